"""What credit is made of: the shares of a breakdown, layer by layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lightning_lca.figures import style
from lightning_lca.figures.timeline import Shown, check, total
from lightning_lca.record.history import History
from lightning_lca.record.tables import Floats

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WHAT = {
    "part": "What the steps were made of",
    "order": "What the gradient foretold, and what curvature changed",
    "term": "LCA by term of the loss",
}
_PANEL = 1.15  # Inches, next to the names.


def breakdown(history: History, name: str | None = None) -> Figure:
    """Draws the shares of every layer's credit side by side. Needs T ≥ 1 rows with that breakdown.

    How to read it: a row is a layer, a column a share; all have one scale, so that the longest bar
    matters most. To the left, in blue, the share helped (lowered the loss), to the right, in red,
    it hurt. The last column is the layer's credit, to which the shares of its row add up. Shares
    that are zero everywhere are left out.

    Args:
        history: The run.
        name: Which breakdown, "part", "order" or "term"; by default the first that there is.

    Raises:
        ValueError: Nothing was measured yet, or not with that breakdown.
    """
    check(history)
    there = list(history.breakdowns)
    name = next(iter(there), "part") if name is None else name
    if name not in there:
        raise ValueError(
            f"This record has no breakdown {name!r}: it has {there or 'none'}. "
            f'Train with LCACallback(breakdown=["{name}"]).'
        )
    split = history.breakdowns[name]
    finite = history.rows.finite & np.isfinite(split.allocated).all((1, 2))
    if not finite.any():
        raise ValueError(f"No step was measured with the breakdown {name!r} yet.")
    credits = np.where(finite[:, None], history.allocated, np.nan)
    shown = {"all": Shown.of(history, credits)}
    for k, share in enumerate(split.names):
        values = np.where(finite[:, None], split.allocated[:, :, k], np.nan)
        shown[share] = Shown.of(history, values)
    bars = {share: total(of_layers.values) for share, of_layers in shown.items()}
    whole = bars.pop("all")
    names = shown["all"].names
    largest = max(float(np.abs(b).max(initial=0)) for b in [*bars.values(), whole])
    bars = {n: b for n, b in bars.items() if np.abs(b).max(initial=0) > 1e-6 * largest}
    height = style.tall(len(names), 1.75)
    with style.page(height) as figure:
        figure.set_figwidth(max(style.WIDTH, 1.8 + _PANEL * (len(bars) + 1)))
        panels = figure.subplots(1, len(bars) + 1, sharex=True, sharey=True, squeeze=False)[0]
        rows = np.arange(len(names))
        for axes, (share, values) in zip(panels, [*bars.items(), ("LCA", whole)], strict=True):
            axes.barh(rows, values, 0.75, color=style.signed(values))
            axes.axvline(0, color="0.3", linewidth=0.8)
            axes.set_title(share.replace("_", " "), fontweight="bold" if share == "LCA" else None)
            axes.set_xlabel(f"Σ {style.number(float(values.sum()))}", fontsize=11)
            axes.tick_params("y", length=0)
            axes.spines["left"].set_visible(False)
            axes.use_sticky_edges = False
            axes.margins(x=0.06)
            axes.xaxis.set_major_formatter(style.tick)
            axes.locator_params("x", nbins=3)
        panels[0].set_ylim(len(names) - 0.5, -0.5)
        style.label_rows(panels[0], names, figure.get_figheight())
        figure.supxlabel(
            "LCA (loss) over the run, Σ of all layers:  helps  ←   →  hurts", fontsize=11
        )
        style.headline(figure, _WHAT.get(name, f"LCA by {name}"), _most(bars))
    return figure


def _most(bars: dict[str, Floats]) -> str:
    """Says which share helped most, and which hurt most."""
    sums = {share.replace("_", " "): float(values.sum()) for share, values in bars.items()}
    best, worst = min(sums, key=sums.__getitem__), max(sums, key=sums.__getitem__)
    helped = f"{best} helped most ({style.number(sums[best])})" if sums[best] < 0 else ""
    hurt = f"{worst} hurt most ({style.number(sums[worst])})" if sums[worst] > 0 else "none hurt"
    text = ", ".join(filter(None, [helped, hurt]))
    return text[:1].upper() + text[1:]
