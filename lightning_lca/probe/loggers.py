"""Loggers that say what training's loggers say of themselves, and write nothing."""

from __future__ import annotations

import copy
import functools
import inspect
import types
from collections import deque
from collections.abc import Iterator
from typing import Any

_WRITES = ("log", "watch", "unwatch", "after_", "upload", "write", "add_")
_ALSO_WRITES = frozenset({"save", "finalize", "flush", "close", "use_artifact", "link_artifact"})
_FUNCTIONS = (types.FunctionType, staticmethod, classmethod)


def silent(loggers: list[Any]) -> list[Any]:
    """Makes stand-ins for loggers, for while a loss is evaluated that training did not ask for.

    Each is an instance of its logger's class and answers as the logger does: name, version,
    directories. Its methods that write do nothing, and its ``experiment`` takes anything.
    """
    return [_silent(logger) for logger in loggers]


def _silent(logger: Any) -> Any:
    kind: Any = type(logger)
    mute, answers = _attributes(kind)
    names: dict[str, Any] = {"__slots__": (), "__module__": kind.__module__}
    names |= {name: _say_nothing for name in mute}
    names |= {name: _answer_of(logger, name) for name in answers}
    nothing = Nothing()
    names["experiment"] = property(lambda _: nothing, _say_nothing)
    make: Any = type(kind)
    quiet = make(kind.__name__, (kind,), names)
    quiet.__qualname__ = kind.__qualname__
    stand_in = object.__new__(quiet)
    for name, value in getattr(logger, "__dict__", {}).items():
        if name not in names:
            # What a method of the user's adds to stays here.
            mutable = type(value) in (list, dict, set, deque)
            stand_in.__dict__[name] = copy.copy(value) if mutable else value
    for cls in kind.__mro__:
        for slot in vars(cls).values():
            if isinstance(slot, types.MemberDescriptorType):
                try:
                    slot.__set__(stand_in, slot.__get__(logger))
                except AttributeError:  # Not filled.
                    continue
    return stand_in


@functools.lru_cache(maxsize=64)
def _attributes(kind: Any) -> tuple[list[str], list[str]]:
    """Lists the methods of a logger's class that write, and its properties."""
    mute: list[str] = []
    answers: list[str] = []
    for name in dir(kind):
        attribute = inspect.getattr_static(kind, name)
        if name.startswith("__"):
            continue
        if isinstance(attribute, _FUNCTIONS):
            if name.startswith(_WRITES) or name in _ALSO_WRITES:
                mute.append(name)
        elif isinstance(attribute, property):
            answers.append(name)
    return mute, answers


def _say_nothing(*args: Any, **kwargs: Any) -> None:
    """Stands in for what writes."""


def _answer_of(logger: Any, name: str) -> property:
    """Asks the logger itself: a version that is found late is found once."""
    return property(lambda _: getattr(logger, name), _say_nothing)


class Nothing:
    """Has every attribute, takes every call, index and ``with``; each gives itself again.

    Example:
        >>> nothing = Nothing()
        >>> with nothing.start_run("a") as run:
        ...     run.config["rate"] = 0.1
        >>> run.summary.update({}) is nothing
        True
    """

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Gives itself."""
        return self

    def __getitem__(self, key: Any) -> Any:
        return self

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __contains__(self, key: Any) -> bool:
        return False

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *error: Any) -> None:
        pass
