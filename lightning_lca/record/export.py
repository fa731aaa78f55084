"""A history as tables for other tools: CSV, Parquet or NumPy's npz."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_lca.record.history import History
from lightning_lca.record.layers import Layers
from lightning_lca.record.tables import SCALARS, StepTable

Columns = dict[str, npt.NDArray[Any]]
FORMATS = (".csv", ".parquet", ".npz")
BLOCK = 10_000  # Most rows that are written at once,
CELLS = 2**20  # and most numbers.
_PER_STEP = ("steps", *SCALARS, "finite")
_PER_GROUP = ("allocated", "helping", "hurting")


def wide(history: History, rows: slice = slice(None), *, by_layer: bool = False) -> Columns:
    """Returns one row per measured step [T]: its scalars, then lca, helping, hurting of each group.

    Units: LCA, losses and residuals are in loss units, negative LCA helped; helping and hurting are
    fractions of the group's weights. Steps that are not ``finite`` count in no sum elsewhere.

    Args:
        history: What was measured.
        rows: Which steps.
        by_layer: One column for each layer that dashboards show, in place of each group.
    """
    table = history.rows[rows]
    layers = history.shown if by_layer else Layers.of(history.groups)
    columns = {name: getattr(table, name) for name in _PER_STEP}
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


def _per_group(history: History, table: StepTable, layers: Layers) -> Columns:
    sizes = np.maximum(layers.sums(history.sizes), 1)
    return {
        "lca": layers.sums(table.allocated.astype(np.float64)),
        "helping": layers.sums(table.helping) / sizes,
        "hurting": layers.sums(table.hurting) / sizes,
    }


def _per_share(history: History, table: StepTable, layers: Layers) -> Columns:
    """Sums the shares of breakdowns: {"part/noise": [T, layers]}."""
    return {
        f"{name}/{share}": layers.sums(table.shares[name][:, :, k].astype(np.float64))
        for name, breakdown in history.breakdowns.items()
        for k, share in enumerate(breakdown.names)
    }


def arrays(history: History) -> Columns:
    """Returns the attributes of a history under their own names, tables of windows included.

    ``neurons_allocated`` [W, N], ``neurons_steps`` [W] and ``neurons_names`` (N,), for example.
    """
    columns: Columns = {name: getattr(history, name) for name in (*_PER_STEP, *_PER_GROUP)}
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
    """Writes blocks of rows as CSV; numbers are written so that they read back exactly."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        for part in parts:
            writer.writerows(zip(*(column.tolist() for column in part.values()), strict=True))


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
