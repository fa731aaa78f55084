"""A history as pandas data frames, one row per step, per step and group, or per window and thing.

Numbers are those of the history: credits and losses in loss units, negative credit helped.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from lightning_lca.record.tables import SCALARS, WindowTable

if TYPE_CHECKING:
    import pandas as pd

    from lightning_lca.record.history import History

FrameName = Literal["steps", "groups", "breakdowns", "batches", "parameters", "neurons", "weights"]


def frame(history: History, table: FrameName) -> pd.DataFrame:
    """Makes the data frame of a table; `History.to_pandas` lists their columns.

    Raises:
        ModuleNotFoundError: pandas is not installed.
        ValueError: There is no such table, or the run did not record it.
    """
    if table not in get_args(FrameName):
        names = ", ".join(map(repr, get_args(FrameName)))
        raise ValueError(f"table must be one of {names}; got {table!r}.")
    try:
        import pandas
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"to_pandas needs pandas ({error}). Run: pip install pandas. Without it the columns "
            "are NumPy arrays (history.steps, history.allocated and so on), and `lightning-lca "
            "export` writes them as CSV.",
            name=error.name,
        ) from error
    if table == "steps":
        return _steps(pandas, history)
    if table == "groups":
        return _groups(pandas, history)
    if table == "breakdowns":
        return _breakdowns(pandas, history)
    if table == "batches":
        return _batches(pandas, history)
    windows = getattr(history, table)
    if windows is None:
        raise ValueError(f"This record has no {table}. {_WHERE[table]}")
    return _windows(pandas, windows, table)


_WHERE = {
    "parameters": "It was written without them.",
    "neurons": "Train with LCACallback(neurons=True).",
    "weights": "Train with LCACallback(track_parameters=True).",
}


def _steps(pandas: Any, history: History) -> Any:
    columns = {name: getattr(history, name) for name in SCALARS}
    with np.errstate(invalid="ignore", over="ignore"):
        columns["lca"] = history.allocated.sum(1)
    columns["finite"] = history.finite
    return pandas.DataFrame(columns, index=pandas.Index(history.steps, name="step"))


def _groups(pandas: Any, history: History) -> Any:
    columns = {"lca": history.allocated, "helping": history.helping, "hurting": history.hurting}
    if history.sampling_error is not None:
        columns["sampling_error"] = history.sampling_error
    if (turns := history.oscillation) is not None:
        columns |= {name: turns.allocated[:, :, k] for k, name in enumerate(turns.names)}
    flat = {name: column.reshape(-1) for name, column in columns.items()}
    made = pandas.DataFrame(flat, index=_by_group(pandas, history))
    steps = len(history)
    made.insert(0, "layer", pandas.Categorical(np.tile(np.array(history.layers, object), steps)))
    made.insert(1, "weights", np.tile(history.sizes, steps))
    return made


def _breakdowns(pandas: Any, history: History) -> Any:
    found = history.breakdowns
    if not found:
        raise ValueError("This record has no breakdowns. Train with LCACallback(breakdown=True).")
    columns = {
        (name, share): split.allocated[:, :, k].reshape(-1)
        for name, split in found.items()
        for k, share in enumerate(split.names)
    }
    made = pandas.DataFrame(columns, index=_by_group(pandas, history))
    made.columns.names = ["breakdown", "share"]
    return made


def _batches(pandas: Any, history: History) -> Any:
    by_batch = history.by_batch
    if by_batch is None:
        raise ValueError(
            "This record has no credit of single batches: its probe has one. Train with "
            "LCACallback(probe_batches=4), for example."
        )
    values = by_batch.allocated.reshape(-1, len(by_batch.names))
    columns = pandas.RangeIndex(len(by_batch.names), name="batch")
    return pandas.DataFrame(values, index=_by_group(pandas, history), columns=columns)


def _by_group(pandas: Any, history: History) -> Any:
    """The index of a row for each step and group [T x G]."""
    return pandas.MultiIndex.from_product([history.steps, history.groups], names=["step", "group"])


def _windows(pandas: Any, windows: WindowTable, table: str) -> Any:
    thing = table.removesuffix("s")
    index = pandas.MultiIndex.from_product([windows.steps, windows.names], names=["step", thing])
    count, things = len(windows), len(windows.names)
    columns: dict[str, Any] = {}
    if windows.layers:
        columns["layer"] = pandas.Categorical(np.tile(np.array(windows.layers, object), count))
    if windows.kinds:
        columns["kind"] = pandas.Categorical(np.tile(np.array(windows.kinds, object), count))
    columns["measured"] = np.repeat(windows.measured, things)
    columns["lca"] = windows.allocated.reshape(-1)
    if windows.helping is not None:
        columns["helped"] = windows.helping.reshape(-1)
    return pandas.DataFrame(columns, index=index)
