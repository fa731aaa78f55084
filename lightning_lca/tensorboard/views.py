"""What the page draws, from tables: sums over bins of optimizer steps, and what follows from them.

Every view takes a `Table` and a range and gives arrays and plain values; `answers` turns them into
what travels, with null in place of what is not finite. Credit is in loss units; negative = helped.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lightning_lca.analysis.bins import Bins, Bools, accumulated, counted
from lightning_lca.analysis.scale import colour_limit
from lightning_lca.record.findings import LEVEL, find
from lightning_lca.record.overfitting import Overfitting
from lightning_lca.record.statistics import LEAST
from lightning_lca.record.summary import PerStep, Trust
from lightning_lca.record.synchrony import Dips, Synchrony
from lightning_lca.record.tables import Floats, Ints
from lightning_lca.tensorboard.query import QueryError, show
from lightning_lca.tensorboard.snapshot import Range, Table

_CELLS = 2**17  # Most numbers in a heatmap of channels: JSON of more takes too long.
_TOLD = 2  # Layers that are named as those that helped or hurt most.
_POINTS = 2048  # Steps at which train and validation are compared, at most.
_CHANNELS = 256  # Most channels in it: half of them the most helpful, half the most hurting.


def bins(table: Table, asked: Range) -> dict[str, Any]:
    """Credit of every layer and the ledger, per bin and as running sums."""
    rows, tiles = table.rows, asked.tile(table)
    before = slice(0, tiles.rows.start)
    groups = table.column("allocated").per_bin(tiles)
    credit, credit_before = table.by_layer(groups).T, table.column("allocated").total(before)
    truth, truth_before = _true_change(table, tiles)
    return {
        "edges": tiles.edges,
        "unit": tiles.unit,
        "layers": table.layers,
        **_rows(table),
        "row_of": _row_of(table),
        "sizes": table.layer_sizes,
        "credit": credit,
        "total": table.credit(tiles.rows),
        "limit": colour_limit(credit[_adding_up(table)]),
        "running": accumulated(credit.T).T,
        "running_total": accumulated(groups.sum(1)),
        "running_truth": truth,
        "before": table.by_layer(credit_before),
        "before_total": credit_before.sum(),
        "before_truth": truth_before,
        "loss": _loss_at_edges(table, tiles),
        "loss_first": rows.loss_before[0],
        "residual": tiles.sums(rows.residual),
        "raw_residual": tiles.sums(rows.raw_residual),
        "closes": table.history.closes,
        "drift": tiles.sums(rows.drift),
        "measured": tiles.measured,
        "not_finite": tiles.not_finite,
        "unconverged": _count(~rows.converged, tiles),
        "beyond_tolerance": _count(~rows.converged & table.finite, tiles),
        "residual_before": _total(table, rows.residual, before),
        "drift_before": _total(table, rows.drift, before),
    }


def helping(table: Table, asked: Range, layer: str | None) -> dict[str, Any]:
    """How many of the weights that moved helped, of the network and of one layer, per bin."""
    rows, tiles = table.rows, asked.tile(table)
    helped, hurt = (table.column(name).per_bin(tiles) for name in ("helping", "hurting"))
    answer = {
        "edges": tiles.edges,
        "measured": tiles.counted,
        "network": _shares(helped.sum(1), hurt.sum(1), tiles.sums(rows.trained, np.int64)),
        "layer": None,
    }
    if layer is not None:
        columns = table.columns_of(layer)
        helped, hurt = (counts[:, columns].sum(1) for counts in (helped, hurt))
        weights = table.history.sizes[columns].sum()
        answer["layer"] = _shares(helped, hurt, tiles.counted * weights)
    return answer


def channels(table: Table, asked: Range, layer: str) -> dict[str, Any]:
    """Credit of one layer's channels, per bin, the most helpful first.

    Raises:
        QueryError: The record has no channels, or no such layer.
    """
    finite: Any = None
    if table.group_by == "neuron":
        names, layers, finite = table.history.groups, table.history.layers, table.finite
        steps, credit = table.rows.steps, table.rows.allocated
    elif table.neurons is not None:
        names, layers = table.neurons.names, table.neurons.layers
        steps, credit = table.neurons.steps, table.neurons.allocated
    else:
        raise QueryError(
            "This record has no channels: it was made without them. Train with "
            "LCACallback(neurons=True) to see the channels of a layer."
        )
    place = table.find(layer)
    # The channels of a parameter or head are those of its layer.
    is_finer = table.group_by in ("parameter", "head")
    owner = table.history.layers[place] if is_finer else layer
    own = np.flatnonzero([name == owner for name in layers])
    # Coarser groups have those of all layers within. Older records name the channels of a recurrent
    # network rnn.l0, rnn.l1.
    if not len(own):
        own = np.flatnonzero([name.startswith(f"{owner}.") for name in layers])
    if not len(own):
        raise QueryError(f"Layer {show(layer)} has no channels. Choose another one.")
    finest = max(1, _CELLS // min(_CHANNELS, len(own)))
    coarser = Range(asked.start, asked.stop, min(asked.bins, finest))
    tiles = coarser.tile_for(table, steps, finite)
    total = tiles.sums(credit[:, own])
    total = np.where(np.isfinite(total), total, 0).sum(0)
    order = np.argsort(total, kind="stable")
    if len(order) > _CHANNELS:
        order = np.concatenate([order[: _CHANNELS // 2], order[-_CHANNELS // 2 :]])
    shown = own[order]
    binned = tiles.sums(credit[:, shown]).T
    return {
        "layer": layer,
        "edges": tiles.edges,
        "unit": tiles.unit,
        "channels": [names[i] for i in shown],
        "credit": binned,
        "total": total[order],
        "limit": colour_limit(binned),
        "helped": int((total < 0).sum()),
        "hurt": int((total > 0).sum()),
        "shown": len(shown),
        "of": len(own),
    }


def shares(shown: Table, asked: Range) -> dict[str, Any]:
    """What the credit of every layer in the range is made of, by breakdown."""
    span = asked.tile(shown).rows
    breakdowns = []
    for name, names in shown.history.shares.items():
        column = shown.column(name)
        (sums,) = column.between([span.start, span.stop])  # [groups, shares].
        credit = shown.by_layer(sums.T).T
        breakdowns.append(
            {
                "name": name,
                "shares": list(names),
                "credit": credit,
                "total": sums.sum(0),
                "measured": int(column.counts[span].sum()),
            }
        )
    credit = shown.credit(span)
    return {"layers": shown.layers, **_rows(shown), "credit": credit, "breakdowns": breakdowns}


def table(shown: Table, asked: Range) -> dict[str, Any]:
    """The ledger of the range: what every layer gave, and what the credits leave over."""
    span = asked.tile(shown).rows
    rows = shown.rows[span]
    per_step = shown.digest.per_step
    finite = per_step.finite[span]
    judged = PerStep(finite, per_step.credited[span], per_step.unmoved[span])
    trust = Trust.of(shown.history, span, judged)
    groups = shown.column("allocated").total(span)
    credit = shown.by_layer(groups)
    helped, hurt = (
        shown.by_layer(shown.column(name).total(span)) for name in ("helping", "hurting")
    )
    start, stop = _loss_before(shown, span.start), _loss_before(shown, span.stop)
    weights = shown.layer_sizes * (trust.measured - trust.not_finite)
    with np.errstate(divide="ignore", invalid="ignore"):
        columns = {
            "credit": credit,
            "share": credit / (stop - start),
            "helping": helped / weights,
            "hurting": hurt / weights,
        }
    sizes = shown.layer_sizes.tolist()
    residual = rows.residual[finite]
    each = shown.history.shown.sums(groups)  # Of every layer, whatever is folded.
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = each / (stop - start)
    by_credit = np.argsort(each, kind="stable")
    by_credit = by_credit[np.isfinite(each[by_credit])]

    def told(places: Ints) -> dict[str, Any]:
        names = shown.history.shown.names
        return {
            "name": [names[i] for i in places.tolist()],
            "credit": each[places],
            "share": shares[places],
        }

    return {
        "layers": [
            {
                "name": line.name,
                "depth": line.depth,
                "inside": len(line.layers),
                "open": line.is_open,
                "size": sizes[i],
                **{k: column[i] for k, column in columns.items()},
            }
            for i, line in enumerate(shown.lines)
        ],
        "helped": int((each < 0).sum()),
        "hurt": int((each > 0).sum()),
        "broken": int((~np.isfinite(each)).sum()),
        "most_helpful": told(by_credit[each[by_credit] < 0][:_TOLD]),
        "most_hurtful": told(by_credit[each[by_credit] > 0][::-1][:_TOLD]),
        "true_change": stop - start,
        "allocated": groups.sum(),
        "residual": residual.sum(),
        "drift": _total(shown, shown.rows.drift, span),
        "rows": trust.measured,
        "unconverged": trust.unconverged,
        "beyond_tolerance": int((~rows.converged & finite).sum()),
        "not_finite": trust.not_finite,
        "unexplained": np.nan if trust.unexplained is None else trust.unexplained,
        "is_large": trust.is_large,
        "closes": trust.closes,
        "remarks": trust.remarks,
        "largest_residual": np.abs(rows.raw_residual[finite]).max(initial=0.0),
        "first_step": int(rows.steps[0]) if len(rows) else None,
        "last_step": int(rows.steps[-1]) if len(rows) else None,
    }


def findings(tables: Mapping[str, Table], probe: str, asked: Range) -> dict[str, Any]:
    """What one probe shows beyond chance in the range, and what all of them show together."""
    first, last = asked.of(tables[probe])
    span = asked.tile(tables[probe]).rows
    found = find({name: t.history for name, t in tables.items()}, (probe,), first, last)
    return {
        "steps": int(tables[probe].finite[span].sum()),
        "least": LEAST,
        "level": LEVEL,
        "kind": [one.kind for one in found],
        "where": [one.where for one in found],
        "layer": [one.where if tables[probe].has(one.where) else None for one in found],
        "statement": [one.statement for one in found],
        "try_this": [one.try_this for one in found],
        "effect": [one.effect for one in found],
        "low": np.array(
            [np.nan if one.interval is None else one.interval[0] for one in found], float
        ),
        "high": np.array(
            [np.nan if one.interval is None else one.interval[1] for one in found], float
        ),
        "p": [one.p for one in found],
    }


def compare(a: Table, b: Table, asked: Range) -> dict[str, Any]:
    """Credit of the layers that two tables share, on common bins, and b minus a."""
    first, last = asked.of(a, b)
    width = max(a.spacing, b.spacing)
    both = [name for name in a.layers if b.has(name)]
    rows = _rows(a)
    places = [a.find(name) for name in both]
    answer: dict[str, Any] = {"layers": both}
    answer |= {name: [values[i] for i in places] for name, values in rows.items()}
    credits, totals = [], []
    for letter, one in (("a", a), ("b", b)):
        tiles = Bins.by_steps(one.rows.steps, first, last, asked.bins, width, one.finite)
        at = [one.find(name) for name in both]
        before = one.credit(slice(0, tiles.rows.start))[at]
        total = one.credit(tiles.rows)[at]
        credit = one.by_layer(one.column("allocated").per_bin(tiles)).T[at]
        # Lines end with the run, in the bin that holds its last step.
        beyond = np.append(False, tiles.edges[:-1] >= one.last_step)
        sums = np.where(beyond, np.nan, accumulated(credit.T).T)
        all_sums = np.where(beyond, np.nan, accumulated(credit.sum(0)))
        answer["edges"], answer["unit"] = tiles.edges, tiles.unit
        answer[letter] = credit
        answer[f"total_{letter}"] = total
        answer[f"running_{letter}"] = sums
        answer[f"running_total_{letter}"] = all_sums
        answer[f"before_{letter}"] = before
        answer[f"before_total_{letter}"] = before.sum()
        answer[f"measured_{letter}"] = tiles.measured
        credits.append(np.where(tiles.measured > 0, credit, np.nan))
        totals.append(total)
    difference = credits[1] - credits[0]
    answer["difference"] = difference
    answer["total_difference"] = totals[1] - totals[0]
    shown = _adding_up(a)[places]
    answer["limit"] = colour_limit(*(credit[shown] for credit in credits))
    answer["limit_difference"] = colour_limit(difference[shown])
    answer["only_a"] = [name for name in a.layers if not b.has(name)]
    answer["only_b"] = [name for name in b.layers if not a.has(name)]
    return answer


def generalization(train: Table, val: Table, asked: Range) -> dict[str, Any]:
    """What each layer did for training data, and what for validation data, over the range.

    Raises:
        QueryError: The two have no layer in common.
    """
    names = tuple(name for name in train.layers if val.has(name))
    if not names:
        raise QueryError(
            'The probes "train" and "val" have no layer in common. Measure the same layers with '
            "both."
        )
    first, last = asked.of(train, val)
    spans = [Range(first, last).tile(one).rows for one in (train, val)]
    both = np.intersect1d(train.rows.steps[spans[0]], val.rows.steps[spans[1]], assume_unique=True)
    # The curves at so many of these steps, the last among them; exact at each.
    every = max(1, -(-len(both) // _POINTS))
    points = both[::-every][::-1]
    parts: list[Any] = []
    for one, span in zip((train, val), spans, strict=True):
        cuts = [span.start, *np.searchsorted(one.rows.steps, points, side="right")]
        credit = one.by_layer(one.column("allocated").between(cuts))
        parts += [points, credit[:, [one.find(name) for name in names]]]
    found = Overfitting.between(names, *parts)
    width = max(train.spacing, val.spacing)
    tiles = Bins.by_steps(found.steps[1:], first, last, asked.bins, width)
    at = np.maximum(np.searchsorted(found.steps, tiles.edges, side="right") - 1, 0)
    since = np.where(found.overfits, np.maximum(found.since, first - 1), -1).tolist()
    return {
        "edges": tiles.edges,
        "layers": list(names),
        "measured": len(both),
        "train": found.train[at].T,
        "val": found.val[at].T,
        "total_train": found.train[-1],
        "total_val": found.val[-1],
        "verdict": list(found.verdicts),
        "since": [None if step < 0 else step for step in since],
        "given_back": np.where(found.overfits, found.given_back, np.nan),
        "most_telling": found.most_telling,
    }


def _rows(table: Table) -> dict[str, Any]:
    """Tells of every row whether it is a block, and where it lies in the tree [L]."""
    lines = table.lines
    return {
        "depth": [line.depth for line in lines],
        "inside": [len(line.layers) for line in lines],
        "open": [line.is_open for line in lines],
    }


def _adding_up(table: Table) -> Bools:
    """Marks the rows that add up to the whole: all but open blocks, whose layers follow [L]."""
    return np.array([not line.is_open for line in table.lines], bool)


def _row_of(table: Table) -> Ints:
    """Finds the innermost row that shows each layer [N]; -1 where none does."""
    row_of = np.full(len(table.history.shown), -1, np.int64)
    for place, line in enumerate(table.lines):
        row_of[list(line.layers)] = place  # What lies within comes later.
    return row_of


def _total(shown: Table, values: Any, rows: slice) -> Any:
    """Adds up the rows of a range that sums count: [T] -> a number.

    It is nan where the range has rows, and none that counts.
    """
    finite = shown.finite[rows]
    total = counted(values[rows], finite).sum(0)
    return total if finite.any() or not len(finite) else total * np.nan


def _count(which: Any, tiles: Bins) -> Ints:
    """Counts the rows of every bin that are such [T] -> [B]."""
    running = np.concatenate([[0], np.cumsum(which, dtype=np.int64)])
    return np.diff(running[tiles.cuts])


def _loss_before(shown: Table, row: int) -> float:
    """Returns the probe loss from which a row's drift and step start."""
    return float(shown.rows.loss_after[row - 1] if row else shown.rows.loss_before[0])


