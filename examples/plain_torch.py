"""Allocates loss change in a hand-written torch loop, without Lightning, on scikit-learn's digits.

    python examples/plain_torch.py

`allocate` asks a *field*, any function that gives the loss and its gradient at a position, at a few
positions on the straight line between the weights before and after a step. Printed are the credit
of every layer (negative helped, positive hurt), then the ledger: the true loss change is what was
allocated plus the residual, which is the error of the quadrature. ``--out FILE`` draws how the
credit of the layers adds up to the true change.
"""

from __future__ import annotations

import argparse
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call

from lightning_lca import Position, Sample, Segment, allocate

STEPS, BATCH = 300, 64


def draw(credits: dict[str, list[float]], losses: list[float], path: Path) -> None:
    """Draws what every layer has done to the loss so far, and the true change, over steps."""
    figure = Figure(figsize=(6.4, 3.4), dpi=90, layout="constrained")
    axes = figure.subplots()
    for (layer, values), colour in zip(
        credits.items(), ("#440154", "#2a788e", "#7ad151"), strict=True
    ):
        axes.plot(np.cumsum(values), color=colour, label=layer)
    axes.plot(np.array(losses[1::2]) - losses[0], "k--", label="true loss change")
    axes.axhline(0, color="0.6", linewidth=0.8)
    axes.set(xlabel="optimizer step", ylabel="cumulative LCA (loss)")
    axes.legend(frameon=False, loc="center right", bbox_to_anchor=(1, 0.4))
    axes.spines[["top", "right"]].set_visible(False)
    most = min(credits, key=lambda layer: sum(credits[layer]))
    axes.set_title(
        f"{most} helps most; the layers add up to the true change", loc="left", fontsize=11
    )
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description="LCA in a loop of plain torch.")
    parser.add_argument("--out", type=Path, help="draws a picture there, e.g. plain_torch.png")
    args = parser.parse_args()
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

    credits: dict[str, list[float]] = {"first": [], "second": [], "output": []}
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

        for layer, credit in credits.items():
            parts = [v.sum() for n, v in allocation.values.items() if n.startswith(f"{layer}.")]
            credit.append(sum(parts).item())
        losses += [allocation.loss_before.item(), allocation.loss_after.item()]
        residual += allocation.residual.item()

    change, allocated = losses[-1] - losses[0], sum(map(sum, credits.values()))
    for layer, credit in credits.items():
        print(f"{layer:<10} {sum(credit):+.4f}  {sum(credit) / change:6.1%}")
    print(f"\ntrue loss change  {change:+.6f}  ({losses[0]:.6f} -> {losses[-1]:.6f})")
    print(f"  allocated       {allocated:+.6f}")
    print(f"  residual        {residual:+.6f}  ({abs(residual / change):.2%} of the change)")
    if args.out:
        draw(credits, losses, args.out)


if __name__ == "__main__":
    main()
