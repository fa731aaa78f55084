"""Errors of others: the user's own comes out as it is, what was measured is kept, all goes on."""

import random
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.models import Classifier, mlp, pl, toy_loader, unrecorded
from support.training import fit, make_trainer
from torch import nn

from lightning_lca import History, LCACallback

STEPS, LAST = 9, 5  # The error comes in the batch after so many steps.


class BoomError(Exception):
    """Of a type that nobody else raises."""


ERRORS = {
    "an error": BoomError("the user's own words", 7),
    "out of memory": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "ctrl-c": KeyboardInterrupt(),
}


def fuse(error, nth=1):
    """Makes a function that raises at its n-th call."""
    pytest.lca_burns = 0  # Kept at another's module: what this one has is put back by the fence.

    def burn():
        pytest.lca_burns += 1
        if pytest.lca_burns == nth:
            raise error

    return burn


class Fragile(Classifier):
    """Burns a fuse in each forward of one kind, in the sixth step: of training or of the probe."""

    def __init__(self, burn=None, *, on_probe=False):
        pl.seed_everything(3)
        super().__init__(nn.Sequential(nn.BatchNorm1d(12), mlp(), nn.Dropout(0.2)))
        self.burn, self.on_probe = burn, on_probe

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        here = (len(x) == 7) == self.on_probe and self.global_step == LAST + self.on_probe
        if self.burn is not None and here:
            self.burn()
        self.log("train_loss", loss)
        return unrecorded(loss) if self.on_probe else loss


def probe_batches():
    return [[x[:7], y[:7]] for x, y in list(toy_loader(shuffle=False))[:2]]


def state_of(trainer, module):
    """Everything that an error could leave changed."""
    tensors = [*module.state_dict().values(), *(p.grad for p in module.parameters())]
    return {
        "tensors": [None if t is None else t.numpy().tobytes() for t in tensors],
        "training": [m.training for m in module.modules()],
        "requires_grad": [p.requires_grad for p in module.parameters()],
        "random": (torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()),
        "loggers": list(trainer.loggers),
        "said": [name for name in ("log", "log_dict", "print") if name in vars(module)],
        "metrics": {k: v.item() for k, v in trainer.callback_metrics.items()},
        "modes": (torch.is_anomaly_enabled(), torch.is_grad_enabled(), torch.get_default_dtype()),
    }


class Witness(pl.Callback):
    """Comes before LCACallback: sees what it finds, and what is there when the error arrives."""

    def __init__(self):
        self.found, self.left, self.error = None, None, None

    def on_train_batch_end(self, trainer, module, *args):
        self.found = state_of(trainer, module)

    def on_exception(self, trainer, module, error):
        self.left, self.error = state_of(trainer, module), error


def train(path, module, *callbacks, **options):
    options = {"max_steps": STEPS, "log_every_n_steps": 2} | options
    return fit(path, *callbacks, model=module, measured=False, trainer=options).trainer


def assert_record_ends(lca, last):
    """Everything that was measured is in memory and in the record, up to the last step."""
    assert lca.history.steps.tolist() == list(range(1, last + 1))
    record = History.load(lca.log_dir)
    assert np.array_equal(record.steps, lca.history.steps)
    assert np.array_equal(record.loss_after, lca.history.loss_after)
    assert record.windows["parameters"].measured.sum() == last
    assert record.lost == 0


@pytest.mark.slow
@pytest.mark.parametrize("nth", [1, 2, 4])  # Batch 0 and 1 in the middle; batch 1 at the end.
@pytest.mark.parametrize("name", ERRORS)
def test_an_error_in_the_probe_alone_comes_out_as_it_is_and_leaves_nothing_behind(
    tmp_path, name, nth
):
    error = ERRORS[name].with_traceback(None)
    error.__context__ = None
    witness = Witness()
    lca = LCACallback(probe=probe_batches(), track_parameters=True)
    module = Fragile(fuse(error, nth), on_probe=True)
    with pytest.raises(SystemExit if name == "ctrl-c" else type(error)) as caught:
        train(tmp_path, module, witness, lca)
    assert witness.error is error, "the very object, with its own type and words"
    assert error.__cause__ is error.__context__ is None
    assert name == "ctrl-c" or caught.value is error
    for part, found in witness.found.items():
        assert witness.left[part] == found, part
    assert_record_ends(lca, LAST)
    state = lca.state_dict()
    assert (state["steps"], state["open"]["at"]) == (LAST + 1, LAST), "it can still be measured"
    # The same objects train again, and measure all.
    trainer = make_trainer(tmp_path, lca, max_steps=4)
    trainer.fit(module, toy_loader())
    assert_record_ends(lca, 4)


HOOKS = (
    "on_fit_start",
    "on_train_start",
    "on_train_epoch_start",
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
    "on_train_epoch_end",
    "on_save_checkpoint",
    "on_train_end",
)


