"""Arrays too large for memory lie in temporary files, which the system reads as they are needed."""

from __future__ import annotations

import math
import mmap
import os
import tempfile
from typing import Any

import numpy as np

LARGE = 64 * 2**20  # Bytes; a larger array lies in a file.


def allocate(shape: tuple[int, ...], dtype: Any) -> Any:
    """Makes an array that holds anything: a large one in a file that nobody else sees.

    The file goes with the array, or with the process. Where there is no room for it, the array lies
    in memory after all. A file has twice as many rows as asked for, so that it is seldom copied.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    reserve = getattr(os, "posix_fallocate", None)
    if size <= LARGE or reserve is None:
        return np.empty(shape, dtype)
    try:
        with tempfile.TemporaryFile() as file:
            # A full disk must be noticed here: whoever writes to the array would be killed.
            reserve(file.fileno(), 0, 2 * size)
            room = mmap.mmap(file.fileno(), 2 * size)
    except OSError:
        return np.empty(shape, dtype)
    return np.frombuffer(room, dtype).reshape(2 * shape[0], *shape[1:])


def memory(array: Any) -> int:
    """Tells how many bytes of memory an array takes: none of those that lie in a file."""
    base = array
    while isinstance(base, np.ndarray) and base.base is not None:
        base = base.base
    if isinstance(base, memoryview):
        base = base.obj
    return 0 if isinstance(base, mmap.mmap) else int(array.nbytes)
