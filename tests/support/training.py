"""One way to train in tests, quiet and from a fixed seed, and callbacks that several use."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

from lightning_lca import LCACallback
from support.models import Classifier, pl, toy_loader


def make_trainer(tmp_path: Any, *callbacks: Any, **kwargs: Any) -> pl.Trainer:
    """A quiet Trainer on the CPU that writes below ``tmp_path``."""
    defaults: dict[str, Any] = {
        "max_steps": 12,
        "max_epochs": -1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 4,
        "accelerator": "cpu",
    }
    return pl.Trainer(default_root_dir=tmp_path, callbacks=list(callbacks), **(defaults | kwargs))


class Run(NamedTuple):
    """A training that has ended; ``lca`` is None where none measured."""

    lca: Any
    module: Any
    trainer: Any


def fit(
    path: Any,
    *callbacks: Any,
    model: Any = Classifier,
    data: Any = toy_loader,
    steps: int = 12,
    run_seed: int = 3,
    measured: bool = True,
    resume: Any = None,
    trainer: Any = None,
    **arguments: Any,
) -> Run:
    """Trains once.

    Args:
        path: Where the Trainer writes.
        callbacks: Come after LCACallback. If one of them is an LCACallback, no other is made.
        model: A module, or what makes one; it is called after seeding.
        data: A loader, a tuple of those for training and validation, or what makes it.
        steps: After so many it ends.
        run_seed: Of every random stream, before the model is made.
        measured: Whether there is an LCACallback.
        resume: A checkpoint to go on from.
        trainer: Keywords of the Trainer.
        arguments: Of LCACallback.
    """
    pl.seed_everything(run_seed)
    lca = next((c for c in callbacks if isinstance(c, LCACallback)), None)
    if lca is None and measured:
        lca = LCACallback(**arguments)
        callbacks = (lca, *callbacks)
    made = make_trainer(path, *callbacks, **({"max_steps": steps} | (trainer or {})))
    module = model if isinstance(model, pl.LightningModule) else model()
    loaders = data() if callable(data) else data
    made.fit(module, *(loaders if isinstance(loaders, tuple) else (loaders,)), ckpt_path=resume)
    return Run(lca, module, made)


class Trail(pl.Callback):
    """Keeps the weights before training and after every step, on the host.

    Args:
        weights: Gives {name: tensor} of a LightningModule; by default its parameters by name.
    """

    def __init__(self, weights: Callable[[Any], Any] | None = None) -> None:
        self.weights = weights or (lambda module: dict(module.named_parameters()))
        self.points: list[Any] = []

    def keep(self, trainer: Any, module: Any, *args: Any) -> None:
        held = self.weights(module)
        self.points.append({name: w.detach().cpu().clone() for name, w in held.items()})

    on_train_start = keep
    on_train_batch_end = keep


class Guarded(LCACallback):
    """Enters a context around its own hooks, in steps 12 to 18."""

    def __init__(self, guard: Callable[[], Any], **arguments: Any) -> None:
        super().__init__(**arguments)
        self.guard = guard

    def _guarded(self, hook: Any, trainer: Any, *args: Any) -> None:
        with self.guard() if 12 <= trainer.global_step <= 18 else nullcontext():
            hook(trainer, *args)

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        self._guarded(super().on_train_batch_start, trainer, *args)

    def on_before_optimizer_step(self, trainer: Any, *args: Any) -> None:
        self._guarded(super().on_before_optimizer_step, trainer, *args)

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        self._guarded(super().on_train_batch_end, trainer, *args)