def _loss_at_edges(shown: Table, tiles: Bins) -> Floats:
    """Returns the probe loss at the edges [B + 1]; nan after an empty bin."""
    rows = shown.rows
    known = np.concatenate([rows.loss_before[:1], rows.loss_after])
    return np.where(np.append(True, tiles.measured > 0), known[tiles.cuts], np.nan)


def _true_change(shown: Table, tiles: Bins) -> tuple[Floats, float]:
    """Follows the probe loss since the range's start [B + 1], and what it did before that.

    Empty bins carry on. Where the loss at the start is not finite, the first one that is stands
    for it.
    """
    loss = np.concatenate([shown.rows.loss_before[:1], shown.rows.loss_after])
    loss = np.where(np.isfinite(loss), loss, np.nan)
    edges = loss[tiles.cuts]
    known = edges[np.isfinite(edges)]
    start = float(known[0]) if len(known) else np.nan
    return edges - start, float(start - loss[0])


def _shares(helped: Ints, hurt: Ints, trained: Ints) -> dict[str, Any]:
    moved = helped + hurt
    with np.errstate(divide="ignore", invalid="ignore"):
        return {
            "share": helped / moved,
            "mean": helped.sum() / moved.sum(),
            # For programs that ask for it, as fields stay; weights are no coins: nothing is drawn.
            "sd": 0.5 / np.sqrt(moved),
            "helping": helped / trained,
            "hurting": hurt / trained,
        }


