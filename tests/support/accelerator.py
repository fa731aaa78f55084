"""An accelerator, played by the CPU."""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_lca.measure.captured import NotCapturableError


def take_the_cpu_for_one(monkeypatch):
    """Every room goes the ways of an accelerator."""
    rooms = ("tensors", "allocation", "groups", "stretches")
    for room in ("training.snapshots", *(f"measure.{name}" for name in rooms)):
        monkeypatch.setattr(f"lightning_lca.{room}.on_accelerator", lambda tensor: True)


HOST = ("_local_scalar_dense", "equal", "nonzero", "is_nonzero", "masked_select", "unique")


def storage(tensor):
    return tensor.untyped_storage()._cdata


def tensors(*values):
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


class _Capture(TorchDispatchMode):
    """Notes operations and their tensors; what they write to is put back."""

    def __init__(self):
        super().__init__()
        self.operations = []
        self.before = {}
        self.own = set()
        self.kept = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.__name__.split(".")[0] in HOST:
            raise NotCapturableError(f"the host reads a number by {func.__name__}")
        given = tensors(args, kwargs)
        if func._schema.is_mutable:
            for tensor in given:
                if storage(tensor) not in self.own | self.before.keys():
                    whole = torch.empty(0, dtype=torch.uint8)
                    whole = whole.set_(tensor.untyped_storage())
                    self.before[storage(tensor)] = whole, whole.clone()
        result = func(*args, **kwargs)
        known = {*map(storage, given)}
        fresh = [t for t in tensors(result) if storage(t) not in known]
        self.own.update(map(storage, fresh))
        self.kept += fresh  # An address is not used again.
        self.operations.append((func, args, kwargs, result))
        return result


class Played:
    """Stands in for `Captured`: operations, addresses and numbers are fixed when it captures."""

    launches = 0
    captures = 0

    def __init__(self, function, device):
        with (capture := _Capture()):
            self.results = function()
        self._operations = capture.operations
        for whole, before in capture.before.values():
            whole.copy_(before)
        type(self).captures += 1

    def launch(self):
        type(self).launches += 1
        with torch.no_grad(), torch._C._AutoDispatchBelowAutograd():
            for func, args, kwargs, result in self._operations:
                known = {*map(storage, tensors(args, kwargs))}
                for old, new in zip(tensors(result), tensors(func(*args, **kwargs)), strict=True):
                    if storage(old) not in known:
                        old.copy_(new)
        return self.results

    @staticmethod
    def free(device):
        return 2**40
