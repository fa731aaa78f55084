"""Is a mean more than chance? Tests for series whose steps depend on one another, and for many.

Credit of one step resembles that of the step before, so that the plain t-test finds something in
noise every second time. Here the long-run variance comes from the series' slow cosine waves, each
of which gives an independent estimate (equal-weighted cosine, EWC).

Source: Lazarus, Lewis, Stock and Watson 2018, "HAR Inference: Recommendations for Practice",
Journal of Business and Economic Statistics 36(4), equations 3 to 5 and their rule for nu.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

LEAST = 50  # Steps: with fewer, noise that swings slowly is found significant too often.
_LONGEST = 2**14  # Steps; of more, means of neighbours stand for them.
_CELLS = 2**21  # Numbers that are transformed at once: bounds memory whatever the run's length.


@dataclass(frozen=True)
class Mean:
    """Means of L series over T steps, and how far to trust them.

    Attributes:
        mean: In the unit of the series [L].
        error: Standard error, in the same unit [L]; 0 where a series is constant.
        degrees: Of freedom, of Student's t [L].
    """

    mean: Floats
    error: Floats
    degrees: Ints

    @classmethod
    def of(cls, series: npt.ArrayLike) -> Mean:
        """Estimates the means of series and their errors by EWC. [T, L] -> [L].

        Raises:
            ValueError: Not [T, L], not finite, or fewer than 50 steps.

        >>> mean = Mean.of(np.random.default_rng(0).normal(1, 1, (400, 1)))
        >>> mean.degrees.item(), mean.above().item() < 0.001
        (21, True)
        """
        table = np.asarray(series, np.float64)
        if table.ndim != 2 or not np.isfinite(table).all():
            raise ValueError(
                f"Series must be finite numbers [steps, series], got shape {list(table.shape)}. "
                "Leave out steps that are not finite."
            )
        if len(table) < LEAST:
            raise ValueError(f"A test needs at least {LEAST} steps, got {len(table)}.")
        degrees = int(0.4 * len(table) ** (2 / 3))
        # Scaled first: squares of very large or small credits stay in the range of floats.
        scale = np.abs(table).max(0, initial=0)
        scale = np.where(scale > 0, scale, 1)
        block = max(1, _CELLS // len(table))
        means, errors = np.zeros(table.shape[1]), np.zeros(table.shape[1])
        for first in range(0, table.shape[1], block):
            some = slice(first, first + block)
            part = table[:, some] / scale[some]
            means[some] = part.mean(0)
            waves = _cosines(part - part[:1], degrees)  # A constant becomes exactly 0.
            errors[some] = np.sqrt((waves**2).mean(0) / len(table))
        return cls(means * scale, errors * scale, np.full(len(means), degrees))

    @classmethod
    def of_pieces(cls, pieces: Iterable[Floats], steps: int) -> Mean:
        """Estimates the same from pieces of the series, one after the other [n, L].

        Of more than 16,384 steps, means of so many neighbours stand for them that there are no
        more: their slow waves are those of the steps. The mean is that of all steps.

        Args:
            pieces: Of all steps.
            steps: How many there are in all.
        """
        every = -(-steps // _LONGEST)
        if every <= 1:
            return cls.of(np.concatenate(list(pieces)))
        total: Floats | float = 0.0
        blocks, rest = [], None
        for piece in pieces:
            total = total + piece.sum(0)
            rows = piece if rest is None else np.concatenate([rest, piece])
            whole = len(rows) // every * every
            blocks.append(rows[:whole].reshape(-1, every, rows.shape[1]).mean(1))
            rest = rows[whole:]
        found = cls.of(np.concatenate(blocks))
        return cls(np.asarray(total) / steps, found.error, found.degrees)

    def over(self, batches: npt.ArrayLike) -> Mean:
        """Widens the errors by that of the data: means on K batches of them [K, L].

        Both errors are independent. Student's t takes the fewer degrees of freedom of both: those
        of Welch and Satterthwaite would trust two batches that lie together by chance.

        >>> mean = Mean(np.array([1.0]), np.array([3.0]), np.array([20]))
        >>> wide = mean.over([[1.0], [9.0]])  # The error of their mean is 4.
        >>> wide.error.tolist(), wide.degrees.tolist()
        ([5.0], [1])
        """
        table = np.asarray(batches, np.float64)
        degrees = np.minimum(self.degrees, len(table) - 1)
        return Mean(self.mean, np.hypot(self.error, error_of_mean(table, 0)), degrees)

    def above(self) -> Floats:
        """Tests for a mean above 0. -> p [L], one-sided."""
        return np.array([upper_tail(t, k) for t, k in self._counted])

    def below(self) -> Floats:
        """Tests for a mean below 0. -> p [L], one-sided."""
        return np.array([upper_tail(-t, k) for t, k in self._counted])

    def apart(self) -> Floats:
        """Tests for a mean other than 0. -> p [L], two-sided."""
        return np.array([min(1.0, 2 * upper_tail(abs(t), k)) for t, k in self._counted])

    def interval(self, tail: float) -> tuple[Floats, Floats]:
        """Gives the ends of intervals that miss the true mean with chance `tail` on either side."""
        known = {k: quantile(1 - tail, k) for k in {*self.degrees.tolist()}}
        reach = np.array([known[k] for k in self.degrees.tolist()]) * self.error
        return self.mean - reach, self.mean + reach

    @property
    def _counted(self) -> list[tuple[float, int]]:
        return list(zip(self._t, self.degrees.tolist(), strict=True))

    @property
    def _t(self) -> list[float]:
        """The statistic; a constant is infinitely far from 0, unless it is 0."""
        return [
            m / e if e > 0 else math.copysign(math.inf, m) if m else 0.0
            for m, e in zip(self.mean.tolist(), self.error.tolist(), strict=True)
        ]


def error_of_mean(values: Floats, axis: int) -> Floats:
    """Gives the standard error of means of independent values along an axis."""
    error: Floats = values.std(axis, ddof=1) / math.sqrt(values.shape[axis])
    return error


def _cosines(table: Floats, count: int) -> Floats:
    """Projects series on the slowest cosine waves. [T, L] -> [count, L].

    Wave j of T steps is sqrt(2 / T) cos(pi j (t + 1/2) / T): a cosine transform, by a Fourier
    transform of the series followed by itself backwards.
    """
    steps = len(table)
    mirrored = np.concatenate([table, table[::-1]])
    j = np.arange(1, count + 1)
    turned = np.fft.rfft(mirrored, axis=0)[j] * np.exp(-0.5j * np.pi * j / steps)[:, None]
    return np.asarray(math.sqrt(2 / steps) / 2 * turned.real)


def holm(p: npt.ArrayLike) -> Floats:
    """Corrects the p-values of many tests for their number. [L] -> [L].

    Where what is at most 5 % afterwards counts as significant, chance makes one or more of all
    tests so in at most 5 % of cases, however they depend on one another.

    Source: Holm 1979, "A simple sequentially rejective multiple test procedure".

    >>> holm([0.01, 0.04, 0.03]).round(6).tolist()
    [0.03, 0.06, 0.06]
    """
    raw = np.asarray(p, np.float64)
    order = np.argsort(raw, kind="stable")
    grown = np.maximum.accumulate(raw[order] * np.arange(len(raw), 0, -1))
    corrected = np.empty(len(raw))
    corrected[order] = np.minimum(grown, 1)
    return corrected


def upper_tail(t: float, degrees: int) -> float:
    """Gives the chance that Student's t exceeds a value; exact to some 1e-15 (not relative).

    Args:
        t: The value; may be infinite.
        degrees: Degrees of freedom, a whole number of at least 1.

    Raises:
        ValueError: The degrees are out of range.

    Source: Abramowitz and Stegun 1964, 26.7.3 and 26.7.4: a finite sum for whole degrees.

    >>> round(upper_tail(1.0, 1), 6), round(upper_tail(-2.0, 13), 6)
    (0.25, 0.96658)
    """
    if degrees != int(degrees) or degrees < 1:
        raise ValueError(f"Degrees of freedom must be a whole number from 1, got {degrees!r}.")
    return _tail_at(math.atan2(t, math.sqrt(degrees)), int(degrees))


def quantile(p: float, degrees: int) -> float:
    """Finds the value that Student's t stays below with chance p, in (0, 1).

    Raises:
        ValueError: p or the degrees are out of range.

    >>> round(quantile(0.975, 13), 4)
    2.1604
    """
    if not 0 < p < 1:
        raise ValueError(f"A quantile needs 0 < p < 1, got {p!r}.")
    upper_tail(0.0, degrees)
    low, high = -math.pi / 2, math.pi / 2  # Of the angle whose tangent is t / sqrt(degrees).
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _tail_at(middle, int(degrees)) > 1 - p else (low, middle)
    return math.sqrt(degrees) * math.tan((low + high) / 2)


def _tail_at(angle: float, degrees: int) -> float:
    """Gives the upper tail at t = sqrt(degrees) tan(angle)."""
    cosine, sine = math.cos(angle), math.sin(angle)
    odd = degrees % 2
    # The sum's terms are ratios of odd and even numbers times growing powers of the cosine.
    term, total = 1.0, 1.0 if degrees > 1 else 0.0
    for k in range(2 + odd, degrees, 2):
        term *= cosine * cosine * (k - 1) / k
        total += term
    within = 2 / math.pi * (angle + sine * cosine * total) if odd else sine * total
    return min(1.0, max(0.0, (1 - within) / 2))
