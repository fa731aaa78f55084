"""Names of parameters as the user wrote them, whatever wraps a module or its weight since.

torch.compile and activation checkpointing put modules into wrappers, and pruning renames the
weights that it masks, also in mid-training. Credits keep one name through all of that.
"""

from __future__ import annotations

from torch import nn

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
