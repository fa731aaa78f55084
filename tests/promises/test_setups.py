"""Callbacks, hooks and wrappers that people train with: harmless in each, and true in each.

Every set-up is trained twice for the bits (`twins`), and its credits are those of the float64 twin,
which knows nothing of the set-up: it gets the path of the weights and the bare network.
"""

import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.assertions import assert_same
from support.harmless import (
    Awkward,
    Case,
    Validated,
    both,
    rich_net,
    twins,
    validating,
)
from support.models import Classifier, Model, pl, toy_loader
from support.training import fit, make_trainer
from support.twin import RULES, PathRecorder, Twin
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.nn.utils import parametrize, prune
from torch.optim.swa_utils import AveragedModel

from lightning_lca import LCACallback
from lightning_lca.runtime.lightnings import MisconfigurationException

pytestmark = pytest.mark.slow  # Every set-up is trained twice or three times.

plc = pl.callbacks
BATCH = next(iter(toy_loader(batch_size=24, shuffle=False)))


def small_net():
    return nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 4))


def small(net=None):
    optimizer = lambda weights: torch.optim.SGD(weights, lr=0.2, momentum=0.9)  # noqa: E731
    return Model(small_net() if net is None else net, F.cross_entropy, optimizer)


# -- the twin's verdict ---------------------------------------------------------------------------


def assert_credits_are_the_twins(
    tmp_path, model, *, bare=small, callbacks=tuple, weights=None, trainer=None, steps=6
):
    """Trains ``model()``; compares its credits with those of ``bare()`` on the same path."""
    options = {"max_steps": steps} | (trainer or {})

    def train(*others):
        fit(tmp_path, *others, *callbacks(), model=model, measured=False, trainer=options)

    recorder = PathRecorder(weights or (lambda m: dict(zip(names, m.parameters()))))
    torch.manual_seed(3)
    twin = Twin(bare(), [BATCH])
    names = [n for n, _ in twin.module.named_parameters()]
    train(recorder)
    lca = LCACallback(probe=[BATCH], track_parameters=True, group_by="parameter")
    train(lca)
    history = lca.history
    chords = list(recorder.chords())
    assert len(history) == len(chords)
    assert set(history.groups) == set(names), "every weight keeps its name"
    previous = None
    for t, chord in enumerate(chords):
        start, stop, _ = chord
        want = twin.measure(start, stop, {}, RULES["simpson"], names)
        for g, name in enumerate(history.groups):
            off = abs(history.allocated[t, g] - want.credit[name].sum())
            assert off <= want.slack[name].sum(), (t, name)
        slack = sum(s.sum() for s in want.slack.values()) + 2 * want.loss_slack
        assert abs(history.residual[t] - want.residual) <= slack
        drift = 0.0 if previous is None else want.before - previous.after
        assert abs(history.drift[t] - drift) <= want.loss_slack + (previous or want).loss_slack
        previous = want
    booked = history.allocated.sum() + history.residual.sum() + history.drift.sum()
    assert booked == pytest.approx(history.loss_after[-1] - history.loss_before[0], rel=1e-9)
    return history


# -- hooks ----------------------------------------------------------------------------------------

COUNTED = {}


class Hooked(Model):
    """Has hooks of one kind, which change gradients and count outside of any module."""

    def __init__(self, kind):
        bare = small()
        super().__init__(bare.net, bare.loss, bare.make_optimizers)
        COUNTED["calls"] = 0
        layer, kinds = self.net[2], self.hooks()
        self.kind, self.handles = kind, []
        if kind == "hooks that the step registers":
            return
        if kind in ("hooks on weights", "hooks after gradients"):
            for p in self.parameters():
                kinds[kind](p)
        else:
            kinds[kind](layer)

    def hooks(self):
        def scale(gradient):
            COUNTED["calls"] += 1
            return 0.3 * gradient

        def scale_all(module, inputs, outputs=None):
            COUNTED["calls"] += 1
            return tuple(g if g is None else 0.3 * g for g in inputs)

        def after(weight):
            COUNTED["calls"] += 1
            weight.grad *= 0.3

        return {
            "hooks on weights": lambda p: p.register_hook(scale),
            "hooks after gradients": lambda p: p.register_post_accumulate_grad_hook(after),
            "backward hooks": lambda m: m.register_full_backward_hook(scale_all),
            "backward pre-hooks": lambda m: m.register_full_backward_pre_hook(scale_all),
        }

    def training_step(self, batch, batch_idx):
        if self.kind == "hooks that the step registers":
            register = self.hooks()["hooks on weights"]
            self.handles = [register(p) for p in self.parameters()]
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self, *args):
        for handle in self.handles:
            handle.remove()
        self.log("calls", float(COUNTED["calls"]))


