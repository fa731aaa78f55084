"""Trains in two processes, with and without the callback, and saves what every rank saw.

    python train_on_two.py DIRECTORY CASE ...

Writes ``{case}-{plain or measured}-{rank}.pt``. `test_distributed` runs it.
"""

import datetime
import os
import sys
import time
import warnings
from pathlib import Path

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parent.parent))
from cases import Classifier, make_trainer, toy_data

from lightning_lca import LCACallback

STEPS = 6
FLAVOURS = {
    "ddp": {},
    "static": {"static_graph": True},
    "buckets": {"gradient_as_bucket_view": True},
    "unused": {"find_unused_parameters": True},
    "spawn": {"start_method": "spawn"},
    "fork": {"start_method": "fork"},
}


def sgd(parameters):
    """An optimizer that can be sent to another process, as no lambda can."""
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


class Talkative(Classifier):
    """Gathers from all ranks within its training step, and has buffers that differ over ranks."""

    def __init__(self, unused=False):
        net = nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 4))
        super().__init__(net, sgd)
        if unused:
            self.spare = nn.Linear(3, 3)

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self.net(x)
        loss = F.cross_entropy(logits, y)
        self.all_gather(loss.detach())
        self.log("train_loss", loss, sync_dist=True, on_epoch=True)
        return loss


class Plain(Classifier):
    """Has no BatchNorm, so that a mean over ranks is the mean over the joint batch."""


class Trail(pl.Callback):
    """Keeps the weights before and after every step."""

    def __init__(self):
        self.points = []

    def keep(self, trainer, module, *args):
        self.points.append({n: p.detach().clone() for n, p in module.named_parameters()})

    on_train_start = keep
    on_train_batch_end = keep


class Save(pl.Callback):
    """Writes what this rank has seen."""

    def __init__(self, file, lca, path):
        self.file, self.lca, self.path = file, lca, path

    def on_train_end(self, trainer, module):
        history = self.lca.history if self.lca else None
        torch.save(
            {
                "weights": module.state_dict(),
                "optimizer": trainer.optimizers[0].state_dict(),
                "metrics": dict(trainer.callback_metrics),
                "random": torch.random.get_rng_state(),
                "points": self.path.points,
                "rows": vars(history.rows) if history else None,
                "groups": history.groups if history else None,
                "log_dir": str(self.lca.log_dir) if self.lca else None,
            },
            f"{self.file}-{trainer.global_rank}.pt",
        )


class Die(pl.Callback):
    """Ends one rank as a crash would, in mid-training."""

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == 3 and trainer.global_rank == 1:
            os._exit(9)


def probe_batches(dtype):
    """Four batches of unequal size."""
    xs, ys = toy_data(60, dtype=dtype).tensors
    return [list(b) for b in zip(xs.split([20, 10, 16, 14]), ys.split([20, 10, 16, 14]))]


def train(directory, case, measured):
    name, _, option = case.partition("+")
    double = option in ("double", "three", "tolerance")
    dtype = torch.float64 if double else torch.float32
    pl.seed_everything(1, verbose=False)
    model = (
        Plain(optimizer=sgd) if double or option == "single" else Talkative(unused=name == "unused")
    )
    probe = probe_batches(dtype)
    probe = {"three": probe[:3], "drawn": "train"}.get(option, probe)
    tolerance = 1e-9 if option == "tolerance" else None
    lca = LCACallback(probe=probe, figures=False, tolerance=tolerance) if measured else None
    path = Trail()
    kind = "measured" if measured else "plain"
    save = Save(directory / f"{case}-{kind}", lca, path)
    others = [Die()] if option == "die" else []
    trainer = make_trainer(
        directory / f"{case}-{kind}",
        *([lca] if lca else []),
        path,
        save,
        *others,
        max_steps=STEPS,
        devices=2,
        strategy=DDPStrategy(
            process_group_backend="gloo",
            timeout=datetime.timedelta(seconds=20),
            **FLAVOURS[name],
        ),
        precision="64-true" if double else "32-true",
        use_distributed_sampler=True,
    )
    trainer.fit(model, DataLoader(toy_data(96, dtype=dtype), batch_size=8))
    return lca


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    directory, cases = Path(sys.argv[1]), sys.argv[2:]
    began = time.monotonic()
    for case in cases:
        for measured in [True] if "die" in case else [False, True]:
            lca = train(directory, case, measured)
            if measured and case in ("spawn", "fork"):
                try:
                    assert not lca.history
                except RuntimeError as error:
                    (directory / f"{case}-error").write_text(str(error))
