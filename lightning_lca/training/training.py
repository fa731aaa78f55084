"""One training followed from its start to its end: when segments open and close, and what is told.

The callback's hooks say what happens; what it means for the measure is decided here.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_lca.measure.shards import parts
from lightning_lca.probe.probe import live_weights
from lightning_lca.runtime.notices import tell, warn
from lightning_lca.runtime.signals import held
from lightning_lca.training.budget import Budget
from lightning_lca.training.cost import Cost
from lightning_lca.training.session import Session, x_axis
from lightning_lca.training.settings import Settings
from lightning_lca.training.snapshots import Path
from lightning_lca.training.steps import Steps


class Training:
    """Opens a segment before an optimizer step, and measures it at the end of a batch.

    Attributes:
        session: What measures and records.
        path: The motion of the weights.
        every_n_steps: Steps of a segment; None until a budget has chosen.
    """

    def __init__(self, trainer: Any, module: Any, settings: Settings) -> None:
        """Reads the probes, and evaluates each once; every rank must call this.

        Args:
            trainer: The Trainer that starts.
            module: Its LightningModule.
            settings: What was asked for.
        """
        self._asked = settings
        self.path = Path()
        self.session = Session(trainer, module, settings)
        self.every_n_steps = None if settings.max_overhead is not None else settings.every_n_steps
        self._chosen: int | None = None
        self._trained: dict[str, Tensor] = {}
        self._opened_at = 0
        self._steps = Steps(trainer, module, self._step)
        self._cost: Cost | None = Cost(module.device)
        self._budget: Budget | None = None

    def begin(self, trainer: Any, module: Any, kept: dict[str, Any] | None) -> None:
        """Opens the record, and goes on where a checkpoint left off.

        Args:
            trainer: The Trainer that starts.
            module: Its LightningModule.
            kept: What `state` gave when the checkpoint was saved; None for a new training.
        """
        self.session.begin(kept)
        opened = kept["open"] if kept else None
        if kept:
            self._steps.resume(kept["steps"])
            if self.every_n_steps is None and kept.get("every_n_steps") is not None:
                self.every_n_steps = self._chosen = int(kept["every_n_steps"])
                self.session.choose(self.every_n_steps)
        if opened:
            self._opened_at = opened["at"]
            self.path.resume(opened["weights"], live_weights(module))
            # The checkpoint was saved after a step was done and before it was measured.
            if self._is_due:
                self._measure(module)
                self.session.log(x_axis(trainer), self._steps.done)
        self._cost = Cost(module.device)
        if self.every_n_steps is None:
            self._budget = Budget(self._asked, self.session, self.path, self._cost)
            if opened:
                self._budget.resume(opened, self._steps.done)

    # -- what happens -----------------------------------------------------------------------------

    def look(self, module: Any) -> None:
        """Notes which weights are trained: later, a toggled optimizer may hide some."""
        if not self.path.is_open:
            self._trained = live_weights(module)

    @held()
    def open(self) -> None:
        """Starts a segment where the weights are, unless one is open: only copies."""
        if not self.path.is_open:
            self._opened_at = self._steps.done
            self.path.open(self._trained)
            if self._budget is not None:
                self._budget.begin(self._opened_at, self.path.start)

    def close(self, trainer: Any, module: Any) -> None:
        """Closes the segment at the end of a batch if it is due, measures it, and logs."""
        done = self._steps.done
        if self._budget is not None:
            every = self._budget.take(module, live_weights(module), done)
            if self._choose(trainer, self._budget, every) and not self.path.is_open:
                self.session.log(x_axis(trainer), done)
        if not self._is_due:
            self.session.record()
            return
        if self._cost is not None:
            self._cost.enter(done - self._opened_at)
        gradients = self._measure(module)
        self.session.log(x_axis(trainer), done)
        self.session.record()
        if self._cost is not None:
            self._cost.leave(gradients)
            self._tell(trainer, self._cost)

    def end(self, trainer: Any, module: Any) -> None:
        """Measures what is left of the last chord, logs it and closes the record."""
        self._steps.leave()
        x, done = 0, self._steps.done
        if self._budget is not None:
            every = self._budget.end(live_weights(module), done)
            if self._choose(trainer, self._budget, every):
                x = x_axis(trainer) - 1
            self._chosen = None  # A training that goes on from here chooses for itself.
        if self.path.is_open and done > self._opened_at:
            self._measure(module)
            x = x_axis(trainer) - 1  # The last batch is counted by now.
        self.session.end(x, done)

    def abort(self) -> None:
        """Writes what was measured, after an error that is none of ours; raises nothing."""
        self._steps.leave()
        try:
            self.session.close()
        except Exception as error:
            warn(f"LCA: the record could not be finished: {error!r}")

    def state(self) -> dict[str, Any]:
        """Gives what a checkpoint needs, as plain values and tensors."""
        opened = None
        # Of weights that are cut, a checkpoint of this process would hold a part only: a chord that
        # was open then ends there, and what it did to the loss is booked as drift.
        if self.session.is_cut:
            pass
        elif self._budget is not None and self._budget.began_at is not None:
            opened = {"at": self._budget.began_at, "weights": dict(self._budget.start)}
        elif self.path.is_open:
            weights = {n: w.cpu().clone() for n, w in self.path.start.items()}
            opened = {"at": self._opened_at, "weights": weights}
        own = {"open": opened, "steps": self._steps.done, "every_n_steps": self._chosen}
        return self.session.state() | own

    # -- what it means ----------------------------------------------------------------------------

    @property
    def _is_due(self) -> bool:
        every = self.every_n_steps
        return (
            self.path.is_open and every is not None and self._steps.done - self._opened_at >= every
        )

    @held()
    def _step(self) -> None:
        """Opens a segment at a step of manual optimization, or marks where the open one passes."""
        done = self._steps.done
        if self._asked.segments == "step" and self.path.is_open and done > self._opened_at:
            self.path.mark(self._trained, done)
        self.open()

    def _choose(self, trainer: Any, budget: Budget, every: int | None) -> bool:
        """Goes on with the every_n_steps that was chosen; False if none is yet."""
        if self.path.is_open and budget.began_at is not None:
            self._opened_at = budget.began_at
        if every is None:
            return False
        tell(trainer, budget.line(every))
        self.session.choose(every)
        self.every_n_steps = self._chosen = every
        self._budget, self._cost = None, Cost(budget.device)
        return True

    def _tell(self, trainer: Any, cost: Cost) -> None:
        """Says once what measuring costs, or that it costs far more than it should."""
        if not cost.is_known or self.every_n_steps is None:
            return
        self._cost = None
        if self._asked.max_overhead is None:
            tell(trainer, cost.line(refines=self._asked.tolerance is not None))
        elif trainer.is_global_zero and (
            excess := cost.excess(self.every_n_steps, self._asked.max_overhead)
        ):
            warn(excess)

    def _measure(self, module: Any) -> int:
        """Measures from where the segment was opened to where the weights are now."""
        live = live_weights(module)
        whole, continues = self.path.close(live)
        pieces = self.path.pieces(whole, self._steps.done)
        gradients = 0
        for piece, step in pieces:
            try:
                if len(pieces) > 1:
                    piece.at(1.0).write(parts(live))
                gradients += self.session.measure(piece, continues, step)
            except BaseException:
                whole.at(1.0).write(parts(live))
                # A checkpoint saved now says where it began: it is measured when training resumes.
                if self.session.measured_to < step:
                    self.path.reopen(piece)
                raise
            self._opened_at, continues = step, True
        return round(gradients / len(pieces))