HOOKS = ["hooks on weights", "hooks after gradients", "backward hooks", "backward pre-hooks"]
HOOKS += ["hooks that the step registers"]


@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_on_gradients_are_training_and_no_part_of_the_loss(tmp_path, kind):
    assert_credits_are_the_twins(tmp_path, lambda: Hooked(kind))


@pytest.mark.parametrize("kind", HOOKS)
def test_the_probe_calls_no_hook_on_gradients(tmp_path, capsys, kind):
    plain, measured, _ = twins(Case(lambda: Hooked(kind)), tmp_path, capsys)
    assert_same(plain, measured)  # The number of calls is logged.
    assert plain["callback_metrics"]["calls"] > 0


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # First layers' inputs are data.
def test_nor_hooks_on_the_gradients_of_all_modules(tmp_path):
    def scale(module, inputs, outputs):
        return tuple(g if g is None else 0.3 * g for g in inputs)

    handle = nn.modules.module.register_module_full_backward_hook(scale)
    try:
        lca = LCACallback(probe=[BATCH])
        fit(tmp_path, lca, model=small)
    finally:
        handle.remove()
    assert np.abs(lca.history.residual).sum() < 1e-3 * np.abs(lca.history.allocated).sum()


class Steps(Classifier):
    """Steps its optimizers within the backward pass, and recomputes its middle there."""

    def __init__(self):
        super().__init__(small_net())
        self.net[0] = checkpoint_wrapper(self.net[0], CheckpointImpl.REENTRANT)
        self.net.insert(0, nn.Linear(12, 12))
        self.steps = 0
        for p in self.net[-1].parameters():
            p.register_post_accumulate_grad_hook(self.step)

    @torch.no_grad()
    def step(self, weight):
        weight -= 0.1 * weight.grad


def test_an_optimizer_in_a_hook_does_not_step_while_the_probe_runs_backward(tmp_path, capsys):
    plain, measured, lca = twins(Case(Steps), tmp_path, capsys)
    assert_same(plain, measured)
    assert lca._training.meters[None].probe._by_backward


class Watching:
    """A user's object with a method as a hook."""

    def __init__(self):
        self.calls, self.seen = 0, []

    def note(self, module, inputs, output):
        self.calls += 1
        self.seen.append(output.detach().mean().item())

    def noted(self, scale, module, inputs):
        self.calls += 1
        return (inputs[0] * (1 + scale[0]),)


class HookedForward(Classifier):
    """Counts and collects in forward hooks: in closures, in objects, in arguments."""

    def __init__(self):
        super().__init__(small_net())
        calls, seen, watching, scale = 0, [], Watching(), [0.0]

        def note(module, inputs, output):
            nonlocal calls
            calls += 1
            seen.append(output.detach().mean().item())
            return helper(output)

        def helper(output):
            scale[0] += 0.01
            return output * (1 + 0.01 * calls)

        def noted(module, inputs, *, into):
            into["calls"] = into.get("calls", 0) + 1

        held = {}
        self.net[0].register_forward_hook(note)
        self.net[1].register_forward_hook(watching.note)
        self.net[2].register_forward_pre_hook(functools.partial(watching.noted, scale))
        self.net[2].register_forward_pre_hook(functools.partial(noted, into=held))
        self.tell = lambda: calls + len(seen) + watching.calls + len(watching.seen) + held["calls"]

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("hooks", float(self.tell()))
        return loss


