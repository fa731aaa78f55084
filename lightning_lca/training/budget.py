"""The choice of every_n_steps from what measuring costs in the first steps."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median

import torch
from torch import Tensor

from lightning_lca.measure.allocation import Weights
from lightning_lca.training.cost import Cost, affordable
from lightning_lca.training.session import Session
from lightning_lca.training.settings import Settings
from lightning_lca.training.snapshots import Path

REHEARSALS = 5
_COLD = 2  # The first starts without a gradient to go on from; the second checks the one it has.
_TIMED = 20
_LONG = 10


class Budget:
    """Chooses every_n_steps while the first chord is under way.

    The first steps are measured one by one, as a rehearsal: their rows are kept if all steps can be
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

    def __init__(self, settings: Settings, session: Session, path: Path, cost: Cost) -> None:
        """Starts before the first step.

        Args:
            settings: What was asked for: the budget, and the least number to choose.
            session: Measures.
            path: Cuts the weights' motion into segments.
            cost: The clock.
        """
        self._most = settings.max_overhead or 0.0
        self._least = settings.every_n_steps
        self._refines = settings.tolerance is not None
        self._session = session
        self._path = path
        self._cost = cost
        self._rehearses = True
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
        self._whole = False  # What was rehearsed then is not in the checkpoint.

    @property
    def device(self) -> torch.device:
        """What is waited for when times are taken."""
        return self._cost.device

    def take(self, module: object, weights: Weights, done: int) -> int | None:
        """Takes a batch that has ended; gives every_n_steps once it is chosen.

        Then either the path is closed, and what was rehearsed is measured, or the first chord is
        open.

        Args:
            module: The LightningModule.
            weights: The live weights {name: [*shape]}.
            done: Optimizer steps done.
        """
        if self.began_at is None or done == self._done:
            return None
        self._cost.enter(done - self._done)
        self._done = done
        chosen = None
        if self._rehearses:
            self._rehearse(module, weights)
            if len(self._cost.measuring) == REHEARSALS:
                chosen = self._look(module, weights, done - self.began_at)
        elif done - self.began_at >= self._next_look:
            chosen = self._look(module, weights, done - self.began_at)
        self._cost.leave()
        return chosen

    def end(self, weights: Weights, done: int) -> int | None:
        """Chooses at the end of a training that was too short: all steps, or one chord."""
        if self.began_at is None or done == self.began_at:
            return None
        self._ended = True
        if self._rehearses and self._whole and self._least == 1:
            self._session.settle(keep=True)
            return 1
        if self._rehearses:
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

    def _rehearse(self, module: object, weights: Weights) -> None:
        """Measures a segment, in the time between `enter` and `leave` of the clock."""
        segment, continues = self._path.close(weights)
        self._cost.leave(self._session.rehearse(module, segment, continues, self._done))

    def _forget(self, weights: Weights) -> None:
        """Drops what was rehearsed, and opens the first chord again where it began."""
        self._session.settle(keep=False)
        self._rehearses = False
        # Only weights that were trained there: a chord told beforehand has no others.
        self._path.resume(self.start, {n: w for n, w in weights.items() if n in self.start})

    def _look(self, module: object, weights: Weights, length: int) -> int | None:
        """Chooses, or says how long the chord must become before the next look."""
        # The first step is slower than all others.
        self._plain = median(self._cost.plain[1:])
        if self._rehearses:
            self._measuring = median(self._cost.measuring[_COLD:])
        every = self._affordable()
        if self._rehearses:
            self._first_look = length
            if every * REHEARSALS <= length and self._least == 1 and self._whole:
                self._session.settle(keep=True)
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
        self._cost.enter(1)
        self._cost.plain.pop()
        self._rehearse(module, weights)
        self._measuring = self._cost.measuring[-1]
        if (every := self._affordable()) <= length:
            self._session.settle(keep=True)
            return length
        self._forget(weights)
        self._next_look = every
        return None

    def _affordable(self) -> int:
        """Every rank's own number may differ: the largest holds."""
        return self._session.largest(affordable(self._measuring, self._plain, self._most))
