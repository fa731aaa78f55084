"""LCACallback: opens and closes segments around optimizer steps and wires the rooms together."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path as FilePath
from typing import Any

import torch
from torch import Tensor

from lightning_lca import flavours
from lightning_lca.allocation import Allocation
from lightning_lca.batches import read_batches
from lightning_lca.board import Board
from lightning_lca.cost import Cost
from lightning_lca.detail import Detail
from lightning_lca.distribution import Distributions
from lightning_lca.flavours import LightningCallback
from lightning_lca.gallery import Gallery, lay_out
from lightning_lca.grouping import GroupBy, Grouping
from lightning_lca.history import History
from lightning_lca.meter import Meter
from lightning_lca.path import Path
from lightning_lca.probe import Probe, ProbeMode, live_weights
from lightning_lca.quadrature import Quadrature
from lightning_lca.scalars import Scalars
from lightning_lca.settings import Settings, check_trainer


class LCACallback(LightningCallback):
    """Measures Loss Change Allocation while a Lightning Trainer trains, and changes nothing else.

    Every measured optimizer step is credited to single weights: negative where a weight's motion
    lowered the loss on a fixed probe set (it helped), positive where it raised it (it hurt). Sums
    per layer go to the Trainer's loggers every ``log_every_n_steps`` and, for every measured step,
    to the record in the log directory. The keys are listed in `Scalars`.

    Args:
        probe: What the loss is measured on: "train" or "val" (batches drawn from that data), an
            iterable of batches, a DataLoader, or {name: any of these} for several probes.
        probe_batches: Batches drawn for "train" and "val"; fixed for the run.
        probe_mode: "no_dropout": as training has the model, dropout off, BatchNorm on batch
            statistics; "eval": eval mode; "train": dropout on, with the same random numbers at
            every evaluation.
        loss_fn: (module, batch) -> scalar tensor, or {term: scalar}, whose sum is taken. None: the
            module's own training_step.
        every_n_steps: Measures the chord from every n-th optimizer step to the next: nothing is
            missed, at 1/n of the cost, but what happens within a chord is not resolved.
        quadrature: Name of a rule ("euler", "midpoint", "trapezoid", "simpson", "boole", "gauss2",
            "gauss3") or a `Quadrature`.
        tolerance: Largest |residual| per measured step, in loss units: panels are doubled until it
            is met. Needs Simpson's rule. None: no refinement; the residual is reported all the
            same.
        max_splits: Most panels of a refinement; a step that needs more is flagged in
            ``history.converged``.
        group_by: What history and dashboards resolve: "parameter", "layer" or "neuron".
        log_every_n_steps: Interval of the scalars; None: that of the Trainer.
        seed: Draws the probe's batches and seeds its random numbers.
        track_parameters: Keeps ``totals`` and ``last``, at two more copies of the weights, and
            follows a sample of 10,000 single weights in the record.
        neurons: Keeps the credit of every neuron (output channel) per logging interval in the
            record, so that dashboards can open a layer; one more pass over the weights per step.
        figures: Shows figures in loggers that can (TensorBoard, Weights & Biases, Comet, MLflow),
            or as PNG files in ``log_dir``, up to ten times per run and at its end.
        custom_scalars: Lays out TensorBoard's Custom Scalars tab, in a sub-run of its own.

    Attributes:
        log_dir: Directory of the record, while and after training.

    Raises:
        ValueError: An argument out of range. TypeError: one of the wrong type.

    Example:
        >>> lca = LCACallback(every_n_steps=10)
        >>> # pl.Trainer(callbacks=[lca]).fit(model, loader); print(lca.summary())
    """

    def __init__(
        self,
        probe: Any = "train",
        probe_batches: int = 1,
        probe_mode: ProbeMode = "no_dropout",
        loss_fn: Callable[[Any, Any], Any] | None = None,
        every_n_steps: int = 1,
        quadrature: str | Quadrature = "simpson",
        tolerance: float | None = None,
        max_splits: int = 32,
        group_by: GroupBy = "layer",
        log_every_n_steps: int | None = None,
        seed: int = 0,
        track_parameters: bool = False,
        neurons: bool = False,
        figures: bool = True,
        custom_scalars: bool = False,
    ) -> None:
        """Checks the arguments; everything that costs anything waits for the start of training."""
        super().__init__()
        self._settings = Settings.check(
            probe=probe,
            probe_batches=probe_batches,
            probe_mode=probe_mode,
            loss_fn=loss_fn,
            every_n_steps=every_n_steps,
            quadrature=quadrature,
            tolerance=tolerance,
            max_splits=max_splits,
            group_by=group_by,
            log_every_n_steps=log_every_n_steps,
            seed=seed,
            track_parameters=track_parameters,
            neurons=neurons,
            figures=figures,
            custom_scalars=custom_scalars,
        )
        self.log_dir: FilePath | None = None
        self._path = Path()
        self._opened_at = 0
        self._meters: dict[str | None, Meter] = {}
        self._scalars: dict[str | None, Scalars] = {}
        self._board: Board | None = None
        self._gallery: Gallery | None = None
        self._cost: Cost | None = None

    # -- results ----------------------------------------------------------------------------------

    @property
    def histories(self) -> dict[str | None, History]:
        """Every probe's table of measured steps, by name; the name of a single probe is None."""
        self._collect()
        return {name: meter.history for name, meter in self._meters.items()}

    @property
    def history(self) -> History:
        """The table of measured steps (of the first probe, if there are several).

        Raises:
            RuntimeError: Training has not started.
        """
        self._first_meter("history")
        return next(iter(self.histories.values()))

    @property
    def totals(self) -> dict[str, Tensor]:
        """Cumulative LCA {name: [*shape]}, in loss units; needs track_parameters=True."""
        totals = self._first_meter("totals").totals
        if totals is None:
            raise RuntimeError("totals needs LCACallback(track_parameters=True).")
        return totals

    @property
    def last(self) -> Allocation | None:
        """The allocation of the latest measured step; needs track_parameters=True."""
        meter = self._first_meter("last")
        if meter.totals is None:
            raise RuntimeError("last needs LCACallback(track_parameters=True).")
        return meter.last

    def summary(self) -> str:
        """Tells per layer the share of the loss change, and how the ledger closes, as text."""
        texts = [
            history.summary() if name is None else f"probe {name!r}\n{history.summary()}"
            for name, history in self.histories.items()
        ]
        return "\n\n".join(texts) or "LCA: training has not started."

    @property
    def state_key(self) -> str:
        """Tells several of these callbacks in one Trainer apart."""
        asked = self._settings
        probes = [n or (s if isinstance(s, str) else "own") for n, s in asked.sources.items()]
        return (
            f"LCACallback(probe={'+'.join(probes)}, probe_mode={asked.probe_mode}, "
            f"every_n_steps={asked.every_n_steps}, quadrature={asked.rule.name}, "
            f"group_by={asked.group_by})"
        )

    # -- hooks ------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Reads the probes, evaluates each once, and opens the record."""
        asked = self._settings
        check_trainer(trainer, pl_module, asked)
        grouping = Grouping(pl_module, asked.group_by)
        self._path = Path()
        self._meters, self._scalars = {}, {}
        for name, source in asked.sources.items():
            self._meters[name] = self._make_meter(trainer, pl_module, source, grouping)
            prefix = f"lca_{name}" if self._scalars else "lca"
            self._scalars[name] = Scalars(grouping.names, grouping.sizes, prefix)
        self._board = Board(trainer, self._first_meter("board").history.sizes)
        self.log_dir = self._board.log_dir
        self._board.meta(self._describe(trainer, pl_module, grouping), trainer.global_step)
        self._gallery = Gallery(trainer, self.log_dir, draws=asked.figures)
        if asked.custom_scalars and self.log_dir is not None:
            lay_out(next(iter(self._scalars.values())).labels, self.log_dir)
        self._x = self._logged_at = _x_axis(trainer)
        self._interval = asked.log_every_n_steps or trainer.log_every_n_steps
        self._cost = Cost(
            asked.every_n_steps, asked.tolerance is not None, lambda: _synchronize(pl_module.device)
        )

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Opens a segment: only copies, since graphs may still be alive."""
        if not self._path.is_open:
            self._opened_at = trainer.global_step
            self._path.open(live_weights(pl_module))

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Closes the segment if it is due, measures it, and logs on the interval."""
        if self._cost is not None:
            self._cost.enter()
        gradients = None
        done = trainer.global_step - self._opened_at
        if self._path.is_open and done >= self._settings.every_n_steps:
            gradients = self._measure(trainer, pl_module)
            self._x = _x_axis(trainer)
            every = self._interval
            if every and (self._x + 1) // every > self._logged_at // every:
                self._log()
                self._logged_at = self._x + 1
            if self._gallery is not None and self._gallery.due(trainer.global_step):
                self._show(trainer.global_step)
        self._record()
        if self._cost is not None:
            self._cost.leave(gradients)
            if line := self._cost.line():
                self._cost = None
                flavours.of(trainer, ".utilities.rank_zero").rank_zero_info(line)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Measures what is left of the last chord, logs it and closes the record."""
        if self._path.is_open and trainer.global_step > self._opened_at:
            self._measure(trainer, pl_module)
            self._x = max(self._x, _x_axis(trainer) - 1)  # The last batch is counted by now.
        self._log()
        self._show(trainer.global_step, last=True)
        self._finish()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Writes what was measured; the user's own error stays on top."""
        try:
            self._finish()
        except Exception as error:
            warnings.warn(f"LCA: the record could not be finished: {error!r}", stacklevel=2)

    # -- inside -----------------------------------------------------------------------------------

    def _make_meter(self, trainer: Any, module: Any, source: Any, grouping: Grouping) -> Meter:
        asked = self._settings
        batches = read_batches(source, trainer, asked.probe_batches, asked.seed)
        probe = Probe(
            trainer,
            module,
            batches,
            mode=asked.probe_mode,
            loss_fn=asked.loss_fn,
            seed=asked.seed,
        )
        probe.check()
        detail = Detail(
            module,
            grouping,
            neurons=asked.neurons,
            weights=asked.track_parameters,
            seed=asked.seed,
        )
        return Meter(
            probe,
            grouping,
            detail,
            Distributions(module),
            asked.rule,
            tolerance=asked.tolerance,
            max_splits=asked.max_splits,
            track_parameters=asked.track_parameters,
        )

    def _measure(self, trainer: Any, pl_module: Any) -> int:
        """Measures the open segment with every probe; gives the gradients it took, audits apart."""
        segment, continues = self._path.close(live_weights(pl_module))
        due = self._gallery is not None and self._gallery.due(trainer.global_step)
        before = sum(meter.gradients for meter in self._meters.values())
        for meter in self._meters.values():
            meter.measure(segment, continues, trainer.global_step, spread=due)
        return sum(meter.gradients for meter in self._meters.values()) - before

    def _collect(self) -> None:
        """Copies what was measured since the last time to the host."""
        for name, meter in self._meters.items():
            if meter.pending:
                rows = meter.collect()
                self._scalars[name].update(rows)
                if self._board is not None:
                    self._board.add(name, rows)

    def _log(self) -> None:
        self._collect()
        values: dict[str, float] = {}
        for scalars in self._scalars.values():
            values |= scalars.take()
        if values and self._board is not None:
            self._board.scalars(values, self._x)
        self._close_windows()

    def _show(self, step: int, *, last: bool = False) -> None:
        """Shows the figures and tables of an occasion, or of the end."""
        if self._gallery is None:
            return
        histories = {self._scalars[n].prefix: h for n, h in self.histories.items()}
        spreads = [meter.take_distributions() for meter in self._meters.values()]
        for (prefix, history), spread in zip(histories.items(), spreads, strict=True):
            self._gallery.show(prefix, history, spread, self._x)
        self._gallery.draw(histories, self._x, last=last)
        self._gallery.turn(step)

    def _close_windows(self) -> None:
        """Ends the windows of finer sums; `_collect` comes first."""
        for name, meter in self._meters.items():
            windows = meter.take_windows()
            if self._board is not None:
                self._board.add_windows(name, windows)

    def _record(self) -> None:
        """Writes to the record when a chunk is full, or waits for long."""
        board = self._board
        if board is None:
            return
        waiting = [meter.pending + board.waiting(name) for name, meter in self._meters.items()]
        if board.overdue or max(waiting) >= board.chunk_steps:
            self._collect()
            if not self._interval:
                self._close_windows()
            board.write(everything=board.overdue)

    def _finish(self) -> None:
        self._path.abandon()
        self._collect()
        self._close_windows()
        if self._board is not None:
            self._board.write(everything=True)
            self._board.close()
            self._board = None

    def _describe(self, trainer: Any, module: Any, grouping: Grouping) -> dict[str, Any]:
        """Gives what a reader of the record must know, as JSON."""
        return {
            "version": 1,
            "first_step": trainer.global_step,
            "probes": list(self._settings.sources),
            "group_by": self._settings.group_by,
            "groups": grouping.names,
            "sizes": grouping.sizes,
            "shapes": {n: list(p.shape) for n, p in module.named_parameters()},
            "windows": self._first_meter("meta").windows,
            "modules": {n: type(m).__name__ for n, m in module.named_modules()},
            "settings": self._settings.describe(),
        }

    def _first_meter(self, what: str) -> Meter:
        if not self._meters:
            raise RuntimeError(
                f"{what} is there once training has started: call trainer.fit first."
            )
        return next(iter(self._meters.values()))


def _x_axis(trainer: Any) -> int:
    """Gives the step at which `self.log` logs this batch, so that LCA lines up with it."""
    # Private; LearningRateMonitor uses the same. global_step counts optimizers and is one ahead.
    stepped = getattr(trainer.fit_loop.epoch_loop, "_batches_that_stepped", None)
    return int(trainer.global_step if stepped is None else stepped)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
