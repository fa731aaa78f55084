"""The loss surface of a LightningModule: weights in, loss and gradient out, no side effect.

The live parameters are displaced in place and put back by copying: the one way that also works
under torch.compile, tied weights and parametrizations, and that needs no further copy of the
weights.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lca.measure.allocation import Position, Sample, Segment, Weights
from lightning_lca.measure.parameters import (
    LiveWeights,
    any_cut,
    local,
    local_gradient,
    parts,
)
from lightning_lca.measure.selection import EVERYTHING, Selection
from lightning_lca.measure.tensors import HALF, side_by_side, wide
from lightning_lca.probe.batches import batch_sizes, copied
from lightning_lca.probe.fingerprint import fingerprint
from lightning_lca.probe.isolation import Fence, GradientHooks, drop_gradient_hooks, seeded
from lightning_lca.probe.loggers import silent
from lightning_lca.probe.loss import (
    Loss,
    LossFn,
    NoLossError,
    ProbeMode,
    TrainingLoss,
    set_mode,
    surroundings,
)
from lightning_lca.probe.precision import LossScale
from lightning_lca.probe.recording import NotRecordableError, Recorder, Recording
from lightning_lca.runtime.lightnings import (
    LightningModule,
    MisconfigurationException,
    Trainer,
    warn,
)
from lightning_lca.runtime.processes import Ranks


class Probe:
    """A `Field`: the mean loss over fixed batches, as a function of the module's weights.

    Every evaluation sees the same batches, random numbers, buffers and attributes, and leaves
    module, trainer and random streams as it found them. ``p.grad`` is not touched. A mean over
    several batches weighs them by their number of samples.

    `prepare` runs the user's code, and records what it computes where that can be done. From then
    on a recording is evaluated: no code of the user runs, and nothing has to be put back. What
    cannot be recorded runs within a fence, with the live weights displaced. Between evaluations the
    live weights are those at ``segment.stop``: the probe puts those back.

    Weights that are cut over processes travel as the parts that this process holds; the gradient of
    such a part is that of the whole probe, which all ranks evaluate together.

    Attributes:
        gradients: Evaluations with a gradient so far.
        why_not: Why the loss is not recorded, in a few words; None while it is.
        is_lost: Whether the user's code gave no loss when it ran last.
        terms: Names of the terms whose gradients are taken, known from the first look on.
        shares: Of the whole probe's loss that each batch is [batches], of all processes; known from
            then on, too. () where the weights are cut over processes.
        examples: Of the whole probe, as far as batches tell; known with ``shares``.
        watch: While it is set, it gets of every batch its number, its share of the gradient, and
            the weights where the segment stops.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        *,
        mode: ProbeMode = "no_dropout",
        loss_fn: LossFn | None = None,
        seed: int = 0,
        ranks: Ranks | None = None,
        whole: bool = False,
        selection: Selection = EVERYTHING,
        splits: bool = False,
    ) -> None:
        """Looks at nothing yet but the module.

        Args:
            trainer: The Trainer that runs.
            module: Its LightningModule, bare.
            mode: "no_dropout": as training has it, but dropout off; "eval"; "train": dropout on.
            loss_fn: (module, batch) -> scalar or {term: scalar}, whose sum is taken; None:
                training_step.
            seed: Batch j is evaluated on random streams seeded with seed + j.
            ranks: The processes that share the probe; each gets its part of loss and gradient,
                which add up to the whole.
            whole: Adds them up at each evaluation, so that all ranks know loss and gradient of the
                whole probe.
            selection: Which weights are measured; to the loss the others are constants.
            splits: Also takes the gradient of each term, where loss_fn gives several.
        """
        self._trainer = trainer
        self._module = module
        self._mode = mode
        self._splits = splits
        self._other_terms: set[str] = set()  # That loss_fn did not return at first.
        self._objective = TrainingLoss(module, loss_fn)
        self._seed = seed
        self._devices: set[torch.device] = {p.device for p in module.parameters()}
        self._ranks = ranks = ranks or Ranks()
        self.whole = whole
        self._is_cut = any_cut(module)
        # Their gradients are means over the ranks' shares of the data, where sums are wanted.
        self._factor = ranks.world if self._is_cut else 1
        half = {p.dtype for p in module.parameters()} | {_autocast_type(trainer)}
        self._scale = LossScale(self.device) if torch.float16 in half else None
        self._watching = True
        self._written: set[int] = set()  # Constant parameters that the loss was seen to write to.
        self._by_backward = self._is_cut  # autograd.grad gives their gradients to nobody.
        self._unreached = 0  # Weights that the last loss did not depend on.
        self._batches: dict[int, Any] = {}
        self._shares: dict[int, float] = {}
        self._recordings: dict[int, Recording] = {}
        self._taken: dict[int, Recording] | None = None  # While the user's code is recorded.
        self._form: list[tuple[str, torch.Size, torch.dtype]] = []  # Of the recorded weights.
        self._live = LiveWeights(module, selection)
        self._modules: list[Any] = []
        self._tables: list[Any] = []
        self._hooks: list[Any] = []
        self._held: list[Tensor] = []
        self._has_begun = False
        self.is_lost = False
        self.terms: tuple[str, ...] = ()
        self.shares: tuple[float, ...] = ()
        self.examples = 0
        self.watch: Callable[[int, Weights, Weights], None] | None = None
        self._stop: Weights = {}  # Where the segment stops that is evaluated.
        self._is_alone = False
        self._around: _Around | None = None  # While nothing else happens.
        self.gradients = 0
        self.why_not: str | None = "it was not tried yet"

    @property
    def is_prepared(self) -> bool:
        """Whether the batches are there and their loss was looked at."""
        return bool(self._shares)

    def prepare(self, batches: Mapping[int, Any], segment: Segment, *, moved: bool = False) -> None:
        """Takes the batches, looks at their loss for the first time, and records it if it can.

        Args:
            batches: By their number in the whole probe.
            segment: Its stop is live now; a recording is compared with the user's code at its
                start.
            moved: Whether the batches are on the device already, through the module's own transfer
                hooks; else they go there now.

        Raises:
            NoLossError: There is no loss on them, or none that is finite.
            MisconfigurationException: The loss is not a scalar with a gradient.
        """
        sizes = torch.tensor(batch_sizes(list(batches.values())), dtype=torch.float64)
        total = sizes.sum().float().to(self.device)
        self._ranks.sum([total])
        shares = sizes / (total.cpu().double() / self._ranks.copies)
        self._shares = dict(zip(batches, shares.tolist(), strict=True))
        if not self._is_cut:
            count = 1 + self._ranks.largest(max(batches), self.device)
            # Where every process takes all batches, they are counted several times.
            self.examples = int(sizes.sum() if len(batches) == count else total)
            every = torch.zeros(count, device=self.device, dtype=wide(total))
            every[list(batches)] = shares.to(every)
            self._ranks.sum([every])
            self.shares = tuple(every.tolist())
        try:
            self._batches = dict(batches) if moved else self._moved(batches)
            lost: NoLossError | None = None
            try:
                self._check(segment)
            except NoLossError as error:
                lost = error
            if not self._ranks.all([lost is None], self.device)[0]:
                raise lost or NoLossError("Another process found no loss on its batches.")
        except BaseException:
            self._shares = {}
            raise
        self.record(segment)

    def __call__(self, at: Position, /, *, afresh: bool = False) -> Sample:
        """Evaluates loss and, where needed, gradient on a segment whose stop is live now.

        Args:
            at: Where.
            afresh: Runs the user's code also where its loss is recorded.
        """
        if self._recordings and not afresh and self._knows(at.segment):
            return self._replay(at)
        live = self._live()
        held = parts(live)
        total: Tensor | None = None
        sums: list[Tensor] | None = None
        self.is_lost, self._stop = False, at.segment.stop
        with self._put_back(at, held):
            for j, share in self._shares.items():
                # A forward may write to trained weights, too.
                moves = at.s != 1.0 or total is not None
                while True:
                    gradients: list[Tensor] = []
                    with self._fenced(j):
                        if moves:
                            at.write(held)
                        set_mode(self._module, self._mode)
                        # The step may write into its batch.
                        batch = copied(self._batches[j])
                        with self._noting(j, list(live.values())) as done:
                            try:
                                with self._trainer.precision_plugin.train_step_context():
                                    loss = self._objective(batch, j)
                            except NoLossError:
                                if not self._has_begun:
                                    raise
                                self.is_lost = True
                                loss = Loss(torch.full((), torch.nan, device=self.device), {})
                                gradients = [torch.full_like(w, torch.nan) for w in held.values()]
                                gradients *= max(1, len(self.terms))
                            # Layers gathered on the way forward are let go of on the way back.
                            if (at.needs_gradient or self._is_cut) and not self.is_lost:
                                gradients = self._differentiate(loss, share, list(live.values()))
                            done(loss.total, gradients)
                    value = loss.total.detach()
                    del loss
                    if self._fits(gradients, value):
                        break
                    moves = True
                total, sums = self._added(j, total, sums, value, gradients, list(live))
        assert total is not None
        return self._sample(at, total, sums, list(live))

    def _replay(self, at: Position) -> Sample:
        """Evaluates what was recorded: no live weight moves, and no code of the user runs."""
        start, stop = at.segment.start, at.segment.stop
        self._stop = stop
        if at.s in (0.0, 1.0):
            total, sums = self._replayed(start if at.s == 0.0 else stop)
        else:
            # Those between the ends lie where the stop was kept: no memory is needed. The live
            # weights are at the stop, so that it is copied back from them.
            self._stop = parts(self._live())
            try:
                at.write(stop)
                total, sums = self._replayed(stop)
            finally:
                with torch.no_grad():
                    torch._foreach_copy_([*stop.values()], [self._stop[n] for n in stop])
        return self._sample(at, total, sums, list(start))

    def _replayed(self, weights: Weights) -> tuple[Tensor, list[Tensor] | None]:
        """Adds up the recordings of all batches at some weights: loss [] and gradients [*shape]."""
        total: Tensor | None = None
        sums: list[Tensor] | None = None
        numbers = list(weights.values())
        for j in self._shares:
            recording = self._recordings[j]
            while True:
                # As the user's code finds them on batch j.
                streams = seeded(self._seed + j, self._devices)
                with streams if recording.is_random else nullcontext():
                    loss, gradients = recording(numbers)
                if self._fits(gradients, loss):
                    break
            total, sums = self._added(j, total, sums, loss, gradients, list(weights))
        assert total is not None
        return total, sums

    def _fits(self, gradients: list[Tensor], loss: Tensor) -> bool:
        """Whether a half-precision gradient did not overflow; if it did, the scale is lower now."""
        if self._scale is None or not gradients or not loss.isfinite():
            return True
        return self._scale.fits(gradients)

    def _added(
        self,
        j: int,
        total: Tensor | None,
        sums: list[Tensor] | None,
        loss: Tensor,
        gradients: list[Tensor],
        names: list[str],
    ) -> tuple[Tensor, list[Tensor] | None]:
        """Adds batch j's share of loss and gradient to those before."""
        loss, share = loss.to(wide(loss)), self._shares[j]
        if share != 1:
            loss = loss * share
        total = loss if total is None else total + loss
        if not gradients:
            return total, sums
        if self._scale is not None:
            gradients = self._scale.unscaled(gradients)
        if self.watch is not None:
            self.watch(j, dict(zip(names, gradients, strict=False)), self._stop)
        # Autograd may hand out one tensor twice, or expanded: never add in place.
        return total, gradients if sums is None else list(torch._foreach_add(sums, gradients))

    def _sample(
        self, at: Position, total: Tensor, sums: list[Tensor] | None, names: list[str]
    ) -> Sample:
        if not at.needs_gradient:
            sums = None
        if self.whole and self._ranks.processes > 1:
            total = total / self._ranks.copies
            self._ranks.sum([total])
            if sums is not None and not self._is_cut:
                sums = [g.contiguous() for g in sums]
                self._ranks.sum(sums)
        self.gradients += at.needs_gradient or self._is_cut
        if sums is None:
            return Sample(total, None)
        count = len(names)
        gradient, *terms = (
            dict(zip(names, sums[i : i + count], strict=True)) for i in range(0, len(sums), count)
        )
        return Sample(total, gradient, terms)

    # -- recording --------------------------------------------------------------------------------

    def record(self, segment: Segment) -> None:
        """Records the loss anew, and compares it with the user's code at other weights.

        Every rank must call this: either all have a recording afterwards, or none. ``why_not`` says
        why there is none.

        Args:
            segment: Its stop is live now. It is recorded at the start, and compared at both ends.
        """
        self._recordings, self.why_not = {}, None
        if self._is_cut:
            self.why_not = "its weights are cut over processes"
        else:
            before = self.gradients
            self._try_to_record(segment)
            self.gradients = before
        self._all_recorded()

    def _all_recorded(self) -> bool:
        """Whether all ranks have a recording that holds; if one has none, none keeps its own."""
        if self._ranks.all([self.why_not is None], self.device)[0]:
            return True
        self.why_not = self.why_not or "another process cannot record it"
        self._recordings = {}
        return False

    def _try_to_record(self, segment: Segment) -> None:
        recordings: dict[int, Recording] = {}
        self._taken, self._has_begun = recordings, True
        try:
            fresh = self(segment.at(0.0), afresh=True)
        finally:
            self._taken = None
        self.why_not = self.why_not or ("it gave none" if self.is_lost else None)
        if not self._all_recorded():
            return
        self._recordings, self._form = recordings, _form_of(segment.start)
        self._modules = list(self._module.modules())
        self._tables = [t for m in self._modules for t in (m._buffers, m._modules)]
        self._hooks = [t for m in self._modules for t in (m._forward_pre_hooks, m._forward_hooks)]
        self._held = list(self._module.buffers())  # So that no other gets the id of one.
        for s in (0.0, 1.0):
            fresh = fresh if s == 0.0 else self(segment.at(s), afresh=True)
            recorded = self(segment.at(s))
            if not agree(recorded, fresh):
                self.why_not = (
                    "the recorded operations give another loss or gradient than its code "
                    f"({recorded.loss.item():.9g} and {fresh.loss.item():.9g})"
                )
            del fresh, recorded

    @contextmanager
    def _noting(self, j: int, weights: list[Tensor]) -> Iterator[Callable[..., None]]:
        """Notes what runs within, if it is to be recorded; what it gives takes the results."""
        if self._taken is None or self.why_not is not None:
            yield lambda loss, gradients: None
            return
        module = self._module
        try:
            recorder = Recorder(weights, [*self._constants(), *module.buffers()])
        except NotRecordableError as error:
            self.why_not = str(error)
            yield lambda loss, gradients: None
            return
        results: list[Any] = []
        with recorder:
            yield lambda loss, gradients: results.extend([loss, gradients])
        try:
            self._taken[j] = recorder.finish(*results)
        except NotRecordableError as error:
            self.why_not = str(error)

    def _knows(self, segment: Segment) -> bool:
        """Whether the recordings are of such weights; a head that grew makes them void."""
        if _form_of(segment.start) == self._form:
            return True
        self._recordings = {}
        self.record(segment)
        return bool(self._recordings)

    @property
    def reads_numbers(self) -> bool:
        """Whether the recorded loss holds numbers that were read from tensors once."""
        return any(r.reads_numbers for r in self._recordings.values())

    def _structure(self) -> tuple[Any, ...]:
        """Shows what makes a recording void: training flags; others in the place of buffers, too.

        A table that is empty when the loss is recorded may not stay so, as when a layer is pruned.
        """
        flags = [m.training for m in self._modules]
        hooks = [*map(len, self._hooks)]
        return (*flags, *hooks, *[id(b) for table in self._tables for b in table.values()])

    def give_up(self, why: str) -> None:
        """Evaluates the user's code from now on."""
        self._recordings, self.why_not = {}, why

    @property
    def epoch(self) -> int:
        """Of training, which a loss may depend on."""
        return int(self._trainer.current_epoch)

    @property
    def way(self) -> str:
        """How it is evaluated, in words."""
        if self._recordings:
            return "recorded"
        return f"by the user's code, since it cannot be recorded: {self.why_not}"

    @property
    def is_scaled(self) -> bool:
        """Whether gradients are scaled for float16, by what overflowed before."""
        return self._scale is not None

    def program(self) -> object | None:
        """Returns what stands for the operations of an evaluation: one object while they are those.

        None where more than these takes part, as in float16, where the host looks for what
        overflowed, or where random streams are seeded.
        """
        if self._scale is not None or self.watch is not None or self._ranks.processes > 1:
            return None
        recordings = self._recordings
        is_alone = all([r.is_alone for r in recordings.values()])
        return recordings if recordings and is_alone else None

    @property
    def room(self) -> float:
        """Bytes that all results of a recorded evaluation take; infinite if the host takes part."""
        found = self._recordings.values()
        stay = bool(found) and all(r.stays_on(self.device) for r in found)
        return sum(r.room for r in found) if stay else math.inf

    @property
    def is_recorded(self) -> bool:
        """Whether a recording is evaluated, and not the user's code."""
        return bool(self._recordings)

    # -- the first look ---------------------------------------------------------------------------

    def _check(self, segment: Segment) -> None:
        """Evaluates once at the segment's start, and settles how gradients are taken.

        Raises:
            NoLossError: There is no loss, or it is not finite.
            MisconfigurationException: It is not a scalar with a gradient.
        """
        frozen = self._constants()
        before = [local(p).detach().clone() for p in frozen]
        self._watching = False
        try:
            sample = self._try_both_ways(segment.at(0.0))
        finally:
            self._watching = True
            for parameter, saved in zip(frozen, before, strict=True):
                if not torch.equal(local(parameter), saved):
                    self._written.add(id(parameter))
                    local(parameter).data.copy_(saved)
        self.gradients = 0
        if not bool(torch.isfinite(sample.loss)):
            raise NoLossError(
                f"The probe loss is {sample.loss.item()} at the first step. LCA needs a finite "
                "loss: look at the probe's batches and at loss_fn."
            )

    def _try_both_ways(self, here: Position) -> Sample:
        """Prefers autograd.grad, where reentrant checkpointing raises or hides weights."""
        try:
            sample = self(here)
        except RuntimeError as error:
            if "checkpoint" not in str(error).lower():
                raise
            self._by_backward = True
            return self(here)
        if unreached := self._unreached:
            self._by_backward = True
            sample = self(here)
            self._by_backward = self._unreached < unreached
        return sample

    @property
    def live(self) -> Weights:
        """The parameters that are trained now {name: [*shape]}."""
        return self._live()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(iter(self._devices))

    def surroundings(self) -> tuple[tuple[Any, ...], Tensor]:
        """Fingerprints what the loss reads beside the trained weights."""
        if self._recordings:
            read = [t for r in self._recordings.values() for t in r.live]
            return self._structure(), fingerprint(read, self.device)
        return surroundings(self._module, self._mode, self.device, self._constants())

    def _constants(self) -> list[nn.Parameter]:
        """Lists the parameters that are not measured: frozen ones, and those left out."""
        measured = set(map(id, self._live().values()))
        return [p for p in self._module.parameters() if id(p) not in measured]

    # -- one evaluation ---------------------------------------------------------------------------

    def _differentiate(self, loss: Loss, share: float, weights: list[Tensor]) -> list[Tensor]:
        """Takes the scaled gradient [*shape] of every weight; zeros where the loss has none.

        Of a loss that is split, after these the gradients of each term but the last.
        """
        drop_gradient_hooks(self._module.parameters())  # Those that the step itself registered.
        terms = self._terms_of(loss) if self._splits else []
        scalars = terms if len(terms) > 1 else [loss.total]
        found = [
            self._gradients_of(scalar, share, weights, again=i + 1 < len(scalars))
            for i, scalar in enumerate(scalars)
        ]
        self._unreached = sum(all(g is None for g in taken) for taken in zip(*found, strict=True))
        plain = [[_plain(g, w) for g, w in zip(f, weights, strict=True)] for f in found]
        total = plain[0]
        for more in plain[1:]:
            total = list(torch._foreach_add(total, more))
        return [g for gradients in (total, *plain[:-1]) for g in gradients]

    def _terms_of(self, loss: Loss) -> list[Any]:
        """Lists the terms of a loss in the order of their names; the last takes up strange ones."""
        if not self._has_begun and not self.terms:
            self.terms = tuple(loss.terms)
        if not self.terms:
            return []
        given = loss.terms or {"a single number": loss.total}
        if strange := [name for name in given if name not in self.terms]:
            if not self._has_begun:
                raise MisconfigurationException(
                    f"loss_fn returned the terms {list(self.terms)} on one batch of the probe and "
                    f"{list(given)} on another. Return the same ones on every batch, zero where "
                    "one is off."
                )
            if not self._other_terms.issuperset(strange):
                self._other_terms.update(strange)
                warn(
                    f"LCA: loss_fn returned {strange}, which it did not return at first: the "
                    f"credit is counted with {self.terms[-1]!r}. Return every term from the first "
                    "step on, zero where it is off."
                )
        *names, last = self.terms
        rest = sum(term for name, term in given.items() if name in {last, *strange})
        return [*(given.get(name, 0.0) for name in names), rest]

    def _gradients_of(
        self, loss: Any, share: float, weights: list[Tensor], *, again: bool
    ) -> list[Tensor | None]:
        """Takes the scaled gradient of a scalar; ``again``: its graph is needed again."""
        gradients: list[Tensor | None]
        if not isinstance(loss, Tensor) or not loss.requires_grad:  # A term may be a constant.
            return [None] * len(weights)
        loss = loss.float() if loss.dtype in HALF else loss
        if share * self._factor != 1:
            loss = loss * (share * self._factor)
        if self._scale is not None:
            loss = loss * self._scale.factor
        if self._by_backward:
            for weight in weights:
                weight.grad = None
            loss.backward(retain_graph=again)  # type: ignore[no-untyped-call]
            gradients = [w.grad for w in weights]
        else:
            # The step itself may have frozen some.
            needed = [w for w in weights if w.requires_grad]
            taken = iter(torch.autograd.grad(loss, needed, allow_unused=True, retain_graph=again))
            gradients = [next(taken) if w.requires_grad else None for w in weights]
        return gradients

    # -- surroundings of an evaluation ------------------------------------------------------------

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Promises that nothing but evaluations of this probe touches the module or the Trainer.

        What the fence holds aside then serves all of them.
        """
        self._is_alone = True
        try:
            yield
        finally:
            self._is_alone, self._around = False, None

    def _surround(self) -> _Around:
        """Looks at all that an evaluation may change, unless that was done and still holds."""
        around, self._around = self._around, None
        if around is None:
            held, spare = (self._module, self._trainer), self._spare()
            around = _Around(
                Fence(*held, spare=spare, devices=self._devices),
                GradientHooks(self._module),
                [vars(m) for m in self._module.modules() if hasattr(m, "log_dict")],
            )
        return around

    @contextmanager
    def _put_back(self, at: Position, held: Weights) -> Iterator[None]:
        """Puts back the weights, to where the segment stops, and ``p.grad``."""
        parameters = list(self._module.parameters())
        gradients = [p.grad for p in parameters]
        try:
            for parameter in parameters:
                parameter.grad = None  # The step may run a backward pass of its own.
            yield
        finally:
            at.segment.at(1.0).write(held)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient

    @contextmanager
    def _fenced(self, j: int) -> Iterator[None]:
        """Runs one evaluation of batch j: seeded, silent, uncompiled, and undone afterwards.

        Hooks on gradients rest: they are no part of the loss.
        """
        trainer, loggers = self._trainer, self._trainer.loggers
        around = self._surround()
        with around.fence.around(self._seed + j):
            for attributes in around.of_loud:
                attributes.update(log=_say_nothing, log_dict=_say_nothing, print=_say_nothing)
            trainer.loggers = silent(loggers)
            try:
                # A NaN is recorded, also where training looks for the origin of its own.
                quiet = torch.autograd.set_detect_anomaly(False)
                with _uncompiled(), around.hooks.off(), torch.enable_grad(), quiet:
                    yield
            finally:
                trainer.loggers = loggers
        if self._is_alone and around.fence.lasts:
            self._around = around

    def _spare(self) -> list[Tensor]:
        """Lists the parameters that the fence need not copy.

        The measured ones are put back from the segment. A forward may write to others, too, such as
        a teacher that follows its student: they are copied, unless they are most of the model. Then
        only those that were written to at the first evaluation are.
        """
        parameters = list(self._module.parameters())
        constants = self._constants()
        if self._watching and 2 * sum(map(Tensor.numel, constants)) <= sum(
            map(Tensor.numel, parameters)
        ):
            return list(self._live().values())
        return [p for p in parameters if id(p) not in self._written]

    def _moved(self, batches: Mapping[int, Any]) -> dict[int, Any]:
        """Moves batches to the device, through the module's own transfer hooks, once."""
        with self._fenced(0):
            return {
                j: to_device(self._trainer, self._module, copied(b)) for j, b in batches.items()
            }


