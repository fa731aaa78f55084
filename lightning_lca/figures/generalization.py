"""Train against validation: which layer overfits, and since when."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lightning_lca.figures import style
from lightning_lca.figures.timeline import Array, check
from lightning_lca.record.history import History
from lightning_lca.record.overfitting import Overfitting

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PANELS = 8
_PANEL = 1.42  # Inches that a row of panels needs.
_TRAIN = "0.55"


def generalization(train_history: History, val_history: History) -> Figure:
    """Draws what layers did for the training data against what they did for validation data.

    How to read it: a panel is a layer. Grey is its LCA on training data, black that on validation
    data, both added up over time: down is learning. A layer that generalizes has both lines go down
    together. Red is what a layer gave back: from that step on, named in red, it went on lowering
    the training loss and raised the validation loss, by more than a walk without direction would.
    Panels have scales of their own. Of more than eight layers those that overfit most are shown,
    then those that did most.

    Args:
        train_history: Of a probe of training data.
        val_history: Of a probe of validation data, of the same run.

    Raises:
        ValueError: Nothing was measured yet, or the two have no layer or no step in common.
    """
    for history in (train_history, val_history):
        check(history)
    found = Overfitting.of(train_history, val_history)
    shown = np.sort(found.most_telling[:_PANELS])
    columns = 1 if len(shown) == 1 else 2
    lines = -(-len(shown) // columns)
    with style.page(1.0 + _PANEL * lines) as figure:
        panels = np.ravel(figure.subplots(lines, columns, sharex=True, squeeze=False))
        names = style.elide(found.layers)
        for axes, i in zip(panels, shown, strict=False):
            _panel(axes, found, i, names[i])
        for axes in panels[len(shown) :]:
            axes.set_visible(False)
        for axes in panels[max(0, len(shown) - columns) : len(shown)]:
            style.step_axis(axes)
            axes.tick_params(labelbottom=True)
        figure.supylabel("cumulative LCA (loss)", fontsize=12)
        _legend(figure, bool(found.overfits[shown].any()))
        style.headline(figure, *_who_overfits(found, names, len(shown)))
    return figure


def _panel(axes: Axes, found: Overfitting, i: int, name: str) -> None:
    """Draws one layer."""
    places = _thinned(len(found.steps), int(found.turn[i]))
    steps, train, val = found.steps[places], found.train[places, i], found.val[places, i]
    axes.axhline(0, color="0.8", linewidth=0.8)
    axes.plot(steps, train, color=_TRAIN, linewidth=1.8)
    axes.plot(steps, val, color=style.TRUE, linewidth=1.8)
    axes.set_title(name, loc="left", pad=4)
    if found.overfits[i]:
        after = steps >= found.since[i]
        lowest = found.val[found.turn[i], i]
        axes.fill_between(
            steps[after], lowest, val[after], color=style.HURTS, alpha=0.55, linewidth=0
        )
        axes.axvline(found.since[i], color=style.HURTS, linewidth=1.2)
        axes.set_title(
            f"overfits from step {found.since[i]:,}", loc="right", pad=4, color=style.HURTS
        )
    axes.locator_params("y", nbins=3)
    axes.yaxis.set_major_formatter(lambda value, _: style.tick(value))
    axes.margins(y=0.08)


def _thinned(count: int, kept: int) -> Array:
    """Chooses the points of a line to draw, one of them where it must be."""
    every = max(1, -(-count // style.POINTS))
    return np.unique(np.append(np.arange(0, count, every), [kept, count - 1]))


def _legend(figure: Figure, overfits: bool) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Line2D | Patch] = [
        Line2D([], [], color=_TRAIN, linewidth=1.8, label="train"),
        Line2D([], [], color=style.TRUE, linewidth=1.8, label="validation"),
    ]
    if overfits:
        handles.append(Patch(color=style.HURTS, alpha=0.55, label="given back"))
    figure.legend(
        handles=handles, loc="outside lower center", ncols=3, handlelength=1.4, columnspacing=1.4
    )


def _who_overfits(found: Overfitting, names: list[str], shown: int) -> tuple[str, str]:
    """Says in a line which layers overfit, and in another how much, or what all did together."""
    order = np.argsort(-found.given_back, kind="stable")
    overfit = [names[i] for i in order if found.overfits[i]]
    others = f"; {shown} of {len(names)} layers shown" if shown < len(names) else ""
    gap = f"All layers: train {style.number(found.train[-1].sum())}, "
    gap += f"validation {style.number(found.val[-1].sum())}{others}"
    if not overfit:
        return "No layer helps train and hurts validation", gap
    if len(overfit) == 1:
        return f"{overfit[0]} overfits: it helps train and hurts validation", gap
    return f"{len(overfit)} of {len(names)} layers overfit, {overfit[0]} most", gap
