"""Messages that no other test comes upon: each is told where it should be, in words that help."""

import builtins

import numpy as np
import pytest
import torch
from support.models import Classifier, pl, toy_loader
from support.noise import noisy
from support.records import Tab, chunk, command, description, good, write
from support.training import fit

from lightning_lca import History, LCACallback, figures
from lightning_lca.cli.replay import _probe
from lightning_lca.probe.batches import ProbeBatches
from lightning_lca.record import eventfile
from lightning_lca.record.tables import WindowTable
from lightning_lca.reporting.reporter import Reporter
from lightning_lca.runtime import lightnings
from lightning_lca.runtime.lightnings import MisconfigurationException
from lightning_lca.training.meter import Meter
from lightning_lca.training.snapshots import Snapshots

BATCHES = list(toy_loader(shuffle=False))[:1]


# -- training -------------------------------------------------------------------------------------


class Frozen(Classifier):
    """Trains a tensor that is no parameter, on a frozen network."""

    def __init__(self):
        super().__init__()
        self.net.requires_grad_(False)
        self.shift = [torch.zeros(12, requires_grad=True)]

    def training_step(self, batch, batch_idx):
        x, y = batch
        return torch.nn.functional.cross_entropy(self.net(x + self.shift[0]), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.shift, lr=0.1)


def test_a_model_with_nothing_to_train_is_refused(tmp_path):
    with pytest.raises(MisconfigurationException, match="has no trainable weight: every param"):
        fit(tmp_path, model=Frozen, steps=3)


def test_a_model_that_is_frozen_as_a_whole_later_rests(tmp_path):
    class Freeze(pl.Callback):
        def on_train_batch_start(self, trainer, module, *args):
            module.net.requires_grad_(trainer.global_step < 3)

    class Thawed(Frozen):
        def configure_optimizers(self):
            return torch.optim.SGD([*self.shift, *self.net.parameters()], lr=0.1)

    lca = fit(tmp_path, Freeze(), LCACallback(), model=Thawed, steps=6).lca
    assert lca.history.steps.tolist() == [1, 2, 3]


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need")
def test_a_probe_that_a_checkpoint_could_not_keep_is_drawn_anew(tmp_path, monkeypatch):
    save = pl.callbacks.ModelCheckpoint(tmp_path, "half", every_n_train_steps=6)
    loader = toy_loader
    fit(tmp_path, save, LCACallback(), data=loader, steps=6, trainer={"enable_checkpointing": True})
    monkeypatch.setattr(ProbeBatches, "_checksum", property(lambda batches: id(batches)))
    with pytest.warns(UserWarning, match="probe's batches are not those of before the checkpoint"):
        fit(tmp_path, data=loader, steps=9, resume=tmp_path / "half.ckpt")


def test_a_record_that_cannot_be_finished_after_an_error_leaves_the_error_on_top(
    tmp_path, monkeypatch
):
    close = Reporter.close

    def broken(reporter):
        close(reporter)
        raise ZeroDivisionError

    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 3:
                monkeypatch.setattr(Reporter, "close", broken)
                raise RuntimeError("the user's own")

    with (
        pytest.warns(UserWarning, match="the record could not be finished: ZeroDivisionError"),
        pytest.raises(RuntimeError, match="the user's own"),
    ):
        fit(tmp_path, LCACallback(), Stop(), steps=5)


def test_a_layout_that_cannot_be_written_is_left_out(tmp_path, monkeypatch):
    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lightning_lca.reporting.figures.EventFile", full)
    with pytest.warns(UserWarning, match="Custom Scalars could not be laid out: .*No space left"):
        run = fit(tmp_path, custom_scalars=True, steps=3)
    assert len(run.lca.history) == 3


def test_what_is_done_in_the_wrong_order_says_so(tmp_path):
    with pytest.raises(TypeError, match="Not a Lightning Trainer: <class 'object'>"):
        lightnings.of(object(), ".utilities")
    with pytest.raises(RuntimeError, match="No segment is open"):
        Snapshots().close({})
    meter = object.__new__(Meter)
    meter._pending = [None]
    with pytest.raises(RuntimeError, match="A window ends on collected steps: call collect first"):
        meter.take_windows()


# -- figures --------------------------------------------------------------------------------------


def test_a_figure_says_what_it_has_nothing_of():
    empty = History(["a"], [1])
    with pytest.raises(ValueError, match=r"nothing to draw: no step was measured yet\. Train"):
        figures.heatmap(empty)
    still = noisy(steps=20)
    names = ("w[0]", "w[1]")
    ones = np.ones(1, np.int64)
    table = WindowTable(names, ones, ones, np.zeros((1, 2)), np.zeros((1, 2), np.int64), (), 2)
    still.append_windows("weights", table)
    for draw in (figures.distribution, figures.helping_per_weight):
        with pytest.raises(ValueError, match="no weight of the sample has moved the loss"):
            draw(still)
    split = noisy(steps=20, split={"part": {"signal": np.full((20, 6), np.nan)}})
    with pytest.raises(ValueError, match="No step was measured with the breakdown 'part' yet"):
        figures.breakdown(split, "part")


# -- records --------------------------------------------------------------------------------------


def test_a_description_of_impossibly_many_neurons_is_refused(tmp_path):
    stems = {"neurons": {"stems": [["conv", 9 * 10**14], ["fc", 9 * 10**14]]}}
    write(tmp_path, {eventfile.META: description(windows=stems)}, chunk())
    with pytest.raises(FileNotFoundError, match=r"it declares more than 1e\+15 neurons"):
        History.load(tmp_path)


def test_synchronization_of_very_many_layers_is_refused(tmp_path, monkeypatch):
    good(tmp_path / "run")
    monkeypatch.setattr("lightning_lca.tensorboard.routes._PAIRED", 1)
    status, told = Tab(tmp_path).reply("synchrony", run="run")
    assert status == 400
    assert "This record has 2 layers; synchronization compares every pair of at most 1" in told


# -- the command line -----------------------------------------------------------------------------


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch, capsys):
    good(tmp_path)
    found = builtins.__import__

    def absent(name, *args, **kwargs):
        if name.startswith("pyarrow"):
            raise ModuleNotFoundError("No module named 'pyarrow'")
        return found(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    status, _, err = command(capsys, "export", tmp_path, "--to", tmp_path / "x.parquet")
    assert status == 2
    assert "Parquet needs pyarrow (No module named 'pyarrow'). Run: pip install pyarrow, or" in err


def test_figures_of_a_run_without_steps_say_so(tmp_path, capsys):
    write(tmp_path, {eventfile.META: description()})
    status, _, err = command(capsys, "figures", tmp_path, "--out", tmp_path / "out")
    assert status == 0
    assert f"{tmp_path}: no step was measured yet, nothing to draw." in err


def test_probes_of_a_replay_need_different_names():
    from lightning_lca.cli.terminal import InputError

    with pytest.raises(InputError, match=r"Several probes need different names, got val, val\."):
        _probe(["val", "val"])
