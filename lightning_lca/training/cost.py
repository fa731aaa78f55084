"""What measuring costs: the one clock that times it, and what is told of it."""

from __future__ import annotations

import time
from math import ceil
from statistics import median

import torch

clock = time.perf_counter
_WARM_UP = 3
_TIMED = 7
_CHOICES = (2, 5, 10)  # Longer chords are curved too much for one panel of a rule.
_CHEAP = 1.2
_BY_FAR = 2.0


class Cost:
    """Times measuring against the training around it, waiting for the device at either end.

    Attributes:
        device: What the clock waits for.
        steps: Optimizer steps of every stretch of training, from `leave` to `enter`.
        plain: Seconds per optimizer step of it.
        measuring: Seconds from `enter` to `leave`, where a step was measured.
        gradients: Probe gradients of every measured step.

    Example:
        >>> cost_line(first=3, then=2, plain=0.010, measuring=0.019, every=1)
        'LCA: 3 probe gradients first, then 2 per measured step; training steps take 2.9x as long. \
every_n_steps=10 would make it about 1.2x, with less resolution and a larger residual.'
    """

    def __init__(self, device: torch.device) -> None:
        """Starts the clock.

        Args:
            device: What to wait for.
        """
        self.device = device
        self.steps: list[int] = []
        self.plain: list[float] = []
        self.measuring: list[float] = []
        self.gradients: list[int] = []
        self._left = self._entered = self.now()

    def now(self) -> float:
        """Reads the clock once the device has caught up."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return clock()

    def enter(self, steps: int) -> None:
        """Marks that so many optimizer steps of training have ended, and measuring may begin."""
        self._entered = self.now()
        self.steps.append(steps)
        self.plain.append((self._entered - self._left) / steps)

    def leave(self, gradients: int | None = None) -> None:
        """Marks that training goes on, after so many gradients if a step was measured."""
        self._left = self.now()
        if gradients is not None:
            self.gradients.append(gradients)
            self.measuring.append(self._left - self._entered)

    @property
    def is_known(self) -> bool:
        """Whether enough steps were timed."""
        return len(self.gradients) >= _WARM_UP + _TIMED

    def line(self, *, refines: bool = False) -> str:
        """Words what was timed; with a tolerance, without advice."""
        gradients, every, plain, measuring = self._steady()
        return cost_line(self.gradients[0], gradients, plain, measuring, every, refines=refines)

    def excess(self, every: int, most: float) -> str | None:
        """Words by how much a budget is overdrawn: None unless by far."""
        _, steps, plain, measuring = self._steady()
        overhead = measuring / (steps * plain)
        if overhead <= _BY_FAR * most:
            return None
        return (
            f"LCA: measuring takes {overhead:.0%} of training's own time, beyond "
            f"max_overhead={most:g}: since every_n_steps={every} was chosen in the first steps, "
            "training has become faster or measuring slower. It stays as it is; next time, "
            f"every_n_steps={affordable(measuring, plain, most)} would keep to it."
        )

    def _steady(self) -> tuple[int, int, float, float]:
        parts = (self.gradients, self.steps, self.plain, self.measuring)
        gradients, steps, plain, measuring = (median(part[_WARM_UP:]) for part in parts)
        return round(gradients), round(steps), plain, measuring


def affordable(measuring: float, plain: float, most: float) -> int:
    """Gives the least every_n_steps that keeps to a budget.

    Args:
        measuring: Seconds of one measurement.
        plain: Seconds of one plain training step.
        most: The budget, as a share of the time of plain training.

    Example:
        >>> affordable(measuring=0.019, plain=0.010, most=0.1)
        19
    """
    tiny = 1e-9  # Seconds, for clocks that stand still; and 0.019 / 0.001 is not quite 19.
    return max(1, ceil(measuring / (most * max(plain, tiny)) - tiny))


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
