"""A Trainer that fits again: one history from the first step to the last, in memory and on disk."""

import numpy as np
import pytest
import torch
from support.assertions import assert_ledger_closes, assert_same_history
from support.models import Classifier, pl, toy_loader
from support.training import make_trainer

from lightning_lca import History, LCACallback

TensorBoardLogger = pl.loggers.TensorBoardLogger


def plain():
    """A loader and a model that go on as if they had never stopped: no order, no momentum."""
    pl.seed_everything(3)
    return Classifier(optimizer=lambda p: torch.optim.SGD(p, lr=0.1)), toy_loader(shuffle=False)


def fit(path, *epochs, logger=True, **arguments):
    """Fits a Trainer up to so many epochs, each time with the same model and data."""
    model, data = plain()
    lca = LCACallback(**arguments)
    options = {"logger": TensorBoardLogger(path, name="") if logger else False}
    trainer = make_trainer(path, lca, max_steps=-1, max_epochs=epochs[0], **options)
    for until in epochs:
        trainer.fit_loop.max_epochs = until
        trainer.fit(model, data)
    return lca, trainer


@pytest.mark.parametrize("logger", [True, False])
@pytest.mark.parametrize(
    "arguments",
    [{}, {"every_n_steps": 4}, {"neurons": True, "track_parameters": True, "probe_batches": 3}],
    ids=["plain", "chords", "everything"],
)
def test_its_history_is_that_of_one_training(tmp_path, logger, arguments):
    once, _ = fit(tmp_path / "once", 4, logger=logger, **arguments)
    twice, trainer = fit(tmp_path / "twice", 2, 4, logger=logger, **arguments)
    assert trainer.global_step == 24
    assert twice.history.steps.tolist() == once.history.steps.tolist()
    assert np.array_equal(twice.history.allocated, once.history.allocated)
    assert np.array_equal(twice.history.loss_after, once.history.loss_after)
    assert_ledger_closes(twice.history, 1e-6)
    assert not twice.history.drift.any(), "nothing happened in between"
    read = History.load(twice.log_dir)
    assert np.array_equal(read.steps, twice.history.steps)
    assert np.array_equal(read.allocated, twice.history.allocated.astype(np.float32))
    assert read.windows.keys() == twice.history.windows.keys()
    for name, windows in read.windows.items():
        assert np.array_equal(windows.steps, getattr(twice.history, name).steps), name
    if "track_parameters" in arguments:
        for name, total in twice.totals.items():
            assert torch.equal(total, once.totals[name])


def test_several_probes_go_on(tmp_path):
    own = [next(iter(toy_loader(shuffle=False)))]
    once, _ = fit(tmp_path / "once", 3, probe={"train": "train", "own": own})
    twice, _ = fit(tmp_path / "twice", 1, 2, 3, probe={"train": "train", "own": own})
    for name in ("train", "own"):
        assert_same_history(twice.histories[name], once.histories[name], rows_alone=True)
        assert len(History.load(twice.log_dir, name)) == 18


def test_what_was_read_in_between_stays_as_it_was(tmp_path):
    model, data = plain()
    lca = LCACallback()
    trainer = make_trainer(tmp_path, lca, max_steps=5)
    trainer.fit(model, data)
    before = lca.history
    trainer.fit_loop.epoch_loop.max_steps = 9
    trainer.fit(model, data)
    assert (len(before), len(lca.history)) == (5, 9)


def test_weights_that_changed_in_between_are_drift(tmp_path):
    model, data = plain()
    lca = LCACallback()
    trainer = make_trainer(tmp_path, lca, max_steps=-1, max_epochs=2)
    trainer.fit(model, data)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5)
    trainer.fit_loop.max_epochs = 4
    trainer.fit(model, data)
    history = lca.history
    assert len(history) == 24
    assert np.flatnonzero(history.drift).tolist() == [12]
    assert_ledger_closes(history, 1e-6)
    assert np.array_equal(History.load(lca.log_dir).drift, history.drift)


def test_another_trainer_starts_anew(tmp_path):
    model, data = plain()
    lca = LCACallback()
    make_trainer(tmp_path, lca, max_steps=5).fit(model, data)
    make_trainer(tmp_path, lca, max_steps=7).fit(model, data)
    assert lca.history.steps.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert len(History.load(lca.log_dir)) == 7


def test_a_training_that_was_interrupted_goes_on_with_its_chord(tmp_path):
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 8 and not trainer.stopped_once:
                trainer.stopped_once = True
                raise RuntimeError("on purpose")

    model, data = plain()
    lca = LCACallback(every_n_steps=3)
    trainer = make_trainer(tmp_path, lca, Stop(), max_steps=14)
    trainer.stopped_once = False
    with pytest.raises(RuntimeError, match="on purpose"):
        trainer.fit(model, data)
    assert lca.history.steps.tolist() == [3, 6]
    trainer.fit(model, data)
    assert trainer.global_step == 14
    assert lca.history.steps.tolist() == [3, 6, 9, 12, 14]
    assert_ledger_closes(lca.history, 1e-6)
    assert not lca.history.drift.any()
    assert np.array_equal(History.load(lca.log_dir).steps, lca.history.steps)
