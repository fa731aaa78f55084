"""How answers travel: as JSON for anyone, or with their numbers as bytes for the page.

A view's answer holds arrays. Turning a million numbers into text, and back, takes seconds; as
bytes they take milliseconds.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np

COLUMNS = "application/x-lca-columns"


def plain(value: Any) -> Any:
    """Turns arrays into nested lists that JSON can hold, with None for what is not finite.

    >>> plain({"credit": np.array([[1.5, np.nan]]), "of": 2})
    {'credit': [[1.5, None]], 'of': 2}
    """
    if isinstance(value, np.ndarray):
        if np.issubdtype(value.dtype, np.floating):
            finite = np.isfinite(value)
            if not finite.all():
                value = value.astype(object)
                value[~finite] = None
        return value.tolist()
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    return value


def as_json(answer: Any) -> str:
    """Writes an answer as strict JSON."""
    return json.dumps(plain(answer), allow_nan=False, separators=(",", ":"))


def as_columns(answer: Any) -> bytes:
    """Writes an answer as JSON and bytes.

    The length of the JSON in four bytes, the JSON, blanks up to a multiple of eight, then float64
    numbers; all little-endian. The JSON is ``{"answer": ..., "arrays": [[path, at, shape], ...]}``:
    the array that belongs at that path of the answer starts with the number in place ``at``. NaN
    stands for null.
    """
    numbers: list[Any] = []
    places: list[tuple[list[str | int], int, list[int]]] = []

    def without_arrays(value: Any, path: list[str | int]) -> Any:
        if isinstance(value, np.ndarray):
            places.append((path, sum(part.size for part in numbers), list(value.shape)))
            numbers.append(value)
            return None
        if isinstance(value, Mapping):
            return {name: without_arrays(part, [*path, name]) for name, part in value.items()}
        if isinstance(value, list | tuple):
            return [without_arrays(part, [*path, i]) for i, part in enumerate(value)]
        return plain(value)

    whole = {"answer": without_arrays(answer, []), "arrays": places}
    text = json.dumps(whole, allow_nan=False, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 4) % 8)
    return b"".join(
        [struct.pack("<I", len(text)), text, *(part.astype("<f8").tobytes() for part in numbers)]
    )
