"""The Trainer's loggers: scalars to each, and where the run's own directory is."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning_lca.runtime.lightnings import Trainer, warn


class Loggers:
    """Writes scalars to every logger of a Trainer, on rank zero.

    Training never ends for want of a logger: one that fails is told of once, and gets no more.

    Attributes:
        log_dir: Directory of the run: that of the Trainer's TensorBoardLogger, else of another
            logger; without any a fresh ``lca_logs/version_N`` under ``default_root_dir``. None
            where nothing is written.
    """

    def __init__(self, trainer: Trainer, *, writes: bool = True) -> None:
        """Finds the loggers and the log directory; every rank must call this.

        Args:
            trainer: The Trainer.
            writes: False: nothing is written, on rank zero either.
        """
        self._loggers = list(trainer.loggers)
        self._writes = writes and trainer.is_global_zero and not trainer.fast_dev_run
        self._tensorboard = next((x for x in self._loggers if is_a("TensorBoardLogger", x)), None)
        self.log_dir: Path | None = None
        root = trainer.strategy.broadcast(trainer.default_root_dir)
        if self._writes:
            try:
                self.log_dir = _log_dir(self._tensorboard, self._loggers, Path(root))
            except OSError as error:
                warn(
                    f"LCA: there is no record, since its directory could not be made: {error}. "
                    "Training goes on, and lca.history has all steps. For a record, give the "
                    "Trainer a default_root_dir that can be written to."
                )

    @property
    def stream(self) -> Callable[[], Any] | None:
        """Finds the writer of the TensorBoardLogger's event file; None if there is no such file."""
        logger = self._tensorboard
        return None if logger is None else lambda: file_writer(logger).event_writer

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Logs all values at one step: one event for TensorBoard, ``log_metrics`` for others."""
        if not self._writes:
            return
        for logger in list(self._loggers):
            try:
                _log(logger, values, step)
            except Exception as error:
                self._loggers.remove(logger)
                warn(
                    f"LCA: {type(logger).__name__} raised {type(error).__name__}: {error}. "
                    "Training goes on; this logger gets no more scalars of LCA."
                )


def _log(logger: Any, values: Mapping[str, float], step: int) -> None:
    # Private: a prefix is applied by the logger's own slow path, value by value.
    if is_a("TensorBoardLogger", logger) and not getattr(logger, "_prefix", ""):
        from tensorboard.compat.proto.summary_pb2 import Summary

        value = [Summary.Value(tag=k, simple_value=v) for k, v in values.items()]
        file_writer(logger).add_summary(Summary(value=value), step)
    else:
        logger.log_metrics(dict(values), step=step)


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
