"""Many numbers as text at once: Python takes a microsecond for each, numpy a tenth of that."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

WIDTH = 16  # Bytes of a number with the comma before it, as ,-1.17549435e-38.
_BLOCK = 2**13  # Numbers that stay in a processor's cache while they are written.
_FIRST, _LAST = -46, 39  # Exponents of float32, and one more at either end.
_POWERS = np.array([float(f"1e{8 - i}") for i in range(_FIRST, _LAST + 1)])


def _words(texts: list[str]) -> npt.NDArray[np.uint32]:
    """Makes words of four bytes each of texts, from the right; what is short begins with 0."""
    text = b"".join(text.rjust(4, "\0").encode() for text in texts)
    return np.frombuffer(text, np.uint32)


_HEADS = _words([f",{sign}{i}." for sign in ("\0", "-") for i in range(10)])
_FOUR = _words([f"{i:04d}" for i in range(10_000)])
_EXPONENTS = _words([f"e{i:+03d}" for i in range(_FIRST, _LAST + 1)])
_NOTHING = np.uint32(0)


def singles(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    r"""Writes float32 numbers with nine digits, which read back exactly as float32.

    Args:
        values: Of any shape; 0 is written as 0, what is not finite as nan, inf and -inf.

    Returns:
        ASCII, `WIDTH` bytes for each value behind their shape: a comma and the number. Bytes that
        are 0 are nothing.

    >>> singles(np.array([0.1, -3, np.nan], np.float32)).tobytes().replace(b"\0", b"")
    b',1.00000001e-01,-3.00000000e+00,nan'
    """
    flat = values.reshape(-1)
    text = np.empty((flat.size, 4), np.uint32)
    for first in range(0, flat.size, _BLOCK):
        _write(flat[first : first + _BLOCK], text[first : first + _BLOCK])
    return text.view(np.uint8).reshape(*values.shape, WIDTH)


def _write(values: npt.NDArray[np.float32], text: npt.NDArray[np.uint32]) -> None:
    """Fills in four words for each value: its head, four digits twice, the exponent."""
    with np.errstate(invalid="ignore"):  # A NaN of some bits is told to be none.
        size: Any = np.abs(values.astype(np.float64))
    odd = ~((size > 0) & (size < np.inf))
    has_odd = odd.any()
    if has_odd:
        size[odd] = 1.0
    place = np.floor(np.log10(size)).astype(np.int32) - _FIRST
    digits = np.rint(size * _POWERS[place])
    # Next to a power of ten the logarithm may be off by one, and rounding may reach the next one.
    off = np.flatnonzero((digits >= 1e9) | (digits < 1e8))
    if len(off):
        place[off] += np.where(digits[off] >= 1e9, 1, -1).astype(np.int32)
        digits[off] = np.rint(size[off] * _POWERS[place[off]])
    whole = digits.astype(np.uint32)
    high, low = np.divmod(whole, np.uint32(10_000))
    first, middle = np.divmod(high, np.uint32(10_000))
    text[:, 0] = _HEADS[first + np.signbit(values) * np.uint32(10)]
    text[:, 1] = _FOUR[middle]
    text[:, 2] = _FOUR[low]
    text[:, 3] = _EXPONENTS[place]
    if has_odd:
        zero, infinite = odd & (values == 0), np.isinf(values)
        below = np.signbit(values[infinite])
        text[odd] = [*_words([",", "nan"]), _NOTHING, _NOTHING]
        text[zero] = [*_words([",", "0"]), _NOTHING, _NOTHING]
        text[infinite, 1] = np.where(below, _words(["-inf"]), _words(["inf"]))
