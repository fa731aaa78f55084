"""LCACallback: opens and closes segments around optimizer steps and wires the rooms together."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path as FilePath
from typing import Any, get_args

import torch
from torch import Tensor

from lightning_lca import flavours, record
from lightning_lca.allocation import Allocation
from lightning_lca.batches import read_batches
from lightning_lca.board import CHUNK_BYTES, CHUNK_SECONDS, CHUNK_STEPS, Board
from lightning_lca.cost import Cost
from lightning_lca.flavours import LightningCallback, MisconfigurationException
from lightning_lca.grouping import GroupBy, Grouping
from lightning_lca.history import History, Rows
from lightning_lca.meter import Meter
from lightning_lca.path import Path
from lightning_lca.probe import Probe, ProbeMode, live_weights
from lightning_lca.quadrature import SIMPSON, Quadrature, as_quadrature
from lightning_lca.scalars import Scalars


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
        track_parameters: Keeps ``totals`` and ``last``, at two more copies of the weights.

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
    ) -> None:
        """Checks the arguments; everything that costs anything waits for the start of training."""
        super().__init__()
        self._sources = _as_sources(probe)
        _check_choice("probe_mode", probe_mode, get_args(ProbeMode))
        _check_choice("group_by", group_by, get_args(GroupBy))
        for name, value in (
            ("probe_batches", probe_batches),
            ("every_n_steps", every_n_steps),
            ("max_splits", max_splits),
            ("log_every_n_steps", 1 if log_every_n_steps is None else log_every_n_steps),
        ):
            _check_count(name, value)
        if loss_fn is not None and not callable(loss_fn):
            raise TypeError(
                "loss_fn must be a function (module, batch) -> scalar, got "
                f"{type(loss_fn).__name__}."
            )
        self._rule = as_quadrature(quadrature)
        if tolerance is not None:
            if not tolerance > 0:
                raise ValueError(
                    "tolerance must be a positive number in loss units, e.g. 1e-3; "
                    f"got {tolerance}."
                )
            if self._rule != SIMPSON:
                raise ValueError(
                    f"A tolerance refines Simpson's rule, got quadrature={self._rule.name!r}. "
                    'Choose quadrature="simpson" or tolerance=None.'
                )
        self._probe_batches = probe_batches
        self._probe_mode: ProbeMode = probe_mode
        self._loss_fn = loss_fn
        self._every = every_n_steps
        self._tolerance = tolerance
        self._max_splits = max_splits
        self._group_by: GroupBy = group_by
        self._log_every = log_every_n_steps
        self._seed = seed
        self._track = track_parameters
        self.log_dir: FilePath | None = None
        self._path = Path()
        self._opened_at = 0
        self._meters: dict[str | None, Meter] = {}
        self._scalars: dict[str | None, Scalars] = {}
        self._unwritten: dict[str | None, list[Rows]] = {}
        self._board: Board | None = None
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
        names = [
            repr(n) if n else s if isinstance(s, str) else "own" for n, s in self._sources.items()
        ]
        return (
            f"LCACallback(probe={'+'.join(names)}, probe_mode={self._probe_mode}, "
            f"every_n_steps={self._every}, quadrature={self._rule.name}, group_by={self._group_by})"
        )

    # -- hooks ------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Reads the probe, evaluates it once, and opens the record."""
        _check_trainer(trainer, pl_module, self._loss_fn is not None)
        grouping = Grouping(pl_module, self._group_by)
        self._path = Path()
        self._meters, self._scalars, self._unwritten = {}, {}, {}
        for name, source in self._sources.items():
            batches = read_batches(source, trainer, self._probe_batches, self._seed)
            probe = Probe(
                trainer,
                pl_module,
                batches,
                mode=self._probe_mode,
                loss_fn=self._loss_fn,
                seed=self._seed,
            )
            probe.check()
            self._meters[name] = Meter(
                probe,
                grouping,
                self._rule,
                tolerance=self._tolerance,
                max_splits=self._max_splits,
                track_parameters=self._track,
            )
            prefix = "lca" if not self._scalars else f"lca_{name}"
            self._scalars[name] = Scalars(grouping.names, grouping.sizes, prefix)
            self._unwritten[name] = []
        self._chunk = max(1, min(CHUNK_STEPS, CHUNK_BYTES // (8 * len(grouping.names))))
        self._board = Board(trainer)
        self.log_dir = self._board.log_dir
        self._board.meta(self._describe(trainer, pl_module, grouping), trainer.global_step)
        self._wrote = time.monotonic()
        self._logged_at = _x_axis(trainer)
        self._x = self._logged_at
        self._cost = Cost(self._every, lambda: _synchronize(pl_module.device))

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
        if self._path.is_open and trainer.global_step - self._opened_at >= self._every:
            gradients = self._measure(trainer, pl_module)
            self._x = _x_axis(trainer)
            interval = self._log_every or trainer.log_every_n_steps
            if interval and (self._x + 1) // interval > self._logged_at // interval:
                self._log()
                self._logged_at = self._x + 1
        overdue = time.monotonic() - self._wrote > CHUNK_SECONDS
        if overdue or self._waiting() >= self._chunk:
            self._collect()
            self._write(everything=overdue)
        if self._cost is not None:
            self._cost.leave(gradients)
            if line := self._cost.line():
                self._cost = None
                flavours.of(trainer, ".utilities.rank_zero").rank_zero_info(line)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Measures what is left of the last chord, logs it and closes the record."""
        if self._path.is_open and trainer.global_step > self._opened_at:
            self._measure(trainer, pl_module)
        self._log()
        self._finish()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Writes what was measured; the user's own error stays on top."""
        try:
            self._finish()
        except Exception as error:
            warnings.warn(f"LCA: the record could not be finished: {error!r}", stacklevel=2)

    # -- inside -----------------------------------------------------------------------------------

    def _measure(self, trainer: Any, pl_module: Any) -> int:
        """Measures the open segment with every probe; gives the gradients it took, audits apart."""
        segment, continues = self._path.close(live_weights(pl_module))
        before = sum(meter.gradients for meter in self._meters.values())
        for meter in self._meters.values():
            meter.measure(segment, continues, trainer.global_step)
        return sum(meter.gradients for meter in self._meters.values()) - before

    def _waiting(self) -> int:
        """Counts the measured steps of a probe that are not in the record yet."""
        return max(m.pending + sum(map(len, self._unwritten[n])) for n, m in self._meters.items())

    def _collect(self) -> None:
        for name, meter in self._meters.items():
            if meter.pending:
                rows = meter.collect()
                self._scalars[name].update(rows)
                self._unwritten[name].append(rows)

    def _log(self) -> None:
        self._collect()
        values: dict[str, float] = {}
        for scalars in self._scalars.values():
            values |= scalars.take()
        if values and self._board is not None:
            self._board.scalars(values, self._x)

    def _write(self, everything: bool) -> None:
        """Writes full chunks to the record, or everything there is."""
        for name, parts in self._unwritten.items():
            rows = Rows.join(parts) if parts else None
            while rows is not None and len(rows) >= (1 if everything else self._chunk):
                chunk, rows = rows[: self._chunk], rows[self._chunk :]
                if self._board is not None:
                    sizes = self._meters[name].history.sizes
                    tags = record.chunk_tags(int(chunk.steps[0]), name, chunk.parts(sizes))
                    self._board.chunk(tags, int(chunk.steps[-1]))
            self._unwritten[name] = [rows] if rows is not None and len(rows) else []
        self._wrote = time.monotonic()

    def _finish(self) -> None:
        self._path.abandon()
        self._collect()
        self._write(everything=True)
        if self._board is not None:
            self._board.close()
            self._board = None

    def _describe(self, trainer: Any, module: Any, grouping: Grouping) -> dict[str, Any]:
        return {
            "version": 1,
            "first_step": trainer.global_step,
            "probes": list(self._sources),
            "group_by": self._group_by,
            "groups": grouping.names,
            "sizes": grouping.sizes,
            "shapes": {n: list(p.shape) for n, p in module.named_parameters()},
            "modules": {n: type(m).__name__ for n, m in module.named_modules()},
            "settings": {
                "probe_batches": self._probe_batches,
                "probe_mode": self._probe_mode,
                "every_n_steps": self._every,
                "quadrature": self._rule.name,
                "tolerance": self._tolerance,
                "max_splits": self._max_splits,
                "seed": self._seed,
            },
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


def _as_sources(probe: Any) -> dict[str | None, Any]:
    """Names the probes: a single one None."""
    sources: dict[str | None, Any] = dict(probe) if isinstance(probe, Mapping) else {None: probe}
    if not sources:
        raise ValueError('The probe is empty: got {}. Name at least one, e.g. {"train": "train"}.')
    for name, source in sources.items():
        if isinstance(source, str):
            _check_choice("probe", source, ("train", "val"))
        elif not isinstance(source, Iterable) or isinstance(source, Tensor | Mapping):
            raise TypeError(
                f'probe must be "train", "val", a DataLoader or a list of batches, got '
                f"{type(source).__name__}. One batch is a list of one: probe=[batch]."
            )
        elif not hasattr(source, "dataset") and not isinstance(source, list | tuple):
            sources[name] = list(source)  # An iterator gives its batches only once.
    return sources


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        options = ", ".join(map(repr, choices))
        raise ValueError(f"{name} must be one of {options}; got {value!r}.")


def _check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number, got {value!r}.")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}.")


def _check_trainer(trainer: Any, module: Any, has_loss_fn: bool) -> None:
    """Refuses what cannot be measured, and warns of what cannot be measured well."""
    if not module.automatic_optimization:
        reason = (
            "Running a manual training_step as the probe would step its optimizers. "
            if not has_loss_fn
            else ""
        )
        raise MisconfigurationException(
            f"LCACallback does not measure manual optimization yet (automatic_optimization=False). "
            f"{reason}Remove the callback, or use lightning_lca.allocate in the training_step."
        )
    if trainer.world_size > 1:
        raise MisconfigurationException(
            f"LCACallback measures single-process training for now, got {trainer.world_size} "
            f"processes ({type(trainer.strategy).__name__}). Train with devices=1, or remove the "
            "callback."
        )
    half = sum(
        p.numel()
        for p in module.parameters()
        if p.requires_grad and p.dtype in (torch.float16, torch.bfloat16)
    )
    if half:
        warnings.warn(
            f"LCA: {half:,} weights are half precision. Most of their small updates round away, "
            "and the middle of a step often rounds to one of its ends: credits are coarse. "
            "bf16-mixed keeps the weights in float32.",
            stacklevel=2,
        )
