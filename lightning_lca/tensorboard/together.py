"""Synchronized learning, as the page draws it: moments, coincidences and their null, per bin."""

from __future__ import annotations

from typing import Any

import numpy as np

from lightning_lca.analysis.synchrony import rates
from lightning_lca.analysis.synchrony import synchrony as measure
from lightning_lca.tensorboard.bins import Range, plain
from lightning_lca.tensorboard.snapshot import Table

MOST = 1000  # Moments per layer that may be asked for.
_WORK = (
    6_000_000  # Moments times draws: with more of the one, less of the other, to answer in time.
)


def synchrony(shown: Table, asked: Range, strongest: int) -> dict[str, Any]:
    """Moments of learning of the range, and whether layers have them together."""
    tiles = asked.tile(shown)
    credit = shown.by_layer(shown.rows.allocated[tiles.rows])
    steps = shown.rows.steps[tiles.rows]
    most = min(strongest, len(steps)) * credit.shape[1]
    draws = int(np.clip(_WORK // max(1, most), 100, 1000))
    found = measure(credit, strongest, draws)
    full = np.flatnonzero(tiles.measured > 0)
    rate = {
        name: np.full(len(tiles.measured), np.nan)
        for name in ("observed", "expected", "low", "high")
    }
    if len(full):
        rows = np.append(tiles.cuts[full], tiles.cuts[-1]) - tiles.cuts[0]
        binned = rates(found.moments, rows, draws)
        for name, values in rate.items():
            values[full] = getattr(binned, name)
    single = (tiles.measured == 1).all()
    row, layer = found.moments.nonzero()
    low, high = np.quantile(found.null, [0.025, 0.975])
    pairs_low, pairs_high = np.quantile(found.null_pairs, [0.025, 0.975])
    return {
        "edges": tiles.edges.tolist(),
        "width": int(tiles.edges[1] - tiles.edges[0]),
        "layers": shown.layers,
        "strongest": strongest,
        "raster": np.stack([layer, steps[row]], 1).tolist(),
        "coincidences": found.coincidences.tolist() if single else None,
        "expected": plain(found.expected) if single else None,
        "band": plain(found.band) if single else None,
        "rate": plain(rate["observed"]),
        "rate_null": plain(rate["expected"]),
        "rate_low": plain(rate["low"]),
        "rate_high": plain(rate["high"]),
        "moments": int(found.moments.sum()),
        "synchronized": found.synchronized,
        "null_mean": plain(found.null.mean()),
        "null_low": plain(low),
        "null_high": plain(high),
        "p_value": found.p_value,
        "pairs": found.pairs,
        "pairs_null_mean": plain(found.null_pairs.mean()),
        "pairs_null_low": plain(pairs_low),
        "pairs_null_high": plain(pairs_high),
        "p_pairs": found.p_pairs,
        "draws": draws,
        "correlation": plain(found.correlation),
    }
