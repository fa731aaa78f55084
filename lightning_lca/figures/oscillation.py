"""Which layers swing to and fro, and with which period."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lightning_lca.analysis.oscillation import LAGS, autocorrelation, period
from lightning_lca.figures import style
from lightning_lca.figures.timeline import Shown, credit
from lightning_lca.record.history import History
from lightning_lca.record.tables import Floats

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LEAST = 2 * LAGS  # Steps.


def oscillation(history: History) -> Figure:
    """Draws how the LCA of every layer repeats itself from step to step. Needs T ≥ 32 finite rows.

    How to read it: a row is a layer, a column a distance in measured steps. Purple says that steps
    so far apart do the opposite of one another (one helps where the other hurts), orange that they
    do the same. Stripes are an oscillation, and the first orange column after a purple one is its
    period. A row that is pale throughout has none. Right, where training had ``oscillation=True``:
    the share of weights that reversed direction from one step to the next, in the mean.

    Raises:
        ValueError: Fewer steps were measured.
    """
    layers = credit(history)
    found = autocorrelation(np.asarray(layers.values, float))
    if not np.isfinite(found).any():
        raise ValueError(
            f"Oscillations need {_LEAST} measured steps that are finite and not all alike; this "
            f"record has {int(history.finite.sum())}."
        )
    turned = _turned(history)
    with style.page(style.tall(len(layers), 1.5)) as figure:
        if turned is None:
            axes = figure.subplots()
        else:
            axes, beside = figure.subplots(1, 2, sharey=True, width_ratios=[3, 1])
            rows = np.arange(len(layers))
            beside.barh(rows, 100 * turned, 0.75, color="0.5")
            beside.axvline(50, color="0.2", linewidth=0.8, linestyle=":")
            beside.set_xlim(0, 100)
            beside.set_xlabel("weights that turned\nround in a step (%)")
            beside.spines["left"].set_visible(False)
            beside.tick_params("y", length=0)
        image = axes.pcolormesh(
            np.arange(LAGS + 1) + 0.5,
            np.arange(len(layers) + 1) - 0.5,
            found.T,
            cmap="PuOr_r",
            vmin=-1,
            vmax=1,
        )
        axes.set_ylim(len(layers) - 0.5, -0.5)
        axes.set_xticks([1, *range(2, LAGS + 1, 2)])
        axes.set_xlabel("distance (measured steps)")
        for side in axes.spines.values():
            side.set_visible(False)
        style.label_rows(axes, layers.names, figure.get_figheight())
        bar = figure.colorbar(image, ax=axes, location="top", aspect=40, pad=0.02, ticks=[-1, 0, 1])
        bar.ax.set_xticklabels(["opposite", "unrelated", "the same"])
        bar.outline.set_visible(False)  # type: ignore[operator]
        style.headline(figure, *_words(layers, found))
    return figure


def _turned(history: History) -> Floats | None:
    """Takes the mean share of weights that turned round, of what is shown [L]."""
    turns = history.oscillation
    if turns is None:
        return None
    reversed_ = turns.allocated[:, :, 0]
    known = np.isfinite(reversed_)
    if not known.any():
        return None
    weights = np.where(known, history.sizes, 0)
    sums = Shown.of(history, np.where(known, reversed_, 0) * history.sizes).values.sum(0)
    counts = Shown.of(history, weights).values.sum(0)
    share: Floats = sums / np.maximum(counts, 1)
    return share


def _words(layers: Shown, found: Floats) -> tuple[str, str]:
    """Says which layers oscillate, the strongest first."""
    names = style.elide(layers.names)
    periods = {i: p for i in range(len(names)) if (p := period(found[:, i])) is not None}
    if not periods:
        return "No layer oscillates", "Their LCA does not come and go with a period"
    first = min(periods, key=lambda i: np.nanmin(found[:, i]))
    text = f"{names[first]} oscillates with a period of {periods[first]} steps"
    others = len(periods) - 1
    more = "No other layer does" if not others else f"So do {others} more of {len(names)} layers"
    return text, more
