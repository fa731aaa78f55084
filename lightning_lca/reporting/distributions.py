"""How credit is spread over the single weights of a layer, as a histogram on the device."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from lightning_lca.measure.allocation import Weights
from lightning_lca.measure.groups import Grouping
from lightning_lca.measure.tensors import CHUNK, wide
from lightning_lca.record.tables import Floats, Ints
from lightning_lca.reporting.scalars import panels_of

BINS = 40


@dataclass(frozen=True)
class Distribution:
    """A layer's credits in one step, each times the number of the layer's weights.

    In these units, which are those of the loss, the mean is the layer's LCA: a weight at 0.01 moved
    the loss as the layer would by 0.01, if all its weights had the same part in it.

    Attributes:
        limits: Right edges of the bins [40]: narrow around 0, symmetric, up to the largest.
        counts: Weights in each bin [40].
        low: Smallest value. high: Largest value.
        total: Sum of all values. squares: Sum of their squares.
    """

    limits: Floats
    counts: Ints
    low: float
    high: float
    total: float
    squares: float


class Distributions:
    """Takes the distributions of a module's layers, at most thirty; of coarser modules beyond."""

    def __init__(self, module: nn.Module, only: Collection[str] | None = None) -> None:
        """Names the layers as the scalars do; with ``only`` those of some parameters."""
        layers = Grouping(module, "layer", only=only)
        panels = dict(zip(layers.names, panels_of(layers.names), strict=True))
        order = list(dict.fromkeys(panels.values()))
        self._members: dict[str, list[str]] = {}
        for parameter, layer in layers.owners.items():
            panel = panels[layer]
            label = f"{order.index(panel):02d} {panel or 'root'}"
            self._members.setdefault(label, []).append(parameter)

    def of(self, values: Weights) -> dict[str, Distribution]:
        """Counts credits into bins: {name: [*shape]} -> {layer: its distribution}."""
        taken = {}
        for label, names in self._members.items():
            flat = [values[n].reshape(-1) for n in names if n in values and values[n].numel()]
            if flat:
                taken[label] = _distribution(flat)
        return taken


def _distribution(flat: list[Tensor]) -> Distribution:
    weights = sum(f.numel() for f in flat)
    ends = torch.stack([torch.stack(torch.aminmax(_finite(f))) for f in flat])
    low, high = float(ends[:, 0].min()) * weights, float(ends[:, 1].max()) * weights
    largest = max(-low, high)
    counts = torch.zeros(BINS, dtype=torch.long, device=flat[0].device)
    precise = wide(flat[0])
    sums = torch.zeros(2, dtype=precise, device=flat[0].device)
    for f in flat:
        for chunk in torch.split(f, CHUNK):
            x = _finite(chunk).to(precise) * weights
            sums += torch.stack([x.sum(), x.square().sum()])
            # A cube root: credits differ by orders of magnitude, and most are close to 0.
            place = (x.abs() / largest).pow(1 / 3) * x.sign() if largest else x
            bins = ((place + 1) * (BINS / 2)).long().clamp_(0, BINS - 1)
            counts += torch.bincount(bins, minlength=BINS)
    edges = np.linspace(-1, 1, BINS + 1)[1:] ** 3 * (largest or 1.0)
    total, squares = sums.tolist()
    return Distribution(edges, counts.cpu().numpy(), low, high, total, squares)


def _finite(values: Tensor) -> Tensor:
    return torch.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
