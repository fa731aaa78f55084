"""What measuring costs: the clock that times it, what is told of it, and the choice of a budget."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from math import ceil
from statistics import median

import torch
from torch import Tensor

from lightning_lca.measure.allocation import Weights
from lightning_lca.training.settings import Settings
from lightning_lca.training.snapshots import Snapshots

TRIALS = 5
_COLD = 2  # The first starts without a gradient to go on from; the second checks the one it has.
_TIMED = 20
_LONG = 10


class Budget:
    """Chooses every_n_steps while the first chord is under way.

    The first steps are measured one by one, as a trial: their rows are kept if all steps can be
    afforded, and forgotten otherwise. Then plain steps are timed, until the steps done since the
    chord began pay for measuring it, or twenty are timed. What is measured is thus what a training
    that was told the number measures, from its first step on; 2 to 4 are the numbers that can't be
    chosen, since by then too little is timed.

    With a tolerance a chord may take more gradients than a step: there it is measured before it is
    chosen, and training goes on to a longer one if it is too dear.

    Attributes:
        began_at: Optimizer steps done where the first chord began; None before the first step.
        start: The weights there {name: [*shape]}, on the host.
    """

    def __init__(
        self,
        settings: Settings,
        snapshots: Snapshots,
        timer: StepTimer,
        trial: Callable[..., int],
        commit: Callable[..., None],
        largest: Callable[[int], int],
    ) -> None:
        """Starts before the first step.

        Args:
            settings: What was asked for: the budget, and the least number to choose.
            snapshots: Cuts the weights' motion into segments.
            timer: The clock.
            trial: Closes the open segment and measures it, but for the time that it takes; returns
                the gradients.
            commit: Takes what was tried for measured (``keep=True``), or forgets it.
            largest: Finds the largest of all ranks' numbers.
        """
        self._most = settings.max_overhead or 0.0
        self._least = settings.every_n_steps
        self._refines = settings.tolerance is not None
        self._snapshots = snapshots
        self._trial = trial
        self._commit = commit
        self._largest = largest
        self._timer = timer
        self._tries = True
        self._whole = True
        self._done = 0
        self._next_look = 0
        self._first_look = 0
        self._ended = False
        self._plain = self._measuring = 0.0
        self.began_at: int | None = None
        self.start: dict[str, Tensor] = {}

    def begin(self, at: int, start: Weights) -> None:
        """Keeps where the first chord begins; later calls change nothing."""
        if self.began_at is None:
            self.began_at = self._done = at
            self.start = {n: w.detach().cpu().clone() for n, w in start.items()}

    def resume(self, opened: Mapping[str, object], done: int) -> None:
        """Takes up a first chord that was under way when a checkpoint was saved."""
        self.begin(opened["at"], opened["weights"])  # type: ignore[arg-type]
        self._done = done
        self._whole = False  # What was tried then is not in the checkpoint.

    @property
    def device(self) -> torch.device:
        """What is waited for when times are taken."""
        return self._timer.device

    def take(self, module: object, weights: Weights, done: int) -> int | None:
        """Takes a batch that has ended; gives every_n_steps once it is chosen.

        Then either the path is closed, and what was tried is measured, or the first chord is
        open.

        Args:
            module: The LightningModule.
            weights: The live weights {name: [*shape]}.
            done: Optimizer steps done.
        """
        if self.began_at is None or done == self._done:
            return None
        self._timer.enter(done - self._done)
        self._done = done
        chosen = None
        if self._tries:
            self._measure(module, weights)
            if len(self._timer.measuring) == TRIALS:
                chosen = self._look(module, weights, done - self.began_at)
        elif done - self.began_at >= self._next_look:
            chosen = self._look(module, weights, done - self.began_at)
        self._timer.leave()
        return chosen

    def end(self, weights: Weights, done: int) -> int | None:
        """Chooses at the end of a training that was too short: all steps, or one chord."""
        if self.began_at is None or done == self.began_at:
            return None
        self._ended = True
        if self._tries and self._whole and self._least == 1:
            self._commit(keep=True)
            return 1
        if self._tries:
            self._forget(weights)
        return max(self._least, done - self.began_at)

    def line(self, every: int) -> str:
        """Words what was chosen, from which times, and what it means."""
        text = f"LCA: every_n_steps={every} repeats this run exactly; "
        if self._ended:
            return text + f"training ended before max_overhead={self._most:g} could choose more."
        share = self._measuring / self._plain
        text += (
            f"chosen for max_overhead={self._most:g}: measuring a step takes {share:.2g} times as "
            f"long as a plain one ({1e3 * self._measuring:.3g} and {1e3 * self._plain:.3g} "
            f"ms), so that training slows down by {share / every:.1%}."
        )
        if (fits := affordable(self._measuring, self._plain, self._most)) < self._least:
            text += f" every_n_steps={fits} would do, too, but {self._least} is the least allowed."
        elif fits < every == self._first_look:
            text += f" every_n_steps={fits} would, too, but until step {every} steps were timed."
        if every > _LONG:
            text += (
                f" A chord of {every} steps cuts across the bends of the path: watch the residual. "
                "A smaller probe or a larger max_overhead makes it shorter."
            )
        return text

    # -- inside -----------------------------------------------------------------------------------

    def _measure(self, module: object, weights: Weights) -> None:
        """Measures a segment, in the time between `enter` and `leave` of the clock."""
        self._timer.leave(self._trial(module, weights, self._done))

    def _forget(self, weights: Weights) -> None:
        """Drops what was tried, and opens the first chord again where it began."""
        self._commit(keep=False)
        self._tries = False
        # Only weights that were trained there: a chord told beforehand has no others.
        self._snapshots.resume(self.start, {n: w for n, w in weights.items() if n in self.start})

    def _look(self, module: object, weights: Weights, length: int) -> int | None:
        """Chooses, or says how long the chord must become before the next look."""
        # The first step is slower than all others.
        self._plain = median(self._timer.plain[1:])
        if self._tries:
            self._measuring = median(self._timer.measuring[_COLD:])
        every = self._affordable()
        if self._tries:
            self._first_look = length
            if every * TRIALS <= length and self._least == 1 and self._whole:
                self._commit(keep=True)
                return 1
            self._forget(weights)
        if every <= length and self._refines and length >= self._least:
            return self._try(module, weights, length)
        every = max(every, self._least)
        if every <= length:
            return length
        if length >= _TIMED and not self._refines:
            return every
        self._next_look = every if self._refines else min(every, _TIMED)
        return None

    def _try(self, module: object, weights: Weights, length: int) -> int | None:
        """Measures the chord, and chooses it if it is paid for."""
        self._timer.enter(1)
        self._timer.plain.pop()
        self._measure(module, weights)
        self._measuring = self._timer.measuring[-1]
        if (every := self._affordable()) <= length:
            self._commit(keep=True)
            return length
        self._forget(weights)
        self._next_look = every
        return None

    def _affordable(self) -> int:
        """Every rank's own number may differ: the largest holds."""
        return self._largest(affordable(self._measuring, self._plain, self._most))


clock = time.perf_counter
_WARM_UP = 3
_KNOWN = 7
_CHOICES = (2, 5, 10)  # Longer chords are curved too much for one panel of a rule.
_CHEAP = 1.2
_BY_FAR = 2.0


class StepTimer:
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
        return len(self.gradients) >= _WARM_UP + _KNOWN

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
    """Returns the least every_n_steps that keeps to a budget.

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