@dataclass(frozen=True)
class _Around:
    """What is known of all that surrounds an evaluation.

    Attributes:
        fence: Undoes what it does.
        hooks: Those on gradients.
        of_loud: The attributes of modules that log.
    """

    fence: Fence
    hooks: GradientHooks
    of_loud: list[dict[str, Any]]


def to_device(trainer: Trainer, module: LightningModule, batch: Any) -> Any:
    """Moves a batch as training does, through the module's own transfer hooks."""
    batch = trainer.precision_plugin.convert_input(batch)
    # Private, and the only way to the hook that users may override.
    before = getattr(module, "_on_before_batch_transfer", None)
    batch = batch if before is None else before(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def _plain(gradient: Tensor | None, weight: Tensor) -> Tensor:
    """Returns a gradient as dense numbers, in float32 at least, of what this process holds."""
    if gradient is None:
        gradient = torch.zeros_like(local(weight))
    else:
        gradient = local_gradient(gradient, weight)
    if gradient.layout != torch.strided:
        gradient = gradient.to_dense()
    return gradient.float() if gradient.dtype in HALF else gradient


def _form_of(weights: Weights) -> list[tuple[str, torch.Size, torch.dtype]]:
    return [(name, w.shape, w.dtype) for name, w in weights.items()]


def _autocast_type(trainer: Trainer) -> torch.dtype | None:
    """What mixed precision computes in, if that is float16."""
    return torch.float16 if str(trainer.precision) == "16-mixed" else None


def _uncompiled() -> Any:
    """Runs compiled modules eagerly: another batch size would change training's graphs."""
    if "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance"):
        return torch.compiler.set_stance("force_eager")
    return nullcontext()


