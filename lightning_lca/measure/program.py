"""Operations of torch, noted as they ran, and written as one straight function.

Between two operations of ours or of a module lies Python that decides what comes next. Where it
decides the same every time, the operations alone do the same work, in less time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Slot:
    """Stands for a tensor among the arguments of an operation."""

    number: int


@dataclass
class Operation:
    """One operation, its arguments with slots in place of tensors.

    Attributes:
        function: An overload of an operation.
        args: Its arguments.
        kwargs: Those by name.
        outputs: As the operation gives them: slots, or None for what is no tensor.
    """

    function: Any
    args: Any
    kwargs: dict[str, Any]
    outputs: Any


def written(
    operations: Sequence[Operation],
    outputs: Sequence[int],
    constants: Mapping[int, Tensor],
    arguments: int = 0,
) -> Callable[..., tuple[Tensor, ...]]:
    """Writes a function that runs the operations, each result dropped after its last use.

    Args:
        operations: In their order.
        outputs: Slots of what it returns.
        constants: What it takes as it is, by slot.
        arguments: How many tensors it gets, in a sequence: those of the first slots.
    """
    names: dict[str, Any] = {f"v{slot}": tensor for slot, tensor in constants.items()}
    lines: list[str] = []
    used: list[list[int]] = []
    pool: dict[str, Any] = {}

    def value(argument: Any) -> str:
        if isinstance(argument, Slot):
            used[-1].append(argument.number)
            return f"v{argument.number}"
        if isinstance(argument, list | tuple):
            inner = ", ".join(value(a) for a in argument)
            return f"[{inner}]" if isinstance(argument, list) else f"({inner},)"
        if argument is None or isinstance(argument, bool | int | str):
            return repr(argument)
        if isinstance(argument, float) and math.isfinite(argument):
            return repr(argument)
        name = f"k{len(pool)}"
        pool[name] = argument
        return name

    for i, operation in enumerate(operations):
        used.append([])
        function = f"f{i}"
        names[function] = getattr(operation.function, "_op", operation.function)
        texts = [value(a) for a in operation.args]
        texts += [f"{k}={value(v)}" for k, v in operation.kwargs.items()]
        call = f"{function}({', '.join(texts)})"
        own = set(slots_in([operation.args, operation.kwargs]))
        targets = _targets(operation.outputs, own)
        lines.append(f"{targets} = {call}" if targets else call)
        used[-1] += [s for s in slots_in(operation.outputs) if s not in own]
    keep = {*outputs, *range(arguments), *constants}
    last = {slot: i for i, slots in enumerate(used) for slot in slots if slot not in keep}
    dead: dict[int, list[int]] = {}
    for slot, i in last.items():
        dead.setdefault(i, []).append(slot)
    body = ["def run(w=()):"]
    if arguments:
        body.append(f"    {''.join(f'v{i}, ' for i in range(arguments))}= w")
    for i, line in enumerate(lines):
        body.append(f"    {line}")
        if i in dead:
            body.append(f"    {' = '.join(f'v{s}' for s in dead[i])} = None")
    body.append(f"    return ({''.join(f'v{s}, ' for s in outputs)})")
    space = names | pool
    exec(compile("\n".join(body), "<noted operations>", "exec"), space)
    run: Callable[..., tuple[Tensor, ...]] = space["run"]
    return run


def _targets(outputs: Any, own: set[int]) -> str:
    """Writes the left side of an assignment; what an operation returns of its arguments stays."""
    if isinstance(outputs, Slot):
        return "" if outputs.number in own else f"v{outputs.number}"
    if isinstance(outputs, list | tuple) and outputs:
        inner = [_targets(o, own) or "_" for o in outputs]
        return f"({', '.join(inner)},)" if any(t != "_" for t in inner) else ""
    return ""


def tensors_in(value: Any) -> list[Tensor]:
    """Lists the tensors in lists, tuples and dicts."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [t for v in value for t in tensors_in(v)]
    if isinstance(value, dict):
        return [t for v in value.values() for t in tensors_in(v)]
    return []


def slots_in(value: Any) -> list[int]:
    """Lists the numbers of the slots in lists, tuples and dicts."""
    if isinstance(value, Slot):
        return [value.number]
    if isinstance(value, list | tuple):
        return [s for v in value for s in slots_in(v)]
    if isinstance(value, dict):
        return [s for v in value.values() for s in slots_in(v)]
    return []


def with_slots(value: Any, slot: Callable[[Tensor], int], *, keep: bool = True) -> Any:
    """Puts slots in place of tensors; other values stay, or become None."""
    if isinstance(value, Tensor):
        return Slot(slot(value))
    if isinstance(value, list | tuple):
        items = [with_slots(v, slot, keep=keep) for v in value]
        return items if isinstance(value, list) else tuple(items)
    return value if keep else None
