"""Hooks on gradients, put aside: they belong to training, and are no part of the loss.

A hook may clip, scale or log the gradients that training uses, count them, or step an optimizer.
Credits need the derivative of the loss itself, and training must not notice that it was taken.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules import module as _everywhere

_Owner = tuple[Any, tuple[str, ...]]  # Who has tables of hooks, and their names.
_OF_PARAMETERS = ("_backward_hooks", "_post_accumulate_grad_hooks")
_OF_MODULES = ("_backward_hooks", "_backward_pre_hooks")
_OF_ALL_MODULES = ("_global_backward_hooks", "_global_backward_pre_hooks")


@contextmanager
def no_gradient_hooks(module: nn.Module) -> Iterator[None]:
    """Runs the body without hooks on the gradients of parameters and modules.

    Hooks on other tensors, which a forward registers on its way, stay. Those registered on
    parameters and modules within the body are dropped at its end.
    """
    # The tables are private. They are emptied in place: handles and autograd hold on to them.
    owners: list[_Owner] = [(p, _OF_PARAMETERS) for p in module.parameters()]
    owners += [(m, _OF_MODULES) for m in module.modules()]
    owners.append((_everywhere, _OF_ALL_MODULES))
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


def _tables(owners: list[_Owner]) -> list[MutableMapping[int, Any]]:
    """Lists the tables that have entries."""
    tables = (getattr(owner, name, None) for owner, names in owners for name in names)
    return [table for table in tables if table]
