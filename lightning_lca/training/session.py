"""One training from its start to its end: the probes' meters, and everything written of them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from lightning_lca.measure.allocation import Segment
from lightning_lca.measure.flag import Flag
from lightning_lca.measure.groups import Grouping
from lightning_lca.measure.parameters import named_modules, named_parameters
from lightning_lca.measure.shards import any_cut
from lightning_lca.probe.rounding import Rounding
from lightning_lca.record.history import History
from lightning_lca.record.reader import Reader
from lightning_lca.reporting.figures import Gallery, lay_out
from lightning_lca.reporting.loggers import Board
from lightning_lca.reporting.scalars import Scalars
from lightning_lca.runtime.processes import Ranks
from lightning_lca.training.assembly import make_meter, make_probe
from lightning_lca.training.meter import Meter
from lightning_lca.training.settings import Settings


class Session:
    """Measures segments with every probe, and logs, shows and records what they give.

    Attributes:
        meters: By name of the probe; None is the name of a single one.
        measured_to: Last step that some probe has measured in this training.
        log_dir: Directory of the record; None where this process writes nothing.
        is_cut: Whether weights are cut over processes.
        logged_at: Where on the loggers' x axis the next interval of scalars begins.
    """

    def __init__(self, trainer: Any, module: Any, settings: Settings) -> None:
        """Reads the probes, evaluates each once, and opens the record; every rank must call this.

        Args:
            trainer: The Trainer that starts.
            module: Its LightningModule.
            settings: What was asked for.
        """
        self._asked = settings
        self.is_cut = any_cut(module)
        self._rounding = Rounding(module)
        self._ranks = Ranks.of(trainer)
        self._grouping = grouping = Grouping(module, settings.group_by, trainer.global_rank)
        self.meters: dict[str | None, Meter] = {}
        self._rehearsed: dict[str | None, Meter] = {}
        self._scalars: dict[str | None, Scalars] = {}
        for name, source in settings.sources.items():
            probe = make_probe(trainer, module, settings, source, self._ranks)
            self.meters[name] = make_meter(probe, module, settings, grouping, self._ranks)
            prefix = f"lca_{name}" if self._scalars else "lca"
            self._scalars[name] = Scalars(grouping.names, grouping.sizes, prefix)
        self._first = next(iter(self.meters))
        self._board: Board | None = Board(trainer, self.meters[self._first].history.sizes)
        self.log_dir = self._board.log_dir
        self._started_at = self.measured_to = trainer.global_step
        self._description = self._describe(module, grouping)
        self._gallery = Gallery(trainer, self.log_dir, draws=settings.figures)
        self._gallery.turn(self._started_at)
        self._x = self.logged_at = x_axis(trainer)
        self._interval = settings.log_every_n_steps or trainer.log_every_n_steps

    def begin(self, kept: dict[str, Any] | None) -> None:
        """Describes the session in the record, and goes on where a checkpoint left off.

        Args:
            kept: What `state` gave when the checkpoint was saved; None for a new training.
        """
        if kept:
            self._started_at = max(self._started_at, kept["steps"])
            self._gallery.turn(self._started_at)
            # A training that ended in mid-chord measured the rest of it; one that goes on from
            # there takes up the chord, and that rest no longer counts.
            measured = [state["last_step"] for state in kept["probes"].values()]
            self._description["first_step"] = min([self._started_at, *measured])
        histories = self._read_back(kept) if kept else {}
        if self._board is not None:
            self._board.meta(self._description, self._description["first_step"])
        if self._asked.custom_scalars and self.log_dir is not None:
            lay_out(self._scalars[self._first].labels, self.log_dir)
        if kept is None:
            return
        self._x = self.logged_at = kept["logged_at"]
        for name, meter in self.meters.items():
            state, history = kept["probes"].get(name or ""), histories.get(name)
            if state is None:
                continue
            taken = meter.resume(state, history)
            if (taken or not kept["record"]) and meter.history.last_step < state["last_step"]:
                warnings.warn(
                    f"LCA: the record ends at step {meter.history.last_step}, since it could not "
                    "be written or was cut off. The history goes on without the steps from there "
                    f"to {state['last_step']} that were measured before the checkpoint.",
                    stacklevel=2,
                )
            self._scalars[name].resume(state["credit"], meter.history.rows, state["logged"])
            if taken is not None and self.log_dir != Path(kept["record"]):
                self._copy(name, taken)

    def state(self) -> dict[str, Any]:
        """Gives what a checkpoint needs, as plain values and tensors; the rows are in the record.

        Brings the record up to date, so that training can go on from both.
        """
        self.collect()
        self._close_windows()
        if self._board is not None:
            self._board.write(everything=True)
        return {
            "record": str(self.log_dir) if self.log_dir is not None else None,
            "logged_at": self.logged_at,
            "probes": {
                name or "": meter.state()
                | {"credit": scalars.credit, "logged": len(meter.history) - scalars.waiting}
                for (name, meter), scalars in zip(
                    self.meters.items(), self._scalars.values(), strict=True
                )
            },
        }

    def measure(self, segment: Segment, continues: Flag | bool, step: int) -> int:
        """Measures a segment with every probe; gives the gradients it took, audits apart.

        Args:
            segment: Where the weights were and are.
            continues: Whether it starts exactly where the segment before stopped.
            step: Optimizer steps done at its end.
        """
        self._rounding.look(segment)
        due = self._gallery.due(step)
        before = sum(meter.gradients for meter in self.meters.values())
        for meter in self.meters.values():
            meter.measure(segment, continues, step, spread=due)
            self.measured_to = step
        return sum(meter.gradients for meter in self.meters.values()) - before

    def rehearse(self, module: Any, segment: Segment, continues: Flag | bool, step: int) -> int:
        """Measures like `measure`, but for the time that it takes: the rows wait for `settle`."""
        if not self._rehearsed:
            asked, grouping, ranks = self._asked, self._grouping, self._ranks
            self._rehearsed = {
                name: make_meter(meter.probe, module, asked, grouping, ranks)
                for name, meter in self.meters.items()
            }
        before = sum(meter.gradients for meter in self._rehearsed.values())
        for meter in self._rehearsed.values():
            meter.measure(segment, continues, step)
            meter.collect()
        return sum(meter.gradients for meter in self._rehearsed.values()) - before

    def settle(self, *, keep: bool) -> None:
        """Takes what was rehearsed for measured, or forgets it."""
        rehearsed, self._rehearsed = self._rehearsed, {}
        if not keep:
            return
        self.meters = rehearsed
        for name, meter in rehearsed.items():
            self.measured_to = meter.history.last_step
            self._scalars[name].update(meter.history.rows)
            if self._board is not None:
                self._board.add(name, meter.history.rows)

    def largest(self, number: int) -> int:
        """Gives the largest of the ranks' numbers; every rank must call this."""
        return self._ranks.largest(number, self.meters[self._first].probe.device)

    def choose(self, every: int) -> None:
        """Records which every_n_steps was chosen."""
        self._description["settings"] |= {"every_n_steps": every}
        if self._board is not None:
            self._board.meta(self._description, self._description["first_step"])

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

    def record(self) -> None:
        """Writes to the record when a chunk is full, or waits for long."""
        board = self._board
        if board is None:
            return
        waiting = [meter.pending + board.waiting(name) for name, meter in self.meters.items()]
        full = max(waiting) >= board.chunk_steps and not board.failing
        if board.overdue or full:
            self.collect()
            if not self._interval:
                self._close_windows()
            board.write(everything=board.overdue)

    def end(self, x: int, step: int) -> None:
        """Logs and shows what there is at the end of training, and closes the record."""
        self._x = max(self._x, x)
        self._log()
        self._show(step, last=True)
        self.close()

    def close(self) -> None:
        """Writes what was measured, and closes the record."""
        self.collect()
        self._close_windows()
        if self._board is not None:
            self._board.close()
            self._board = None

    def collect(self) -> None:
        """Copies what was measured since the last time to the host."""
        for name, meter in self.meters.items():
            if meter.pending:
                rows = meter.collect()
                self._scalars[name].update(rows)
                if self._board is not None:
                    self._board.add(name, rows)

    def _log(self) -> None:
        self.collect()
        values: dict[str, float] = {}
        for scalars in self._scalars.values():
            values |= scalars.take()
        if values and self._board is not None:
            self._board.scalars(values, self._x)
        self._close_windows()

    def _show(self, step: int, *, last: bool = False) -> None:
        """Shows the figures and tables of an occasion, or of the end."""
        self.collect()
        histories = {self._scalars[n].prefix: m.history for n, m in self.meters.items()}
        spreads = [meter.take_distributions() for meter in self.meters.values()]
        for (prefix, history), spread in zip(histories.items(), spreads, strict=True):
            self._gallery.show(prefix, history, spread, self._x)
        self._gallery.draw(histories, self._x, last=last)
        self._gallery.turn(step)

    def _close_windows(self) -> None:
        """Ends the windows of finer sums; `collect` comes first."""
        for name, meter in self.meters.items():
            windows = meter.take_windows()
            if self._board is not None:
                self._board.add_windows(name, windows)

    def _read_back(self, kept: dict[str, Any]) -> dict[str | None, History]:
        """Reads the histories up to the checkpoint from the record that it names."""
        where = kept["record"]
        try:
            reader = Reader.of(Path(where)) if where else None
        except FileNotFoundError as error:
            reader = None
            warnings.warn(
                f"LCA: the history goes on without what was measured before step "
                f"{self._started_at}, which was recorded in {where}: {error}",
                stacklevel=2,
            )
        if reader is None:
            return {}
        for history in reader.histories.values():
            history.cut(self._description["first_step"])
        return {name or None: history for name, history in reader.histories.items()}

    def _copy(self, name: str | None, history: History) -> None:
        """Repeats in this record what an earlier one holds, so that each is whole."""
        if self._board is not None and len(history):
            self._board.add(name, history.rows)
            windows = {table: w for table, w in history.windows.items() if len(w)}
            self._board.add_windows(name, windows)

    def _describe(self, module: Any, grouping: Grouping) -> dict[str, Any]:
        """Gives what a reader of the record must know, as JSON."""
        return {
            "version": 1,
            "first_step": self._started_at,
            "probes": list(self._asked.sources),
            "group_by": self._asked.group_by,
            "groups": grouping.names,
            "sizes": grouping.sizes,
            "shapes": {n: list(p.shape) for n, p in named_parameters(module).items()},
            "windows": self.meters[self._first].windows,
            "modules": {n: type(m).__name__ for n, m in named_modules(module).items()},
            "settings": self._asked.describe(),
        }


def x_axis(trainer: Any) -> int:
    """Gives the step at which `self.log` logs this batch, so that LCA lines up with it."""
    # Private; LearningRateMonitor uses the same. global_step counts optimizers and is one ahead.
    stepped = getattr(trainer.fit_loop.epoch_loop, "_batches_that_stepped", None)
    return int(trainer.global_step if stepped is None else stepped)