MOST_MOMENTS = 1000  # Moments per layer that may be asked for.
_PRODUCTS = 2**26  # Most that are added up for the correlation of all pairs of layers.
_WORK = (
    4_000_000  # Moments times draws: with more of the one, less of the other, to answer in time.
)


def synchrony(shown: Table, asked: Range, strongest: int) -> dict[str, Any]:
    """Moments of learning of the range, and whether layers have them together."""
    tiles = asked.tile(shown)
    credit = shown.by_layer(shown.rows.allocated[tiles.rows])
    steps, layers = credit.shape
    draws = int(np.clip(_WORK // max(1, min(strongest, steps) * layers), 100, 1000))
    full = np.flatnonzero(tiles.measured > 0)
    rows = np.append(tiles.cuts[full], tiles.cuts[-1]) - tiles.cuts[0] if len(full) else None
    found = Synchrony.of(Dips.of(credit, strongest), steps, draws, edges=rows, table=credit)
    rate = {
        name: np.full(len(tiles.measured), np.nan)
        for name in ("observed", "expected", "low", "high")
    }
    if found.rates is not None:
        for name, values in rate.items():
            values[full] = getattr(found.rates, name)
    single = (tiles.measured == 1).all()
    row, layer = found.dips.at, found.dips.layer
    at_once = found.coincidences[row]  # Layers with a moment there.
    low, high = np.quantile(found.null, [0.025, 0.975])
    pairs_low, pairs_high = np.quantile(found.null_pairs, [0.025, 0.975])
    return {
        "edges": tiles.edges,
        "width": int(tiles.edges[1] - tiles.edges[0]),
        "layers": shown.layers,
        "strongest": strongest,
        "raster": np.stack([layer, shown.rows.steps[tiles.rows][row]], 1),
        "raster_at_once": at_once,
        "moments_by_layer": np.bincount(layer, minlength=layers),
        "shared_by_layer": np.bincount(layer[at_once > 1], minlength=layers),
        "coincidences": found.coincidences if single else None,
        "expected": found.expected if single else None,
        "band": found.band if single else None,
        "rate": rate["observed"],
        "rate_null": rate["expected"],
        "rate_low": rate["low"],
        "rate_high": rate["high"],
        "moments": len(row),
        "synchronized": found.synchronized,
        "null_mean": found.null.mean(),
        "null_low": low,
        "null_high": high,
        "p_value": found.p_value,
        "pairs": found.pairs,
        "pairs_null_mean": found.null_pairs.mean(),
        "pairs_null_low": pairs_low,
        "pairs_null_high": pairs_high,
        "p_pairs": found.p_pairs,
        "draws": draws,
        "correlation": found.correlation if steps * layers**2 <= _PRODUCTS else None,
    }
