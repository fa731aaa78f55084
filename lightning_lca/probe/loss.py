"""What the loss of a batch is: that of the module's own training step, or of a given function."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from lightning_lca.runtime.lightnings import MisconfigurationException

LossFn = Callable[[Any, Any], Any]  # (module, batch) -> scalar, or {term: scalar}


class Objective:
    """The loss of a LightningModule on a batch, evaluated as training does it."""

    def __init__(self, module: Any, loss_fn: LossFn | None) -> None:
        """Takes loss_fn's result or the sum of its terms; None: that of training_step."""
        self._module = module
        self._loss_fn = loss_fn
        self._arguments = _step_arguments(module) if loss_fn is None else 2

    def __call__(self, batch: Any, j: int) -> Tensor:
        """Evaluates the loss [] on batch j.

        Raises:
            MisconfigurationException: What came is not a scalar tensor with a gradient.
        """
        if self._loss_fn is not None:
            result, source = self._loss_fn(self._module, batch), "loss_fn"
            if isinstance(result, Mapping):
                result = sum(result.values())
        else:
            result = self._module.training_step(*(batch, j)[: self._arguments])
            source = "training_step"
            if isinstance(result, Mapping):
                result = result.get("loss")
        if result is None:
            raise MisconfigurationException(
                f"{source} returned no loss on the probe (None). Return a scalar tensor, or pass "
                "loss_fn=(module, batch) -> scalar."
            )
        if not isinstance(result, Tensor) or result.numel() != 1:
            shape = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
            raise MisconfigurationException(
                f"{source} returned {shape} on the probe, not a scalar tensor. Reduce the loss to "
                "one number, e.g. by .mean()."
            )
        if not result.requires_grad:
            raise MisconfigurationException(
                f"The loss that {source} returned on the probe has no gradient. Compute it from "
                "the module's trainable weights, without detach() or torch.no_grad()."
            )
        return result.squeeze() if result.dim() else result


def _step_arguments(module: Any) -> int:
    """Counts what this training_step takes: 1, the batch, or 2, its index too."""
    parameters = inspect.signature(module.training_step).parameters
    if "dataloader_iter" in parameters:
        raise MisconfigurationException(
            "training_step takes dataloader_iter, so the probe cannot give it a batch. "
            "Pass loss_fn=(module, batch) -> scalar."
        )
    takes_more = len(parameters) > 1 or any(p.kind is p.VAR_POSITIONAL for p in parameters.values())
    return 2 if takes_more else 1
