"""Rows to any Lightning logger, and the record to TensorBoard event files."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_lca.record import eventfile
from lightning_lca.record.tables import Ints, Rows, Windows
from lightning_lca.runtime.notices import warn

CHUNK_STEPS = 512
CHUNK_BYTES = 2**18
CHUNK_SECONDS = 15.0


class Board:
    """Writes scalars to every logger of a Trainer, and chunks to one event file, on rank zero.

    The event file is that of the Trainer's TensorBoardLogger; without one, a file of our own in the
    run's log directory. Without any logger that is a fresh ``lca_logs/version_N`` under
    ``default_root_dir``.

    Training never ends for want of a disk or of a logger: what fails is told once. Rows that could
    not be written are kept, and tried again every fifteen seconds, in a file of our own.

    Attributes:
        log_dir: Directory of the record; None where nothing is written.
        chunk_steps: Measured steps that make a full chunk.
    """

    def __init__(self, trainer: Any, sizes: Ints) -> None:
        """Finds the loggers and the log directory; every rank must call this.

        Args:
            trainer: The Trainer that runs.
            sizes: Number of weights of every group [G].
        """
        self._loggers = list(trainer.loggers)
        self._writes = trainer.is_global_zero and not trainer.fast_dev_run
        self._tensorboard = next((x for x in self._loggers if is_a("TensorBoardLogger", x)), None)
        self._own: eventfile.EventFile | None = None
        self._meta: dict[str, Any] = {}
        self._told = False  # Whether the description is in the file.
        self._written_to = 0  # Last step in the record.
        self._failure: Exception | None = None  # Since the last success.
        self._sizes = sizes
        self._unwritten: dict[str | None, list[Rows]] = {}
        self._windows: dict[tuple[str, str | None], list[Windows]] = {}
        self._wrote = time.monotonic()
        # An event of moderate size never holds the writer's thread for long.
        self.chunk_steps = max(1, min(CHUNK_STEPS, CHUNK_BYTES // (8 * len(sizes))))
        self.log_dir: Path | None = None
        root = trainer.strategy.broadcast(trainer.default_root_dir)
        if self._writes:
            try:
                self.log_dir = _log_dir(self._tensorboard, self._loggers, Path(root))
            except OSError as error:
                self._warn(
                    f"there is no record, since its directory could not be made: {error}. Training "
                    "goes on, and lca.history has all steps. For a record, give the Trainer a "
                    "default_root_dir that can be written to."
                )

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Logs all values at one step: one event for TensorBoard, ``log_metrics`` for others."""
        if not self._writes:
            return
        for logger in list(self._loggers):
            try:
                self._log(logger, values, step)
            except Exception as error:
                self._loggers.remove(logger)
                self._warn(
                    f"{type(logger).__name__} raised {type(error).__name__}: {error}. Training "
                    "goes on; this logger gets no more scalars of LCA."
                )

    def meta(self, value: Mapping[str, Any], step: int) -> None:
        """Takes what describes a session of the record, which starts after this step."""
        self._meta, self._written_to, self._told = dict(value), step, False
        self._try(everything=False)

    def add(self, probe: str | None, rows: Rows) -> None:
        """Takes measured steps of a probe for the record."""
        self._unwritten.setdefault(probe, []).append(rows)

    def add_windows(self, probe: str | None, windows: Mapping[str, Windows]) -> None:
        """Takes sums over windows of steps for the record."""
        for table, window in windows.items():
            self._windows.setdefault((table, probe), []).append(window)

    def waiting(self, probe: str | None) -> int:
        """Counts the measured steps of a probe that are not in the record yet."""
        return sum(map(len, self._unwritten.get(probe, [])))

    @property
    def overdue(self) -> bool:
        """Whether the last chunk was written so long ago that part of one should follow."""
        return time.monotonic() - self._wrote > CHUNK_SECONDS

    @property
    def failing(self) -> bool:
        """Whether the last attempt to write failed."""
        return self._failure is not None

    def write(self, *, everything: bool) -> None:
        """Writes full chunks of the record, or all there is, down to the disk."""
        self._try(everything=everything)

    def close(self) -> None:
        """Writes all there is, and closes our own event file; a logger closes its own."""
        self._try(everything=True)
        missing = sum(map(self.waiting, self._unwritten))
        if self._failure is not None and missing:
            self._warn(
                f"{missing} measured steps are missing in the record in {self.log_dir}, which "
                f"could not be written: {self._failure}. They are in lca.history."
            )
        if self._own is not None:
            self._own.close()
            self._own = None

    # -- inside -----------------------------------------------------------------------------------

    def _log(self, logger: Any, values: Mapping[str, float], step: int) -> None:
        # Private: a prefix is applied by the logger's own slow path, value by value.
        if is_a("TensorBoardLogger", logger) and not getattr(logger, "_prefix", ""):
            from tensorboard.compat.proto.summary_pb2 import Summary

            value = [Summary.Value(tag=k, simple_value=v) for k, v in values.items()]
            file_writer(logger).add_summary(Summary(value=value), step)
        else:
            logger.log_metrics(dict(values), step=step)

    def _try(self, *, everything: bool) -> None:
        if self.log_dir is None:
            self._unwritten, self._windows = {}, {}
            return
        try:
            self._write_all(everything)
            self._failure = None
        except Exception as error:
            if self._failure is None:
                self._warn(
                    f"the record in {self.log_dir} could not be written: {error}. Training goes "
                    f"on, lca.history has all steps, and every {CHUNK_SECONDS:.0f} s it is tried "
                    "again."
                )
            self._failure = error
            # A writer that failed once fails for ever; from now on we have our own.
            self._tensorboard = None
            if self._own is not None:
                self._own.close()
                self._own = None
        self._wrote = time.monotonic()

    def _write_all(self, everything: bool) -> None:
        """Writes what is due; what was not written stays, if that raises."""
        if self._tensorboard is None and self._own is None:
            assert self.log_dir is not None
            self._own = eventfile.EventFile(self.log_dir)
            self._told = False
        if not self._told:
            # Of a file that followed on another, only what comes later counts.
            described = self._meta | {"first_step": self._written_to}
            self._write({eventfile.META: json.dumps(described).encode()}, self._written_to)
            self._told = True
        for probe, parts in self._unwritten.items():
            rows = Rows.join(parts)
            self._unwritten[probe] = [rows]
            while len(rows) >= (1 if everything else self.chunk_steps):
                chunk, rows = rows[: self.chunk_steps], rows[self.chunk_steps :]
                tags = eventfile.tagged(
                    "chunk", int(chunk.steps[0]), probe, chunk.parts(self._sizes)
                )
                self._write(tags, int(chunk.steps[-1]))
                self._unwritten[probe] = [rows]
        for (table, probe), windows in list(self._windows.items()):
            joined = Windows.join(windows)
            self._write(
                eventfile.tagged(table, int(joined.steps[0]), probe, joined.parts()),
                int(joined.steps[-1]),
            )
            del self._windows[table, probe]

    def _write(self, tags: Mapping[str, bytes], step: int) -> None:
        """Writes events that belong together, down to the disk."""
        from tensorboard.compat.proto.event_pb2 import Event

        events = [
            Event(step=step, wall_time=time.time(), summary=eventfile.summarize({tag: data}))
            for tag, data in tags.items()
        ]
        if self._tensorboard is None:
            assert self._own is not None
            self._own.write(events)
        else:
            writer = file_writer(self._tensorboard).event_writer
            for event in events:
                writer.add_event(event)
            writer.flush()
        self._written_to = max(self._written_to, step)

    def _warn(self, text: str) -> None:
        warn(f"LCA: {text}")


def is_a(name: str, logger: Any) -> bool:
    """Whether a logger is of the class of this name, in either Lightning."""
    return any(cls.__name__ == name for cls in type(logger).__mro__)


def file_writer(logger: Any) -> Any:
    """Finds the writer of events behind a TensorBoardLogger."""
    # Private, but the one way to write many values as one event; it reopens a closed writer.
    return logger.experiment._get_file_writer()


def _log_dir(tensorboard: Any, loggers: list[Any], root: Path) -> Path:
    """Finds this run's own directory, so that two runs never share a record."""
    if tensorboard is not None:
        return Path(tensorboard.log_dir)
    for logger in loggers:
        if getattr(logger, "log_dir", None):
            return Path(logger.log_dir)
        if logger.save_dir:
            own = [str(part) for part in (logger.name, logger.version) if part is not None]
            return Path(logger.save_dir, *own)
    parent = root / "lca_logs"
    version = 0
    while True:
        try:
            os.makedirs(parent / f"version_{version}")
            return parent / f"version_{version}"
        except FileExistsError:
            version += 1