@pytest.mark.filterwarnings("ignore:LCA. the probe loss changed")  # It depends on the calls.
def test_what_forward_hooks_hold_is_put_back(tmp_path, capsys):
    plain, measured, _ = twins(Case(HookedForward), tmp_path, capsys)
    assert_same(plain, measured)


# -- callbacks ------------------------------------------------------------------------------------


class Finetuning(plc.BaseFinetuning):
    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.net[0])

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net[0], optimizer, 0.05)


class Backbone(Model):
    """Has the backbone that BackboneFinetuning thaws."""

    def __init__(self):
        bare = small()
        super().__init__(bare.net, bare.loss, bare.make_optimizers)

    @property
    def backbone(self):
        return self.net[0]


def pruning(**options):
    def make():
        return [plc.ModelPruning(amount=0.3, **options)]

    return make


def unmasked(module):
    """Names the weights that the loss reads: masked where a mask is."""
    weights = {}
    for path, layer in module.named_modules():
        for leaf, p in layer.named_parameters(recurse=False):
            leaf = leaf.removesuffix("_orig")
            mask = getattr(layer, f"{leaf}_mask", torch.ones(()))
            weights[f"{path}.{leaf}"] = p * mask
    return weights


epochs = {"max_epochs": 3, "max_steps": -1}
EVERY_SECOND = {"apply_pruning": lambda epoch: epoch == 1}
STRUCTURED = {"pruning_norm": 1, "pruning_dim": 0, "use_global_unstructured": False}
STRUCTURED["parameter_names"] = ["weight"]
CALLBACKS = {
    "finetuning": {"callbacks": lambda: [Finetuning()], "trainer": epochs},
    "backbone finetuning": {
        "model": Backbone,
        "callbacks": lambda: [plc.BackboneFinetuning(1, lambda epoch: 1.5)],
        "trainer": epochs,
    },
    "pruning": {"callbacks": pruning(pruning_fn="l1_unstructured"), "trainer": epochs},
    "pruning that goes back to the first weights": {
        "callbacks": pruning(pruning_fn="random_unstructured"),
        "trainer": epochs,
    },
    "pruning without the lottery ticket": {
        "callbacks": pruning(
            pruning_fn="l1_unstructured", use_lottery_ticket_hypothesis=False, **EVERY_SECOND
        ),
        "trainer": epochs,
    },
    "pruning of channels": {
        "callbacks": pruning(pruning_fn="ln_structured", **STRUCTURED),
        "trainer": epochs,
    },
    "weights averaged at the end": {
        "callbacks": lambda: [plc.StochasticWeightAveraging(0.05, swa_epoch_start=1)],
        "trainer": epochs,
    },
    "accumulation that is scheduled": {
        "callbacks": lambda: [plc.GradientAccumulationScheduler({0: 1, 1: 3})],
        "trainer": epochs,
    },
    "overfit_batches": {"trainer": {"overfit_batches": 2}},
    "clipping by norm": {"trainer": {"gradient_clip_val": 0.05}},
    "clipping by value": {
        "trainer": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}
    },
}
if hasattr(plc, "EMAWeightAveraging"):
    CALLBACKS["an exponential average"] = {"callbacks": lambda: [plc.EMAWeightAveraging(decay=0.9)]}
    CALLBACKS["a running average"] = {"callbacks": lambda: [plc.WeightAveraging()]}
quiet = pytest.mark.filterwarnings(
    "ignore:.*overfit_batches.*", "ignore:.*Trainer.*overfit.*", "ignore:You requested to overfit"
)