def raiser(hook, error):
    """Makes a callback that raises in a hook: in the sixth batch, where that is in training."""
    late = "batch" in hook or "before" in hook or "after" in hook or "save" in hook
    ends = {"on_train_batch_end": 1, "on_save_checkpoint": 1}.get(hook, 0)

    def burn(self, trainer, *args):
        if not late or trainer.global_step == LAST + ends:
            raise error

    return type("Raiser", (pl.Callback,), {hook: burn})()


@pytest.mark.slow
@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("hook", HOOKS)
def test_an_error_in_another_callback_comes_out_as_without_us(tmp_path, hook, place):
    def run(directory, *lca):
        error = BoomError("not ours")
        other = raiser(hook, error)
        others = (other, *lca) if place == "before" else (*lca, other)
        witness = Witness()
        save = pl.callbacks.ModelCheckpoint(directory, every_n_train_steps=2)
        module = Fragile()
        with pytest.raises(BoomError) as caught:
            train(directory, module, *others, witness, save, enable_checkpointing=True)
        assert caught.value is witness.error is error
        assert error.__cause__ is error.__context__ is None
        return witness.left, module

    lca = LCACallback(probe=probe_batches())
    mine, module = run(tmp_path / "measured", lca)
    plain, _ = run(tmp_path / "plain")
    for part, value in plain.items():
        assert mine[part] == value, part
    started = hook not in ("on_fit_start",) and (hook, place) != ("on_train_start", "before")
    if started:
        done = {"on_train_start": 0, "on_train_epoch_start": 0, "on_train_epoch_end": 6}
        done |= {"on_train_end": STEPS, "on_save_checkpoint": LAST + 1}
        # Where the error comes before us, the last step is not measured, but still can be.
        after = hook == "on_train_batch_end" and place == "after"
        last = done.get(hook, LAST + after)
        assert_record_ends(lca, last) if last else None
    trainer = make_trainer(tmp_path, lca, max_steps=4)
    trainer.fit(module, toy_loader())
    assert_record_ends(lca, 4)


def test_an_error_in_training_leaves_the_record_of_all_that_was_measured(tmp_path):
    error = BoomError("the model's")
    lca = LCACallback(probe=probe_batches())
    with pytest.raises(BoomError) as caught:
        train(tmp_path, Fragile(fuse(error)), lca)
    assert caught.value is error
    assert error.__context__ is None
    assert_record_ends(lca, LAST)


class Broken(pl.loggers.logger.DummyLogger):
    """Raises for every metric, or for ours alone; ours never come to it a second time."""

    save_dir = None

    def __init__(self, ours_alone):
        super().__init__()
        self.ours_alone, self.asked = ours_alone, 0

    def log_metrics(self, metrics, step=None):
        ours = any(key.startswith("lca") for key in metrics)
        self.asked += ours
        if ours or not self.ours_alone:
            raise BoomError("no connection")


def test_a_logger_that_refuses_our_scalars_does_not_end_training(tmp_path):
    lca, logger = LCACallback(probe=probe_batches()), Broken(ours_alone=True)
    with pytest.warns(UserWarning, match=r"LCA: Broken raised BoomError: no connection\. Training"):
        trainer = train(tmp_path, Fragile(), lca, logger=logger)
    assert trainer.global_step == STEPS
    assert logger.asked == 1
    assert len(lca.history) == STEPS


@pytest.mark.filterwarnings("ignore:LCA. Broken raised")
def test_the_error_of_a_logger_comes_out_where_the_user_logs(tmp_path):
    lca = LCACallback(probe=probe_batches())
    with pytest.raises(BoomError, match="no connection") as caught:
        train(tmp_path, Fragile(), lca, logger=Broken(ours_alone=False))
    assert caught.value.__cause__ is caught.value.__context__ is None
    assert "lightning_lca" not in {str(entry.path) for entry in caught.traceback}


@pytest.mark.filterwarnings("ignore:.*(was called without a model|no last checkpoint available)")
@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need")
def test_what_an_error_left_unmeasured_is_measured_when_training_resumes(tmp_path):
    """The probe ran out of memory; the checkpoint of the exception has the step that it broke."""
    unbroken = LCACallback(probe=probe_batches())
    train(tmp_path / "unbroken", Fragile(), unbroken, max_steps=6)
    lca = LCACallback(probe=probe_batches())
    save = pl.callbacks.OnExceptionCheckpoint(tmp_path, "broken")
    error = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(torch.OutOfMemoryError):
        train(tmp_path, Fragile(fuse(error), on_probe=True), lca, save, enable_checkpointing=True)
    again = LCACallback(probe=probe_batches())
    pl.seed_everything(3)
    trainer = make_trainer(tmp_path, again, max_steps=7)
    trainer.fit(Fragile(), toy_loader(), ckpt_path=tmp_path / "broken.ckpt")
    assert again.history.steps.tolist() == list(range(1, 8))
    for column in ("loss_before", "loss_after", "residual", "drift", "helping", "hurting"):
        mine, theirs = (getattr(h.history, column)[:6] for h in (again, unbroken))
        assert np.array_equal(mine, theirs), column
    record = History.load(again.log_dir)
    assert np.array_equal(record.steps, again.history.steps)


