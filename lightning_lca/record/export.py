"""A history as tables for other tools: CSV, Parquet or NumPy's npz."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_lca.record.decimals import WIDTH, singles
from lightning_lca.record.history import History
from lightning_lca.record.layers import Layers
from lightning_lca.record.tables import SCALARS, StepTable

Columns = dict[str, npt.NDArray[Any]]
FORMATS = (".csv", ".parquet", ".npz")
BLOCK = 10_000  # Most rows that are written at once,
CELLS = 2**20  # and most numbers.
_SPECIAL = re.compile('[,"\\r\\n]')
_TOLD_APART = 2**22  # Weights of which float32 tells k from k + 1, as fractions.
_PER_STEP = ("steps", *SCALARS, "finite")  # And the raw residual, where that is another one.
_PER_GROUP = ("allocated", "helping", "hurting")


def wide(history: History, rows: slice = slice(None), *, by_layer: bool = False) -> Columns:
    """Returns one row per measured step [T]: its scalars, then lca, helping, hurting of each group.

    Units: LCA, losses and residuals are in loss units, negative LCA helped; helping and hurting are
    fractions of the group's weights. Steps that are not ``finite`` count in no sum elsewhere.
    Numbers are float32 where the record's are, and fractions where that tells every count apart.

    Args:
        history: What was measured.
        rows: Which steps.
        by_layer: One column for each layer that dashboards show, in place of each group.
    """
    table = history.rows[rows]
    layers = history.shown if by_layer else Layers.of(history.groups)
    columns = {name: getattr(table, name) for name in _per_step(history)}
    # "lca/" also keeps a name from being a formula.
    for prefix, values in _per_group(history, table, layers).items():
        columns |= {f"{prefix}/{name}": values[:, i] for i, name in enumerate(layers.names)}
    for share, values in _per_share(history, table, layers).items():
        columns |= {f"{share}/{name}": values[:, i] for i, name in enumerate(layers.names)}
    return columns


def long(history: History) -> Columns:
    """Returns one row per measured step and group [T x G]: steps, layer, lca, helping, hurting."""
    columns: Columns = {
        "steps": np.repeat(history.steps, len(history.groups)),
        "layer": np.tile(np.array(history.groups, dtype=object), len(history)),
    }
    values = _per_group(history, history.rows, Layers.of(history.groups))
    values |= _per_share(history, history.rows, Layers.of(history.groups))
    return columns | {prefix: v.reshape(-1) for prefix, v in values.items()}


def _per_step(history: History) -> tuple[str, ...]:
    return (*_PER_STEP, "raw_residual") if history.closes else _PER_STEP


def _per_group(history: History, table: StepTable, layers: Layers) -> Columns:
    sizes = np.maximum(layers.sums(history.sizes), 1)
    narrow = np.float32 if sizes.max(initial=1) <= _TOLD_APART else np.float64
    return {
        "lca": _sums(table.allocated, layers),
        "helping": (layers.sums(table.helping) / sizes).astype(narrow),
        "hurting": (layers.sums(table.hurting) / sizes).astype(narrow),
    }


def _sums(values: npt.NDArray[Any], layers: Layers) -> npt.NDArray[Any]:
    """Adds what belongs to one layer: [T, G] -> [T, L]; what is not added stays as it is."""
    return layers.sums(values if len(layers) == len(layers.owner) else values.astype(np.float64))


def _per_share(history: History, table: StepTable, layers: Layers) -> Columns:
    """Sums the shares of breakdowns: {"part/noise": [T, layers]}."""
    return {
        f"{name}/{share}": _sums(table.shares[name][:, :, k], layers)
        for name, breakdown in history.breakdowns.items()
        for k, share in enumerate(breakdown.names)
    }


def arrays(history: History) -> Columns:
    """Returns the attributes of a history under their own names, tables of windows included.

    ``neurons_allocated`` [W, N], ``neurons_steps`` [W] and ``neurons_names`` (N,), for example.
    """
    columns: Columns = {name: getattr(history, name) for name in (*_per_step(history), *_PER_GROUP)}
    columns |= {"groups": np.array(history.groups, dtype=str), "sizes": history.sizes}
    turns = history.oscillation
    for name, breakdown in (
        history.breakdowns | ({} if turns is None else {"oscillation": turns})
    ).items():
        columns[f"{name}_allocated"] = breakdown.allocated
        columns[f"{name}_names"] = np.array(breakdown.names, dtype=str)
    for table in ("parameters", "neurons", "weights"):
        windows = getattr(history, table)
        if windows is None:
            continue
        columns |= {
            f"{table}_{name}": getattr(windows, name)
            for name in ("steps", "measured", "allocated", "helping")
            if getattr(windows, name) is not None
        }
        columns[f"{table}_names"] = np.array(windows.names, dtype=str)
    return columns


def blocks(columns: Mapping[str, npt.NDArray[Any]]) -> Iterator[Columns]:
    """Cuts columns into blocks of rows."""
    rows = len(next(iter(columns.values())))
    step = max(1, min(BLOCK, CELLS // len(columns)))
    for start in range(0, rows, step):
        yield {name: column[start : start + step] for name, column in columns.items()}


def write_csv(path: Path, header: Iterable[str], parts: Iterable[Columns]) -> None:
    """Writes blocks of rows as CSV; see `csv_rows`."""
    with path.open("wb") as file:
        file.write(csv_header(header))
        for part in parts:
            file.write(csv_rows(part))


def csv_header(names: Iterable[str]) -> bytes:
    """Writes the names of columns as a line of CSV."""
    return ",".join(map(_quoted, names)).encode() + b"\r\n"


def csv_rows(columns: Columns) -> bytes:
    """Writes rows as lines of CSV; numbers read back exactly, float32 ones as float32."""
    parts: list[Iterable[bytes]] = []
    for narrow, run in groupby(columns.values(), lambda column: bool(column.dtype == np.float32)):
        some = list(run)
        if narrow:
            text = singles(np.stack(some, 1)).tobytes()
            width = WIDTH * len(some)
            parts.append([text[i : i + width] for i in range(0, len(text), width)])
        else:
            lists = [
                map(_quoted if column.dtype == object else str, column.tolist()) for column in some
            ]
            parts.append(f",{','.join(row)}".encode() for row in zip(*lists, strict=True))
    lines = (b"".join(line)[1:] for line in zip(*parts, strict=True))
    # What is shorter than its place has bytes that are nothing.
    return b"".join(line + b"\r\n" for line in lines).translate(None, b"\0")


def _quoted(text: str) -> str:
    """Quotes a text where CSV needs it."""
    return '"' + text.replace('"', '""') + '"' if _SPECIAL.search(text) else text


def write_parquet(path: Path, parts: Iterable[Columns]) -> None:
    """Writes blocks of rows as Parquet.

    Raises:
        ModuleNotFoundError: pyarrow is not installed.
    """
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    writer = None
    for part in parts:
        table = arrow.table(part)
        writer = writer or parquet.ParquetWriter(path, table.schema)
        writer.write_table(table)
    if writer is not None:
        writer.close()
