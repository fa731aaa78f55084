"""Do layers learn at the same moments? The figure of synchrony."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lightning_lca.analysis.bins import Bins
from lightning_lca.figures import style
from lightning_lca.figures.timeline import credit, timeline
from lightning_lca.record import synchrony as core
from lightning_lca.record.history import History

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SINGLE = 400  # Iterations that are shown one by one; longer runs are binned.
_BINS = 100
_ALONE = "#a9c4e2"
_ENOUGH = 4  # Layers: with fewer no p is below 5 %.


def synchrony(history: History, strongest: int = 20) -> Figure:
    """Draws each layer's moments of learning, and how many coincide. Needs T ≥ 1 rows.

    How to read it: above, a mark is a moment of learning, an iteration in which the layer's LCA was
    lower than just before and just after; dark if another layer has one on the same iteration,
    pale if not. Columns of dark marks are iterations that the whole network learned from. Below is
    the number of layers per moment; in long runs the number of pairs of layers that coincide, per
    iteration (a measured step). Grey is what chance gives: the same series, each shifted by one or
    two iterations at random (mean plus two standard deviations, or the 97.5 % quantile, with the
    mean as a line). Bars that rise above the grey coincide more than chance. The p value is for the
    excess of coincident pairs of layers over chance, in the whole run.

    Args:
        history: The record.
        strongest: Moments of learning per layer, at most: those with the lowest LCA.

    Raises:
        ValueError: Nothing was measured yet, or `strongest` is below 1.
    """
    layers = credit(history)
    found = core.synchrony(layers.values, strongest)
    each = timeline(history, len(history))
    height = style.tall(len(layers), 2.8)
    with style.page(max(height, 4.4)) as figure:
        tall = figure.get_figheight()
        above, below = figure.subplots(2, sharex=True, height_ratios=[max(tall - 2.8, 1), 1.3])
        at, layer = found.moments.nonzero()
        shared = found.coincidences[at] > 1
        size = 0.6 * 72 * (tall - 2.8) / len(layers)
        for which, colour in ((~shared, _ALONE), (shared, style.HELPS)):
            above.scatter(
                each.middles[at[which]],
                layer[which],
                marker="|",
                s=min(max(size, 2), 14) ** 2,
                linewidths=1.8,
                color=colour,
            )
        above.set_ylim(len(layers) - 0.5, -0.5)
        style.label_rows(above, layers.names, tall - 1.6)
        if len(history) <= _SINGLE:
            _one_by_one(below, found, each)
        else:
            _binned(below, found, history)
        below.set_xlim(each.edges[0], each.edges[-1])
        below.set_ylim(bottom=0)
        style.step_axis(below)
        style.headline(figure, *_finding(found))
    return figure


def _one_by_one(axes: Axes, found: core.Synchrony, each: Bins) -> None:
    axes.stairs(found.band, each.edges, fill=True, color=style.CHANCE)
    shared = found.coincidences > 1
    for which, colour in ((~shared, _ALONE), (shared, style.HELPS)):
        axes.bar(
            each.edges[:-1][which],
            found.coincidences[which],
            np.diff(each.edges)[which],
            align="edge",
            color=colour,
        )
    axes.set_ylim(0, max(1, axes.get_ylim()[1]))
    axes.locator_params("y", nbins=3, integer=True)
    axes.set_ylabel("layers")


def _binned(axes: Axes, found: core.Synchrony, history: History) -> None:
    time = timeline(history, _BINS)
    rates = core.rates(found.moments, time.cuts)
    axes.stairs(rates.high, time.edges, fill=True, color=style.CHANCE)
    axes.stairs(rates.observed, time.edges, fill=True, color=style.HELPS, alpha=0.8)
    axes.stairs(rates.expected, time.edges, baseline=None, color="0.3", linewidth=1.2)
    axes.set_ylim(0, axes.get_ylim()[1] if rates.observed.any() or rates.high.any() else 1)
    axes.locator_params("y", nbins=3)
    axes.set_ylabel("pairs per\niteration")


def _finding(found: core.Synchrony) -> tuple[str, str]:
    layers = found.moments.shape[1]
    detail = (
        "No two layers have a moment at once, by chance either"
        if found.excess is None
        else f"Moments coincide {abs(found.excess):.0%} {'more' if found.excess > 0 else 'less'} "
        f"often than by chance (p = {found.p_pairs:.2g})"
    )
    if layers < _ENOUGH:
        return "Too few layers to tell whether they learn together", detail
    if found.p_pairs <= 0.05:
        return "Layers learn together", detail
    return "No sign that layers learn together", detail
