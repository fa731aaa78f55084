"""What a request asks for, checked before anything is read."""

from __future__ import annotations

import json
import re
from typing import Any

MOST_BINS = 2000
_LARGEST = 10**15  # Well inside what a float64, and so the page, holds exactly.


class QueryError(ValueError):
    """A request that cannot be answered: the message names cause, find and remedy."""


class Query:
    """The parameters of one request.

    Every parameter is taken once, by name; `done` refuses those that nobody took.
    """

    def __init__(self, arguments: Any) -> None:
        """Takes the parameters as werkzeug's multi-dict.

        Raises:
            QueryError: A parameter is repeated.
        """
        self._arguments = dict(arguments)
        self._known: list[str] = []
        for name, values in arguments.lists():
            if len(values) > 1:
                raise QueryError(
                    f"Parameter {show(name)} was given {len(values)} times. Give it once."
                )

    def text(self, name: str, default: str | None = None) -> str:
        """Takes a text. QueryError if it is missing and has no default."""
        self._known.append(name)
        value: str | None = self._arguments.get(name, default)
        if value is None:
            raise QueryError(f"Parameter {name} is missing. Add {name}=... to the address.")
        return value

    def optional(self, name: str) -> str | None:
        """Takes a text, or None if it is missing."""
        self._known.append(name)
        return self._arguments.get(name)

    def whole(self, name: str, least: int, most: int, default: int) -> int:
        """Takes a whole number in a range, or the default if it is missing."""
        value = self.optional(name)
        if value is None:
            return default
        # int() also takes "+5", "1_000", blanks and the digits of other scripts.
        if not re.fullmatch("[0-9]{1,20}", value) or not least <= int(value) <= most:
            raise QueryError(
                f"{name} must be a whole number from {least} to {most}, in digits; "
                f"got {show(value)}."
            )
        return int(value)

    def names(self, name: str) -> list[str]:
        """Takes a list of names, in JSON; none if it is missing."""
        text = self.optional(name)
        try:
            value = [] if text is None else json.loads(text)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            raise QueryError(
                f'{name} must be a list of names in JSON, as ["a", "b"]; got {show(text or "")}.'
            )
        return value

    def steps(self) -> tuple[int | None, int | None]:
        """Takes the range of optimizer steps; None where an end was left open."""
        ends = [self.whole(name, 0, _LARGEST, -1) for name in ("start", "stop")]
        start, stop = (None if end < 0 else end for end in ends)
        if start is not None and stop is not None and start > stop:
            raise QueryError(f"start={start} lies after stop={stop}. Give start <= stop.")
        return start, stop

    def bins(self) -> int:
        """Takes the number of bins."""
        return self.whole("bins", 1, MOST_BINS, 500)

    def done(self) -> None:
        """Refuses parameters that nobody took.

        Raises:
            QueryError: There is one.
        """
        for name in self._arguments:
            if name not in self._known:
                raise QueryError(
                    f"Unknown parameter {show(name)}. This route takes {', '.join(self._known)}."
                    if self._known
                    else f"Unknown parameter {show(name)}. This route takes none."
                )


def show(text: str) -> str:
    """Quotes what was found, at a length that a message can bear."""
    return repr(text if len(text) <= 80 else text[:80] + "…")
