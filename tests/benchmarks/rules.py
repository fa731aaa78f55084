"""How accurate each quadrature rule is, by the gradients it spends, on real small runs.

    python tests/benchmarks/rules.py [--steps 64] [--seeds 3] [--only mlp cnn groupnorm transformer]

Trains small networks in float64, on scikit-learn's digits and on a text that comes with Python, and
credits every step by every rule. The truth is Gauss-Legendre of 8 points on each half of a step.
Errors are Σ|A - true A| / Σ|true A|: of layers per step (which is what dashboards show), and of
single weights; signs are those of a layer's credit in a step. Chords of ten steps are measured
along the chord, as `every_n_steps` does, and compared with the path.
"""

from __future__ import annotations

import argparse
import site
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call

from lightning_lca import Position, Sample, Segment, allocate
from lightning_lca.measure.allocation import Field, closed_gradient, credit
from lightning_lca.measure.quadrature import RULES, Quadrature
from lightning_lca.training.meter import _MEMORY, _MUCH

Path = list[dict[str, Tensor]]
Credits = dict[str, Tensor]
CHORD = 10
HALVES = np.polynomial.legendre.leggauss(8)


def exact() -> Quadrature:
    """Makes the rule that counts as the truth: 8 points of Gauss-Legendre on each half."""
    places, weights = (np.asarray(a) for a in HALVES)
    nodes = [float((p + 1) / 4 + half) for half in (0.0, 0.5) for p in places]
    return Quadrature(
        "gauss8 x2", tuple(nodes), tuple(float(w) / 4 for w in [*weights, *weights]), 3
    )


class Image(nn.Module):
    """Shows 64 numbers as an image."""

    def forward(self, x: Tensor) -> Tensor:
        """Reshapes [batch, 64]."""
        return x.view(-1, 1, 8, 8)


def mlp() -> nn.Module:
    """Makes 64-32-32-10."""
    return nn.Sequential(
        nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10)
    )


def cnn(norm: Callable[[int], nn.Module] = lambda channels: nn.Identity()) -> nn.Module:
    """Makes two convolutions and a linear layer."""
    return nn.Sequential(
        *(Image(), nn.Conv2d(1, 8, 3, padding=1), norm(8), nn.ReLU()),
        *(nn.Conv2d(8, 16, 3, padding=1), norm(16), nn.ReLU()),
        *(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(256, 10)),
    )


class Characters(nn.Module):
    """A transformer of two layers that foretells the next of 32 characters."""

    def __init__(self) -> None:
        """Makes 128 characters, width 32, two heads."""
        super().__init__()
        self.embed, self.place = nn.Embedding(128, 32), nn.Parameter(torch.randn(32, 32) / 6)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(32, 2, 64, 0.0, "gelu", batch_first=True) for _ in range(2)
        )
        self.out = nn.Linear(32, 128)

    def forward(self, x: Tensor) -> Tensor:
        """Foretells [batch, 128, 32] of [batch, 32]."""
        mask = nn.Transformer.generate_square_subsequent_mask(32).to(self.place)
        h = self.embed(x) + self.place
        for layer in self.layers:
            h = layer(h, mask, is_causal=True)
        out: Tensor = self.out(h)
        return out.transpose(1, 2)


NETS: dict[str, Callable[[], nn.Module]] = {
    "mlp": mlp,
    "cnn": cnn,
    "groupnorm": lambda: cnn(lambda channels: nn.GroupNorm(channels // 4, channels)),
    "transformer": Characters,
}
OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=3e-3),
}


@dataclass
class Sums:
    """What is added up over the steps of a run, for one rule."""

    layers: float = 0.0
    weights: float = 0.0
    wrong: int = 0
    gradients: float = 0.0


@dataclass
class Errors:
    """What rules miss in one run, as shares; signs and gradients per step."""

    layers: float
    weights: float
    signs: float
    gradients: float


@dataclass
class Run:
    """A path, and the loss on the probe along it."""

    field: Field
    path: Path

    def by_layer(self, values: Mapping[str, Tensor]) -> np.ndarray:
        """Sums credit over layers [L]."""
        sums: dict[str, float] = defaultdict(float)
        for name, value in values.items():
            sums[name.rpartition(".")[0] or name] += float(value.sum())
        return np.array(list(sums.values()))


