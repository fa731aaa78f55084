"""Rows to any Lightning logger, and the record to TensorBoard event files."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_lca import record

CHUNK_STEPS = 512
CHUNK_BYTES = 2**18
CHUNK_SECONDS = 15.0


class Board:
    """Writes scalars to every logger of a Trainer, and chunks to one event file, on rank zero.

    The event file is that of the Trainer's TensorBoardLogger; without one, a file of our own in the
    run's log directory. Without any logger that is a fresh ``lca_logs/version_N`` under
    ``default_root_dir``.
    """

    def __init__(self, trainer: Any) -> None:
        """Finds the loggers and the log directory; every rank must call this."""
        self._loggers = list(trainer.loggers)
        self._writes = trainer.is_global_zero and not trainer.fast_dev_run
        self._tensorboard = next((x for x in self._loggers if _is_tensorboard(x)), None)
        self._own: Any = None
        root = trainer.strategy.broadcast(trainer.default_root_dir)
        self.log_dir: Path | None = None
        if self._writes:
            self.log_dir = _log_dir(self._tensorboard, self._loggers, Path(root))

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Logs all values at one step: one event for TensorBoard, ``log_metrics`` for others."""
        if not self._writes:
            return
        for logger in self._loggers:
            # Private: a prefix is applied by the logger's own slow path, value by value.
            if _is_tensorboard(logger) and not getattr(logger, "_prefix", ""):
                from tensorboard.compat.proto.summary_pb2 import Summary

                value = [Summary.Value(tag=k, simple_value=v) for k, v in values.items()]
                _file_writer(logger).add_summary(Summary(value=value), step)
            else:
                logger.log_metrics(dict(values), step=step)

    def meta(self, value: Mapping[str, Any], step: int) -> None:
        """Writes what describes a session of the record."""
        self._write({record.META: json.dumps(value).encode()}, step)

    def chunk(self, tags: Mapping[str, bytes], step: int) -> None:
        """Writes a chunk of the record, down to the disk."""
        self._write(tags, step)
        self.flush()

    def flush(self) -> None:
        """Waits until everything written is on the disk."""
        if self._writes:
            writer = self._record_writer()
            writer.flush()

    def close(self) -> None:
        """Closes our own event file, if there is one; a logger closes its own."""
        if self._own is not None:
            self._own.close()
            self._own = None

    def _write(self, tags: Mapping[str, bytes], step: int) -> None:
        if not self._writes:
            return
        from tensorboard.compat.proto.event_pb2 import Event

        writer = self._record_writer()
        # One event a part: an event of moderate size never holds the writer's thread for long.
        for tag, data in tags.items():
            summary = record.summarize({tag: data})
            writer.add_event(Event(step=step, wall_time=time.time(), summary=summary))

    def _record_writer(self) -> Any:
        if self._tensorboard is not None:
            return _file_writer(self._tensorboard).event_writer
        if self._own is None:
            from tensorboard.summary.writer.event_file_writer import EventFileWriter

            self._own = EventFileWriter(str(self.log_dir), filename_suffix=".lca")
        return self._own


def _is_tensorboard(logger: Any) -> bool:
    return any(cls.__name__ == "TensorBoardLogger" for cls in type(logger).__mro__)


def _file_writer(logger: Any) -> Any:
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
            return Path(logger.save_dir) / str(logger.name) / str(logger.version)
    parent = root / "lca_logs"
    version = 0
    while True:
        try:
            os.makedirs(parent / f"version_{version}")
            return parent / f"version_{version}"
        except FileExistsError:
            version += 1