def test_without_a_writable_directory_training_goes_on_and_memory_has_all(tmp_path):
    (tmp_path / "file").write_text("where a directory should be")
    lca = LCACallback(probe=probe_batches(), figures=False)
    with pytest.warns(UserWarning, match="there is no record, since its directory could not be"):
        trainer = train(tmp_path / "file", Fragile(), lca)
    assert trainer.global_step == len(lca.history) == STEPS
    assert lca.log_dir is None


class Remover(pl.Callback):
    """Deletes the log directory after some steps, as people do who clean up."""

    def __init__(self, directory):
        self.directory = directory

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == LAST:
            shutil.rmtree(self.directory)


def test_a_record_that_is_deleted_begins_again_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_lca.record.writer.CHUNK_STEPS", 2)
    monkeypatch.setattr("lightning_lca.record.writer.CHUNK_SECONDS", 0)
    lca = LCACallback(probe=probe_batches())
    remover = Remover(tmp_path / "lca_logs")
    with pytest.warns(UserWarning, match="could not be written: .*deleted.*Training goes on") as w:
        trainer = train(tmp_path, Fragile(), lca, remover)
    assert len([x for x in w if "LCA" in str(x.message)]) == 1
    assert trainer.global_step == len(lca.history) == STEPS
    record = History.load(lca.log_dir)
    assert record.steps.tolist() == list(range(LAST + 1, STEPS + 1))
    assert np.array_equal(record.loss_after, lca.history.loss_after[LAST:])


@pytest.mark.filterwarnings("ignore:Exception in thread")  # TensorBoard's own writer.
@pytest.mark.filterwarnings("ignore:LCA. the record in")
@pytest.mark.filterwarnings("ignore:LCA. TensorBoardLogger raised")
@pytest.mark.filterwarnings("ignore:LCA. .* while the summary was logged")
def test_with_its_directory_deleted_a_tensorboard_logger_fails_as_without_us(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_lca.record.writer.CHUNK_STEPS", 2)
    monkeypatch.setattr("lightning_lca.record.writer.CHUNK_SECONDS", 0)
    errors = []
    lca = LCACallback(probe=probe_batches())
    for callbacks in ((), (lca,)):
        directory = tmp_path / str(len(callbacks))
        logger = pl.loggers.TensorBoardLogger(directory)
        with pytest.raises((OSError, ValueError)) as caught:
            train(directory, Fragile(), *callbacks, Remover(logger.root_dir), logger=logger)
        error = caught.value
        errors.append(type(error.__cause__ or error))
    assert errors == [FileNotFoundError, FileNotFoundError]
    last = lca.history.last_step
    assert last > LAST
    assert History.load(lca.log_dir).steps.tolist() == list(range(LAST + 1, last + 1))


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need")
@pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable")
@pytest.mark.parametrize("how", ["cut off", "never written"])
def test_a_record_shorter_than_its_checkpoint_is_told_of(tmp_path, how):
    lca = LCACallback(probe=probe_batches(), figures=False)
    save = pl.callbacks.ModelCheckpoint(tmp_path / "saved", "at", every_n_train_steps=3)
    root = tmp_path / "root"
    if how == "cut off":
        train(root, Fragile(), lca, save, enable_checkpointing=True)
        (file,) = lca.log_dir.glob("*tfevents*")
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        left = History.load(lca.log_dir).last_step
        assert 0 < left < STEPS
    else:
        root.write_text("where a directory should be")
        with pytest.warns(UserWarning, match="there is no record"):
            train(root, Fragile(), lca, save, enable_checkpointing=True)
        left = 0
    again = LCACallback(probe=probe_batches(), figures=False)
    trainer = make_trainer(tmp_path / "again", again, max_steps=STEPS + 2)
    with pytest.warns(UserWarning, match=f"ends at step {left}, .* to {STEPS} that were measured"):
        trainer.fit(Fragile(), toy_loader(), ckpt_path=tmp_path / "saved" / "at.ckpt")
    steps = [*range(1, left + 1), STEPS + 1, STEPS + 2]
    assert again.history.steps.tolist() == History.load(again.log_dir).steps.tolist() == steps


@pytest.mark.figures
def test_where_one_figure_cannot_be_written_the_others_are_not_tried(tmp_path):
    lca = LCACallback(probe=probe_batches())

    class Spoil(pl.Callback):
        def on_train_start(self, *args):
            (lca.log_dir / "lca_figures").write_text("where a directory should be")

    with pytest.warns(UserWarning, match="LCA") as warned:
        train(tmp_path, Fragile(), lca, Spoil())
    (said,) = [str(w.message) for w in warned if "LCA" in str(w.message)]
    assert "the figures could not be written: [Errno 17] File exists" in said
