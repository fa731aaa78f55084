"""The loss surface: how gradients are taken, and what an evaluation must not disturb."""

import numpy as np
import pytest
import torch
from support.models import Classifier, pl, toy_loader
from support.training import fit, make_trainer
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_lca import LCACallback


class Checkpointed(nn.Module):
    """Recomputes its middle in the backward pass, dropout and all."""

    def __init__(self, reentrant):
        super().__init__()
        self.first, self.last = nn.Linear(12, 16), nn.Linear(16, 4)
        self.middle = nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.3), nn.Tanh())
        self.reentrant = reentrant

    def forward(self, x):
        x = self.first(x)
        if self.reentrant is None:
            x = self.middle(x)
        else:
            x = checkpoint(self.middle, x, use_reentrant=self.reentrant)
        return self.last(x)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["no_dropout", "train"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_changes_no_credit(tmp_path, reentrant, mode):
    plain, model, _ = fit(tmp_path, model=lambda: Classifier(Checkpointed(None)), probe_mode=mode)
    same, other, _ = fit(
        tmp_path, model=lambda: Classifier(Checkpointed(reentrant)), probe_mode=mode
    )
    assert np.array_equal(plain.history.allocated, same.history.allocated)
    assert np.array_equal(plain.history.helping, same.history.helping)
    for a, b in zip(model.parameters(), other.parameters()):
        assert torch.equal(a, b)
    assert same._training.meters[None].probe._by_backward == reentrant


class Watched(pl.Callback):
    """Notes when every device is seeded while training runs."""

    def __init__(self, monkeypatch):
        self.monkeypatch, self.seeds = monkeypatch, []

    def on_train_start(self, *_):
        self.monkeypatch.setattr(torch.cuda, "manual_seed_all", self.seeds.append)


def test_random_streams_of_devices_that_hold_no_weight_are_left_alone(tmp_path, monkeypatch):
    watched = Watched(monkeypatch)
    net = nn.Sequential(nn.Linear(12, 16), nn.Dropout(0.3), nn.Linear(16, 4))
    lca = fit(tmp_path, watched, model=lambda: Classifier(net), probe_mode="train").lca
    assert lca.history.settings["evaluated"] == "recorded"
    assert watched.seeds == []


class HiddenInReentrant(nn.Module):
    """Keeps most of its weights in a part that autograd.grad cannot look into."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(12, 4)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return checkpoint(self.body, x * self.scale, use_reentrant=True)


def test_weights_that_autograd_grad_cannot_see_are_found_by_backward(tmp_path):
    lca = fit(tmp_path, model=lambda: Classifier(HiddenInReentrant())).lca
    moved = dict(zip(lca.history.groups, abs(lca.history.allocated).sum(0)))
    assert moved["net.body"] > 0
    residual = abs(lca.history.residual).sum()
    assert residual < 0.01 * abs(lca.history.allocated).sum()


def test_a_weight_that_the_loss_does_not_need_is_idle(tmp_path):
    net = nn.Sequential(nn.Linear(12, 4))
    net.unused = None
    model = Classifier(net)
    model.unused = nn.Linear(3, 3)
    pl.seed_everything(0)
    lca = LCACallback()
    make_trainer(tmp_path, lca).fit(model, toy_loader())
    assert lca.history.groups == ("net.0", "unused")
    assert (lca.history.allocated[:, 1] == 0).all()
    assert not lca._training.meters[None].probe._by_backward, (
        "backward finds no more than autograd.grad"
    )


CAN_REST = hasattr(torch.compiler, "set_stance")


def test_a_compiled_model_is_warned_of_where_torch_cannot_let_it_rest(tmp_path, monkeypatch):
    monkeypatch.delattr(torch.compiler, "set_stance", raising=False)
    compiled = torch.compile(nn.Linear(12, 4), backend="eager")
    with pytest.warns(UserWarning, match=r"only torch 2\.6 and later can evaluate a compiled"):
        fit(tmp_path, model=Classifier(compiled))
    torch._dynamo.reset()


@pytest.mark.skipif(not CAN_REST, reason="torch below 2.6 cannot let a compiled module rest")
def test_compiled_modules_keep_their_graphs(tmp_path):
    """A probe batch of another size must not make torch.compile meet a new shape."""
    torch._dynamo.reset()
    shapes = []

    def backend(graph, inputs):
        shapes.append([tuple(i.shape) for i in inputs if isinstance(i, torch.Tensor)])
        return graph.forward

    def net():
        layers = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 4))
        return torch.compile(layers, backend=backend)

    probe = [next(iter(toy_loader(batch_size=24)))]
    lca = fit(tmp_path, model=lambda: Classifier(net()), probe=probe).lca
    torch._dynamo.reset()
    assert len(lca.history) == 12
    assert len(shapes) == 1, "the training batch, and no other"
    assert not any(24 in shape for graph in shapes for shape in graph)
