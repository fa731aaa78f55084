"""What the loss of a batch is, and the mode that it is evaluated in: as training does it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_lca.probe.fingerprint import fingerprint
from lightning_lca.runtime.lightnings import LightningModule, MisconfigurationException

LossFn = Callable[[Any, Any], Any]  # (module, batch) -> scalar, or {term: scalar}


class NoLossError(MisconfigurationException):
    """There is no loss on a batch, or none that is finite: another batch may have one."""


@dataclass(frozen=True)
class Loss:
    """The loss of a batch.

    Attributes:
        total: [], with a gradient.
        terms: {term: [] or a number} that add up to it; empty where it is one number.
    """

    total: Tensor
    terms: Mapping[str, Any]


class TrainingLoss:
    """The loss of a LightningModule on a batch, evaluated as training does it."""

    def __init__(self, module: LightningModule, loss_fn: LossFn | None) -> None:
        """Takes loss_fn's result or the sum of its terms; None: that of training_step."""
        self._module = module
        self._loss_fn = loss_fn
        self._arguments = _step_arguments(module) if loss_fn is None else _both

    def __call__(self, batch: Any, j: int) -> Loss:
        """Evaluates the loss on batch j.

        Raises:
            NoLossError: Nothing came.
            MisconfigurationException: What came is not a scalar tensor with a gradient.
        """
        terms: Mapping[str, Any] = {}
        if self._loss_fn is not None:
            result, source = self._loss_fn(self._module, batch), "loss_fn"
            if isinstance(result, Mapping):
                terms = {str(name): term for name, term in result.items()}
                result = sum(result.values())
        else:
            result = self._module.training_step(*self._arguments(batch, j))
            source = "training_step"
            if isinstance(result, Mapping):
                result = result.get("loss")
        if result is None:
            raise NoLossError(
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
        return Loss(result.squeeze() if result.dim() else result, terms)


def _step_arguments(module: LightningModule) -> Callable[[Any, int], tuple[Any, ...]]:
    """Finds what this training_step takes: the batch, its index too, or an iterator of them."""
    parameters = inspect.signature(module.training_step).parameters
    if "dataloader_iter" in parameters:
        return lambda batch, j: (iter([(batch, j, 0)]),)
    takes_more = len(parameters) > 1 or any(p.kind is p.VAR_POSITIONAL for p in parameters.values())
    return _both if takes_more else lambda batch, j: (batch,)


def _both(batch: Any, j: int) -> tuple[Any, int]:
    return batch, j


ProbeMode = Literal["no_dropout", "eval", "train"]


def set_mode(module: nn.Module, mode: ProbeMode) -> None:
    """Sets training flags for one evaluation; whoever calls puts them back."""
    if mode == "train":
        return
    for m in module.modules():
        if mode == "eval" or _is_dropout(m):
            m.training = False
        elif isinstance(m, nn.RNNBase | nn.MultiheadAttention):
            # Theirs is functional, and their training flag does more than that.
            m.dropout = 0.0


def surroundings(
    module: nn.Module, mode: ProbeMode, device: torch.device, constants: Sequence[Tensor]
) -> tuple[tuple[bool, ...], Tensor]:
    """Fingerprints what a loss reads beside the measured weights: training flags and tensors.

    BatchNorm's running statistics do not count where the mode normalises by the batch.

    Args:
        module: Whose loss.
        mode: In which it is evaluated.
        device: Where the fingerprint goes.
        constants: Its parameters that are not measured.
    """
    modules = list(module.modules())
    flags = tuple(m.training for m in modules)
    read: list[Tensor] = list(constants)
    for m in modules:
        by_batch = isinstance(m, nn.modules.batchnorm._NormBase) and (m.training and mode != "eval")
        read += [b for b in m._buffers.values() if b is not None and not by_batch]
    return flags, fingerprint(read, device)


def _is_dropout(module: nn.Module) -> bool:
    """Recognises dropout by its base class, and stochastic depth and the like by name."""
    name = type(module).__name__.lower()
    random_by_name = "droppath" in name or "dropblock" in name or "stochasticdepth" in name
    return isinstance(module, nn.modules.dropout._DropoutNd) or random_by_name