@quiet
@pytest.mark.parametrize("setup", CALLBACKS.values(), ids=CALLBACKS)
def test_credits_are_the_twins_beside(tmp_path, setup):
    pruned = "prun" in str(setup.get("callbacks"))
    weights = {"weights": unmasked} if pruned else {}
    history = assert_credits_are_the_twins(tmp_path, **({"model": small} | setup | weights))
    if "finetuning" in str(setup.get("callbacks", "")).lower():
        assert (history.allocated[:6, :2] == 0).all()
        assert (history.allocated[6:, :2] != 0).all()
    if pruned:
        assert history.drift.any(), "what pruning does to the loss is drift"


@quiet
@pytest.mark.parametrize("setup", CALLBACKS.values(), ids=CALLBACKS)
def test_training_is_bitwise_the_same_beside(tmp_path, capsys, setup):
    callbacks = setup.get("callbacks", list)
    model = setup.get("model", lambda: Awkward(small_net()))
    case = Case(model, callbacks=lambda path: callbacks(), trainer=setup.get("trainer", {}))
    plain, measured, _ = twins(case, tmp_path, capsys)
    assert_same(plain, measured)


@pytest.mark.skipif(not hasattr(plc, "EMAWeightAveraging"), reason="Lightning before 2.6")
def test_averages_swapped_in_for_validation_are_swapped_out_again(tmp_path, capsys):
    case = Case(
        Validated, both, lambda path: [plc.EMAWeightAveraging(decay=0.5)], trainer=validating
    )
    plain, measured, lca = twins(case, tmp_path, capsys)
    assert_same(plain, measured)
    alone = twins(Case(Validated, both, trainer=validating), tmp_path / "alone", capsys)[2]
    # The module remembers what it validated, and its loss reads that; nothing else may differ.
    assert lca.history.allocated[0].tolist() == alone.history.allocated[0].tolist()


# -- what the model is made of --------------------------------------------------------------------


class Configured(Model):
    """Makes its network in configure_model."""

    def __init__(self, make):
        bare = small()
        super().__init__(None, bare.loss, bare.make_optimizers)
        self.make = make

    def configure_model(self):
        if self.net is None:
            torch.manual_seed(3)
            self.net = self.make()


def lazy(dry_run=True):
    net = nn.Sequential(nn.LazyLinear(10), nn.Tanh(), nn.LazyLinear(4))
    if dry_run:
        torch.manual_seed(3)
        net(torch.zeros(1, 12))
    return net


@pytest.mark.parametrize("make", [small_net, lazy], ids=["modules", "lazy modules"])
def test_a_network_made_in_configure_model_is_measured_as_any_other(tmp_path, capsys, make):
    assert_credits_are_the_twins(tmp_path, lambda: Configured(make))
    assert_same(*twins(Case(lambda: Configured(make)), tmp_path / "bits", capsys)[:2])


def test_lazy_modules_that_saw_no_batch_are_refused(tmp_path):
    model = Configured(lambda: lazy(dry_run=False))
    with pytest.raises(
        MisconfigurationException, match=r"4 parameters have no shape yet, net\.0\.weight"
    ):
        make_trainer(tmp_path, LCACallback()).fit(model, toy_loader())


def wrapped(implementation):
    net = small_net()
    apply_activation_checkpointing(
        net,
        checkpoint_wrapper_fn=lambda m: checkpoint_wrapper(m, implementation),
        check_fn=lambda m: m is net[2],  # Reentrant ones need an input with a gradient.
    )
    return net


@pytest.mark.parametrize("by", ["layer", "neuron", "parameter"])
@pytest.mark.parametrize("how", list(CheckpointImpl), ids=lambda how: how.name.lower())
def test_checkpoint_wrappers_change_neither_names_nor_credits(tmp_path, how, by):
    def train(net):
        return fit(tmp_path, model=lambda: small(net()), group_by=by, track_parameters=True).lca

    plain, same = train(small_net), train(lambda: wrapped(how))
    assert plain.history.groups == same.history.groups
    assert np.array_equal(plain.history.allocated, same.history.allocated)
    assert np.array_equal(plain.history.helping, same.history.helping)
    assert plain.totals.keys() == same.totals.keys() == dict(small().named_parameters()).keys()


