"""Stand-ins for what nobody can put back: iterators, queues, files. Their use is refused, by name.

A module may hold such an object, as long as its loss does not use it.
"""

from __future__ import annotations

import asyncio
import copy
import functools
import io
import operator
import queue
import socket
import sys
import threading
import types
from collections.abc import Callable
from multiprocessing import connection, queues
from tempfile import _TemporaryFileWrapper
from typing import Any

from lightning_lca.runtime.lightnings import MisconfigurationException

_QUEUES = (queue.Queue, queue.SimpleQueue, queues.Queue, queues.SimpleQueue, asyncio.Queue)
_FILES = (io.IOBase, _TemporaryFileWrapper)
_BUFFERS = (io.StringIO, io.BytesIO)  # These can be put back.
_METHODS = (types.MethodType, types.BuiltinMethodType, types.MethodWrapperType)
_RUNNING = (types.GeneratorType, types.CoroutineType, types.AsyncGeneratorType)
_COPIES = {
    *(type(iter([])), type(reversed([])), type(iter(())), type(iter("")), type(iter("\u2207"))),
    *(type(iter(b"")), type(iter(bytearray())), type(iter(range(1))), type(iter(range(2**70)))),
}


def is_copied(value: Any) -> bool:
    """Whether it is an iterator whose copy goes on where it is, over the same items."""
    return type(value) in _COPIES


@functools.lru_cache(maxsize=4096)
def needs_none(kind: Any) -> bool:
    """Whether objects of a class are never replaced."""
    return kind not in _COPIES and kind not in _METHODS and _what_kind(kind) is None


def stand_in(value: Any, path: Callable[[], str], own: Callable[[Any], bool]) -> Any:
    """Finds what holders get in place of a value while a loss is evaluated; mostly itself.

    Args:
        value: Anything that somebody holds.
        path: Names it as the user would.
        own: Whether a class is the user's: iterators of such classes are put back by attributes.
    """
    if is_copied(value):
        return copy.copy(value)
    what = _what(value, own)
    return value if what is None else Guard(value, path(), what)


def _what(value: Any, own: Callable[[Any], bool]) -> str | None:
    """Says what it is if it cannot be put back, else None."""
    kind = type(value)
    if kind in _METHODS:
        owner = value.__self__
        what = None if type(owner) in _METHODS or is_copied(owner) else _what(owner, own)
        return None if what is None else f"a method of {what}"
    found: Any = kind  # To mypy, a class is not hashable for sure.
    if (what := _what_kind(found)) is None:
        return None
    if issubclass(kind, _FILES):
        streams = (sys.stdin, sys.stdout, sys.stderr, sys.__stdin__, sys.__stdout__, sys.__stderr__)
        return None if value.closed or any(value is stream for stream in streams) else what
    by_hand = isinstance(getattr(kind, "__next__", None), types.FunctionType)
    return None if by_hand and own(kind) and not issubclass(kind, _QUEUES) else what


@functools.lru_cache(maxsize=4096)
def _what_kind(kind: Any) -> str | None:
    if kind in _BUFFERS or kind is Guard:
        return None
    for kinds, what in (
        (_QUEUES, f"a queue ({kind.__name__})"),
        (_RUNNING, f"a {kind.__name__}"),
        (_FILES, "an open file"),
        (socket.socket, "a socket"),
        (connection._ConnectionBase, "a pipe"),
    ):
        if issubclass(kind, kinds):
            return what
    if kind.__module__ == "_csv" and hasattr(kind, "writerow"):
        return "a writer of an open file"
    return f"an iterator ({kind.__name__})" if hasattr(kind, "__next__") else None


class Guard:
    """Raises whenever the thread that made it uses it; to others it is the object itself.

    It says that it is of the object's class: ``isinstance`` holds.
    """

    __slots__ = ("_message", "_original", "_thread")

    def __init__(self, original: Any, path: str, what: str) -> None:
        """Takes the object, and how the user would write and call it."""
        message = (
            f"The loss uses {path}, which is {what}. What was taken from it or given to it cannot "
            "be undone: evaluating the loss would use it up, and training would see the next item. "
            "Take what training_step needs in on_train_batch_start, or where the object is made, "
            "and keep the value on the module; or give a loss that does without it: "
            "LCACallback(loss_fn=lambda module, batch: ...)."
        )
        object.__setattr__(self, "_message", message)
        object.__setattr__(self, "_original", original)
        object.__setattr__(self, "_thread", threading.get_ident())

    def __getattribute__(self, name: str) -> Any:
        if name == "__class__":
            return type(object.__getattribute__(self, "_original"))
        return getattr(_opened(self), name)


def _opened(guard: Guard) -> Any:
    if threading.get_ident() == object.__getattribute__(guard, "_thread"):
        raise MisconfigurationException(object.__getattribute__(guard, "_message"))
    return object.__getattribute__(guard, "_original")


def _call(value: Any, *args: Any, **kwargs: Any) -> Any:
    return value(*args, **kwargs)


_USES: dict[str, Callable[..., Any]] = {
    "__next__": next,
    "__iter__": iter,
    "__anext__": lambda value: value.__anext__(),
    "__aiter__": lambda value: value.__aiter__(),
    "__await__": lambda value: value.__await__(),
    "__call__": _call,
    "__len__": len,
    "__bool__": bool,
    "__enter__": lambda value: value.__enter__(),
    "__exit__": lambda value, *error: value.__exit__(*error),
    "__getitem__": operator.getitem,
    "__setitem__": operator.setitem,
    "__delitem__": operator.delitem,
    "__contains__": operator.contains,
    "__setattr__": setattr,
    "__delattr__": delattr,
}


def _guarded(use: Callable[..., Any]) -> Callable[..., Any]:
    return lambda guard, *args, **kwargs: use(_opened(guard), *args, **kwargs)


for _name, _use in _USES.items():
    setattr(Guard, _name, _guarded(_use))
