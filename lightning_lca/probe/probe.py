"""The loss surface of a LightningModule: weights in, loss and gradient out, no side effect.

The live parameters are displaced in place and put back by copying: the one way that also works
under torch.compile, tied weights and parametrizations, and that needs no further copy of the
weights.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from lightning_lca.measure.allocation import Position, Sample, Segment, Weights
from lightning_lca.measure.parameters import any_cut, live_weights, local, local_gradient, parts
from lightning_lca.measure.tensors import HALF, wide
from lightning_lca.probe.batches import batch_sizes
from lightning_lca.probe.isolation import drop_gradient_hooks, fence, no_gradient_hooks
from lightning_lca.probe.loss import LossFn, ProbeMode, TrainingLoss, set_mode, surroundings
from lightning_lca.probe.precision import LossScale
from lightning_lca.runtime import lightnings
from lightning_lca.runtime.lightnings import LightningModule, MisconfigurationException, Trainer
from lightning_lca.runtime.processes import Ranks


class Probe:
    """A `Field`: the mean loss over fixed batches, as a function of the module's weights.

    Every evaluation sees the same batches, random numbers, buffers and attributes, and leaves
    module, trainer and random streams as it found them. ``p.grad`` is not touched. A mean over
    several batches weighs them by their number of samples.

    Between evaluations the live weights are those at ``segment.stop``: the probe puts those back.

    Weights that are cut over processes travel as the parts that this process holds; the gradient of
    such a part is that of the whole probe, which all ranks evaluate together.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        batches: Mapping[int, Any],
        *,
        mode: ProbeMode = "no_dropout",
        loss_fn: LossFn | None = None,
        seed: int = 0,
        ranks: Ranks | None = None,
        whole: bool = False,
    ) -> None:
        """Moves the batches to the device, through the module's own transfer hooks, once.

        Args:
            trainer: The Trainer that runs.
            module: Its LightningModule, bare.
            batches: Batches as the loader gives them, by their number in the whole probe.
            mode: "no_dropout": as training has it, but dropout off; "eval"; "train": dropout on.
            loss_fn: (module, batch) -> scalar or {term: scalar}, whose sum is taken; None:
                training_step.
            seed: Batch j is evaluated on random streams seeded with seed + j.
            ranks: The processes that share the probe; each gets its part of loss and gradient,
                which add up to the whole.
            whole: Adds them up at each evaluation, so that all ranks know loss and gradient of the
                whole probe.
        """
        self._trainer = trainer
        self._module = module
        self._mode = mode
        self._objective = TrainingLoss(module, loss_fn)
        self._seed = seed
        self._devices: set[torch.device] = {p.device for p in module.parameters()}
        sizes = torch.tensor(batch_sizes(list(batches.values())), dtype=torch.float64)
        total = sizes.sum().float().to(self.device)
        self._ranks = ranks = ranks or Ranks()
        self._whole = whole and ranks.processes > 1
        ranks.sum([total])
        shares = sizes / (total.cpu().double() / ranks.copies)
        self._shares = dict(zip(batches, shares.tolist(), strict=True))
        self._is_cut = any_cut(module)
        # Their gradients are means over the ranks' shares of the data, where sums are wanted.
        self._factor = ranks.world if self._is_cut else 1
        half = {p.dtype for p in module.parameters()} | {_autocast_type(trainer)}
        self._scale = LossScale() if torch.float16 in half else None
        self._watching = True
        self._written: set[int] = set()  # Frozen parameters that the loss was seen to write to.
        self._by_backward = self._is_cut  # autograd.grad gives their gradients to nobody.
        self._unreached = 0  # Weights that the last loss did not depend on.
        self._dummies = [
            lightnings.of(trainer, ".loggers.logger").DummyLogger() for _ in trainer.loggers
        ]
        self.gradients = 0  # Evaluations with a gradient so far.
        with self._fenced(0):
            self._batches = {j: self._to_device(copy.deepcopy(b)) for j, b in batches.items()}

    def __call__(self, at: Position, /) -> Sample:
        """Evaluates loss and, where needed, gradient on a segment whose stop is live now."""
        live = live_weights(self._module)
        held = parts(live)
        total: Tensor | None = None
        sums: list[Tensor] | None = None
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
                        with self._trainer.precision_plugin.train_step_context():
                            # The step may write into its batch.
                            loss = self._objective(copy.deepcopy(self._batches[j]), j)
                        # Layers gathered on the way forward are let go of on the way back.
                        if at.needs_gradient or self._is_cut:
                            gradients = self._differentiate(loss, share, list(live.values()))
                    loss = loss.detach().to(wide(loss)) * share
                    if self._scale is None or not gradients or not loss.isfinite():
                        break
                    if self._scale.fits(gradients):
                        break
                    moves = True
                total = loss if total is None else total + loss
                if not at.needs_gradient:
                    continue
                if self._scale is not None:
                    gradients = self._scale.unscaled(gradients)
                # Autograd may hand out one tensor twice, or expanded: never add in place.
                sums = gradients if sums is None else list(torch._foreach_add(sums, gradients))
        assert total is not None
        if self._whole:
            total = total / self._ranks.copies
            self._ranks.sum([total])
            if sums is not None and not self._is_cut:
                sums = [g.contiguous() for g in sums]
                self._ranks.sum(sums)
        self.gradients += at.needs_gradient or self._is_cut
        return Sample(total, None if sums is None else dict(zip(live, sums, strict=True)))

    def check(self) -> Sample:
        """Evaluates once at the live weights, and settles how gradients are taken.

        Raises:
            MisconfigurationException: The loss is not a finite scalar with a gradient, or there is
                none.
        """
        live = live_weights(self._module)
        if not live:
            raise MisconfigurationException(
                "The model has no trainable weight: every parameter has requires_grad=False. "
                "LCA needs weights that move; unfreeze some before training starts."
            )
        frozen = [p for p in self._module.parameters() if not p.requires_grad]
        before = [local(p).detach().clone() for p in frozen]
        here = {name: part.detach().clone() for name, part in parts(live).items()}
        self._watching = False
        try:
            sample = self._try_both_ways(Segment(here, here).at(1.0))
        finally:
            self._watching = True
            for parameter, saved in zip(frozen, before, strict=True):
                if not torch.equal(local(parameter), saved):
                    self._written.add(id(parameter))
                    local(parameter).data.copy_(saved)
        if not bool(torch.isfinite(sample.loss)):
            raise MisconfigurationException(
                f"The probe loss is {sample.loss.item()} before the first step. LCA needs a finite "
                "loss: look at the probe's batches and at loss_fn."
            )
        return sample

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
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(iter(self._devices))

    def surroundings(self) -> tuple[tuple[bool, ...], Tensor]:
        """Fingerprints what the loss reads beside the trained weights."""
        return surroundings(self._module, self._mode, self.device)

    # -- one evaluation ---------------------------------------------------------------------------

    def _differentiate(self, loss: Tensor, share: float, weights: list[Tensor]) -> list[Tensor]:
        """Takes the scaled gradient [*shape] of every weight; zeros where the loss has none."""
        gradients: list[Tensor | None]
        scale = 1.0 if self._scale is None else self._scale.value
        loss = (loss.float() if loss.dtype in HALF else loss) * (share * self._factor * scale)
        drop_gradient_hooks(weights)  # Those that the step itself registered.
        if self._by_backward:
            for weight in weights:
                weight.grad = None
            loss.backward()  # type: ignore[no-untyped-call]
            gradients = [w.grad for w in weights]
        else:
            # The step itself may have frozen some.
            needed = [w for w in weights if w.requires_grad]
            taken = iter(torch.autograd.grad(loss, needed, allow_unused=True))
            gradients = [next(taken) if w.requires_grad else None for w in weights]
        self._unreached = sum(g is None for g in gradients)
        return [_plain(g, w) for g, w in zip(gradients, weights, strict=True)]

    # -- surroundings of an evaluation ------------------------------------------------------------

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
        trainer = self._trainer
        loggers, should_stop = trainer.loggers, trainer.should_stop
        rates = [optimizer.param_groups for optimizer in trainer.optimizers]
        held = (self._module, rates)
        spare, devices = self._spare(), list(self._devices)
        with fence(*held, seed=self._seed + j, spare=spare, devices=devices):
            for module in self._module.modules():
                if hasattr(module, "log_dict"):
                    vars(module).update(log=_say_nothing, log_dict=_say_nothing, print=_say_nothing)
            trainer.loggers = self._dummies
            try:
                # A NaN is recorded, also where training looks for the origin of its own.
                quiet = torch.autograd.set_detect_anomaly(False)
                with _uncompiled(), no_gradient_hooks(self._module), torch.enable_grad(), quiet:
                    yield
            finally:
                trainer.loggers, trainer.should_stop = loggers, should_stop

    def _spare(self) -> list[Tensor]:
        """Lists the parameters that the fence need not copy.

        The trained ones are put back from the segment. A forward may write to frozen ones, too,
        such as a teacher that follows its student: they are copied, unless they are most of the
        model. Then only those that were written to at the first evaluation are.
        """
        parameters = list(self._module.parameters())
        frozen = [p for p in parameters if not p.requires_grad]
        if self._watching and 2 * sum(map(Tensor.numel, frozen)) <= sum(
            map(Tensor.numel, parameters)
        ):
            return [p for p in parameters if p.requires_grad]
        return [p for p in parameters if id(p) not in self._written]

    def _to_device(self, batch: Any) -> Any:
        batch = self._trainer.precision_plugin.convert_input(batch)
        # Private, and the only way to the hook that users may override.
        before = getattr(self._module, "_on_before_batch_transfer", None)
        batch = batch if before is None else before(batch, dataloader_idx=0)
        return self._trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def _plain(gradient: Tensor | None, weight: Tensor) -> Tensor:
    """Returns a gradient as dense numbers, in float32 at least, of what this process holds."""
    if gradient is None:
        gradient = torch.zeros_like(local(weight))
    else:
        gradient = local_gradient(gradient, weight)
    if gradient.layout != torch.strided:
        gradient = gradient.to_dense()
    return gradient.float() if gradient.dtype in HALF else gradient


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
