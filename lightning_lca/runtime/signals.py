"""Signals held back for a moment: Ctrl-C must not end a measurement in its middle.

A handler of Python may run between any two instructions, also while weights are displaced or half
put back, while a chunk is half written, or in the middle of ``finally``. Some raise, as that of
Ctrl-C does; some save a checkpoint, as Lightning's does on SLURM.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # What signal wraps, without costly enums.
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

PATIENCE = 5.0  # Seconds after which a signal that comes again is let through, if all hangs.
_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGALRM")
_HOLDABLE = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))

Handler = Callable[[int, FrameType | None], Any]


class _Deferred:
    """Signals of one body: their handlers, and when which came first."""

    def __init__(self) -> None:
        self._handlers: dict[int, Handler] = {}
        self._came: dict[int, float] = {}
        self._over = False

    def take_over(self) -> None:
        for number in _HOLDABLE:
            handler = _signal.getsignal(number)
            if callable(handler):
                self._handlers[number] = handler
                _signal.signal(number, self._note)

    def give_back(self) -> None:
        """Puts the handlers back, and calls those whose signal came, each once."""
        self._over = True  # From here on a handler that raises may leave some of the rest undone.
        try:
            for number, handler in self._handlers.items():
                if _signal.getsignal(number) == self._note:  # The body may have set its own.
                    _signal.signal(number, handler)
        finally:
            self._deliver(list(self._came))

    def _deliver(self, numbers: list[int]) -> None:
        if numbers:
            try:
                self._handlers[numbers[0]](numbers[0], None)
            finally:
                self._deliver(numbers[1:])

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._over or now - self._came.setdefault(number, now) > PATIENCE:
            self._handlers[number](number, frame)


@contextmanager
def defer_signals() -> Iterator[None]:
    """Runs the body without interruption: what a signal asks for is done right after it.

    Only the main thread handles signals, so elsewhere this does nothing. A signal that comes again
    after five seconds is let through at once: the body may hang.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    deferred = _Deferred()
    try:
        deferred.take_over()
        yield
    finally:
        deferred.give_back()
