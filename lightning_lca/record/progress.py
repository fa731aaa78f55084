"""A bar for what takes more than two seconds, where somebody looks at it."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

PATIENCE = 2.0  # Seconds before a bar appears.

T = TypeVar("T")


def is_watched() -> bool:
    """Whether stderr is a terminal, or a notebook's."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules


def bar(total: int, unit: str, what: str) -> Any:
    """Makes a bar that counts up by its ``update``, and is closed at its end.

    Args:
        total: What it counts up to.
        unit: What it counts; "B": bytes.
        what: Is done meanwhile.
    """
    from tqdm import tqdm

    return tqdm(
        total=total,
        unit=unit,
        unit_scale=unit == "B",
        desc=what,
        delay=PATIENCE,
        leave=False,
        disable=not is_watched(),
    )


def counted(items: Sequence[T], unit: str, what: str) -> Iterable[T]:
    """Goes through items under a bar."""
    with bar(len(items), unit, what) as shown:
        for item in items:
            yield item
            shown.update(1)
