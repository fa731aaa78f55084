"""The callback that lets a model relive its training: checkpoints in place of optimizer steps."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lca.probe.probe import to_device
from lightning_lca.record.reader import Reader
from lightning_lca.replay.checkpoints import Checkpoint, ReplayError, one_line, read
from lightning_lca.reporting.reporter import x_axis
from lightning_lca.runtime.lightnings import AnyTrainer, LightningModule, Trainer
from lightning_lca.runtime.signals import defer_signals
from lightning_lca.training.callback import LCACallback
from lightning_lca.training.training import Training

Bar = Callable[[Sequence[Any]], Iterable[Any]]  # Shows how far a loop is.
_STATE = "replay.pt"
_COMPILED = "_orig_mod."  # What torch.compile puts into the names of weights.


class LeftError(Exception):
    """Leaves a Trainer that is ready to train, before it takes a step."""


class ReplayCallback(LCACallback):
    """Loads one checkpoint after the other into the model, and measures as in training.

    From time to time the state is saved beside the record, so that a replay that was interrupted,
    or checkpoints that came later, go on from there.

    Attributes:
        interrupted: Whether someone asked it to stop before the last checkpoint.
    """

    def __init__(
        self,
        checkpoints: Sequence[Checkpoint],
        record: Path,
        *,
        weights_only: bool,
        bar: Bar,
        arguments: Mapping[str, Any],
    ) -> None:
        """Takes what is to be played.

        Args:
            checkpoints: At least two, by step.
            record: Directory of the record.
            weights_only: As for `read`.
            bar: Wraps the loop over checkpoints.
            arguments: Of `LCACallback`.
        """
        super().__init__(**arguments)
        self.interrupted = False
        self._checkpoints = list(checkpoints)
        self._file = record / _STATE
        self._weights_only = weights_only
        self._bar = bar
        self._terms: dict[str, Any] = {}
        self._before: Checkpoint | None = None  # Where the segment began that led to the first.
        # The same of the last segment, where the state does not know which way weights moved.
        self._began_at: int | None = None

    @property
    def writes(self) -> bool:
        """Whether this process keeps the record."""
        return self._writes

    @property
    def draws_from(self) -> set[str]:
        """Whose loaders the probes need: "train", "val"."""
        return {source for source in self._settings.sources.values() if isinstance(source, str)}

    @property
    def last_step(self) -> int:
        """Optimizer steps done at the last checkpoint."""
        return self._checkpoints[-1].step

    def resume(self, **terms: Any) -> bool:
        """Takes up an earlier replay, if there is one; says whether anything is left to measure.

        Args:
            terms: What must be as it was then, beside the arguments of `LCACallback`.

        Raises:
            ReplayError: It measured something else, or stopped at a checkpoint that is gone.
        """
        settings = self._settings
        self._terms = {
            **settings.describe(),
            **terms,
            "probes": [name or "" for name in settings.sources],
            "loss_fn": getattr(settings.loss_fn, "__qualname__", None),
            "group_by": settings.grouping,
            "include": list(settings.selection.include),
            "exclude": list(settings.selection.exclude),
            "neurons": settings.neurons,
            "track_parameters": settings.track_parameters,
        }
        if not self._file.exists():
            return True
        try:
            state = torch.load(self._file, map_location="cpu", weights_only=True)
        except Exception as error:
            self._start_afresh(f"{self._file} cannot be read ({one_line(error)})")
            return True
        for name, value in self._terms.items():
            if (before := state["terms"].get(name, [] if value == [] else None)) != value:
                raise ReplayError(
                    f"{self._file.parent} was measured with {name}={before!r}, and now "
                    f"{name}={value!r} is asked for. Move it away, or put the new record "
                    "elsewhere (--out)."
                )
        step = state["callback"]["steps"]
        if not self._is_whole(state, step):
            self._start_afresh(f"The record in {self._file.parent} is not whole")
            return True
        left = [c for c in self._checkpoints if c.step >= step]
        if not left or left[0].step != step:
            raise ReplayError(
                f"The record in {self._file.parent} ends at step {step}, of which there is no "
                "checkpoint any more, so that it cannot go on without a gap. Put it back, or "
                "start a new record elsewhere (--out)."
            )
        self._before = self._find_before(state.get("before"))
        self._checkpoints = left
        self.load_state_dict(state["callback"] | {"record": str(self._file.parent)})
        return len(left) > 1

    # -- hooks ------------------------------------------------------------------------------------

    def on_train_start(self, trainer: AnyTrainer, pl_module: LightningModule) -> None:
        """Waits for the module's own hook."""

    def on_train_epoch_start(self, trainer: AnyTrainer, pl_module: LightningModule) -> None:
        """Plays all checkpoints, and leaves the Trainer.

        Raises:
            LeftError: Always, when it is done or interrupted.
        """
        try:
            self._play(trainer, pl_module)
        except KeyboardInterrupt:  # The Trainer would end the process.
            self.interrupted = True
        raise LeftError

    # -- inside -----------------------------------------------------------------------------------

    def _play(self, trainer: AnyTrainer, module: LightningModule) -> None:
        """Measures from each checkpoint to the next."""
        training = self._begin(trainer, module)
        batches = self._batches(trainer, module)
        for checkpoint in self._bar(self._checkpoints[1:]):
            self._depart(trainer, module, batches)
            self._load(trainer, module, checkpoint)
            super().on_train_batch_end(trainer, module, None, None, 0)
            self._save_at_window(trainer, training)
        super().on_train_end(trainer, module)
        self._save()

    def _begin(self, trainer: AnyTrainer, module: LightningModule) -> Training:
        """Goes to the first checkpoint, and sets up what a training has at its start."""
        if self._writes:
            self._look_through(module)
        self._load(trainer, module, self._checkpoints[0])
        super().on_train_start(trainer, module)
        training = self._training
        assert training is not None
        if self._before is not None and "oscillation" in self._settings.splits:
            self._stand_at(trainer, module, 0, self._before, self._checkpoints[0])
        return training

    def _stand_at(
        self,
        trainer: AnyTrainer,
        module: LightningModule,
        index: int,
        before: Checkpoint | None,
        here: Checkpoint,
    ) -> None:
        """Goes to a checkpoint as if all segments up to there had been measured.

        Args:
            trainer: The Trainer.
            module: Its LightningModule.
            index: How many lie before, in this session.
            before: Where the last of them began, where it is known.
            here: The checkpoint.
        """
        training = self._training
        assert training is not None
        training.snapshots.drop()
        if before is not None:
            self._load(trainer, module, before)
            training.look(module)
            training.open()
        self._load(trainer, module, here)
        with defer_signals():
            training.begin_at(index)

    def _depart(self, trainer: AnyTrainer, module: LightningModule, batches: Iterator[Any]) -> None:
        """Calls the hooks of `LCACallback` from the start of a batch to its optimizer step."""
        super().on_train_batch_start(trainer, module, None, 0)
        while self._training is not None and self._training.waits_for_batches:
            self._training.start(module, next(batches))
        super().on_before_optimizer_step(trainer, module, None)

    def _save_at_window(self, trainer: AnyTrainer, training: Training) -> None:
        """Saves the state where windows of finer sums end, and looks for a wish to stop.

        Saved elsewhere, windows would depend on interruptions.

        Raises:
            KeyboardInterrupt: The process was asked to end.
        """
        if training.reporter.logged_at == x_axis(trainer) + 1:
            self._save()
        if trainer.received_sigterm:
            raise KeyboardInterrupt

    def _batches(self, trainer: Trainer, module: LightningModule) -> Iterator[Any]:
        """Reads training's batches, for a probe that keeps some since they are read only once.

        Raises:
            ReplayError: There are too few.
        """
        for batch, *_ in trainer.fit_loop._combined_loader:
            yield to_device(trainer, module, batch)
        raise ReplayError(
            "The data of training end before the probe has as many batches as it needs, or has "
            "found some with a loss. Ask for fewer (--probe_batches), or give batches to measure "
            "on (--probe package.module.function)."
        )

    def _load(self, trainer: Trainer, module: LightningModule, checkpoint: Checkpoint) -> None:
        """Puts the model, and the Trainer's counters, where they were at a checkpoint."""
        content = read(checkpoint.path, weights_only=self._weights_only)
        if content["global_step"] != checkpoint.step:
            raise ReplayError(
                f"{checkpoint.path} was of step {checkpoint.step} and is now of step "
                f"{content['global_step']}: training goes on. Run the same command again."
            )
        module.on_load_checkpoint(content)
        weights = fit_names(content["state_dict"], module)
        try:
            module.load_state_dict(weights, strict=getattr(module, "strict_loading", True))
        except RuntimeError as error:
            raise does_not_fit(checkpoint.path, module, error) from error
        set_progress(trainer, content)

    def _look_through(self, module: LightningModule) -> None:
        """Warns of what a look at both ends of the run tells."""
        first, last = (
            fit_names(read(c.path, weights_only=self._weights_only)["state_dict"], module)
            for c in (self._checkpoints[0], self._checkpoints[-1])
        )
        known = [(n, p) for n, p in module.named_parameters() if n in first and n in last]
        wide = {
            str(first[n].dtype): str(p.dtype)
            for n, p in known
            if p.is_floating_point() and _digits(first[n]) > _digits(p)
        }
        for saved, here in wide.items():
            warnings.warn(
                f"LCA: the checkpoints hold {saved} and are replayed in {here}, which rounds "
                "weights. Choose the precision of the training, e.g. precision='64-true'.",
                stacklevel=2,
            )
        moved = sum(
            p.numel()
            for n, p in known
            if not p.requires_grad
            and first[n].shape == last[n].shape
            and not torch.equal(first[n], last[n])
        )
        if moved:
            warnings.warn(
                f"LCA: {moved:,} weights that {type(module).__name__} freezes moved from the first "
                "to the last checkpoint. What that did to the loss is booked as drift. If the "
                "optimizer moved them, name as model a function that builds it with them unfrozen.",
                stacklevel=2,
            )

    def _find_before(self, step: int | None) -> Checkpoint | None:
        """Finds where the last segment began, if the state of an earlier replay needs that."""
        if step is None or "oscillation" not in self._settings.splits:
            return None
        found = [c for c in self._checkpoints if c.step == step]
        if not found:
            warnings.warn(
                f"LCA: there is no checkpoint of step {step} any more: how many weights turn round "
                "after it cannot be told in the next segment.",
                stacklevel=3,
            )
        return next(iter(found), None)

    def _save(self) -> None:
        """Writes where the replay is, whole or not at all."""
        rows = {name or "": len(history) for name, history in self.histories.items()}
        state = {
            "terms": self._terms,
            "rows": rows,
            "callback": self.state_dict(),
            "before": self._began_at,
        }
        fresh = self._file.with_suffix(".tmp")
        torch.save(state, fresh)
        os.replace(fresh, self._file)

    def _is_whole(self, state: Mapping[str, Any], step: int) -> bool:
        """Whether the record holds all that was measured up to the state."""
        try:
            reader = Reader.of(self._file.parent)
        except FileNotFoundError:
            return False
        for history in reader.histories.values():
            history.cut(step)
        rows: dict[str, int] = state["rows"]
        return {name: len(history) for name, history in reader.histories.items()} == rows

    def _start_afresh(self, why: str) -> None:
        warnings.warn(
            f"LCA: {why}: all checkpoints are measured again, from the first.", stacklevel=3
        )


