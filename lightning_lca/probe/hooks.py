"""Hooks on gradients, put aside: they belong to training, and are no part of the loss.

A hook may clip, scale or log the gradients that training uses, count them, or step an optimizer.
Credits need the derivative of the loss itself, and training must not notice that it was taken.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as _everywhere

_Owner = tuple[Any, tuple[str, ...]]  # Who has tables of hooks, and their names.
_OF_PARAMETERS = ("_backward_hooks", "_post_accumulate_grad_hooks")
_OF_MODULES = ("_backward_hooks", "_backward_pre_hooks")
_OF_ALL_MODULES = ("_global_backward_hooks", "_global_backward_pre_hooks")


@contextmanager
def no_gradient_hooks(module: nn.Module) -> Iterator[None]:
    """Runs the body without hooks on the gradients of parameters and modules.

    Those that are registered within the body are dropped at its end. Hooks on other tensors, which
    a forward registers on its way, stay.
    """
    # The tables are private. They are emptied in place: handles and autograd hold on to them.
    owners: list[_Owner] = [(_everywhere, _OF_ALL_MODULES)]
    for m in module.modules():  # Once for both: walking large modules takes its time.
        owners.append((m, _OF_MODULES))
        owners += [(p, _OF_PARAMETERS) for p in m._parameters.values() if p is not None]
    saved = [(table, dict(table)) for table in _tables(owners)]
    for table, _ in saved:
        table.clear()
    try:
        yield
    finally:
        for table in _tables(owners):
            table.clear()
        for table, hooks in saved:
            table.update(hooks)


def drop_gradient_hooks(weights: Iterable[Tensor]) -> None:
    """Takes all hooks off the gradients of weights."""
    for table in _tables([(w, _OF_PARAMETERS) for w in weights]):
        table.clear()


def _tables(owners: list[_Owner]) -> list[MutableMapping[int, Any]]:
    """Lists the tables that have entries."""
    tables = (getattr(owner, name, None) for owner, names in owners for name in names)
    return [table for table in tables if table]
