"""How many optimizer steps are done, and when the next one begins, in every way of stepping."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class Steps:
    """Counts optimizer steps.

    Lightning counts those that go through it. In manual optimization a step may also be taken on
    the bare torch optimizer, which Lightning does not see: there torch's own hook tells.
    """

    def __init__(self, trainer: Any, module: Any, before: Callable[[], None]) -> None:
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