def fit_names(weights: Mapping[str, Tensor], module: nn.Module) -> Mapping[str, Tensor]:
    """Names weights as the module does, where only one of both was compiled."""
    own = module.state_dict().keys()
    if not any(_COMPILED in name for name in (*own, *weights)):
        return weights
    plain = {name.replace(_COMPILED, ""): name for name in own}
    return {plain.get(n.replace(_COMPILED, ""), n): w for n, w in weights.items()}


def does_not_fit(path: Path, module: LightningModule, error: BaseException) -> ReplayError:
    """Tells in one line that a checkpoint is of another model."""
    name = module.__name__ if isinstance(module, type) else type(module).__name__
    what = one_line(error, beyond=f"for {name}: ")
    return ReplayError(
        f"{path} is not of this {name}: {what} Name the class that was trained, with the "
        "arguments it had then (--model.ARGUMENT VALUE)."
    )


def set_progress(trainer: Trainer, content: Mapping[str, Any]) -> None:
    """Sets global_step, current_epoch and so on, which a training_step may read."""
    loops = content.get("loops") or {}
    if "fit_loop" in loops:
        trainer.fit_loop.load_state_dict(loops["fit_loop"])
    if trainer.global_step != content["global_step"]:
        # A checkpoint that someone made by hand tells no more than the step.
        set_step(trainer, content["global_step"], content["global_step"] - 1)


def set_step(trainer: Trainer, step: int, x: int) -> None:
    """Sets global_step, and where on the x axis the loggers are."""
    loop = trainer.fit_loop.epoch_loop  # Private, as what follows.
    if trainer.lightning_module.automatic_optimization:
        steps = loop.automatic_optimization.optim_progress.optimizer.step
    else:
        steps = loop.manual_optimization.optim_step_progress
    steps.total.completed = step
    loop._batches_that_stepped = x


def _digits(tensor: Tensor) -> int:
    return torch.finfo(tensor.dtype).bits if tensor.is_floating_point() else 0
