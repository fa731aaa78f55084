"""How accurate each quadrature rule is, by the gradients it spends, on a real small run."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call

from lightning_lca import Allocation, Field, Position, Sample, Segment, allocate
from lightning_lca.measure.quadrature import RULES, SIMPSON

PANELS = 64
PROBE = 512
ACTIVATIONS = {"ReLU": nn.ReLU, "tanh": nn.Tanh}  # With kinks, no rule reaches its order.
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p, lr=3e-3),
}


def compare(activation: str, steps: int) -> list[list[str]]:
    """Compares every rule with composite Simpson: one row of text per rule."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # The network is too small for more.
    errors = {
        name: _errors(_train(ACTIVATIONS[activation], make, steps))
        for name, make in OPTIMIZERS.items()
    }
    torch.set_num_threads(threads)
    return [
        [rule.name, str(rule.gradients_per_step)]
        + [f"{100 * share:.2g} %" for name in OPTIMIZERS for share in errors[name][rule.name]]
        for rule in sorted(RULES.values(), key=lambda rule: rule.gradients_per_step)
    ]


def _errors(run: tuple[Field, list[Segment]]) -> dict[str, tuple[float, float]]:
    """Gives per rule the credit error as a share of Σ|A|, and Σ|residual| as a share of Σ|ΔL|."""
    field, segments = run
    wrong = {name: 0.0 for name in RULES}
    residual = {name: 0.0 for name in RULES}
    change = 0.0
    for segment in segments:
        exact = allocate(field, segment, SIMPSON.composite(PANELS))
        change += abs(float(exact.loss_after - exact.loss_before))
        for name, rule in RULES.items():
            allocation = allocate(field, segment, rule)
            wrong[name] += _distance(allocation, exact) / len(segments)
            residual[name] += abs(float(allocation.residual))
    return {name: (wrong[name], residual[name] / change) for name in RULES}


def _distance(allocation: Allocation, exact: Allocation) -> float:
    """Gives Σ|A − exact A| / Σ|exact A| over all weights."""
    pairs = [(allocation.values[name], value) for name, value in exact.values.items()]
    wrong = sum(float((a - b).abs().sum()) for a, b in pairs)
    return wrong / sum(float(b.abs().sum()) for _, b in pairs)


def _train(
    activation: type[nn.Module],
    make_optimizer: Callable[[Any], torch.optim.Optimizer],
    steps: int,
) -> tuple[Field, list[Segment]]:
    """Trains a float64 MLP on digits; gives the probe's field and every step's segment."""
    torch.manual_seed(0)
    x, y = (torch.from_numpy(a) for a in load_digits(return_X_y=True))
    x = x / 16
    net = nn.Sequential(nn.Linear(64, 32), activation(), nn.Linear(32, 10)).double()
    optimizer = make_optimizer(net.parameters())
    path = [_snapshot(net)]
    for _ in range(steps):
        batch = torch.randint(len(x), (64,))
        optimizer.zero_grad()
        F.cross_entropy(net(x[batch]), y[batch]).backward()
        optimizer.step()
        path.append(_snapshot(net))
    segments = [Segment(a, b) for a, b in pairwise(path)]
    return _field(net, x[:PROBE], y[:PROBE]), segments


def _field(net: nn.Module, x: Tensor, y: Tensor) -> Field:
    """Makes the loss on the probe a function of the weights."""

    def field(at: Position) -> Sample:
        weights = at.weights()
        with torch.enable_grad():
            loss = F.cross_entropy(functional_call(net, weights, (x,)), y)
            gradients = torch.autograd.grad(loss, list(weights.values()))
        return Sample(loss.detach(), dict(zip(weights, gradients, strict=True)))

    return field


def _snapshot(net: nn.Module) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in net.named_parameters()}
