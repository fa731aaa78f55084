"""LCACallback: what a user adds to a Trainer, asks for, and reads from."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any

from torch import Tensor

from lightning_lca.measure.allocation import Allocation
from lightning_lca.measure.groups import GroupBy
from lightning_lca.measure.quadrature import Quadrature, QuadratureName
from lightning_lca.probe.loss import ProbeMode
from lightning_lca.record import notebook, overfitting, summary
from lightning_lca.record.findings import Finding, find
from lightning_lca.record.history import History
from lightning_lca.reporting.live import page
from lightning_lca.runtime.lightnings import AnyTrainer, LightningCallback, LightningModule, Trainer
from lightning_lca.runtime.signals import defer_signals
from lightning_lca.training.meter import Meter, Results
from lightning_lca.training.settings import BreakdownName, ProbeSource, Segments, Settings
from lightning_lca.training.support import check_trainer, distinct_key
from lightning_lca.training.training import Training


class LCACallback(LightningCallback):
    """Measures Loss Change Allocation while a Lightning Trainer trains, and changes nothing else.

    Every measured optimizer step is credited to single weights: negative where a weight's motion
    lowered the loss on a fixed probe set (it helped), positive where it raised it (it hurt). Sums
    per layer go to the Trainer's loggers every ``log_every_n_steps`` and, for every measured step,
    to the record in the log directory, which `History.load` reads.

    Logged are, with "lca" in front (a second probe "val" has "lca_val"), in loss units:
    ``lca/total`` and ``lca/residual``, credit and residual since the last log; ``lca/total_cum``,
    credit since the start; ``lca/loss``, that of the probe; ``lca_layer_cum/00 name``, a layer's
    credit since the start. As fractions of weights, mean per step since the last log: ``lca/help``,
    ``lca/hurt``, ``lca_layer_help/00 name`` and ``lca_layer_hurt/00 name``. And
    ``lca/not_finite``, the steps so far whose loss or credit was not finite: no sum counts them.

    One instance may serve several trainings, one after the other; its results are those of the
    latest. A Trainer that fits again goes on where it was: so do history, sums and record. A copy
    or a pickle of it is small: it keeps the settings and, as plain data on the host, the results so
    far (``history``, ``totals``, ``log_dir``; not ``last``), but nothing of a training that runs,
    and starts afresh in its own. A deep copy shares the probe's data and ``loss_fn`` with the
    original; a pickle holds them, so that a lambda cannot be pickled.

    Args:
        probe: What the loss is measured on: "train" or "val" (batches drawn from that data), an
            iterable of batches, a DataLoader, or {name: any of these} for several probes.
        probe_batches: Batches drawn for "train" and "val"; fixed for the run.
        probe_mode: "no_dropout": as training has the model, dropout off, BatchNorm on batch
            statistics; "eval": eval mode; "train": dropout on, with the same random numbers at
            every evaluation.
        loss_fn: (module, batch) -> scalar tensor, or {term: scalar}, whose sum is taken. None: the
            module's own training_step.
        every_n_steps: Measures the chord from every n-th optimizer step to the next: nothing is
            missed, at 1/n of the cost, but what happens within a chord is not resolved. The
            attribute of this name is what max_overhead chose, and None until it did.
        max_overhead: Chooses every_n_steps, at least the one given, from what the first steps cost,
            so that measuring slows training down by at most this share, up to 1 (0.1: a tenth).
            Where Simpson's rule does not afford every step, it chooses ``closed_trapezoid``: chords
            by it are half as long at the same cost. Both are chosen once, logged with what that
            costs in accuracy, recorded, and ``every_n_steps`` and ``quadrature`` from then on: a
            training that is told them has the same history. What loggers take to write, and figures
            to draw, is not in it. While it chooses, one more copy of the weights is held.
        segments: "batch": a segment goes from the begin to the end of a batch. "step": where manual
            optimization steps several times in a batch, every step has a segment and a row of its
            own, on the loss as it is at the batch's end; each takes one more copy of the weights.
        quadrature: Name of a rule or a `Quadrature`. "simpson": two gradients per measured step.
            "closed_trapezoid": one; what it leaves of the loss change, which is known, is shared
            out over the weights by how much their gradients change along the step. "adaptive": the
            same, but Simpson's rule where that is much. Layers are nearly as good by these, single
            weights (``helping``, ``track_parameters``) less so. Also "euler", "midpoint",
            "trapezoid", "boole", "gauss2" and "gauss3".
        tolerance: Largest |residual| per measured step, in loss units: panels are doubled until it
            is met. Needs Simpson's rule. None: no refinement; the residual is reported all the
            same.
        max_splits: Most panels of a refinement, a power of two; a step that needs more is flagged
            in ``history.converged``.
        include: What is measured: a pattern of names or a list of them, as "encoder.*", matched
            with the full names of parameters and of the modules around them; None: everything.
        exclude: What is left out of that, likewise. What is left out is neither copied nor
            credited: cost and memory follow the rest. To the loss it is a constant at each
            measurement, with the value it has there, and what its own training does to the loss
            from one measurement to the next is booked as drift (the start of a step is then
            evaluated afresh: one gradient more).
        group_by: What history and dashboards resolve: "layer", "parameter", "neuron", "head"
            (attention heads, and all else by layer), "module:2" (modules to that depth), or a
            function (name, parameter) -> name of the group.
        log_every_n_steps: Interval of the scalars; None: that of the Trainer.
        seed: Draws the probe's batches and seeds its random numbers.
        track_parameters: Keeps ``totals`` and ``last``, at two more copies of the weights, and
            follows a sample of 10,000 single weights in the record.
        neurons: Keeps the credit of every neuron (output channel) per logging interval in the
            record, so that dashboards can open a layer; one more pass over the weights per step.
        figures: Shows figures in loggers that can (TensorBoard, Weights & Biases, Comet, MLflow,
            LitLogger, any with a method ``log_image(key, images, step)``), or as PNG files in
            ``log_dir``, up to ten times per run and at its end.
        custom_scalars: Lays out TensorBoard's Custom Scalars tab, in a sub-run of its own.
        live: In a notebook (Jupyter, Colab, VS Code), shows the summary as a table with bars and
            the heatmap below the cell that trains, and keeps them up to date: at most once a second
            and in a tenth of the time of training, besides the first drawing and the last.
        breakdown: Splits every credit into shares that add up to it, `History.breakdowns`: "part"
            says what the optimizer's step was made of (signal, momentum, weight_decay, noise,
            other), "order" what the gradient at the start foretold and what curvature changed;
            they take no further gradient, and one more copy of the weights ("part" over chords:
            six). "term" says what each term of the loss was credited, where ``loss_fn`` returns
            several: one forward and a backward pass for each, and for each but the last two copies
            of the weights. True: all that there are (no terms by a rule that closes).
        oscillation: Notes in every step how many weights of each group turned round, and how the
            motion lies to the gradient, `History.oscillation`. Takes no further gradient, and one
            more copy of the weights and a quarter (one that ``breakdown`` takes, too).

    Attributes:
        log_dir: Directory of the record, while and after training.

    Raises:
        ValueError: An argument out of range. TypeError: one of the wrong type.

    Example:
        >>> import tempfile
        >>> import pytorch_lightning as pl
        >>> from pytorch_lightning.demos.boring_classes import BoringModel
        >>> lca = LCACallback(every_n_steps=2, figures=False)
        >>> trainer = pl.Trainer(
        ...     max_steps=8,
        ...     callbacks=[lca],
        ...     default_root_dir=tempfile.mkdtemp(),
        ...     enable_progress_bar=False,
        ...     enable_model_summary=False,
        ... )
        >>> trainer.fit(BoringModel())
        >>> len(lca.history), lca.history.groups
        (4, ('layer',))
        >>> print(lca.summary())
        layer ...
    """

    _writes = True  # Whether this process keeps the record.

    def __init__(
        self,
        probe: ProbeSource | Mapping[str, ProbeSource] = "train",
        probe_batches: int = 1,
        probe_mode: ProbeMode = "no_dropout",
        loss_fn: Callable[[Any, Any], Any] | None = None,
        every_n_steps: int = 1,
        max_overhead: float | None = None,
        segments: Segments = "batch",
        quadrature: QuadratureName | Quadrature = "simpson",
        tolerance: float | None = None,
        max_splits: int = 32,
        group_by: GroupBy = "layer",
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        log_every_n_steps: int | None = None,
        seed: int = 0,
        track_parameters: bool = False,
        neurons: bool = False,
        figures: bool = True,
        custom_scalars: bool = False,
        live: bool = False,
        breakdown: bool | BreakdownName | Sequence[BreakdownName] = False,
        oscillation: bool = False,
    ) -> None:
        """Checks the arguments; everything that costs anything waits for the start of training."""
        super().__init__()
        self._settings = Settings.check(
            probe=probe,
            probe_batches=probe_batches,
            probe_mode=probe_mode,
            loss_fn=loss_fn,
            every_n_steps=every_n_steps,
            max_overhead=max_overhead,
            segments=segments,
            quadrature=quadrature,
            tolerance=tolerance,
            max_splits=max_splits,
            group_by=group_by,
            include=include,
            exclude=exclude,
            log_every_n_steps=log_every_n_steps,
            seed=seed,
            track_parameters=track_parameters,
            neurons=neurons,
            figures=figures,
            custom_scalars=custom_scalars,
            live=live,
            breakdown=breakdown,
            oscillation=oscillation,
        )
        self.log_dir: FilePath | None = None
        self._training: Training | None = None
        self._results: dict[str | None, Results] = {}
        self._kept: dict[str, Any] | None = None
        self._chords = self._settings.chords()
        self._key: str | None = None

    # -- results ----------------------------------------------------------------------------------

    @property
    def every_n_steps(self) -> int | None:
        """Optimizer steps of a segment: what was given, or what max_overhead chose; else None."""
        return self._chords.every

    @property
    def quadrature(self) -> str:
        """Name of the rule: that which was given, or what max_overhead chose."""
        return self._chords.rule.name

    @property
    def histories(self) -> dict[str | None, History]:
        """Every probe's table of measured steps, by name; the name of a single probe is None."""
        return {name: measured.history for name, measured in self._measured().items()}

    @property
    def history(self) -> History:
        """The table of measured steps (of the first probe, if there are several).

        Raises:
            RuntimeError: Training has not started.
        """
        return self._first("history").history

    @property
    def totals(self) -> dict[str, Tensor]:
        """Cumulative LCA {name: [*shape]}, in loss units; needs track_parameters=True."""
        totals = self._first("totals").totals
        if totals is None:
            raise RuntimeError("totals needs LCACallback(track_parameters=True).")
        return totals

    @property
    def last(self) -> Allocation | None:
        """The allocation of the latest measured step; needs track_parameters=True."""
        first = self._first("last")
        if first.totals is None:
            raise RuntimeError("last needs LCACallback(track_parameters=True).")
        return first.last

    def summary(self, all: bool = False) -> str:
        """Tells per layer the share of the loss change, and how the ledger closes, as text.

        Where probes are named "train" and "val", a table tells which layers overfit.

        Args:
            all: A row for every layer. Else, of more than forty, the ten that moved the loss most
                have one, and the others are folded by block: module by module, with exact sums.
        """
        texts = [
            f"probe {name!r}\n" * (name is not None) + history.summary(all)
            for name, history in self.histories.items()
        ]
        texts.append(overfitting.text(self.histories, everything=all))
        texts.append(summary.together(self.histories))
        return "\n\n".join(filter(None, texts)) or "LCA: training has not started."

    def __repr__(self) -> str:
        return self._settings.key()

    def _repr_html_(self) -> str:
        """Shows the summary as a table with bars, and the heatmap, where a notebook shows it."""
        histories = self.histories
        return page(histories) if histories else notebook.message(self.summary())

    def findings(self) -> list[Finding]:
        """Lists what all probes show beyond chance, most important first, and what to do about it.

        With probes named "train" and "val" also the layers that overfit. Fewer than 50 finite steps
        are too few to tell: an empty list.
        """
        return find(self.histories)

    @property
    def state_key(self) -> str:
        """Tells several of these callbacks in one Trainer apart."""
        # Nobody reads it before `setup` but Lightning's check for doubles, whose message names no
        # cure: that of `setup` does.
        return self._key or f"{self._settings.key()} at {id(self):#x}"

    # -- hooks ------------------------------------------------------------------------------------

    def setup(self, trainer: AnyTrainer, pl_module: LightningModule, stage: str) -> None:
        """Tells the Trainer's callbacks of this kind apart.

        Raises:
            MisconfigurationException: Two of them measure the same.
        """
        others = [other._settings for other in _siblings(trainer) if other is not self]
        self._key = distinct_key(self._settings, others)

    def on_train_start(self, trainer: AnyTrainer, pl_module: LightningModule) -> None:
        """Reads the probes, evaluates each once, and opens the record."""
        with defer_signals():
            check_trainer(trainer, pl_module, self._settings)
            kept, self._kept = self._kept, None
            before = None
            if self._training is not None:
                self._training.abort()  # Nobody may have ended it.
                if kept is None and self._training.goes_on_in(trainer):
                    kept, before = self._training.state(), self._training.histories
            self._results, self._training = {}, None
            self._chords = self._settings.chords()
            self._training = Training(
                trainer,
                pl_module,
                self._settings,
                self._chords,
                key=self.state_key,
                place=_place(self, trainer),
                kept=kept,
                writes=self._writes,
                before=before,
            )
            self.log_dir = self._training.reporter.log_dir
            self._training.begin(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: AnyTrainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Notes which weights are trained, and keeps batches where the probe needs them."""
        if self._training is not None:
            self._training.start(pl_module, batch)

    def on_before_optimizer_step(
        self, trainer: AnyTrainer, pl_module: LightningModule, optimizer: Any
    ) -> None:
        """Opens a segment: only copies, since graphs may still be alive."""
        if self._training is None:
            return
        if pl_module.automatic_optimization:
            self._training.look(pl_module)
        self._training.open()

    def on_train_batch_end(
        self,
        trainer: AnyTrainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Closes the segment if it is due, measures it, and logs on the interval."""
        if self._training is not None:
            with defer_signals():
                self._training.close(trainer, pl_module)

    def on_train_epoch_end(self, trainer: AnyTrainer, pl_module: LightningModule) -> None:
        """Measures the rest of the last chord before the module lets go of what the epoch made."""
        if self._training is not None:
            with defer_signals():
                self._training.end_epoch(trainer, pl_module)

    def on_train_end(self, trainer: AnyTrainer, pl_module: LightningModule) -> None:
        """Measures what is left of the last chord, logs it and closes the record."""
        if self._training is not None:
            with defer_signals():
                self._training.end(trainer, pl_module)

    def on_exception(
        self, trainer: AnyTrainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Writes what was measured; the user's own error stays on top."""
        if self._training is not None:
            with defer_signals():
                self._training.abort()

    def state_dict(self) -> dict[str, Any]:
        """Returns what a checkpoint needs: some numbers, and where the record is.

        With ``track_parameters`` also ``totals``, and in mid-chord where it began: each a copy of
        the weights. In mid-chord with breakdown="part" five copies more for every probe, and with
        ``oscillation`` a byte for every weight.
        """
        with defer_signals():
            return (self._kept or {}) if self._training is None else self._training.state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes what `state_dict` gave, for the training that is about to start."""
        self._kept = state_dict or None

    # -- inside -----------------------------------------------------------------------------------

    def _measured(self) -> Mapping[str | None, Meter | Results]:
        """Returns what was measured by every probe, up to now."""
        if self._training is None:
            return self._results
        self._training.reporter.collect()
        return self._training.meters

    def _first(self, what: str) -> Meter | Results:
        measured = self._measured()
        if not measured:
            raise RuntimeError(
                f"{what} is there once training has started: call trainer.fit first. If it ran in "
                "other processes (ddp_spawn, ddp_notebook), read the record: "
                "lightning_lca.History.load(log_dir)."
            )
        return next(iter(measured.values()))

    def __getstate__(self) -> dict[str, Any]:
        """Returns what copies and pickles keep: nothing of a training that runs."""
        results = {
            name: Results.of(m) if isinstance(m, Meter) else m
            for name, m in self._measured().items()
        }
        of_now = {"_training": None, "_results": results, "_key": None}
        state = vars(self) | of_now
        # The Trainer hangs bound methods of the module on every callback.
        return {n: v for n, v in state.items() if n not in ("log", "log_dict")}

    def __deepcopy__(self, memo: dict[int, Any]) -> LCACallback:
        """Copies all but the settings, which never change and may hold large data."""
        memo[id(self._settings)] = self._settings
        twin = memo[id(self)] = object.__new__(type(self))
        vars(twin).update(copy.deepcopy(self.__getstate__(), memo))
        return twin


def _place(callback: LCACallback, trainer: Trainer) -> int:
    """Finds which one of a Trainer's callbacks of this kind this is, from 0."""
    siblings = _siblings(trainer)
    # A callback that another one calls is not among them.
    return siblings.index(callback) if callback in siblings else len(siblings)


def _siblings(trainer: Trainer) -> list[LCACallback]:
    """Lists the callbacks of this kind that a Trainer has."""
    return [c for c in trainer.callbacks if isinstance(c, LCACallback)]
