"""Allocates loss change in a hand-written torch loop, without Lightning, on scikit-learn's digits.

    python examples/plain_torch.py

`allocate` asks a *field*, any function that gives the loss and its gradient at a position, at a few
positions on the straight line between the weights before and after a step. Printed are the credit
of every layer (negative helped, positive hurt), then the ledger: the true loss change is what was
allocated plus the residual, which is the error of the quadrature.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call

from lightning_lca import Position, Sample, Segment, allocate

STEPS, BATCH = 300, 64


def main() -> None:
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    layers = {"first": nn.Linear(64, 64), "relu1": nn.ReLU()}
    layers |= {"second": nn.Linear(64, 32), "relu2": nn.ReLU(), "output": nn.Linear(32, 10)}
    model = nn.Sequential(OrderedDict(layers))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    # The probe is all of the data, the same at every step. The step's own mini-batch would not do:
    # plain SGD lowers its loss by construction, so that every weight would seem to help.
    def field(at: Position) -> Sample:
        weights = at.weights()
        loss = F.cross_entropy(functional_call(model, weights, (x,)), y)
        gradients = torch.autograd.grad(loss, list(weights.values()))
        return Sample(loss.detach().double(), dict(zip(weights, gradients, strict=True)))

    def snapshot() -> dict[str, Tensor]:
        return {name: weight.detach().clone() for name, weight in model.named_parameters()}

    credit = {"first": 0.0, "second": 0.0, "output": 0.0}
    losses, residual = [], 0.0
    before, known = snapshot(), None
    for _ in range(STEPS):
        chosen = torch.randint(len(x), (BATCH,))
        optimizer.zero_grad()
        F.cross_entropy(model(x[chosen]), y[chosen]).backward()
        optimizer.step()

        after = snapshot()
        allocation = allocate(field, Segment(before, after), first=known)
        before, known = after, allocation.last  # The next step starts here: that saves a gradient.

        for name, values in allocation.values.items():
            credit[name.split(".")[0]] += values.sum().item()
        losses += [allocation.loss_before.item(), allocation.loss_after.item()]
        residual += allocation.residual.item()

    change, allocated = losses[-1] - losses[0], sum(credit.values())
    for layer, value in credit.items():
        print(f"{layer:<10} {value:+.4f}  {value / change:6.1%}")
    print(f"\ntrue loss change  {change:+.6f}  ({losses[0]:.6f} -> {losses[-1]:.6f})")
    print(f"  allocated       {allocated:+.6f}")
    print(f"  residual        {residual:+.6f}  ({abs(residual / change):.2%} of the change)")


if __name__ == "__main__":
    main()
