"""Runs made of noise, into which something may be planted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lightning_lca import History
from lightning_lca.record.tables import StepTable

SIZE = 1000  # Weights of a layer, of which a tenth is idle.
SPREAD = 0.01  # Of a layer's credit in a step, in loss units.


def autoregressive(random: np.random.Generator, steps: int, series: int, phi: float) -> Any:
    """Draws series of variance 1, whose every value keeps phi of the one before [T, L]."""
    values = random.normal(size=(steps, series))
    values[1:] *= np.sqrt(1 - phi**2)
    for t in range(1, steps):
        values[t] += phi * values[t - 1]
    return values


def noisy(
    seed: int = 0,
    steps: int = 200,
    phi: float = 0.5,
    layers: int = 6,
    planted: Any = 0.0,
    share: float = 0.5,
    split: Mapping[str, Mapping[str, Any]] | None = None,
    **columns: Any,
) -> History:
    """Makes a run in which every layer helps as often as it hurts.

    Args:
        seed: Of all draws.
        steps: T.
        phi: What a layer's credit keeps of the step before.
        layers: L.
        planted: Added to the credits, as a multiple of their spread; broadcast to [T, L].
        share: Mean share of the moving weights that help.
        split: Shares of credit by name, {breakdown: {share: [T, L]}}.
        columns: Of the table, in place of its own.
    """
    drawn = autoregressive(np.random.default_rng(seed), steps, layers + 1, phi)
    credit = SPREAD * (drawn[:, :layers] + planted)
    moving = SIZE * 9 // 10
    helped = np.rint(moving * np.clip(share + 0.02 * drawn[:, layers:], 0, 1)).astype(np.int64)
    helped = helped + np.zeros((1, layers), np.int64)
    loss = 2 + np.concatenate([[0], credit.sum(1).cumsum()])
    nothing = np.zeros(steps)
    split = split or {}
    names = [f"layer{i}" for i in range(layers)]
    history = History(names, np.full(layers, SIZE), breakdowns={k: [*v] for k, v in split.items()})
    table: dict[str, Any] = {
        "steps": np.arange(1, steps + 1),
        "allocated": credit,
        "helping": helped,
        "hurting": moving - helped,
        "loss_before": loss[:-1],
        "loss_after": loss[1:],
        "residual": nothing,
        "drift": nothing,
        "splits": np.ones(steps, np.int64),
        "converged": np.ones(steps, bool),
        "trained": np.full(steps, SIZE * layers),
        "seconds": nothing,
        "shares": {name: np.stack([*shares.values()], -1) for name, shares in split.items()},
    }
    history.append(StepTable(**(table | columns)))
    return history
