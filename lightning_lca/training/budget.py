"""What measuring costs: the clock that times it, what is told of it, and the choice of a budget."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil
from statistics import median
from typing import Any

import torch
from torch import Tensor

from lightning_lca.measure.allocation import Segment, Weights
from lightning_lca.measure.quadrature import Quadrature
from lightning_lca.training.settings import Settings
from lightning_lca.training.snapshots import Snapshots

TRIALS = 5
_COLD = 2  # The first starts without a gradient to go on from; the second checks the one it has.
_TIMED = 20
_LONG = 10


@dataclass(frozen=True)
class Choice:
    """What a budget chose.

    Attributes:
        every: Optimizer steps of a segment.
        rule: The rule that each is measured by.
    """

    every: int
    rule: Quadrature


@dataclass(frozen=True)
class Trials:
    """What a budget asks of the training that it chooses for; every rank must ask alike.

    Attributes:
        measure: (module, segment, rule, steps done) -> gradients. Measures a segment, but for the
            time that it takes.
        commit: (rule) takes what was tried by a rule for measured; None: forgets it all.
        miss: (module, segment or None, rule) -> share. Tells how far layers' credits were off.
        largest: Finds the largest of all ranks' numbers.
    """

    measure: Callable[[Any, Segment, Quadrature, int], int]
    commit: Callable[[Quadrature | None], None]
    miss: Callable[[Any, Segment | None, Quadrature], float]
    largest: Callable[[int], int]


class Budget:
    """Chooses every_n_steps, and the rule, while the first chord is under way.

    The first steps are measured one by one, as a trial, by each rule that may be chosen: the rows
    of the better one are kept if all steps can be afforded by it, else those of the cheaper one,
    and else all are forgotten. Then plain steps are timed, until the steps done since the chord
    began pay for measuring it, or twenty are timed. What is measured is thus what a training that
    was told number and rule measures, from its first step on; 2 to 4 are the numbers that can't be
    chosen, since by then too little is timed.

    Chords are measured by the cheaper rule: at the same cost they are half as long, and along
    shorter chords less is missed than any rule makes good.

    With a tolerance a chord may take more gradients than a step: there it is measured before it is
    chosen, and training goes on to a longer one if it is too dear.

    Attributes:
        began_at: Optimizer steps done where the first chord began; None before the first step.
        start: The weights there {name: [*shape]}, on the host.
    """

    def __init__(
        self, settings: Settings, snapshots: Snapshots, timer: StepTimer, trials: Trials
    ) -> None:
        """Starts before the first step.

        Args:
            settings: What was asked for: the budget, and the least number to choose.
            snapshots: Cuts the weights' motion into segments.
            timer: The clock.
            trials: What is asked of the training.
        """
        self._most = settings.max_overhead or 0.0
        self._least = settings.every_n_steps
        self._rules = settings.choices
        self._refines = settings.tolerance is not None
        self._snapshots = snapshots
        self._trials = trials
        self._timer = timer
        self._seconds: dict[Quadrature, list[float]] = {rule: [] for rule in self._rules}
        self._tries = True
        self._whole = True
        self._done = 0
        self._next_look = 0
        self._first_look = 0
        self._ended = False
        self._plain = self._measuring = 0.0
        self._rule = self._rules[0]
        self._missed: tuple[int, float] | None = None  # By a chord of so many steps.
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

    def take(self, module: object, weights: Weights, done: int) -> Choice | None:
        """Takes a batch that has ended; gives number and rule once they are chosen.

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

    def end(self, weights: Weights, done: int) -> Choice | None:
        """Chooses at the end of a training that was too short: all steps, or one chord."""
        if self.began_at is None or done == self.began_at:
            return None
        self._ended = True
        if self._tries and self._whole and self._least == 1:
            self._trials.commit(self._rule)
            return Choice(1, self._rule)
        if self._tries:
            self._forget(weights)
        return Choice(max(self._least, done - self.began_at), self._rule)

    def line(self, chosen: Choice) -> str:
        """Words what was chosen, from which times, and what it means."""
        every = chosen.every
        told = f"every_n_steps={every}"
        if len(self._rules) > 1:
            told += f', quadrature="{chosen.rule.name}"'
        text = f"LCA: {told} repeats this run exactly; "
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
        text += self._cost_in_accuracy(every)
        if every > _LONG:
            text += (
                f" A chord of {every} steps cuts across the bends of the path. A smaller probe or "
                "a larger max_overhead makes it shorter."
            )
        return text

    # -- inside -----------------------------------------------------------------------------------

    def _cost_in_accuracy(self, every: int) -> str:
        """Says what was seen of it in the first steps."""
        if self._missed is None:
            return ""
        steps, missed = self._missed
        what = (
            f"Measured so, the first {TRIALS} steps were"
            if steps == 1
            else (f"The first {steps} steps, measured as one chord, were")
        )
        text = (
            f" {what} off by {100 * missed:.2g} % of the layers' credit, against Simpson's rule "
            "step by step"
        )
        if every <= 1:
            return f"{text}."
        longer = "; longer chords are by more" if every > steps else ""
        return f"{text}{longer}. That a chord's residual is small does not vouch for its layers."

    def _measure(self, module: object, weights: Weights) -> None:
        """Measures a segment by every rule, in the time between `enter` and `leave`."""
        segment = self._snapshots.close(weights)
        gradients = []
        for rule in self._rules:
            began = self._timer.now()
            gradients.append(self._trials.measure(module, segment, rule, self._done))
            self._seconds[rule].append(self._timer.now() - began)
        self._timer.leave(gradients[0])

    def _forget(self, weights: Weights) -> None:
        """Drops what was tried, and opens the first chord again where it began."""
        self._trials.commit(None)
        self._tries = False
        # Only weights that were trained there: a chord told beforehand has no others.
        self._snapshots.resume(self.start, {n: w for n, w in weights.items() if n in self.start})

    def _look(self, module: object, weights: Weights, length: int) -> Choice | None:
        """Chooses, or says how long the chord must become before the next look."""
        # The first step is slower than all others.
        self._plain = median(self._timer.plain[1:])
        if self._tries:
            every = self._choose_rule(module, weights, length)
            self._first_look = length
            if self._affords_all(every, length):
                self._trials.commit(self._rule)
                return Choice(1, self._rule)
            self._forget(weights)
        else:
            every = self._affordable()
        if every <= length and self._refines and length >= self._least:
            return self._try(module, weights, length)
        every = max(every, self._least)
        if every <= length:
            return Choice(length, self._rule)
        if length >= _TIMED and not self._refines:
            return Choice(every, self._rule)
        self._next_look = every if self._refines else min(every, _TIMED)
        return None

    def _choose_rule(self, module: object, weights: Weights, length: int) -> int:
        """Chooses the rule, and returns the every_n_steps that it affords.

        The better rule, if it affords every step; or else the cheaper one, if that is cheaper here.
        """
        affords = {}
        for rule in self._rules:
            self._measuring = median(self._seconds[rule][_COLD:])
            affords[rule] = self._affordable()
        best, cheapest = self._rules[0], self._rules[-1]
        keeps_best = self._affords_all(affords[best], length)
        self._rule = best if keeps_best or affords[cheapest] >= affords[best] else cheapest
        self._measuring = median(self._seconds[self._rule][_COLD:])
        if len(self._rules) > 1 and self._whole and not keeps_best:
            if self._affords_all(affords[self._rule], length):
                self._missed = 1, self._trials.miss(module, None, self._rule)
            elif weights.keys() == self.start.keys():  # Or others are trained by now.
                self._snapshots.resume(self.start, weights)
                chord = self._snapshots.look(weights)
                self._missed = length, self._trials.miss(module, chord, self._rule)
        return affords[self._rule]

    def _affords_all(self, every: int, length: int) -> bool:
        """Whether each of the segments that were tried is paid for, and may be kept."""
        return every * TRIALS <= length and self._least == 1 and self._whole

    def _try(self, module: object, weights: Weights, length: int) -> Choice | None:
        """Measures the chord, and chooses it if it is paid for."""
        self._timer.enter(1)
        self._timer.plain.pop()
        self._measure(module, weights)
        self._measuring = self._seconds[self._rule][-1]
        if (every := self._affordable()) <= length:
            self._trials.commit(self._rule)
            return Choice(length, self._rule)
        self._forget(weights)
        self._next_look = every
        return None

    def _affordable(self) -> int:
        """Every rank's own number may differ: the largest holds."""
        return self._trials.largest(affordable(self._measuring, self._plain, self._most))


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
