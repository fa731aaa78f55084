"""Parameters by the names that the user wrote, and the part of each that this process holds.

torch.compile and activation checkpointing put modules into wrappers, and pruning renames the
weights that it masks, also in mid-training. Credits keep one name through all of that.

Weights may be cut over processes (DTensors, as FSDP2 and tensor parallelism make them). Everything
here then works on the part that this process holds, an ordinary tensor; only sums over groups, a
few numbers, ever travel. A whole weight is its own only part.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lca.measure.allocation import Weights
from lightning_lca.measure.selection import EVERYTHING, Selection
from lightning_lca.measure.tensors import Flat

_WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module"})


def named_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Names all parameters, tied ones once: {name: [*shape]}.

    Example:
        >>> net = nn.Sequential(nn.utils.prune.identity(nn.Linear(2, 1), "weight"))
        >>> [name for name, _ in net.named_parameters()]
        ['0.bias', '0.weight_orig']
        >>> list(named_parameters(net))
        ['0.bias', '0.weight']
    """
    return {_plain(module, name): p for name, p in module.named_parameters()}


def live_weights(module: nn.Module, selection: Selection = EVERYTHING) -> dict[str, Tensor]:
    """Names the parameters that are being trained now: {name: [*shape]}, tied ones once."""
    named = named_parameters(module)
    return {n: p for n, p in named.items() if p.requires_grad and n in selection}


class LiveWeights:
    """The parameters that are being trained now, resolved anew only when the module has changed."""

    def __init__(self, module: nn.Module, selection: Selection = EVERYTHING) -> None:
        """Looks at nothing yet; what the selection leaves out is none of them."""
        self._module = module
        self._selection = selection
        self._tables: list[dict[str, Any]] = []
        self._parameters: list[nn.Parameter] = []
        self._seen: object = None
        self._weights: dict[str, Tensor] = {}

    def __call__(self) -> dict[str, Tensor]:
        """Names them {name: [*shape]}, tied ones once: the same dict until one changes."""
        if self._seen is None or self._look() != self._seen:
            modules = list(self._module.modules())
            self._tables = [t for m in modules for t in (m._modules, m._parameters) if t]
            self._parameters = list(self._module.parameters())
            self._weights = live_weights(self._module, self._selection)
            self._seen = self._look()
        return self._weights

    def _look(self) -> object:
        """Lists what a change of the module would change: objects that live on have their ids."""
        ids = [[*map(id, table.values())] for table in self._tables]
        return ids, [*map(_NEEDS_GRADIENT, self._parameters)]


_NEEDS_GRADIENT = operator.attrgetter("requires_grad")


def named_modules(module: nn.Module) -> dict[str, nn.Module]:
    """Names all modules, those within wrappers in place of the wrappers."""
    return {_unwrapped(name): m for name, m in module.named_modules()}


def submodule(module: nn.Module, path: str) -> nn.Module:
    """Finds the module of that name, within its wrappers."""
    found = module.get_submodule(path)  # Wrappers hand on what they do not have themselves.
    while inner := next((found._modules[w] for w in _WRAPPERS if w in found._modules), None):
        found = inner
    return found


def _plain(module: nn.Module, name: str) -> str:
    if name.endswith("_orig"):  # Only with a mask beside it is it pruned.
        path, _, leaf = name.rpartition(".")
        if f"{leaf[:-5]}_mask" in module.get_submodule(path)._buffers:
            name = name[:-5]
    return _unwrapped(name)


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def alike(a: Weights, b: Weights) -> bool:
    """Whether tensors have the same names and shapes."""
    if isinstance(a, Flat) and a.goes_with(b):
        return True
    shapes = [t.shape for t in b.values()]
    return list(a) == list(b) and [t.shape for t in a.values()] == shapes


def is_cut(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, of which this process holds a part."""
    return hasattr(type(tensor), "to_local")


def any_cut(module: nn.Module) -> bool:
    """Whether a module has such parameters."""
    return any(is_cut(p) for p in module.parameters())


def local(tensor: Tensor) -> Tensor:
    """Returns the part that this process holds, in the same memory; a whole tensor is its own."""
    if not is_cut(tensor):
        return tensor
    cut: Any = tensor
    with torch.no_grad():
        part: Tensor = cut.to_local().detach()
    return part


def parts(weights: Weights) -> dict[str, Tensor]:
    """Returns the parts of weights {name: [*shape]} that this process holds."""
    return {name: local(weight) for name, weight in weights.items()}


@torch.no_grad()
def local_gradient(gradient: Tensor, weight: Tensor) -> Tensor:
    """Returns the part of a gradient that belongs to this process's part of the weight."""
    here: Any = gradient
    there: Any = weight
    # The gradient may be a sum that is not added up yet.
    if is_cut(gradient) and here.placements != there.placements:
        here = here.redistribute(there.device_mesh, there.placements)
    return local(here)


def is_counted_here(parameter: Tensor, rank: int) -> bool:
    """Whether this process speaks for its part in sums over processes: one of its copies must.

    Args:
        parameter: A DTensor, or a whole tensor, of which every process holds a copy.
        rank: This process, of all.
    """
    if not is_cut(parameter):
        return rank == 0
    cut: Any = parameter
    where = cut.device_mesh.get_coordinate()
    return all(i == 0 or not p.is_replicate() for p, i in zip(cut.placements, where, strict=True))


def is_even(placement: Any) -> bool:
    """Whether one piece after the other goes to one process after the other, or all to all."""
    return placement.is_replicate() or type(placement).__name__ == "Shard"


def rows_here(parameter: Tensor, dim: int) -> slice:
    """Says which indices of a dimension this process holds: an even cut, the last parts shorter.

    Raises:
        ValueError: The dimension is cut in another way, as by tensor parallelism within FSDP.
    """
    first, length = 0, parameter.shape[dim]
    cut: Any = parameter
    if is_cut(parameter):
        mesh = cut.device_mesh
        for axis, (placement, i) in enumerate(
            zip(cut.placements, mesh.get_coordinate(), strict=True)
        ):
            if placement.is_replicate() or placement.dim != dim:
                continue
            if not is_even(placement):
                raise ValueError(f"{placement} is not an even cut.")
            size = -(-length // mesh.size(axis))
            begin = min(length, i * size)
            first, length = first + begin, min(size, length - begin)
    return slice(first, first + length)
