"""One training from its start to its end: when segments open and close, and what is measured.

The callback's hooks say what happens; what it means for the measure is decided here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_lca.measure.allocation import Segment
from lightning_lca.measure.groups import Grouping
from lightning_lca.measure.motion import Steps, known
from lightning_lca.measure.parameters import (
    LiveWeights,
    any_cut,
    named_modules,
    named_parameters,
    parts,
)
from lightning_lca.measure.quadrature import RULES, Quadrature, as_quadrature
from lightning_lca.measure.shares import Shares
from lightning_lca.probe.batches import ProbeBatches
from lightning_lca.probe.loss import NoLossError
from lightning_lca.probe.precision import Rounding
from lightning_lca.probe.probe import Probe
from lightning_lca.record.history import History
from lightning_lca.record.sampling import signs
from lightning_lca.reporting.reporter import Reporter, x_axis
from lightning_lca.runtime.lightnings import (
    LightningModule,
    MisconfigurationException,
    Trainer,
    tell,
    warn,
)
from lightning_lca.runtime.processes import Ranks
from lightning_lca.runtime.signals import defer_signals
from lightning_lca.training.budget import Budget, Choice, StepTimer, Trials
from lightning_lca.training.meter import Measurement, Meter
from lightning_lca.training.settings import Chords, Settings
from lightning_lca.training.snapshots import Snapshots

_FIRST = 20  # Measured steps that tell how large the probe should be.
_WAYS = {"recorded": "from a recording of its operations; the user's code runs to audit it"}


@dataclass(frozen=True)
class Look:
    """What the first look at a probe's loss tells.

    Attributes:
        terms: Names of the terms of the loss.
        shares: Of the loss that each batch is [batches].
        way: How it is evaluated, in words.
        data: What a checkpoint keeps of the probe's batches, where it was asked for.
    """

    terms: tuple[str, ...]
    shares: tuple[float, ...]
    way: str
    data: dict[str, Any] = field(default_factory=dict)


class Training:
    """Opens a segment before an optimizer step, and measures it at the end of a batch.

    Attributes:
        meters: By name of the probe; None is the name of a single one.
        reporter: Writes what they measure.
        snapshots: The motion of the weights.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        settings: Settings,
        chords: Chords,
        *,
        key: str = "",
        place: int = 0,
        kept: dict[str, Any] | None = None,
        writes: bool = True,
        before: dict[str | None, History] | None = None,
    ) -> None:
        """Prepares what needs no look at the loss; every rank must call this.

        Args:
            trainer: The Trainer that starts.
            module: Its LightningModule.
            settings: What was asked for.
            chords: How long a segment is; a budget writes its choice there.
            key: Tells this callback's record from another's.
            place: Which one of the Trainer's callbacks this is, from 0.
            kept: What `state` returned when a checkpoint was saved; None for a new training.
            writes: False: another process keeps the record of what is measured here.
            before: The histories up to there, where they are in memory.
        """
        if kept and kept.get("every_n_steps") and kept.get("quadrature") and chords.every is None:
            settings = replace(settings, rule=as_quadrature(kept["quadrature"]))
        self._settings = settings
        self._before = before
        self._chords = chords
        self._kept = kept
        self._is_cut = any_cut(module)
        self._rounding = Rounding(module)
        self._ranks = Ranks.of(trainer)
        names = [n for n in named_parameters(module) if n in settings.selection]
        self._grouping = Grouping(module, settings.group_by, trainer.global_rank, names)
        self.snapshots = Snapshots()
        self._steps = Steps(trainer.optimizers if "part" in settings.breakdown else ())
        self.meters: dict[str | None, Meter] = {
            name: self._meter(module, self._probe(trainer, module)) for name in settings.sources
        }
        self._batches = {
            name: ProbeBatches(source, settings.probe_batches, settings.seed, self._ranks)
            for name, source in settings.sources.items()
        }
        for batches in self._batches.values():
            batches.begin(trainer)
        self._told_of_data: set[str | None] = set()
        self._told_of_halves = self._told_of_futility = False
        self._catches_up = False  # Whether the next step ends a chord of before a resume.
        self.reporter = Reporter(
            trainer,
            self.meters,
            self._grouping,
            self._metadata(module, key),
            place=place,
            record=kept["record"] if kept else None,
            interval=settings.log_every_n_steps,
            figures=settings.figures,
            custom_scalars=settings.custom_scalars,
            writes=writes,
            live=settings.live,
        )
        self._measured_to = trainer.global_step  # Last step that some probe has measured.
        self._live = LiveWeights(module, settings.selection)
        self._trained: dict[str, Tensor] = {}
        self._opened_at = 0
        self._splits_chords = "part" in settings.breakdown and settings.every_n_steps > 1
        self._split_to = 0  # Steps of chords are split up to this one.
        # Each with an optimizer of its own, which steps as soon as the gradient is there.
        self._moves_in_backward = any(
            getattr(p, "_post_accumulate_grad_hooks", None) for p in module.parameters()
        )
        self._counter = StepCounter(trainer, module, self._before_step)
        self._timer: StepTimer | None = StepTimer(module.device)
        self._budget: Budget | None = None
        self._trials: dict[Quadrature, dict[str | None, Meter]] = {}
        self._told_of: dict[str | None, Look] = {}  # By the process that measures.
        self._took_rest = False

    def begin(self, trainer: Trainer, module: LightningModule) -> None:
        """Opens the record, and goes on where a checkpoint left off."""
        if self._steps.unknown:
            tell(
                trainer,
                f"LCA: steps of {', '.join(dict.fromkeys(self._steps.unknown))} cannot be split: "
                f'their credit is one part, "step". Known are {known()} of torch.optim.',
            )
        kept, self._kept = self._kept, None
        started_at = first_step = trainer.global_step
        if kept:
            started_at = max(started_at, kept["steps"])
            # A training that ended in mid-chord measured the rest of it; one that goes on from
            # there takes up the chord, and that rest no longer counts.
            measured = [state["last_step"] for state in kept["probes"].values()]
            first_step = min([started_at, *measured])
        before, self._before = self._before, None
        histories = self.reporter.resume(kept, started_at, first_step, before) if kept else {}
        for name, state in kept["probes"].items() if kept else ():
            if name or None in self.meters:
                meter = self.meters[name or None]
                meter.learn(state.get("terms", ()), state.get("shares", ()))
        self.reporter.note_columns(**self._columns)
        self.reporter.begin(first_step)
        opened = kept["open"] if kept else None
        if kept:
            self._resume(kept, histories)
        if opened:
            self._opened_at = opened["at"]
            self.snapshots.resume(opened["weights"], self._live())
            # The checkpoint may have been saved after a step was done and before it was measured.
            least = self._chords.every
            self._catches_up = least is not None and self._counter.done - self._opened_at >= least
        self._split_to = self._counter.done
        self._timer = StepTimer(module.device)
        if self._chords.every is None:
            self._budget = Budget(
                self._settings,
                self.snapshots,
                self._timer,
                Trials(self._trial, self._commit, self._miss, self._largest),
            )
            if opened:
                self._budget.resume(opened, self._counter.done)

    # -- what happens -----------------------------------------------------------------------------

    def look(self, module: LightningModule) -> None:
        """Notes which weights are trained: later, a toggled optimizer may hide some."""
        if not self.snapshots.is_open or self._catches_up:
            self._trained = self._live()

    def start(self, module: LightningModule, batch: Any) -> None:
        """Takes the start of a batch: a segment opens here if the backward pass moves weights."""
        if self._moves_in_backward or not module.automatic_optimization:
            self.look(module)  # Else right before the optimizer's step.
        if not self._is_prepared:
            for batches in self._batches.values():
                batches.pass_by(batch)
        if self._moves_in_backward:
            self.open()

    @defer_signals()
    def open(self) -> None:
        """Starts a segment where the weights are, unless one is open: only copies.

        Raises:
            MisconfigurationException: The model trains nothing from the start.
        """
        # In mid-chord after a resume nobody has looked yet.
        looked = self._trained or self.snapshots.is_open
        if not looked:  # What is measured rests, while others train, or nothing does.
            if self._settings.selection.is_everything and not self._is_prepared:
                raise MisconfigurationException(
                    "The model has no trainable weight: every parameter has requires_grad=False. "
                    "LCA needs weights that move; unfreeze some before training starts."
                )
            return
        if self._catches_up:
            self.snapshots.mark(self._trained, self._counter.done)
        if self._splits_chords and self.snapshots.is_open:
            self.snapshots.begin_step(self._live())
        if not self.snapshots.is_open:
            self._opened_at = self._counter.done
            self.snapshots.open(self._trained)
            self._steps.clear()
            if self._budget is not None:
                self._budget.begin(self._opened_at, self.snapshots.start)

    def close(self, trainer: Trainer, module: LightningModule, *, last: bool = False) -> None:
        """Closes the segment at the end of a batch if it is due, measures it, and logs.

        Args:
            trainer: The Trainer.
            module: Its LightningModule.
            last: Measures what is left of a chord, and leaves logging to the end of training.
        """
        done = self._counter.done
        live = self._live()
        if not live:
            self.snapshots.drop()
            for meter in self.meters.values():
                meter.forget_chord()
        if not (self._is_prepared or self._prepare(trainer, live)):
            return
        if self._budget is not None and not last:
            chosen = self._budget.take(module, live, done)
            if self._choose(trainer, self._budget, chosen) and not self.snapshots.is_open:
                self.reporter.log(x_axis(trainer), done)
        if self.snapshots.is_open and not self._catches_up:
            self._split_step(live, done)
        least = 1 if last or self._catches_up else self._chords.every
        if not self.snapshots.is_open or least is None or done - self._opened_at < least:
            if not last:
                self.reporter.record()
                self.reporter.show()
            return
        if self._timer is not None and not last:
            self._timer.enter(done - self._opened_at)
        whole = self.snapshots.close(live)
        pieces = self.snapshots.pieces(whole, done)
        begun = pieces[1:] if self._catches_up else []  # What goes on after the chord of before.
        self._rounding.look(pieces[0][0])
        before = self._gradients
        for piece, step in pieces[: len(pieces) - len(begun)]:
            spread = step == done and self.reporter.spreads(done)
            try:
                if len(pieces) > 1:
                    piece.at(1.0).write(parts(live))
                # Steps of before a resume are not those that were noted since.
                with self._steps.hidden() if self._catches_up else nullcontext():
                    for meter in self.meters.values():
                        meter.measure(piece, step, spread=spread)
                        self._measured_to = step
            except BaseException:
                whole.at(1.0).write(parts(live))
                # A checkpoint saved now says where it began: it is measured when training resumes.
                if self._measured_to < step:
                    self.snapshots.reopen(piece)
                raise
            self._opened_at = step
            self._tell_of_panels(trainer, step)
        if begun:
            whole.at(1.0).write(parts(live))
            self.snapshots.reopen(begun[0][0])
            self._split_step(live, done)
        self._catches_up = False
        if begun and done - self._opened_at >= (1 if last else self._chords.every or 1):
            self.close(trainer, module, last=last)
        elif not last:
            self.reporter.log(x_axis(trainer), done)
            self.reporter.record()
            self.reporter.show()
            self._tell_of_data(trainer)
            if self._timer is not None:
                self._timer.leave(round((self._gradients - before) / len(pieces)))
                self._tell(trainer, self._timer)

    # -- where others measure, or what they measured is written ----------------------------------

    def prepare(self, trainer: Trainer) -> bool:
        """Looks at the loss for the first time, and measures nothing; False: not yet."""
        if not (self._is_prepared or self._prepare(trainer, self._live())):
            return False
        for meter in self.meters.values():
            meter.watch()
        return True

    def begin_at(self, index: int) -> None:
        """Takes its stand where the open segment ends, as if it had been measured, with all before.

        Args:
            index: How many segments lie before; the last was opened, where it is known, and is not
                measured.
        """
        before = self.snapshots.close(self._live()) if self.snapshots.is_open else None
        for meter in self.meters.values():
            meter.begin_at(index, before)
        if index == 0:
            self.snapshots.drop()

    @property
    def carries(self) -> str:
        """Why another process that begins here would not go on as this one; "" if it would."""
        return next(filter(None, (meter.carries for meter in self.meters.values())), "")

    @property
    def ends(self) -> list[tuple[float, float]]:
        """Loss, and length of its gradient, at the end of the latest segment, for every probe."""
        return [meter.end for meter in self.meters.values()]

    def looks(self, *, data: bool = False) -> dict[str | None, Look]:
        """Returns what the first look at each probe's loss told; ``data``: with its batches."""
        return self._told_of or {
            name: Look(
                meter.probe.terms,
                meter.probe.shares,
                meter.probe.way,
                self._batches[name].state() if data else {},
            )
            for name, meter in self.meters.items()
        }

    def take_looks(self, looks: Mapping[str | None, Look]) -> None:
        """Takes what another process found, which measures in place of this one."""
        is_first, self._told_of = not self._told_of, dict(looks)
        if is_first:
            self._note_terms()
            self._note_ways()

    def take(
        self, trainer: Trainer, found: Mapping[str | None, Measurement], *, rest: bool = False
    ) -> None:
        """Takes a segment that another process has measured, and logs it as `close` does.

        Args:
            trainer: The Trainer, whose step is that of the segment's end.
            found: Of every probe.
            rest: Whether it is what is left of a chord at the end of training.
        """
        for name, meter in self.meters.items():
            meter.take(found[name])
        self._opened_at = self._measured_to = self._counter.done
        self._took_rest = rest
        if not rest:
            self.reporter.log(x_axis(trainer), self._counter.done)
            self.reporter.record()

    def _split_step(self, live: dict[str, Tensor], done: int) -> None:
        """Notes what the latest step of a chord was made of, if there was one."""
        if not self._splits_chords or done <= self._split_to:
            return
        step = self.snapshots.step(live)
        for meter in self.meters.values():
            meter.add_step(step, lambda: self.snapshots.look(live))
        self._steps.clear()
        self._split_to = done

    @property
    def done(self) -> int:
        """Optimizer steps since the start of training."""
        return self._counter.done

    @property
    def waits_for_batches(self) -> bool:
        """Whether a probe keeps batches of training, and too few have passed by."""
        return not all(batches.is_ready for batches in self._batches.values())

    @property
    def _is_prepared(self) -> bool:
        return all(meter.probe.is_prepared for meter in self.meters.values())

    def _prepare(self, trainer: Trainer, live: dict[str, Tensor]) -> bool:
        """Looks at the loss for the first time, once a step was taken; False: not yet.

        By then all that training prepares is prepared: start hooks of the module and of callbacks
        have run, and batches have passed.
        """
        if not self.snapshots.is_open or self._counter.done <= self._opened_at:
            return False
        if self.waits_for_batches:
            return False
        segment = self.snapshots.look(live)
        for name, meter in self.meters.items():
            if not (meter.probe.is_prepared or self._look_at(meter.probe, name, segment)):
                return False
        self._note_terms()
        for name, way in self._note_ways().items():
            which = "the probe" if name is None else f"probe {name!r}"
            tell(trainer, f"LCA: the loss on {which} is evaluated {_WAYS.get(way, way)}.")
        return True

    def _look_at(self, probe: Probe, name: str | None, segment: Segment) -> bool:
        """Looks for batches that have a loss; False: the next ones that pass may."""
        batches = self._batches[name]
        while batches.is_ready:
            try:
                probe.prepare(batches.take(), segment, moved=batches.moved)
            except NoLossError as error:
                try:
                    batches.another()
                except MisconfigurationException as given_up:
                    raise MisconfigurationException(f"{error} {given_up}") from None
            else:
                if batches.is_another:
                    warn(
                        "LCA: the probe's batches are not those of before the checkpoint, since "
                        "they could not be kept in it; what that changes is booked as drift."
                    )
                return True
        return False

    def end_epoch(self, trainer: Trainer, module: LightningModule) -> None:
        """Measures what is left of the last chord while what the epoch has made is still there.

        That is for a loss that the user's code must give: a recording needs nothing of it.
        """
        at, most = trainer.global_step, trainer.max_steps
        epochs = trainer.max_epochs
        is_last = trainer.should_stop or 0 <= most <= at
        is_last = is_last or (epochs is not None and 0 <= epochs <= trainer.current_epoch + 1)
        by_code = [m for m in self.meters.values() if not m.probe.is_recorded]
        if is_last and by_code and self._budget is None and self._is_prepared:
            self.close(trainer, module, last=True)

    def end(self, trainer: Trainer, module: LightningModule) -> None:
        """Measures what is left of the last chord, logs it and closes the record."""
        self._counter.leave()
        self._steps.leave()
        for meter in self.meters.values():
            meter.rest()
        x, done = 0, self._counter.done
        if self._budget is not None:
            chosen = self._budget.end(self._live(), done)
            if self._choose(trainer, self._budget, chosen):
                x = x_axis(trainer) - 1
            self._chords.is_final = False  # A training that goes on from here chooses for itself.
        has_rest = self.snapshots.is_open and done > self._opened_at
        if has_rest:
            self.close(trainer, module, last=True)
        if has_rest or self._took_rest:
            x = x_axis(trainer) - 1  # The last batch is counted by now.
        self._note_halving()
        if self._is_prepared or self._told_of:
            self._note_ways()
        self._leave_places()
        self.reporter.end(x, done)

    def _leave_places(self) -> None:
        for meter in self.meters.values():
            meter.forget_places()

    def abort(self) -> None:
        """Writes what was measured, after an error that is none of ours; raises nothing."""
        self._counter.leave()
        self._steps.leave()
        self._leave_places()
        try:
            self.reporter.close()
        except Exception as error:
            warn(f"LCA: the record could not be finished: {error!r}")

    @property
    def histories(self) -> dict[str | None, History]:
        """Views of what was measured, by probe: what is measured later does not join them."""
        return {name: meter.history.as_it_is() for name, meter in self.meters.items()}

    def goes_on_in(self, trainer: Trainer) -> bool:
        """Whether a training that starts now goes on where this one is, in the same Trainer."""
        return self._counter.watches(trainer) and 0 < self._counter.done == trainer.global_step

    def state(self) -> dict[str, Any]:
        """Returns what a checkpoint needs, as plain values and tensors."""
        opened = None
        # Of weights that are cut, a checkpoint of this process would hold a part only: a chord that
        # was open then ends there, and what it did to the loss is booked as drift.
        if self._is_cut:
            pass
        elif self._budget is not None and self._budget.began_at is not None:
            opened = {"at": self._budget.began_at, "weights": dict(self._budget.start)}
        elif self.snapshots.is_open:
            weights = {n: w.cpu().clone() for n, w in self.snapshots.start.items()}
            opened = {"at": self._opened_at, "weights": weights}
        reported = self.reporter.state()
        looks = self.looks(data=True)
        for name, meter in self.meters.items():
            data = {"data": looks[name].data}
            reported["probes"][name or ""] |= meter.state() | data
        chosen = self._chords.every if self._chords.is_final else None
        own = {"open": opened, "steps": self._counter.done, "every_n_steps": chosen}
        # A rule of the user's own is among the arguments.
        name = self._chords.rule.name
        return reported | own | {"quadrature": name if name in RULES else None}

    # -- how it is set up -------------------------------------------------------------------------

    def _probe(self, trainer: Trainer, module: LightningModule) -> Probe:
        settings = self._settings
        return Probe(
            trainer,
            module,
            mode=settings.probe_mode,
            loss_fn=settings.loss_fn,
            seed=settings.seed,
            ranks=self._ranks,
            whole=settings.sees_whole,  # All ranks must refine alike.
            selection=settings.selection,
            splits="term" in settings.breakdown,
        )

    def _meter(
        self, module: LightningModule, probe: Probe, settings: Settings | None = None
    ) -> Meter:
        settings = self._settings if settings is None else settings
        splits = settings.splits
        shares = Shares(splits, self._grouping, self._steps) if splits else None
        meter = Meter(probe, module, settings, self._grouping, self._ranks, shares)
        meter.learn(probe.terms, probe.shares)
        return meter

    def _metadata(self, module: LightningModule, key: str) -> dict[str, Any]:
        """Returns what a reader of the record must know, as JSON."""
        return {
            "version": 1,
            "callback": key,
            "probes": list(self._settings.sources),
            "group_by": self._grouping.by,
            "groups": self._grouping.names,
            "sizes": self._grouping.sizes,
            "layers": self._grouping.layers,
            "shapes": {n: list(p.shape) for n, p in named_parameters(module).items()},
            "windows": next(iter(self.meters.values())).windows,
            "modules": {n: type(m).__name__ for n, m in named_modules(module).items()},
            "settings": self._settings.describe(),
            **self._columns,
        }

    def _resume(self, kept: dict[str, Any], histories: dict[str | None, History]) -> None:
        """Takes up counters, sums and histories of a checkpoint."""
        for name, meter in self.meters.items():
            state, history = kept["probes"].get(name or ""), histories.get(name)
            if state is None:
                continue
            self._batches[name].resume(state.get("data", {}))
            taken = meter.resume(state, history)
            if (taken or not kept["record"]) and meter.history.last_step < state["last_step"]:
                warn(
                    f"LCA: the record ends at step {meter.history.last_step}, since it could not "
                    "be written or was cut off. The history goes on without the steps from there "
                    f"to {state['last_step']} that were measured before the checkpoint."
                )
            self.reporter.go_on(name, taken, state, kept["record"])
        self._counter.resume(kept["steps"])
        if self._chords.every is None and kept.get("every_n_steps") is not None:
            self._settle(Choice(int(kept["every_n_steps"]), self._settings.rule))

    # -- what it means ----------------------------------------------------------------------------

    @property
    def _gradients(self) -> int:
        """Gradients that were spent on measuring, audits apart."""
        return sum(meter.gradients for meter in self.meters.values())

    @defer_signals()
    def _before_step(self) -> None:
        """Opens a segment at a step of manual optimization, or marks where the open one passes."""
        done = self._counter.done
        if self._settings.segments == "step" and self.snapshots.is_open and done > self._opened_at:
            self.snapshots.mark(self._trained, done)
        self.open()

    def _choose(self, trainer: Trainer, budget: Budget, chosen: Choice | None) -> bool:
        """Goes on with the every_n_steps and the rule that were chosen; False if none is yet."""
        if self.snapshots.is_open and budget.began_at is not None:
            self._opened_at = budget.began_at
        if chosen is None:
            return False
        tell(trainer, budget.line(chosen))
        self._settle(chosen)
        self._budget, self._timer = None, StepTimer(budget.device)
        return True

    def _note_halving(self) -> None:
        """Records whether finer panels leave less over, as far as audits have seen it."""
        self.reporter.collect()
        seen = [meter.history.settings.get("halving") for meter in self.meters.values()]
        if any(value is not None for value in seen):
            self.reporter.note(halving=max(value for value in seen if value is not None))

    def _note_ways(self) -> dict[str | None, str]:
        """Records how the probes are evaluated, which a loss that changes may change."""
        ways = {name: look.way for name, look in self.looks().items()}
        for name, meter in self.meters.items():
            meter.history.settings["evaluated"] = ways[name]
        self.reporter.note(evaluated=next(iter(ways.values())))
        return ways

    def _note_terms(self) -> None:
        """Takes what the first look at the loss told of its terms, and of batches.

        Raises:
            MisconfigurationException: There are none, and they were asked for.
        """
        before, looks = self._columns, self.looks()
        for name, meter in self.meters.items():
            if self._settings.needs_terms and not looks[name].terms:
                raise MisconfigurationException(
                    'breakdown="term" splits credit over the terms of a loss, and loss_fn returned '
                    "a single number. Return {term: scalar}, such as "
                    '{"cross_entropy": ..., "penalty": ...}.'
                )
            meter.learn(looks[name].terms, looks[name].shares)
        terms = {name: look.terms for name, look in looks.items()}
        if len({*terms.values()}) > 1:
            raise MisconfigurationException(
                f"loss_fn returned other terms on one probe than on another: {terms}. Return the "
                "same ones in the same order on every probe, zero where one is off."
            )
        if self._columns != before:
            self.reporter.note_columns(**self._columns)

    @property
    def _columns(self) -> dict[str, Any]:
        """What rows of the record hold beside credit: names of shares, and batches of probes."""
        batches = {name or "": meter.batches for name, meter in self.meters.items()}
        return {
            "breakdowns": next(iter(self.meters.values())).breakdowns,
            "batches": {name: count for name, count in batches.items() if count},
            "closes": self._settings.rule.closes,
        }

    def _settle(self, chosen: Choice) -> None:
        """Goes on with an every_n_steps and a rule, and records them."""
        self._chords.choose(chosen.every, chosen.rule)
        if chosen.rule != self._settings.rule:
            self._settings = replace(self._settings, rule=chosen.rule)
            for meter in self.meters.values():
                if meter.history.settings["quadrature"] != chosen.rule.name:
                    meter.take_rule(self._settings)
            self.reporter.note_columns(**self._columns)
        for meter in self.meters.values():
            meter.history.settings["every_n_steps"] = chosen.every
        self.reporter.note(every_n_steps=chosen.every, quadrature=chosen.rule.name)

    def _trial(self, module: LightningModule, segment: Segment, rule: Quadrature, step: int) -> int:
        """Measures a segment for the time that it takes; the rows wait for `_commit`.

        Returns the gradients that it took.
        """
        if rule not in self._trials:
            self._trials[rule] = self._meters_by(module, rule)
        trials = self._trials[rule].values()
        before = sum(meter.gradients for meter in trials)
        for meter in trials:
            meter.measure(segment, step)
            meter.collect()
        return sum(meter.gradients for meter in trials) - before

    def _meters_by(self, module: LightningModule, rule: Quadrature) -> dict[str | None, Meter]:
        """Makes meters of the same probes that measure by a rule, and go on from what is there."""
        settings = replace(self._settings, rule=rule)
        made = {n: self._meter(module, m.probe, settings) for n, m in self.meters.items()}
        for name, meter in self.meters.items():
            if len(meter.history):
                made[name].resume(meter.state(), meter.history.as_it_is())
        return made

    def _miss(self, module: LightningModule, segment: Segment | None, rule: Quadrature) -> float:
        """Tells how far layers' credits were off in the steps that were tried, as a share.

        Against those by the rule that was asked for, step by step.

        Args:
            module: The LightningModule.
            segment: Of these steps, measured as one chord; None: step by step, too.
            rule: The rule to compare.
        """
        meters = self._trials.get(rule, {})
        if segment is not None:
            for tried in self._trials.values():
                for meter in tried.values():
                    meter.let_go()
            meters = self._meters_by(module, rule)
            for meter in meters.values():
                meter.measure(segment, self._counter.done)
                meter.collect()
        worst = 0.0
        for name, meter in self._trials[self._settings.rule].items():
            before = len(self.meters[name].history)
            best, other = (
                m.history.shown.sums(m.history.allocated[before:]) for m in (meter, meters[name])
            )
            if segment is not None:
                best = best.sum(0, keepdims=True)
            size = float(np.abs(best).sum())
            worst = max(worst, float(np.abs(other - best).sum()) / size if size else 0.0)
        return worst

    def _commit(self, rule: Quadrature | None) -> None:
        """Takes what was tried by a rule for measured; None: forgets it all."""
        trials, self._trials = self._trials.get(rule) if rule is not None else None, {}
        if trials is not None:
            self.meters = trials
            self._measured_to = max(meter.history.last_step for meter in trials.values())
            self.reporter.replace(trials)

    def _largest(self, number: int) -> int:
        """Finds the largest of the ranks' numbers; every rank must call this."""
        return self._ranks.largest(number, next(iter(self.meters.values())).probe.device)

    def _tell_of_panels(self, trainer: Trainer, step: int) -> None:
        """Says once that a step was measured in two halves, and that finer panels gain nothing."""
        if not self._told_of_halves and any(m.halved for m in self.meters.values()):
            self._told_of_halves = True
            tell(
                trainer,
                f"LCA: step {step} left more of the loss change unexplained than all layers "
                "explained, as first steps of networks with normalisation may: it is measured in "
                "two halves, at more gradients. history.splits tells which steps are.",
            )
        if not self._told_of_futility and any(m.is_futile for m in self.meters.values()):
            self._told_of_futility = True
            after = "no step is halved any more"
            if self._settings.tolerance is not None:
                after = "one step in 20 is refined, the others are measured on one panel"
            warn(
                "LCA: in several steps in a row finer panels explained no more of the loss change: "
                "the gradient is not the derivative of the loss here (detach(), custom backward "
                f"passes), or the loss has jumps. From now on {after}; the residual shows the rest."
            )

    def _tell_of_data(self, trainer: Trainer) -> None:
        """Says once, from the first steps, how many examples a probe of several batches needs."""
        for name, meter in self.meters.items():
            if name in self._told_of_data or len(meter.history) < _FIRST:
                continue
            self._told_of_data.add(name)
            found = signs(meter.history, meter.probe.examples)
            if found is None:
                continue
            more = "for 95% it would take more than can be told"
            if found.examples is not None:
                more = f"for 95% it takes about {found.examples:,}"
            which = "the probe" if name is None else f"probe {name!r}"
            tell(
                trainer,
                f"LCA: the {meter.probe.examples:,} examples of {which} tell the sign of a layer's "
                f"credit in a step right in about {found.right:.0%} of cases, by how far its "
                f"batches lie apart; {more}.",
            )

    def _tell(self, trainer: Trainer, timer: StepTimer) -> None:
        """Says once what measuring costs, or that it costs far more than it should."""
        if not timer.is_known or self._chords.every is None:
            return
        self._timer = None
        if self._settings.max_overhead is None:
            tell(trainer, timer.line(refines=self._settings.tolerance is not None))
        elif trainer.is_global_zero and (
            excess := timer.excess(self._chords.every, self._settings.max_overhead)
        ):
            warn(excess)


