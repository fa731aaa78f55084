"""The time that measuring adds to a step, beside that of the simplest callback a user would write.

    python tests/benchmarks/simplest.py [--rounds N] [--only NAME ...] [--unrecorded]

The simplest one takes two gradients of the loss per step by ``torch.autograd.grad``, from live
weights that it displaces without any isolation, and sums credits per tensor. All three trainings of
a round run one after the other, in one process and on one thread; the table has medians of rounds.
``--unrecorded`` trains a loss whose shapes follow from the weights, so that every evaluation runs
the user's code.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
import tempfile
import time
import warnings

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from workloads import resnet50

from lightning_lca import LCACallback

WARM, STEPS = 12, 40
FEW = {"ResNet-50": (4, 10)}  # Of what takes a second.


def mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Tokens(nn.Module):
    """A transformer that sorts sequences of tokens into ten kinds."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(100, width)
        block = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, batch_first=True)
        self.blocks = nn.TransformerEncoder(block, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.embedding(x)).mean(1))


class Block(nn.Module):
    def __init__(self, a: int, b: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(a, b, 3, 1 + (a != b), 1, bias=False),
            nn.BatchNorm2d(b),
            nn.ReLU(),
            nn.Conv2d(b, b, 3, 1, 1, bias=False),
            nn.BatchNorm2d(b),
        )
        self.skip = nn.Conv2d(a, b, 1, 2, bias=False) if a != b else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.body(x) + self.skip(x))


def resnet(width: int) -> nn.Sequential:
    """ResNet-18 for small pictures, narrowed to fit a processor."""
    widths = [width, width, 2 * width, 2 * width, 4 * width, 4 * width, 8 * width, 8 * width]
    blocks = [Block(a, b) for a, b in zip([width, *widths[:-1]], widths, strict=True)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10)]
    return nn.Sequential(nn.Conv2d(3, width, 3, 1, 1), *blocks, *head)


def picture(n: int) -> torch.Tensor:
    return torch.randn(n, 3, 16, 16)


NETWORKS = {
    "64-32-32-10": (lambda: mlp(64, 32, 32, 10), lambda n: torch.randn(n, 64)),
    "20 x 32": (lambda: mlp(64, *[32] * 20, 10), lambda n: torch.randn(n, 64)),
    "3 x 256": (lambda: mlp(64, 256, 256, 256, 10), lambda n: torch.randn(n, 64)),
    "ResNet-18 / 4": (lambda: resnet(16), picture),
    "ResNet-50": (resnet50, lambda n: torch.randn(n, 3, 32, 32)),
    "transformer, 6 layers": (lambda: Tokens(6, 64), lambda n: torch.randint(0, 100, (n, 16))),
    "transformer, 24 layers": (lambda: Tokens(24, 64), lambda n: torch.randint(0, 100, (n, 16))),
}


class Module(pl.LightningModule):
    def __init__(self, net: nn.Module, *, unrecorded: bool = False) -> None:
        super().__init__()
        self.net = net
        self.unrecorded = unrecorded

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        found, wanted = self.net(batch[0]), batch[1]
        if self.unrecorded:  # How many rows are left, the weights decide.
            finite = found.isfinite().all(1)
            found, wanted = found[finite], wanted[finite]
        return F.cross_entropy(found, wanted)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-3)


class Simplest(pl.Callback):
    """What a user would write: Simpson on live weights, sums per tensor, nothing put back."""

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.batch = next(iter(trainer.train_dataloader))
        self.weights = list(module.parameters())
        self.last = self.gradient(module)
        self.rows: list[list[float]] = []

    def gradient(self, module: pl.LightningModule) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(module.training_step(self.batch, 0), self.weights)

    def on_before_optimizer_step(self, *args: object) -> None:
        self.start = [w.detach().clone() for w in self.weights]

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, *args: object
    ) -> None:
        stop = [w.detach().clone() for w in self.weights]
        with torch.no_grad():
            for w, a, b in zip(self.weights, self.start, stop, strict=True):
                w.copy_((a + b) / 2)
        middle = self.gradient(module)
        with torch.no_grad():
            for w, b in zip(self.weights, stop, strict=True):
                w.copy_(b)
        end = self.gradient(module)
        row = [
            ((b - a) * (g0 + 4 * g1 + g2) / 6).sum().item()
            for a, b, g0, g1, g2 in zip(self.start, stop, self.last, middle, end, strict=True)
        ]
        self.rows.append(row)
        self.last = end


class Clock(pl.Callback):
    """Times steps from the start of one batch to that of the next.

    On the CPU, on one thread, it is the processor's time: that of others on the machine is not in
    it.
    """

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_start(self, trainer: pl.Trainer, *args: object) -> None:
        on_cpu = trainer.strategy.root_device.type == "cpu" and torch.get_num_threads() == 1
        self.times.append(time.process_time() if on_cpu else time.perf_counter())


def seconds(name: str, *callbacks: pl.Callback, unrecorded: bool = False) -> float:
    """Trains, and returns the median time of a step."""
    pl.seed_everything(0, verbose=False)
    make, data = NETWORKS[name]
    warm, steps = FEW.get(name, (WARM, STEPS))
    net, n = make(), 32 * (warm + steps)
    loader = DataLoader(TensorDataset(data(n), torch.randint(0, 10, (n,))), 32)
    clock = Clock()
    with tempfile.TemporaryDirectory() as path:
        trainer = pl.Trainer(
            default_root_dir=path,
            callbacks=[clock, *callbacks],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            max_epochs=1,
            accelerator="cpu",
        )
        trainer.fit(Module(net, unrecorded=unrecorded), loader)
    times = [b - a for a, b in zip(clock.times[:-1], clock.times[1:], strict=True)]
    return statistics.median(times[warm:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--unrecorded", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print("network                    plain ms  simplest adds  LCA adds  ratio  training x")
    for name in options.only:
        rounds = []
        for _ in range(options.rounds):
            of = functools.partial(seconds, name, unrecorded=options.unrecorded)
            plain, simplest, lca = of(), of(Simplest()), of(LCACallback(figures=False))
            rounds.append((plain, simplest - plain, lca - plain))
        plain, simplest, lca = (1e3 * statistics.median(column) for column in zip(*rounds))
        ratio = statistics.median(c / b for _, b, c in rounds)
        print(
            f"{name:26s} {plain:8.2f}  {simplest:13.2f}  {lca:8.2f}  {ratio:5.2f}  "
            f"{1 + lca / plain:10.2f}",
            flush=True,
        )


if __name__ == "__main__":
    import logging

    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    main()
