"""What cannot be measured is refused at the start; weights that are cut, in a world of one."""

import os
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.strategies import (
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceXLAStrategy,
    Strategy,
    XLAStrategy,
)
from support.models import Classifier, mlp, toy_loader
from support.training import fit
from torch import nn
from torch.distributed.fsdp import fully_shard

from lightning_lca import LCACallback
from lightning_lca.runtime.lightnings import MisconfigurationException
from lightning_lca.training.support import check_trainer


class Unheard(Strategy):
    """Somebody's own."""


Unheard.__abstractmethods__ = frozenset()


@pytest.mark.parametrize(
    ("strategy", "reason", "remedy"),
    [
        (FSDPStrategy, "flattens the weights of a layer", "use ModelParallelStrategy"),
        (DeepSpeedStrategy, "DeepSpeed's engine keeps the weights", "ModelParallelStrategy"),
        (XLAStrategy, "has not been tried on TPUs", 'strategy="ddp"'),
        (SingleDeviceXLAStrategy, "has not been tried on TPUs", 'strategy="ddp"'),
        (Unheard, "does not know how this strategy keeps the weights", "remove the callback"),
    ],
)
def test_a_strategy_that_hides_the_weights_is_refused_with_reason_and_remedy(
    strategy, reason, remedy
):
    # Without the packages or devices that making a real one asks for.
    trainer = SimpleNamespace(strategy=object.__new__(strategy))
    with pytest.raises(MisconfigurationException) as refused:
        check_trainer(trainer, Classifier(), LCACallback()._settings)
    said = str(refused.value)
    assert f"cannot measure under {strategy.__name__}" in said
    assert reason in said
    assert remedy in said


class Cut(Classifier):
    """Its weights are DTensors on a mesh of one process."""

    def __init__(self, whole=()):
        super().__init__(nn.Identity(), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9))
        self.whole = whole

    def configure_model(self):
        if isinstance(self.net, nn.Identity):
            torch.manual_seed(4)
            self.net = mlp()
            for i, layer in enumerate(self.net):
                if isinstance(layer, nn.Linear) and i not in self.whole:
                    fully_shard(layer, mesh=self.device_mesh["data_parallel"])


class Whole(Cut):
    """The same without a mesh."""

    def configure_model(self):
        if isinstance(self.net, nn.Identity):
            torch.manual_seed(4)
            self.net = mlp()


@pytest.fixture
def alone():
    """Lightning leaves the process group behind, and says in the environment what it launched."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
    if dist.is_initialized():
        dist.destroy_process_group()


def train(path, model, lca, *callbacks, resume=None, steps=10, **trainer):
    if model is not Whole:
        trainer["strategy"] = ModelParallelStrategy(1, 1, process_group_backend="gloo")
    trainer |= {"devices": 1, "use_distributed_sampler": False}
    run = {"model": model, "data": toy_loader(shuffle=False), "steps": steps, "resume": resume}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?!LCA)")
        fit(path, lca, *callbacks, run_seed=6, trainer=trainer, **run)
    return lca.history


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments", [{}, {"neurons": True}, {"group_by": "neuron"}, {"tolerance": 1e-6}], ids=str
)
def test_cut_weights_give_the_history_of_whole_ones(tmp_path, alone, arguments):
    histories = [
        train(tmp_path / model.__name__, model, LCACallback(figures=False, **arguments))
        for model in (Cut, Whole)
    ]
    cut, whole = histories
    for column in ("allocated", "helping", "hurting", "loss_before", "loss_after", "drift"):
        assert np.array_equal(getattr(cut, column), getattr(whole, column)), column
    if "neurons" in arguments:
        assert np.array_equal(cut.neurons.allocated, whole.neurons.allocated)


def test_every_single_weight_of_cut_ones_cannot_be_followed(tmp_path, alone):
    with pytest.raises(MisconfigurationException, match="no process holds them all"):
        train(tmp_path, Cut, LCACallback(track_parameters=True))


def test_a_layer_that_was_left_out_of_sharding_is_pointed_out(alone):
    module = Cut()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh = dist.init_device_mesh("cpu", (1,), mesh_dim_names=("data_parallel",))
    module.net = mlp()
    fully_shard(module.net[0], mesh=mesh)
    two = {"distributed_sampler_kwargs": {"num_replicas": 2, "rank": 0}}
    strategy = object.__new__(type("TwoShares", (ModelParallelStrategy,), two))
    with pytest.raises(MisconfigurationException, match=r"4 trained weights .* 'net.2.weight'"):
        check_trainer(SimpleNamespace(strategy=strategy), module, LCACallback()._settings)


@pytest.mark.slow
@pytest.mark.parametrize("every", [1, 4])
def test_a_sharded_training_resumes_and_books_an_open_chord_as_drift(tmp_path, alone, every):
    unbroken = train(tmp_path / "whole", Cut, LCACallback(every_n_steps=every, figures=False))
    saves = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=6, save_top_k=-1)
    options = {"enable_checkpointing": True, "steps": 6}
    train(
        tmp_path / "first", Cut, LCACallback(every_n_steps=every, figures=False), saves, **options
    )
    (saved,) = (tmp_path / "saved").iterdir()
    lca = LCACallback(every_n_steps=every, figures=False)
    history = train(tmp_path / "second", Cut, lca, resume=saved)
    change = history.loss_after[-1] - history.loss_before[0]
    booked = history.allocated.sum() + history.residual.sum() + history.drift.sum()
    assert booked == pytest.approx(change, rel=1e-6)
    assert history.loss_before[0] == unbroken.loss_before[0]
    assert history.loss_after[-1] == pytest.approx(unbroken.loss_after[-1], rel=1e-7)
    if every == 1:
        assert np.array_equal(history.allocated.astype("f4"), unbroken.allocated.astype("f4"))
        assert (history.drift == 0).all()
