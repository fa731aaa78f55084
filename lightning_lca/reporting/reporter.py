"""What is written while a training runs: scalars, figures and the record, each on its occasion."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from lightning_lca.measure.groups import Grouping
from lightning_lca.record.findings import find
from lightning_lca.record.history import History
from lightning_lca.record.reader import Reader
from lightning_lca.record.tables import StepTable, WindowTable
from lightning_lca.record.writer import RecordWriter, claim
from lightning_lca.reporting.distributions import Distribution
from lightning_lca.reporting.figures import Gallery, lay_out
from lightning_lca.reporting.live import LiveView
from lightning_lca.reporting.loggers import Loggers
from lightning_lca.reporting.scalars import Scalars
from lightning_lca.runtime.lightnings import Trainer, warn


class Measured(Protocol):
    """What is reported of: one probe's measurements."""

    history: History

    @property
    def pending(self) -> int:
        """Number of measured steps that are not in the history yet."""

    def collect(self) -> StepTable:
        """Brings the history up to date; returns the new rows."""

    def take_windows(self) -> dict[str, WindowTable]:
        """Ends the window of finer sums; returns it."""

    def take_distributions(self) -> dict[str, Distribution]:
        """Returns the distributions of credit taken since the last time."""


class Reporter:
    """Logs, shows and records what the meters measure.

    One `LCACallback` of a Trainer writes its record to the run's own directory, under keys that
    start with ``lca``; a second one to ``lca2`` in there, under ``lca2``, and so on. So does one
    that finds the directory taken by another process.

    Attributes:
        log_dir: Directory of the record; None where this process writes nothing.
        logged_at: Where on the loggers' x axis the next interval of scalars begins.
        shown_elsewhere: Steps after which another process shows what this one has measured.
    """

    def __init__(
        self,
        trainer: Trainer,
        meters: Mapping[str | None, Measured],
        grouping: Grouping,
        metadata: Mapping[str, Any],
        *,
        place: int = 0,
        record: str | None = None,
        interval: int | None = None,
        figures: bool = True,
        custom_scalars: bool = False,
        writes: bool = True,
        live: bool = False,
    ) -> None:
        """Finds loggers and directory, and writes nothing yet; every rank must call this.

        Args:
            trainer: The Trainer that starts.
            meters: By name of the probe; None is the name of a single one.
            grouping: Groups of weights.
            metadata: What a reader of the record must know, as JSON.
            place: Which one of the Trainer's callbacks this is, from 0.
            record: Where a checkpoint says that the record was.
            interval: Of the scalars; None: that of the Trainer.
            figures: Whether figures are drawn.
            custom_scalars: Lays out TensorBoard's Custom Scalars tab.
            writes: False: another process writes what is measured here.
            live: Shows a view in the notebook that trains.
        """
        self._meters = meters
        self._metadata = dict(metadata)
        self._loggers = Loggers(trainer, writes=writes)
        self._claim = claim(self._loggers.log_dir, place, record)
        self.log_dir = self._claim.directory
        name = self._claim.name
        if self._claim.is_elsewhere:
            warn(
                f"LCA: another training or callback writes its record to {self._loggers.log_dir}. "
                f"This one's goes to {self.log_dir}, and its keys start with {name}/."
            )
        own = self.log_dir != self._loggers.log_dir
        self._writer: RecordWriter | None = RecordWriter(
            self.log_dir,
            next(iter(meters.values())).history.sizes,
            # The event file of a logger lies in the run's own directory.
            None if own else self._loggers.stream,
            lambda text: warn(f"LCA: {text}"),
        )
        self._writer.hold(_widest(metadata))
        self._scalars = {
            probe: Scalars(grouping.names, grouping.sizes, f"{name}_{probe}" if i else name)
            for i, probe in enumerate(meters)
        }
        for scalars in self._scalars.values():
            scalars.closes = bool(metadata.get("closes"))
        self._gallery = Gallery(trainer, self.log_dir, draws=figures)
        self._gallery.turn(trainer.global_step)
        self._x = self.logged_at = x_axis(trainer)
        self._interval = interval or trainer.log_every_n_steps
        self._lays_out = custom_scalars
        self.shown_elsewhere: Collection[int] = ()
        self._view = LiveView(trainer) if live else None

    # -- begin and end ----------------------------------------------------------------------------

    def begin(self, step: int) -> None:
        """Opens the record of what is measured after this step."""
        self._metadata["first_step"] = step
        if self._writer is not None:
            self._writer.describe(self._metadata, step)
        if self._lays_out and self.log_dir is not None:
            lay_out(next(iter(self._scalars.values())), self.log_dir)

    def resume(
        self,
        kept: Mapping[str, Any],
        started_at: int,
        first_step: int,
        before: dict[str | None, History] | None = None,
    ) -> dict[str | None, History]:
        """Goes on where a checkpoint left off: reads back what was recorded up to there.

        Args:
            kept: What `state` returned when the checkpoint was saved.
            started_at: Optimizer steps done at the start.
            first_step: Last step of what was recorded that still counts.
            before: The histories up to there, where they are in memory.

        Returns:
            The history of every probe, as far as it is known.
        """
        self._gallery.turn(started_at)
        self._x = self.logged_at = kept["logged_at"]
        where = kept["record"]
        if before is not None:
            for history in before.values():
                history.cut(first_step)
            return before
        try:
            reader = Reader.of(Path(where)) if where else None
        except FileNotFoundError as error:
            reader = None
            warnings.warn(
                f"LCA: the history goes on without what was measured before step "
                f"{started_at}, which was recorded in {where}: {error}",
                stacklevel=2,
            )
        if reader is None:
            return {}
        for history in reader.histories.values():
            history.cut(first_step)
        return {name or None: history for name, history in reader.histories.items()}

    def go_on(
        self, probe: str | None, taken: History | None, state: Mapping[str, Any], record: str | None
    ) -> None:
        """Goes on with a probe's sums; repeats in this record what an earlier one holds.

        Args:
            probe: Its name.
            taken: The history that goes on; None if it starts anew.
            state: The probe's part of `state`.
            record: Where the checkpoint says that the record was.
        """
        self._scalars[probe].resume(
            state["credit"], self._meters[probe].history.rows, state["logged"]
        )
        writes = self._writer is not None and self.log_dir != Path(record or "")
        if taken is not None and len(taken) and writes:
            assert self._writer is not None
            self._writer.add(probe, taken.rows)
            windows = {table: w for table, w in taken.windows.items() if len(w)}
            self._writer.add_windows(probe, windows)

    def state(self) -> dict[str, Any]:
        """Returns what a checkpoint needs, as plain values; the rows are in the record.

        Brings the record up to date, so that training can go on from both.
        """
        self.collect()
        self._close_windows()
        if self._writer is not None:
            self._writer.write(everything=True)
        return {
            "record": str(self.log_dir) if self.log_dir is not None else None,
            "logged_at": self.logged_at,
            "probes": {
                name or "": {
                    "credit": self._scalars[name].credit,
                    "logged": len(meter.history) - self._scalars[name].waiting,
                }
                for name, meter in self._meters.items()
            },
        }

    def end(self, x: int, step: int) -> None:
        """Logs and shows what there is at the end of training, and closes the record."""
        self._x = max(self._x, x)
        self._log()
        self._show(step, last=True)
        self.close()

    def close(self) -> None:
        """Writes what was measured, and closes the record and the view."""
        self.collect()
        if self._view is not None:
            self._view.show(self._histories, last=True)
            self._view = None
        self._close_windows()
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        self._claim.release()

    # -- in between -------------------------------------------------------------------------------

    def spreads(self, step: int) -> bool:
        """Whether distributions of credit should be shown after this step."""
        here = self._gallery.shows_distributions and self._gallery.due(step)
        return here or step in self.shown_elsewhere

    def occasions(self, steps: Sequence[int]) -> list[int]:
        """Foretells after which of these steps, in their order, `spreads` will hold."""
        return self._gallery.occasions(steps) if self._gallery.shows_distributions else []

    def replace(self, meters: Mapping[str | None, Measured]) -> None:
        """Reports of other meters from now on, and of what they have measured since."""
        known = {name: len(meter.history) for name, meter in self._meters.items()}
        self._meters = meters
        for name, meter in meters.items():
            self._take(name, meter.history.rows[known[name] :])

    def note(self, **settings: Any) -> None:
        """Records what was chosen, or found out, since the start."""
        self._metadata["settings"] = {**self._metadata["settings"], **settings}
        if self._writer is not None:
            self._writer.describe(self._metadata)

    def note_columns(self, **told: Any) -> None:
        """Records what rows hold beside credit, which the first look at the loss may tell of."""
        if {name: self._metadata.get(name) for name in told} != told:
            self._metadata |= told
            for scalars in self._scalars.values():
                scalars.closes = bool(self._metadata["closes"])
            if self._writer is not None:
                self._writer.hold(_widest(self._metadata))
                if "first_step" in self._metadata:  # It has begun.
                    self._writer.describe(self._metadata)

    def log(self, x: int, step: int) -> None:
        """Logs scalars on their interval, and shows figures on their occasions.

        Args:
            x: Where on the loggers' x axis.
            step: Optimizer steps done.
        """
        self._x = x
        every = self._interval
        if every and (x + 1) // every > self.logged_at // every:
            self._log()
            self.logged_at = x + 1
        if self._gallery.due(step):
            self._show(step)

    def show(self) -> None:
        """Updates the view of a notebook, if there is one and it is time."""
        if self._view is not None and self._view.is_due:
            self.collect()
            self._view.show(self._histories)

    def record(self) -> None:
        """Writes to the record when a chunk is full, or waits for long."""
        writer = self._writer
        if writer is None:
            return
        waiting = [meter.pending + writer.waiting(name) for name, meter in self._meters.items()]
        full = max(waiting) >= writer.chunk_steps and not writer.failing
        if writer.overdue or full:
            self.collect()
            if not self._interval:
                self._close_windows()
            writer.write(everything=writer.overdue)

    def collect(self) -> None:
        """Copies what was measured since the last time to the host."""
        for name, meter in self._meters.items():
            if meter.pending:
                self._take(name, meter.collect())

    # -- inside -----------------------------------------------------------------------------------

    @property
    def _histories(self) -> dict[str | None, History]:
        return {name: meter.history for name, meter in self._meters.items()}

    def _take(self, name: str | None, rows: StepTable) -> None:
        self._scalars[name].update(rows)
        if self._writer is not None:
            self._writer.add(name, rows)

    def _log(self) -> None:
        self.collect()
        values: dict[str, float] = {}
        for scalars in self._scalars.values():
            values |= scalars.take()
        if values:
            self._loggers.log(values, self._x)
        self._close_windows()

    def _show(self, step: int, *, last: bool = False) -> None:
        """Shows the figures and tables of an occasion, or of the end."""
        self.collect()
        histories = {self._scalars[n].prefix: m.history for n, m in self._meters.items()}
        names = {self._scalars[n].prefix: n for n in self._meters}
        spreads = [meter.take_distributions() for meter in self._meters.values()]
        for (prefix, history), spread in zip(histories.items(), spreads, strict=True):
            look = partial(find, self._histories, about=(names[prefix],))
            self._gallery.show(prefix, history, spread, self._x, look)
        self._gallery.draw(histories, self._x, last=last, probes=self._histories)
        self._gallery.turn(step)

    def _close_windows(self) -> None:
        """Ends the windows of finer sums; `collect` comes first."""
        for name, meter in self._meters.items():
            windows = meter.take_windows()
            if self._writer is not None:
                self._writer.add_windows(name, windows)


def _widest(metadata: Mapping[str, Any]) -> int:
    """Counts the shares of the breakdown that has most, or the batches of a probe."""
    shares = map(len, metadata["breakdowns"].values())
    return max([*shares, *metadata["batches"].values()], default=0)


def x_axis(trainer: Trainer) -> int:
    """Finds the step at which `self.log` logs this batch, so that LCA lines up with it."""
    # Private; LearningRateMonitor uses the same. global_step counts optimizers and is one ahead.
    stepped = getattr(trainer.fit_loop.epoch_loop, "_batches_that_stepped", None)
    return int(trainer.global_step if stepped is None else stepped)