def data_of(net: str) -> tuple[Tensor, Tensor]:
    """Returns inputs and targets."""
    if net != "transformer":
        x, y = load_digits(return_X_y=True)
        return torch.from_numpy(x / 16), torch.from_numpy(y)
    text = site.__doc__.encode()[: 33 * 64]
    rows = torch.tensor([*text][: len(text) // 33 * 33]).view(-1, 33)
    return rows[:, :-1], rows[:, 1:]


def train(net: str, optimizer: str, steps: int, seed: int) -> Run:
    """Trains in float64; the probe is 256 images, or 16 rows of text."""
    torch.manual_seed(seed)
    x, y = data_of(net)
    module = NETS[net]().double()
    stepper = OPTIMIZERS[optimizer](list(module.parameters()))
    size = 8 if net == "transformer" else 64

    def kept() -> dict[str, Tensor]:
        return {n: w.detach().clone() for n, w in module.named_parameters()}

    path = [kept()]
    for _ in range(steps):
        batch = torch.randint(len(x), (size,))
        stepper.zero_grad()
        F.cross_entropy(module(x[batch]), y[batch]).backward()
        stepper.step()
        path.append(kept())
    some = torch.randperm(len(x))[: 2 * size if net == "transformer" else 256]
    a, b = x[some], y[some]

    def field(at: Position) -> Sample:
        weights = at.weights()
        with torch.enable_grad():
            loss = F.cross_entropy(functional_call(module, weights, (a,)), b)
            gradients = torch.autograd.grad(loss, list(weights.values()))
        return Sample(loss.detach(), dict(zip(weights, gradients, strict=True)))

    return Run(field, path)


def adaptive(run: Run, segments: list[Segment]) -> Iterator[tuple[Credits, int]]:
    """Credits steps as the callback does, and counts gradients."""
    typical: float | None = None
    for segment in segments:
        known = typical
        gradient, ends = closed_gradient(
            run.field, segment, is_much=lambda r, k=known: k is None or abs(float(r)) > _MUCH * k
        )
        values = credit(gradient, segment)
        size = float(np.abs(run.by_layer(values)).sum())
        typical = size if typical is None else size + _MEMORY * (typical - size)
        yield dict(values), 1 + (ends.shared is None)


def plain(run: Run, segments: list[Segment], rule: Quadrature) -> Iterator[tuple[Credits, int]]:
    """Credits steps one by one."""
    for segment in segments:
        yield dict(allocate(run.field, segment, rule).values), rule.gradients_per_step


def errors_of(run: Run) -> dict[str, Errors]:
    """Compares every rule with the truth on every step."""
    segments = [Segment(a, b) for a, b in pairwise(run.path)]
    truth = [dict(allocate(run.field, s, exact()).values) for s in segments]
    found = {}
    for name, rule in RULES.items():
        credited = adaptive(run, segments) if rule.adapts else plain(run, segments, rule)
        found[name] = _errors(run, credited, truth)
    return found


def errors_of_chords(run: Run) -> dict[str, Errors]:
    """Compares ways to spend a fifth of a gradient per step with the truth of each ten steps."""
    ways = {f"simpson, chords of {CHORD}": ("simpson", CHORD)}
    ways |= {
        f"{rule}, chords of {CHORD // 2}": (rule, CHORD // 2)
        for rule in ("trapezoid", "closed_trapezoid")
    }
    steps = (len(run.path) - 1) // CHORD * CHORD
    path = run.path[: steps + 1]
    single = [dict(allocate(run.field, Segment(a, b), exact()).values) for a, b in pairwise(path)]
    truth = [_added(single[i : i + CHORD]) for i in range(0, steps, CHORD)]
    found = {}
    for name, (rule, length) in ways.items():
        segments = [Segment(a, b) for a, b in pairwise(path[::length])]
        chords = list(plain(run, segments, RULES[rule]))
        each = CHORD // length
        joined = [
            (_added([c for c, _ in chords[i : i + each]]), sum(n for _, n in chords[i : i + each]))
            for i in range(0, len(chords), each)
        ]
        found[name] = _errors(run, iter(joined), truth)
        found[name].gradients /= CHORD
    return found


def _added(credits: list[Credits]) -> Credits:
    return {n: torch.stack([c[n] for c in credits]).sum(0) for n in credits[0]}


def _errors(run: Run, credited: Iterator[tuple[Credits, int]], truth: list[Credits]) -> Errors:
    sums, size_layers, size_weights, layers = Sums(), 0.0, 0.0, 0
    for (values, gradients), true in zip(credited, truth, strict=True):
        mine, theirs = run.by_layer(values), run.by_layer(true)
        sums.layers += float(np.abs(mine - theirs).sum())
        sums.weights += sum(float((values[n] - t).abs().sum()) for n, t in true.items())
        sums.wrong += int((np.sign(mine) != np.sign(theirs)).sum())
        sums.gradients += gradients
        size_layers += float(np.abs(theirs).sum())
        size_weights += sum(float(t.abs().sum()) for t in true.values())
        layers += len(mine)
    return Errors(
        sums.layers / size_layers,
        sums.weights / size_weights,
        sums.wrong / layers,
        sums.gradients / len(truth),
    )


def report(nets: list[str], steps: int, seeds: int) -> None:
    """Prints a table for the steps, and one for chords: the median over seeds, and the range."""
    for title, measure in (("every step", errors_of), (f"every {CHORD} steps", errors_of_chords)):
        print(f"\nError of credit per layer, {title} (median over {seeds} seeds, least to most)")
        width = 34
        print(f"{'':12}{'rule':28}{'gradients':>10}{'layers':>{width}}{'weights':>9}{'signs':>8}")
        for net in nets:
            for optimizer in OPTIMIZERS:
                runs = [measure(train(net, optimizer, steps, seed)) for seed in range(seeds)]
                for name in runs[0]:
                    some = [r[name] for r in runs]
                    layers = sorted(100 * e.layers for e in some)
                    spread = f"{median(layers):.3g} % ({layers[0]:.3g} to {layers[-1]:.3g})"
                    print(
                        f"{net[:5] + '-' + optimizer:12}{name:28}"
                        f"{median(e.gradients for e in some):10.2f}{spread:>{width}}"
                        f"{100 * median(e.weights for e in some):8.2g}%"
                        f"{100 * median(e.signs for e in some):7.2g}%",
                        flush=True,
                    )


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=NETS, default=[*NETS])
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # The networks are too small for more.
    report(arguments.only, arguments.steps, arguments.seeds)


if __name__ == "__main__":
    main()