def _say_nothing(*args: Any, **kwargs: Any) -> None:
    """Stands in for ``log``, ``log_dict`` and ``print`` while the probe runs."""


@torch.no_grad()
def agree(kept: Sample, fresh: Sample) -> Tensor:
    """Compares two samples up to the noise of kernels that add in no fixed order: [] bool.

    Those of a CPU have next to none: what differs there is another function.
    """
    noise = 1e-9 if _precise(fresh) else 1e-5
    gradient_noise = 1e3 * noise
    if fresh.loss.device.type == "cpu":
        noise, gradient_noise = 0.1 * noise, 10 * noise
    size = fresh.loss.abs().clamp(min=1e-3)
    same: Tensor = (kept.loss - fresh.loss).abs() <= noise * size
    same = same | (kept.loss == fresh.loss) | (kept.loss.isnan() & fresh.loss.isnan())
    if kept.gradient and fresh.gradient:
        names = list(fresh.gradient)
        old, new = (
            [gradient[n] for gradient in (s.gradient, *s.terms) if gradient for n in names]
            for s in (kept, fresh)
        )
        differences: list[Tensor] = []
        sizes: list[Tensor] = []
        for some, others in side_by_side(new, old):
            a, b = [_finite(n) for n in some], [_finite(o) for o in others]
            sizes += torch._foreach_norm(a)
            torch._foreach_sub_(a, b)
            differences += torch._foreach_norm(a)
        difference, length = _length(differences), _length(sizes)
        same = same & (difference <= gradient_noise * length).to(same.device)
    return same


def _finite(gradient: Tensor) -> Tensor:
    """Puts 0 where a number is not finite: what does not compare."""
    return gradient.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def _length(norms: list[Tensor]) -> Tensor:
    return torch.stack([n.to(norms[0].device) for n in norms]).square().sum().sqrt()


def _precise(sample: Sample) -> bool:
    return sample.gradient is not None and all(
        g.dtype == torch.float64 for g in sample.gradient.values()
    )
