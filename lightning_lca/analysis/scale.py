"""Where a colour scale of credit ends."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


def colour_limit(*credits: npt.NDArray[Any]) -> float:
    """Finds the 99 % quantile of |credit| over all cells with some: the end of the scale.

    Cells without credit, as those of frozen layers, don't count: they would make the others pale.

    Returns:
        0.0 where no cell has credit.

    Example:
        >>> colour_limit(np.array([[0.0, -2.0], [np.nan, 1.0]]))
        2.0
    """
    sizes = np.abs(np.concatenate([np.ravel(credit) for credit in credits]))
    sizes = sizes[np.isfinite(sizes) & (sizes > 0)]
    return float(np.quantile(sizes, 0.99, method="higher")) if len(sizes) else 0.0
