"""Parts of a step, against a twin that replays the update with the gradient of the probe."""

import copy
import itertools

import pytest
import torch
from torch import nn

from lightning_lca.measure.motion import PARTS, Steps, kind_of, parts


class Lion(torch.optim.Optimizer):
    """Chen et al. 2023, written from the paper's algorithm 2."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            beta, beta2 = group["betas"]
            for p in group["params"]:
                moment = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(group["lr"] * torch.sign(beta * moment + (1 - beta) * p.grad))
                moment.mul_(beta2).add_(p.grad, alpha=1 - beta2)


optim = torch.optim
WAYS = [{"foreach": False}, {"foreach": True}]
FUSED = [*WAYS, {"fused": True}]


def cases():
    """Every optimizer, with its options, in every way that torch runs it on a CPU."""
    for momentum, dampening, decay, maximize in itertools.product(
        [0.0, 0.9], [0.0, 0.3], [0.0, 0.1], [False, True]
    ):
        options = {"momentum": momentum, "dampening": dampening, "weight_decay": decay}
        options |= {"lr": 0.05, "maximize": maximize}
        for way in FUSED:
            yield optim.SGD, {**options, **way}
            if momentum and not dampening:
                yield (
                    optim.SGD,
                    {"lr": 0.05, **options, "nesterov": True, "maximize": maximize, **way},
                )
    for kind, decay, amsgrad, maximize, way in itertools.product(
        [optim.Adam, optim.AdamW], [0.0, 0.1], [False, True], [False, True], FUSED
    ):
        yield kind, {"weight_decay": decay, "amsgrad": amsgrad, "maximize": maximize, **way}
    for kind, decay, decoupled, maximize, way in itertools.product(
        [optim.NAdam, optim.RAdam], [0.0, 0.1], [False, True], [False, True], WAYS
    ):
        yield (
            kind,
            {
                "weight_decay": decay,
                "decoupled_weight_decay": decoupled,
                "maximize": maximize,
                **way,
            },
        )
    for momentum, decay, centered, way in itertools.product(
        [0.0, 0.9], [0.0, 0.1], [False, True], WAYS
    ):
        yield (
            optim.RMSprop,
            {
                "momentum": momentum,
                "weight_decay": decay,
                "centered": centered,
                **way,
            },
        )
    for decay, rate, way in itertools.product([0.0, 0.1], [0.0, 0.01], FUSED):
        yield optim.Adagrad, {"weight_decay": decay, "lr_decay": rate, **way}
    yield Lion, {"weight_decay": 0.1}
    yield Lion, {}


def name_of(case):
    kind, options = case
    return kind.__name__ + "-" + "-".join(f"{k}={v}" for k, v in options.items())


def after(optimizer, options, weight, gradient):
    """Replays one step from a copy of weight and state with some gradient: where it ends."""
    twin = nn.Parameter(weight.detach().clone())
    plain = {k: v for k, v in options.items() if k not in ("foreach", "fused")}
    other = type(optimizer)([twin], **plain)
    other.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"]
    if weight in optimizer.state:
        other.state[twin] = copy.deepcopy(dict(optimizer.state[weight]))
    twin.grad = gradient.clone()
    other.step()
    return twin.detach()


@pytest.mark.parametrize("case", list(cases()), ids=name_of)
def test_parts_are_those_of_the_step_that_the_probes_gradient_would_have_made(case):
    kind, options = case
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(40, dtype=torch.float64))
    optimizer = kind([weight], **options)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
    steps = Steps([optimizer])
    assert not steps.unknown
    split = {}
    for i in range(12):
        own, probe = torch.randn(2, 40, dtype=torch.float64) + weight.detach()
        own[:5] = 0  # Weights that the mini-batch says nothing of.
        start = weight.detach().clone()
        imagined = after(optimizer, options, weight, probe) - start
        steps.clear()
        weight.grad = own.clone()
        if i == 6:  # Other code moves weights, too.
            with torch.no_grad():
                weight[7] += 0.25
            start[7] = weight.detach()[7] - 0.25
        optimizer.step()
        schedule.step()  # What comes next must not be taken for what was.
        step = steps.of(weight)
        assert step.is_known
        motion = weight.detach() - start
        moments = {name: step.state[name] for name in step.moments}
        given = (moments, weight.grad, probe, start, motion)
        before = copy.deepcopy(given)
        found = parts(step, *given)
        torch.testing.assert_close(given, before, rtol=0, atol=0)  # The state is the optimizer's.
        split = dict(zip(PARTS, found, strict=True))
        tight = {"rtol": 1e-9, "atol": 1e-12}
        by_probe = split["signal"] + split["momentum"] + split["weight_decay"]
        keep = torch.arange(40) != 7
        torch.testing.assert_close(by_probe[keep], imagined[keep], **tight)
        torch.testing.assert_close(sum(found), motion, rtol=1e-12, atol=1e-15)
        rest = torch.zeros(40, dtype=torch.float64)
        rest[7] = 0.25 * (i == 6)
        bound = 1e-12 if i != 6 else 0.03  # The step itself began from the moved weight.
        torch.testing.assert_close(split["other"], rest, rtol=0, atol=bound)
        if kind is not Lion and i == 5:
            assert split["noise"][keep].abs().max() < 100 * motion[keep].abs().max()
    has_momentum = kind not in (optim.Adagrad,) and options.get("momentum", 1) != 0
    assert bool(split["momentum"].abs().max() > 1e-8) == has_momentum
    assert bool(split["weight_decay"].abs().max() > 1e-8) == bool(options.get("weight_decay"))
    assert split["signal"].abs().max() > 1e-8


def test_signal_goes_the_way_of_the_probes_gradient_and_no_other():
    weight = nn.Parameter(torch.tensor([1.0, -2.0]))
    adam = torch.optim.Adam([weight], weight_decay=0.1)
    steps = Steps([adam])
    weight.grad = torch.tensor([0.5, 0.5])
    adam.step()
    probe = torch.tensor([0.0, 3.0])
    step = steps.of(weight)
    moments = {name: step.state[name] for name in step.moments}
    start = torch.tensor([1.0, -2.0])
    signal, *_ = parts(step, moments, weight.grad, probe, start, weight.detach() - start)
    assert signal[0] == 0
    assert signal[1] < 0


def test_a_step_of_the_users_own_is_another_optimizer():
    class Own(torch.optim.SGD):
        def step(self, closure=None):
            return super().step(closure)

    class Named(torch.optim.SGD):
        pass

    weight = nn.Parameter(torch.ones(2))
    assert kind_of(Own([weight], 0.1)) == "Own"
    assert kind_of(Named([weight], 0.1)) == "SGD"
    assert Steps([torch.optim.Adadelta([weight])]).unknown == ["Adadelta"]


def test_two_steps_or_a_gradient_that_was_written_to_cannot_be_split():
    weight = nn.Parameter(torch.ones(2))
    sgd = torch.optim.SGD([weight], 0.1)
    steps = Steps([sgd])
    weight.grad = torch.ones(2)
    sgd.step()
    assert steps.of(weight).is_known
    sgd.zero_grad(set_to_none=False)
    assert not steps.of(weight).is_known
    steps.clear()
    assert steps.of(weight) is None
    for _ in range(2):
        weight.grad = torch.ones(2)
        sgd.step()
    assert not steps.of(weight).is_known
    steps.clear()
    steps.leave()
    sgd.step()
    assert steps.of(weight) is None
