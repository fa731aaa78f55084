"""What the benchmark trains, on synthetic data, and the naive LCA callback it compares with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

CLASSES = 10
VOCABULARY = 1024
TOKENS = 128
Batch = list[Tensor]


class Model(pl.LightningModule):
    """Cross-entropy on a network; logs nothing, so that the floor is as low as it can be."""

    def __init__(self, net: nn.Module, optimizer: Callable[[Any], torch.optim.Optimizer]) -> None:
        super().__init__()
        self.net = net
        self.make_optimizer = optimizer

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return cross_entropy(self.net, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make_optimizer(self.net.parameters())


def cross_entropy(net: nn.Module, batch: Batch) -> Tensor:
    """Gives the mean loss over samples, or over tokens."""
    x, y = batch
    return F.cross_entropy(net(x).flatten(0, -2), y.flatten())


def mlp() -> nn.Module:
    """Makes 784-2048-2048-2048-10 with dropout: 10.0M weights."""
    widths = [784, 2048, 2048, 2048]
    hidden = [
        layer
        for i, o in pairwise(widths)
        for layer in (nn.Linear(i, o), nn.ReLU(), nn.Dropout(0.1))
    ]
    return nn.Sequential(*hidden, nn.Linear(widths[-1], CLASSES))


class Block(nn.Module):
    """Two 3x3 convolutions with BatchNorm around a shortcut."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        stride = 1 if inputs == outputs else 2
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = nn.Sequential()
        if stride > 1:
            self.shortcut.append(nn.Conv2d(inputs, outputs, 1, stride, bias=False))
            self.shortcut.append(nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


def resnet18() -> nn.Module:
    """Makes ResNet-18 for 32x32 images, full width, with a 3x3 stem of stride 2: 11.2M weights."""
    widths = [64, 64, 64, 128, 128, 256, 256, 512, 512]
    stem = [nn.Conv2d(3, 64, 3, 2, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    blocks = [Block(i, o) for i, o in pairwise(widths)]
    return nn.Sequential(
        *stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, CLASSES)
    )


class Bottleneck(nn.Module):
    """A 3x3 convolution between two of 1x1, each with BatchNorm, around a shortcut."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.body = nn.Sequential(
            nn.Conv2d(inputs, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, stride, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = nn.Sequential()
        if inputs != outputs:
            self.shortcut.append(nn.Conv2d(inputs, outputs, 1, stride, bias=False))
            self.shortcut.append(nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


def resnet50() -> nn.Module:
    """Makes ResNet-50 for 224x224 images: 23.5M weights."""
    stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    blocks, inputs = [], 64
    for width, count in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for i in range(count):
            blocks.append(Bottleneck(inputs, width, 2 if i == 0 and width > 64 else 1))
            inputs = 4 * width
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, CLASSES)]
    return nn.Sequential(*stem, nn.MaxPool2d(3, 2, 1), *blocks, *head)


class Transformer(nn.Module):
    """Pre-norm encoder over token and position embeddings, dropout 0.1: 3.7M weights."""

    def __init__(self, width: int = 256, layers: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(TOKENS, width)
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.1, batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.tokens(x) + self.positions.weight[: x.shape[1]]))


def _vectors(count: int) -> TensorDataset:
    return TensorDataset(torch.randn(count, 784), torch.randint(CLASSES, (count,)))


def _images(count: int) -> TensorDataset:
    return TensorDataset(torch.randn(count, 3, 32, 32), torch.randint(CLASSES, (count,)))


def _photographs(count: int) -> TensorDataset:
    few = torch.randn(64, 3, 224, 224)  # Repeated: an image takes 600 kB.
    return TensorDataset(few.repeat(count // 64, 1, 1, 1), torch.randint(CLASSES, (count,)))


def _sequences(count: int) -> TensorDataset:
    text = torch.randint(VOCABULARY, (count, TOKENS + 1))
    return TensorDataset(text[:, :-1], text[:, 1:])


@dataclass(frozen=True)
class Workload:
    """A network, its data and its optimizer; the probe is one batch, as large as training's."""

    net: Callable[[], nn.Module]
    data: Callable[[int], TensorDataset]
    optimizer: Callable[[Any], torch.optim.Optimizer]
    batch_on: dict[str, int]  # {device type: samples}
    note: str

    def model(self) -> Model:
        """Builds the model from a fixed seed."""
        torch.manual_seed(0)
        return Model(self.net(), self.optimizer)

    def loader(self, device: str, steps: int) -> DataLoader[Any]:
        """Loads random batches for one epoch of this many steps."""
        batch = self.batch_on[device]
        data = self.data(16 * batch)
        sampler = RandomSampler(data, replacement=True, num_samples=steps * batch)
        return DataLoader(data, batch, sampler=sampler)

    def probe(self, device: str) -> Batch:
        """Draws the probe's batch, on the host."""
        torch.manual_seed(1)
        return list(self.data(self.batch_on[device]).tensors)


WORKLOADS = {
    "mlp": Workload(
        mlp,
        _vectors,
        partial(torch.optim.Adam, lr=1e-3),
        {"cpu": 512, "cuda": 512},
        "784-2048-2048-2048-10, dropout, Adam",
    ),
    "cnn": Workload(
        resnet18,
        _images,
        partial(torch.optim.SGD, lr=0.05, momentum=0.9),
        {"cpu": 64, "cuda": 256},
        "ResNet-18, 32x32 images, stem of stride 2, BatchNorm, SGD",
    ),
    "transformer": Workload(
        Transformer,
        _sequences,
        partial(torch.optim.AdamW, lr=3e-4),
        {"cpu": 8, "cuda": 32},
        "4 layers, width 256, 128 tokens, dropout, AdamW",
    ),
    "resnet50": Workload(
        resnet50,
        _photographs,
        partial(torch.optim.SGD, lr=0.05, momentum=0.9),
        {"cuda": 64},
        "ResNet-50, 224x224 images, BatchNorm, SGD",
    ),
    "transformer100m": Workload(
        partial(Transformer, width=768, layers=14, heads=12),
        _sequences,
        partial(torch.optim.AdamW, lr=3e-4),
        {"cuda": 64},
        "14 layers, width 768, 128 tokens, dropout, AdamW",
    ),
}


@contextmanager
def without_dropout(net: nn.Module) -> Iterator[None]:
    """Turns dropout off, attention's functional one too, as probe_mode="no_dropout" does."""
    dropouts = [m for m in net.modules() if isinstance(m, nn.Dropout) and m.training]
    attentions = [(m, m.dropout) for m in net.modules() if isinstance(m, nn.MultiheadAttention)]
    try:
        for dropout in dropouts:
            dropout.eval()
        for attention, _ in attentions:
            attention.dropout = 0.0
        yield
    finally:
        for dropout in dropouts:
            dropout.train()
        for attention, rate in attentions:
            attention.dropout = rate


class NaiveLCA(pl.Callback):
    """Measures LCA as one writes it in an afternoon: whole copies, three gradients, `.item()`."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.rows: list[
            dict[str, tuple[float, int, int]]
        ] = []  # {name: (credit, helping, hurting)}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        batch = trainer.precision_plugin.convert_input(self.batch)
        self.batch = [x.to(pl_module.device) for x in batch]

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.before = copy.deepcopy(pl_module.net)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        middle, after = copy.deepcopy(pl_module.net), copy.deepcopy(pl_module.net)
        starts, stops = dict(self.before.named_parameters()), dict(after.named_parameters())
        with torch.no_grad():
            for name, weight in middle.named_parameters():
                weight.copy_((starts[name] + stops[name]) / 2)
        first, half, last = (self.gradients(net) for net in (self.before, middle, after))
        row = {}
        for name, start in starts.items():
            mean = (first[name] + 4 * half[name] + last[name]) / 6
            credit = (stops[name] - start).detach() * mean
            row[name] = (
                credit.sum().item(),
                int((credit < 0).sum().item()),
                int((credit > 0).sum().item()),
            )
        self.rows.append(row)

    def gradients(self, net: nn.Module) -> dict[str, Tensor]:
        """Gives {name: [*shape]} by a backward pass through a copy of the network."""
        with without_dropout(net):
            cross_entropy(net, self.batch).backward()
        return {name: weight.grad for name, weight in net.named_parameters()}
