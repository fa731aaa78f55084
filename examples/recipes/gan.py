"""A GAN: two optimizers, two losses, and who moves which.

    python examples/recipes/gan.py

Manual optimization needs a ``loss_fn``, since running ``training_step`` once more would step the
optimizers. Two losses are two callbacks; each has a record of its own, the second in ``lca2``.
"""

from __future__ import annotations

import math

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lca import LCACallback


def generator_loss(module: Gan, batch: list[Tensor]) -> Tensor:
    """Low where the critic takes what is generated for real."""
    return F.softplus(-module.critic(module.generator(batch[0]))).mean()


def critic_loss(module: Gan, batch: list[Tensor]) -> Tensor:
    """Low where the critic tells them apart. No detach(): the generator moves this loss, too."""
    noise, real = batch
    fake = module.critic(module.generator(noise))
    return F.softplus(fake).mean() + F.softplus(-module.critic(real)).mean()


class Gan(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2))
        self.critic = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 1))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        for optimizer, loss in zip(self.optimizers(), (generator_loss, critic_loss), strict=True):
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(loss(self, batch))
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        parts = self.generator, self.critic
        return [torch.optim.Adam(part.parameters(), lr=0.003) for part in parts]


def ring(points: int = 1024) -> TensorDataset:
    """Draws noise to generate from [points, 4], and points of a ring [points, 2]."""
    draw = torch.Generator().manual_seed(0)
    angle = 2 * math.pi * torch.rand(points, generator=draw)
    real = torch.stack([angle.cos(), angle.sin()], 1)
    return TensorDataset(torch.randn(points, 4, generator=draw), real)


def main() -> None:
    pl.seed_everything(0, verbose=False)
    of_generator = LCACallback(loss_fn=generator_loss, group_by="module:1", probe_batches=4)
    of_critic = LCACallback(loss_fn=critic_loss, group_by="module:1", probe_batches=4)
    trainer = pl.Trainer(
        max_epochs=10,
        callbacks=[of_generator, of_critic],
        accelerator="cpu",
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(Gan(), DataLoader(ring(), batch_size=64, shuffle=True))
    for title, lca in (("generator's loss", of_generator), ("critic's loss", of_critic)):
        history = lca.history
        change = history.loss_after[-1] - history.loss_before[0]
        print(f"{title}: {change:+.3f} in {len(history)} batches")
        for part, credit in zip(history.groups, history.allocated.sum(0), strict=True):
            print(f"  what the {part} did to it: {credit:+.3f}")


if __name__ == "__main__":
    main()
