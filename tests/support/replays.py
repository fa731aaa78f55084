"""Trainings that save checkpoints, and what is compared of records of their replays."""

from __future__ import annotations

from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_lca import History
from lightning_lca.record.reader import Reader
from support.assertions import assert_same_history
from support.models import pl
from support.training import fit

STEPS = 12


class SavesStart(pl.Callback):
    """Saves the weights before the first step, by the Trainer."""

    def __init__(self, directory):
        self.directory = directory

    def on_train_start(self, trainer, module):
        trainer.save_checkpoint(self.directory / "start.ckpt")


def train(path, model, data=None, every=1, save=1, slim=False, steps=STEPS, **lca):
    """Trains with the callback, and saves every so many steps as people do; gives the callback."""
    saved = path / "checkpoints"
    where = {name: lca.pop(name) for name in ("precision", "accelerator") if name in lca}
    often = {"every_n_train_steps": save, "save_top_k": -1, "save_weights_only": slim}
    callback, _, trainer = fit(
        path,
        SavesStart(saved),
        pl.callbacks.ModelCheckpoint(saved, **often),
        model=model,
        data=data,
        steps=steps,
        trainer={"enable_checkpointing": True} | where,
        every_n_steps=every,
        **lca,
    )
    trainer.save_checkpoint(saved / "last.ckpt")  # Of the same step as another one.
    return callback


def events(record):
    """Every scalar in a record: {tag: [(step, value)]}, by step.

    TensorBoard reads files that loggers opened within one second in any order.
    """
    written = EventAccumulator(str(record), size_guidance={"scalars": 0})
    written.Reload()
    return {
        tag: sorted((e.step, e.value) for e in written.Scalars(tag))
        for tag in written.Tags()["scalars"]
    }


def distributions(record):
    """Every histogram in a record: {tag: [(step, limits, counts)]}."""
    written = EventAccumulator(str(record), size_guidance={"histograms": 0})
    written.Reload()
    return {
        tag: [
            (e.step, e.histogram_value.bucket_limit, e.histogram_value.bucket)
            for e in written.Histograms(tag)
        ]
        for tag in written.Tags()["histograms"]
    }


def assert_one_record(a: Any, b: Any, *, resumed: bool = False) -> None:
    """Two records are the same to the bit, clocks apart: rows, windows, scalars, what is told.

    What audits have told of panels is not, where one was ``resumed``: they begin anew.
    """
    one, two = Reader.of(a), Reader.of(b)
    assert one.histories.keys() == two.histories.keys()
    for name, history in one.histories.items():
        assert_same_history(history, two.histories[name])
        told = [h.settings.copy() for h in (history, two.histories[name])]
        for settings in told if resumed else ():
            settings.pop("halving", None)
        assert told[0] == told[1]
        assert history.lost == two.histories[name].lost == 0
    assert len(History.load(a)) > 1
    assert events(a) == events(b)
    shown = [distributions(record) for record in (a, b)]
    if resumed:  # What was shown after the last state was saved, and before the end, is so again.
        shown = [{t: {step: rest for step, *rest in e} for t, e in d.items()} for d in shown]
    assert shown[0] == shown[1]
