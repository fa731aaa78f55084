"""Matrices of tests, of which a few stand for the rest in the quick loop (``-m "not slow"``)."""

from collections.abc import Iterable, Mapping
from typing import Any

import pytest


def matrix(cases: Mapping[str, Any], quick: Iterable[str] = ()) -> list[Any]:
    """Makes a parameter of every case, with its name as id; all are slow but the quick ones."""
    quick = set(quick)
    assert quick <= set(cases), quick - set(cases)
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else (case,)),
            id=name,
            marks=() if name in quick else pytest.mark.slow,
        )
        for name, case in cases.items()
    ]
