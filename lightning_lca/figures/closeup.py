"""Below the layers: figures of neurons and of single weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lightning_lca.figures import style
from lightning_lca.figures.timeline import check, of_windows, sample, total
from lightning_lca.record.history import History
from lightning_lca.record.layers import Layers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ROWS = 256
_BARS = 60
_LINES = 10


def neurons(history: History, layer: str) -> Figure:
    """Draws the LCA of every neuron (output channel) of a layer over time, in colour.

    How to read it: a row is a neuron; the one that helped most over the run is on top, the one that
    hurt most at the bottom. Dark blue helped, red hurt, as in `heatmap`. Few coloured rows among
    white ones say that few neurons of the layer learn. Where there are more neurons than rows, a
    row is the sum of some that follow each other in that order.

    Args:
        history: The record of a run with ``LCACallback(neurons=True)`` or ``group_by="neuron"``.
        layer: Its name, as in ``history.groups``.

    Raises:
        ValueError: The record has no neurons, or no such layer.
    """
    check(history)
    windows = history.neurons
    if windows is None or not len(windows):
        raise ValueError(
            'This record has no neurons. Train with LCACallback(neurons=True) or group_by="neuron".'
        )
    layers = Layers.of(windows.layers)
    if layer not in layers.names:
        raise ValueError(f"No layer {layer!r} in this record; it has {', '.join(layers.names)}.")
    mine = layers.columns(layers.names.index(layer))
    credit = windows.allocated[:, mine]
    whole = total(credit)
    order = np.argsort(whole, kind="stable")
    time = of_windows(history, windows, style.COLUMNS)
    grid = time.sums(credit[:, order]).T
    together = -(-len(grid) // _ROWS)
    grid = np.add.reduceat(grid, np.arange(0, len(grid), together), axis=0)
    numbers = [windows.names[i].rpartition("/")[2] for i in mine[order]]
    with style.page(style.HEIGHT + 0.4) as figure:
        axes = figure.subplots()
        style.grid_of_credit(figure, axes, time.edges, grid, time.unit)
        if together == 1:
            style.label_rows(axes, numbers, figure.get_figheight())
            axes.set_ylabel("neuron, best on top")
        else:
            axes.set_yticks([])
            axes.set_ylabel(f"{together} neurons a row, best on top")
        hurting = int((whole > 0).sum())
        style.headline(
            figure,
            f"{hurting:,} of {len(whole):,} neurons of {style.elide([layer], 24)[0]} hurt overall",
        )
    return figure


def distribution(history: History) -> Figure:
    """Draws how the total LCA is spread over single weights, as histograms with two scales.

    How to read it: a weight of the random sample counts once, at its LCA added up over the run;
    blue left of zero helped, red hurt. The upper panel, up to the 99 % quantile, shows which side
    is larger; the lower one, with counts on a logarithmic scale, the few weights far out that do
    much of the work.

    Raises:
        ValueError: The record has no single weights, or none of them has moved.
    """
    weights = sample(history)
    whole = total(weights.allocated)
    whole = whole[whole != 0]
    if not len(whole):
        raise ValueError("There is nothing to draw: no weight of the sample has moved the loss.")
    size = np.abs(whole)
    with style.page(4.2) as figure:
        above, below = figure.subplots(2)
        near = float(np.quantile(size, 0.99, method="higher"))
        for axes, limit in ((above, near), (below, float(size.max()))):
            edges = np.linspace(-limit, limit, _BARS + 1)
            axes.bar(
                edges[:-1],
                np.histogram(whole, edges)[0],
                np.diff(edges),
                align="edge",
                color=style.signed(edges[:-1] + limit / _BARS),
            )
            axes.axvline(0, color="0.3", linewidth=0.8)
            axes.locator_params("x", nbins=5)
            axes.xaxis.set_major_formatter(style.tick)
            axes.set_ylabel("weights")
        below.set_yscale("log")
        below.set_ylim(bottom=0.5)
        below.set_xlabel("LCA of a weight over the run (loss):  helps  ←   →  hurts")
        helped = np.sort(whole[whole < 0])
        few = max(1, round(0.01 * len(whole)))
        best = f"; the best 1% did {helped[:few].sum() / helped.sum():.0%}" if len(helped) else ""
        style.headline(
            figure,
            f"{np.mean(whole < 0):.0%} of weights helped{best}",
            f"{len(whole):,} weights that moved, of {weights.sampled_from:,}",
        )
    return figure


def trajectories(history: History) -> Figure:
    """Draws the LCA of single weights, added up over time: the best ones, and some at random.

    How to read it: left are the weights of the random sample that helped most over the run, right
    as many at random (blue if they end below zero, red if above). A line that falls steadily is a
    weight that keeps helping; one that falls in jumps helped in a few moments; one that wanders
    about zero is typical. Mind the scales: the right one is usually far smaller.

    Raises:
        ValueError: The record has no single weights.
    """
    weights = sample(history)
    time = of_windows(history, weights, style.POINTS)
    whole = total(weights.allocated)
    best = np.argsort(whole, kind="stable")[:_LINES]
    random = np.random.default_rng(0).permutation(len(whole))[:_LINES]
    with style.page() as figure:
        for axes, chosen, title in zip(
            figure.subplots(1, 2), (best, random), ("best", "random"), strict=True
        ):
            lines = time.running(weights.allocated[:, chosen])
            axes.axhline(0, color="0.75", linewidth=1)
            for line, colour in zip(lines.T, style.signed(whole[chosen]), strict=True):
                axes.plot(time.edges, line, color=colour, linewidth=1.2, alpha=0.8)
            axes.set_title(f"{len(chosen)} {title} weights")
            axes.yaxis.set_major_formatter(style.tick)
            style.step_axis(axes)
        figure.axes[0].set_ylabel("cumulative LCA (loss)")
        name = style.elide([weights.names[best[0]]], 28)[0]
        style.headline(figure, f"Best: {name} with {style.number(whole[best[0]])}")
    return figure
