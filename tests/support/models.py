"""Models and data that several tests share: small and deterministic."""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

# The Lightning that the tests train with, where it may be either; .ci/matrix.py sets the variable.
LIGHTNING = os.environ.get("LCA_LIGHTNING") or (
    "pytorch_lightning" if importlib.util.find_spec("pytorch_lightning") else "lightning.pytorch"
)
pl: Any = importlib.import_module(LIGHTNING)


def toy_data(
    samples: int = 96, features: int = 12, classes: int = 4, dtype: Any = torch.float32
) -> Any:
    """Makes a small separable classification set."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(samples, features, generator=generator, dtype=torch.float64)
    y = (x @ torch.randn(features, classes, generator=generator, dtype=torch.float64)).argmax(1)
    return TensorDataset(x.to(dtype), y)


def toy_loader(batch_size: int = 16, shuffle: bool = True, **kwargs: Any) -> DataLoader[Any]:
    """Loads `toy_data`; keywords other than the loader's go to it."""
    data = {k: kwargs.pop(k) for k in ("samples", "features", "classes", "dtype") if k in kwargs}
    return DataLoader(toy_data(**data), batch_size=batch_size, shuffle=shuffle, **kwargs)


class Resumable:
    """A loader that goes on in mid-epoch, as Lightning asks for."""

    def __init__(self) -> None:
        self.batches, self.served = list(toy_loader(shuffle=False)), 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Any:
        while self.served < len(self.batches):
            self.served += 1
            yield self.batches[self.served - 1]
        self.served = 0

    def state_dict(self) -> dict[str, int]:
        return {"served": self.served}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.served = state["served"]


class Classifier(pl.LightningModule):
    """Cross-entropy on a network, by any optimizer."""

    def __init__(self, net: nn.Module | None = None, optimizer: Any = None) -> None:
        super().__init__()
        self.net = net if net is not None else mlp()
        self.make_optimizer = optimizer or (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return self.make_optimizer([p for p in self.parameters() if p.requires_grad])


class Model(pl.LightningModule):
    """Its forward is its loss, so that the twin needs no Trainer."""

    def __init__(self, net, loss, optimizer):
        super().__init__()
        self.net, self.loss, self.make_optimizers = net, loss, optimizer

    def forward(self, x, y):
        return self.loss(self.net(x), y)

    def training_step(self, batch, batch_idx):
        loss = self(*batch)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        return self.make_optimizers([p for p in self.parameters() if p.requires_grad])


class Gan(pl.LightningModule):
    """A generator and a critic that step in turn, each with the other toggled off."""

    def __init__(self, bare_critic=False):
        super().__init__()
        self.automatic_optimization = False
        self.bare_critic = bare_critic
        self.generator, self.critic = mlp(4, 8, 12), mlp(12, 8, 1)

    def generator_loss(self, x):
        return F.softplus(-self.critic(self.generator(x[:, :4]))).mean()

    def critic_loss(self, x, training=False):
        fake = self.generator(x[:, :4])
        # For speed. To the measure it would hide how the generator moves this loss.
        fake = self.critic(fake.detach() if training else fake)
        return F.softplus(fake).mean() + F.softplus(-self.critic(x)).mean()

    def training_step(self, batch, batch_idx):
        x = batch[0]
        generator, critic = self.optimizers()
        self.toggle_optimizer(generator)
        generator.zero_grad()
        self.manual_backward(self.generator_loss(x))
        generator.step()
        self.untoggle_optimizer(generator)
        self.toggle_optimizer(critic)
        critic.zero_grad()
        self.manual_backward(self.critic_loss(x, training=True))
        (critic.optimizer if self.bare_critic else critic).step()
        self.untoggle_optimizer(critic)

    def configure_optimizers(self):
        return [
            torch.optim.Adam(self.generator.parameters(), 0.01),
            torch.optim.SGD(self.critic.parameters(), 0.1, momentum=0.9),
        ]


class Validated(Classifier):
    """The same, with a validation loss."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", F.cross_entropy(self.net(x), y))


def mlp(features: int = 12, hidden: int = 16, classes: int = 4) -> nn.Sequential:
    """A plain network of three layers."""
    return nn.Sequential(
        nn.Linear(features, hidden),
        nn.Tanh(),
        nn.Linear(hidden, hidden),
        nn.Tanh(),
        nn.Linear(hidden, classes),
    )


class ByFunction(nn.Module):
    """A network whose forward is a function of itself and x."""

    def __init__(self, forward: Any, **modules: nn.Module) -> None:
        super().__init__()
        self.function = forward
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Any) -> Any:
        return self.function(self, x)


def unrecorded(loss):
    """Gives a loss back through a shape that follows from it, which no recording holds."""
    return loss.reshape(1)[loss.reshape(1) == loss].sum()
