"""What measuring costs, timed over the first steps and told once."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

_WARM_UP = 3
_TIMED = 7
_CHOICES = (2, 5, 10)  # Longer chords are curved too much for one panel of a rule.
_CHEAP = 1.2


class Cost:
    """Times measured steps against the training around them.

    Example:
        >>> cost_line(first=3, then=2, plain=0.010, measuring=0.019, every=1)
        'LCA: 3 probe gradients first, then 2 per measured step; training steps take 2.9x as long. \
every_n_steps=10 would make it about 1.2x, with less resolution and a larger residual.'
    """

    def __init__(self, every: int, refines: bool, synchronize: Callable[[], None]) -> None:
        """Starts the clock.

        Args:
            every: Optimizer steps per measured step.
            refines: Whether a tolerance is set, so that a longer chord takes more gradients.
            synchronize: Waits for the device; called only until the line has been told.
        """
        self._every = every
        self._refines = refines
        self._synchronize = synchronize
        self._gradients: list[int] = []
        self._plain: list[float] = []
        self._measuring: list[float] = []
        self._training = 0.0
        self._left = self._now()

    def _now(self) -> float:
        self._synchronize()
        return time.perf_counter()

    def enter(self) -> None:
        """Marks that a batch of plain training has ended."""
        self._began = self._now()
        self._training += self._began - self._left

    def leave(self, gradients: int | None = None) -> None:
        """Marks that training goes on, after so many gradients if a step was measured."""
        self._left = self._now()
        if gradients is not None:
            self._gradients.append(gradients)
            self._plain.append(self._training / self._every)
            self._measuring.append(self._left - self._began)
            self._training = 0.0

    def line(self) -> str | None:
        """Gives the line once enough steps are timed."""
        if len(self._gradients) < _WARM_UP + _TIMED:
            return None
        return cost_line(
            self._gradients[0],
            round(median(self._gradients[_WARM_UP:])),
            median(self._plain[_WARM_UP:]),
            median(self._measuring[_WARM_UP:]),
            self._every,
            refines=self._refines,
        )


def cost_line(
    first: int, then: int, plain: float, measuring: float, every: int, *, refines: bool = False
) -> str:
    """Words the cost: gradients, and how much longer a training step takes on average.

    Args:
        first: Probe gradients of the first measured step.
        then: Of every later one.
        plain: Seconds of one plain training step.
        measuring: Seconds of one measurement.
        every: Optimizer steps per measurement.
        refines: Whether a tolerance is set; then the cost of longer chords cannot be foretold.
    """

    def factor(n: int) -> float:
        return 1 + measuring / (n * plain)

    plural = "" if first == 1 else "s"
    text = (
        f"LCA: {first} probe gradient{plural} first, then {then} per measured step; "
        f"training steps take {factor(every):.1f}x as long."
    )
    rarer = [n for n in _CHOICES if n > every]
    if factor(every) > _CHEAP and rarer and not refines:
        n = next((n for n in rarer if factor(n) < _CHEAP + 0.05), rarer[-1])
        text += (
            f" every_n_steps={n} would make it about {factor(n):.1f}x, with less resolution and "
            "a larger residual."
        )
    return text
