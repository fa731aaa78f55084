"""In which mode the loss is evaluated, and what it then reads beside the trained weights."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from lightning_lca.probe.fingerprint import fingerprint

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
    module: nn.Module, mode: ProbeMode, device: torch.device
) -> tuple[tuple[bool, ...], Tensor]:
    """Fingerprints what a loss reads beside the trained weights: training flags and tensors.

    BatchNorm's running statistics do not count where the mode normalises by the batch.
    """
    modules = list(module.modules())
    flags = tuple(m.training for m in modules)
    read: list[Tensor] = [p for p in module.parameters() if not p.requires_grad]
    for m in modules:
        by_batch = isinstance(m, nn.modules.batchnorm._NormBase) and (m.training and mode != "eval")
        read += [b for b in m._buffers.values() if b is not None and not by_batch]
    return flags, fingerprint(read, device)


def _is_dropout(module: nn.Module) -> bool:
    """Recognises dropout by its base class, and stochastic depth and the like by name."""
    name = type(module).__name__.lower()
    random_by_name = "droppath" in name or "dropblock" in name or "stochasticdepth" in name
    return isinstance(module, nn.modules.dropout._DropoutNd) or random_by_name
