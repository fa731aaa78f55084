"""What commands share on a terminal: a user's mistake, a line, a progress bar."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


class InputError(Exception):
    """A mistake of the user's: the message says what was found and what to do."""


def say(text: str) -> None:
    """Prints a line that is no result, beside any progress bar."""
    tqdm.write(text, file=sys.stderr)


def progress(items: Iterable[T], unit: str) -> Iterable[T]:
    """Shows how far a loop is, on a terminal."""
    bar: Iterable[T] = tqdm(list(items), unit=unit, disable=not sys.stderr.isatty(), leave=False)
    return bar
