"""Figures of a run: functions from a `History` to a matplotlib Figure, and nothing else.

Each one's docstring says how to read it. No pyplot state is touched, the user's matplotlib settings
neither leak in nor are changed, and matplotlib is imported when the first figure is drawn.

    history = History.load("lightning_logs/version_0")
    figures.heatmap(history).savefig("heatmap.png")
    for name, draw in figures.available(history).items():
        draw(history).savefig(f"{name}.png")
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_lca.analysis.oscillation import LAGS
from lightning_lca.figures.closeup import distribution, neurons, trajectories
from lightning_lca.figures.generalization import generalization
from lightning_lca.figures.layers import cumulative, heatmap, ledger, stack, totals
from lightning_lca.figures.majority import helping, helping_per_step, helping_per_weight
from lightning_lca.figures.moments import synchrony
from lightning_lca.figures.oscillation import oscillation
from lightning_lca.figures.shares import breakdown
from lightning_lca.figures.timeline import total
from lightning_lca.record.history import History
from lightning_lca.record.layers import Layers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "available",
    "between",
    "breakdown",
    "cumulative",
    "distribution",
    "generalization",
    "heatmap",
    "helping",
    "helping_per_step",
    "helping_per_weight",
    "ledger",
    "neurons",
    "oscillation",
    "stack",
    "synchrony",
    "totals",
    "trajectories",
]

_LAYERS = 8  # Whose neurons are drawn without being asked for.


def available(history: History) -> dict[str, Callable[[History], Figure]]:
    """Lists the figures that a history has the data for, by a name that is safe in a path.

    Neurons get one figure per layer, for the eight layers that moved the loss most. Empty where
    nothing was measured yet.
    """
    if not len(history) or not history.groups:
        return {}
    figures: dict[str, Callable[[History], Figure]] = {
        "heatmap": heatmap,
        "cumulative": cumulative,
        "stack": stack,
        "totals": totals,
        "ledger": ledger,
        "helping": helping,
        "synchrony": synchrony,
    }
    for name, split in history.breakdowns.items():
        if np.isfinite(split.allocated[history.rows.finite]).any():
            figures[f"breakdown_{name}"] = partial(breakdown, name=name)
    if history.oscillation is not None and history.finite.sum() >= 2 * LAGS:
        figures["oscillation"] = oscillation
    finite = history.rows[history.rows.finite]
    if finite.helping.any() or finite.hurting.any():
        figures["helping_per_step"] = helping_per_step
    if history.neurons is not None and len(history.neurons):
        layers = Layers.of(history.neurons.layers)
        names, moved = layers.names, layers.sums(total(history.neurons.allocated))
        for i in np.sort(np.argsort(-np.abs(moved), kind="stable")[:_LAYERS]):
            file = re.sub(r"[^\w.-]", "_", f"neurons_{names[i]}")
            figures[file] = partial(neurons, layer=names[i])
    if history.weights is not None and total(history.weights.allocated).any():
        figures["helping_per_weight"] = helping_per_weight
        figures["distribution"] = distribution
        figures["trajectories"] = trajectories
    return figures


def between(histories: Mapping[Any, History]) -> dict[str, Callable[[], Figure]]:
    """Lists the figures that probes of a run have together, by name; each is drawn by a call.

    Args:
        histories: Of a run, by probe. "train" and "val" are drawn against one another.
    """
    train, val = histories.get("train"), histories.get("val")
    if train is None or val is None or not (len(train) and len(val) and train.groups):
        return {}
    return {"generalization": partial(generalization, train, val)}