class StepCounter:
    """Counts optimizer steps.

    Lightning counts those that go through it. In manual optimization a step may also be taken on
    the bare torch optimizer, which Lightning does not see: there torch's own hook tells.
    """

    def __init__(
        self, trainer: Trainer, module: LightningModule, before: Callable[[], None]
    ) -> None:
        """Watches the optimizers of a training with manual optimization.

        Args:
            trainer: The Trainer that runs.
            module: Its LightningModule.
            before: What to do before a step, while the weights are still where they were.
        """
        self._trainer = trainer
        self._before = before
        self._seen = 0
        self._start = trainer.global_step
        optimizers = [] if module.automatic_optimization else trainer.optimizers
        self._handles = [
            optimizer.register_step_pre_hook(self._on_step)
            for optimizer in optimizers
            if isinstance(optimizer, torch.optim.Optimizer)
        ]

    @property
    def done(self) -> int:
        """Optimizer steps since the start of training."""
        return int(max(self._trainer.global_step, self._start + self._seen))

    def watches(self, trainer: Trainer) -> bool:
        """Whether it is this Trainer whose steps are counted."""
        return trainer is self._trainer

    def resume(self, done: int) -> None:
        """Takes up the count of a checkpoint."""
        self._start = max(self._start, done)

    def leave(self) -> None:
        """Lets go of the optimizers."""
        for handle in self._handles:
            handle.remove()

    def _on_step(self, *_: Any) -> None:
        self._before()
        self._seen += 1
