"""The routes: what each takes from a query, which table it reads, and which view it gives."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from lightning_lca.record import export
from lightning_lca.tensorboard import views
from lightning_lca.tensorboard.provider import Source
from lightning_lca.tensorboard.query import MOST_BINS, Query, QueryError, show
from lightning_lca.tensorboard.runs import Store
from lightning_lca.tensorboard.snapshot import Range, Table

_BLOCK = 2**17  # Credits that are turned to text at once.
_CELLS = 2**20  # Most numbers in an answer: of more layers than anyone looks at, fewer bins.
_PAIRED = 2000  # Most layers of which every pair is compared.


@dataclass(frozen=True)
class Download:
    """A text file, made while it is sent."""

    file_name: str
    text: Iterator[bytes]


Answer = Callable[[Store, Source, Query], "dict[str, Any] | Download"]


def _runs(store: Store, source: Source, query: Query) -> dict[str, Any]:
    query.done()
    return {"runs": store.describe(source), "directory": source.directory()}


def _bins(store: Store, source: Source, query: Query) -> dict[str, Any]:
    (run, probe, asked), fold = _common(query), _folding(query)
    query.done()
    table = fold(store.run(source, run).table(probe))
    return views.bins(table, _bounded(asked, table))


def _helping(store: Store, source: Source, query: Query) -> dict[str, Any]:
    (run, probe, asked), layer = _common(query), query.optional("layer")
    query.done()
    return views.helping(store.run(source, run).table(probe), asked, layer)


def _channels(store: Store, source: Source, query: Query) -> dict[str, Any]:
    (run, probe, asked), layer = _common(query), query.text("layer")
    query.done()
    return views.channels(store.run(source, run).table(probe), asked, layer)


def _table(store: Store, source: Source, query: Query) -> dict[str, Any]:
    (run, probe, asked), fold = _common(query), _folding(query)
    query.done()
    return views.table(fold(store.run(source, run).table(probe)), asked)


def _shares(store: Store, source: Source, query: Query) -> dict[str, Any]:
    (run, probe, asked), fold = _common(query), _folding(query)
    query.done()
    return views.shares(fold(store.run(source, run).table(probe)), asked)


def _compare(store: Store, source: Source, query: Query) -> dict[str, Any]:
    run, probe, asked = _common(query)
    run_b, probe_b, fold = query.text("run_b"), query.optional("probe_b"), _folding(query)
    query.done()
    a, b = store.run(source, run).table(probe), store.run(source, run_b).table(probe_b)
    a, b = fold(a), fold(b)
    return views.compare(a, b, _bounded(asked, a, b))


def _generalization(store: Store, source: Source, query: Query) -> dict[str, Any]:
    run, asked = query.text("run"), Range(*query.steps(), query.bins())
    query.done()
    found = store.run(source, run)
    if not {"train", "val"} <= found.tables.keys():
        raise QueryError(
            f"Run {show(run)} has no probes named train and val. Train with "
            'LCACallback(probe={"train": "train", "val": "val"}) to see which layers overfit.'
        )
    pair = found.table("train"), found.table("val")
    return views.generalization(*pair, _bounded(asked, *pair))


def _synchrony(store: Store, source: Source, query: Query) -> dict[str, Any]:
    run, probe, asked = _common(query)
    strongest = query.whole("strongest", 1, views.MOST_MOMENTS, 20)
    query.done()
    table = store.run(source, run).table(probe)
    if len(table.layers) > _PAIRED:
        raise QueryError(
            f"This record has {len(table.layers):,} layers; synchronization compares every pair of "
            f'at most {_PAIRED:,}. Train with LCACallback(group_by="layer").'
        )
    return views.synchrony(table, asked, strongest)


def _findings(store: Store, source: Source, query: Query) -> dict[str, Any]:
    run, probe, asked = _common(query)
    query.done()
    shown = store.run(source, run)
    table = shown.table(probe)
    name = next(name for name, one in shown.tables.items() if one is table)
    return views.findings(shown.tables, name, asked)


def _export(store: Store, source: Source, query: Query) -> Download:
    run, probe, asked = _common(query)
    query.done()
    table = store.run(source, run).table(probe)
    name = re.sub("[^A-Za-z0-9]+", "_", f"lca {run} {probe or ''}").strip("_")[:100]
    return Download(f"{name}.csv", _csv(table, asked.tile(table).rows))


def _common(query: Query) -> tuple[str, str | None, Range]:
    return query.text("run"), query.optional("probe"), Range(*query.steps(), query.bins())


def _folding(query: Query) -> Callable[[Table], Table]:
    """Takes what is folded: returns what folds a table so."""
    most = query.whole("fold", 0, MOST_BINS, 0) or None
    toggled, found = query.names("toggle"), query.text("find", "")
    return lambda table: table.folded(most, toggled, found)


def _bounded(asked: Range, *tables: Table) -> Range:
    """Asks for fewer bins, where there are very many layers."""
    most = max(1, _CELLS // sum(len(table.layers) for table in tables))
    return replace(asked, bins=min(asked.bins, most))


def _csv(table: Table, rows: slice) -> Iterator[bytes]:
    """Writes rows as text, with the columns of `export.wide`."""
    yield export.csv_header(export.wide(table.history, slice(0, 0), by_layer=True))
    step = max(1, _BLOCK // len(table.layers))
    for first in range(rows.start, rows.stop, step):
        block = slice(first, min(first + step, rows.stop))
        yield export.csv_rows(export.wide(table.history, block, by_layer=True))


ANSWERS: dict[str, Answer] = {
    "runs": _runs,
    "bins": _bins,
    "helping": _helping,
    "channels": _channels,
    "table": _table,
    "shares": _shares,
    "compare": _compare,
    "generalization": _generalization,
    "synchrony": _synchrony,
    "findings": _findings,
    "export": _export,
}