@pytest.mark.parametrize("how", list(CheckpointImpl), ids=lambda how: how.name.lower())
def test_training_through_checkpoint_wrappers_is_bitwise_the_same(tmp_path, capsys, how):
    case = Case(lambda: Awkward(wrapped(how)))
    assert_same(*twins(case, tmp_path, capsys)[:2])


class Symmetric(nn.Module):
    def forward(self, weight):
        return weight.triu() + weight.triu(1).T


def symmetric():
    net = nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 4))
    parametrize.register_parametrization(net[0], "weight", Symmetric())
    return net


def test_a_parametrization_of_ones_own_is_credited_at_its_original(tmp_path, capsys):
    history = assert_credits_are_the_twins(
        tmp_path, lambda: small(symmetric()), bare=lambda: small(symmetric())
    )
    assert "net.0.parametrizations.weight.original" in history.groups
    assert_same(*twins(Case(lambda: small(symmetric())), tmp_path / "bits", capsys)[:2])


class Averaging(Model):
    """Holds an average of its network, and follows it with it."""

    def __init__(self):
        bare = small()
        super().__init__(bare.net, bare.loss, bare.make_optimizers)
        self.average = AveragedModel(self.net)

    def configure_optimizers(self):
        return self.make_optimizers(self.net.parameters())

    def on_train_batch_end(self, *args):
        self.average.update_parameters(self.net)


def test_an_average_held_in_the_module_is_idle(tmp_path, capsys):
    lca = LCACallback(probe=[BATCH], track_parameters=True)
    fit(tmp_path, lca, model=Averaging)
    history = lca.history
    held = [name.startswith("average") for name in history.groups]
    assert sum(held) == 2
    assert not history.allocated[:, held].any()
    assert not history.drift.any()
    assert np.abs(history.residual).sum() < 1e-4 * np.abs(history.allocated).sum()
    assert_same(*twins(Case(Averaging), tmp_path / "bits", capsys)[:2])


class Grows(pl.Callback):
    """Adds a layer in mid-training."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 3:
            pl_module.net.append(nn.Linear(4, 4))
            trainer.optimizers[0].add_param_group({"params": list(pl_module.net[3].parameters())})


@pytest.mark.parametrize("by", ["layer", "neuron"])
def test_a_layer_that_joins_late_is_residual_and_training_goes_on(tmp_path, by):
    lca = LCACallback(probe=[BATCH], group_by=by, track_parameters=True)
    with pytest.warns(UserWarning, match=r"2 parameters, net\.3\.weight the first, joined after"):
        fit(tmp_path, Grows(), lca, model=small)
    history = lca.history
    assert len(history) == 12
    left_out = sum(lca.totals[f"net.3.{leaf}"].double().sum() for leaf in ("weight", "bias"))
    assert history.residual[3:].sum() == pytest.approx(float(left_out), rel=1e-3)


def test_a_masked_weight_is_idle_and_keeps_its_name(tmp_path):
    net = small_net()
    prune.l1_unstructured(net[0], "weight", 0.5)
    mask = net[0].weight_mask.bool()
    lca = LCACallback(probe=[BATCH], track_parameters=True, group_by="neuron")
    fit(tmp_path, lca, model=small(net))
    credit = lca.totals["net.0.weight"]
    assert not credit[~mask].any()
    assert credit[mask].all()
    assert lca.history.groups[0] == "net.0/0"


def test_batch_statistics_and_spectral_norms_are_measured_beside_an_average(tmp_path, capsys):
    case = Case(
        lambda: Classifier(rich_net()),
        callbacks=lambda path: [plc.StochasticWeightAveraging(0.05, swa_epoch_start=1)],
        trainer=epochs,
    )
    _, _, lca = twins(case, tmp_path, capsys)
    history = lca.history
    change = history.loss_after[-1] - history.loss_before[0]
    booked = history.allocated.sum() + history.residual.sum() + history.drift.sum()
    assert booked == pytest.approx(change, rel=1e-9)
