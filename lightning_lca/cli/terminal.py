"""What commands share on a terminal: a user's mistake, a line."""

from __future__ import annotations

import sys

from tqdm import tqdm


class InputError(Exception):
    """A mistake of the user's: the message says what was found and what to do."""


def say(text: str) -> None:
    """Prints a line that is no result, beside any progress bar."""
    tqdm.write(text, file=sys.stderr)
