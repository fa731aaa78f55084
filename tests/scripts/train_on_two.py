"""Trains in two processes (or four), with and without the callback; saves what every rank saw.

    python train_on_two.py DIRECTORY CASE ...

Writes ``{case}-{plain or measured}-{rank}.pt``. `test_distributed` runs it.
"""

import datetime
import os
import sys
import time
import types
import warnings
from pathlib import Path

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parent.parent))
from support.models import Classifier, mlp, toy_data, unrecorded
from support.training import make_trainer

from lightning_lca import LCACallback
from lightning_lca.runtime import processes
from lightning_lca.training import budget as cost
from lightning_lca.training.meter import Meter

STEPS = 6
DDP = {
    "ddp": {},
    "static": {"static_graph": True},
    "buckets": {"gradient_as_bucket_view": True},
    "unused": {"find_unused_parameters": True},
    "spawn": {"start_method": "spawn"},
    "fork": {"start_method": "fork"},
}
MISSES_ALL = Meter._misses_all
MEASURE = Meter.measure
REDUCED = []  # By measured step, the elements of every reduction of ours.
MESHES = {"fsdp": (2, 1), "tensor": (1, 2), "both": (2, 2)}  # Shares of the data, of a layer.
TIMEOUT = datetime.timedelta(seconds=400)  # Of a rank for another; shorter than torch's own.


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


class Cut(Classifier):
    """Its weights are cut over processes: layer by layer, or within each layer, or both ways."""

    def __init__(self, dtype):
        super().__init__(nn.Identity(), sgd)
        self.type_of_weights = dtype

    def configure_model(self):
        if not isinstance(self.net, nn.Identity):
            return
        torch.manual_seed(1)
        self.net = mlp().to(self.type_of_weights)
        last = ColwiseParallel(output_layouts=Replicate())
        across = {"0": ColwiseParallel(), "2": RowwiseParallel(), "4": last}
        if self.device_mesh["tensor_parallel"].size() > 1:
            parallelize_module(self.net, self.device_mesh["tensor_parallel"], across)
        if self.device_mesh["data_parallel"].size() > 1:
            mesh = self.device_mesh["data_parallel"]
            for layer in self.net:
                if isinstance(layer, nn.Linear):
                    fully_shard(layer, mesh=mesh)
            fully_shard(self, mesh=mesh)


def whole(value):
    """Puts DTensors together again, wherever they are."""
    return tree_map(lambda v: v.full_tensor() if hasattr(v, "full_tensor") else v, value)


class Trail(pl.Callback):
    """Keeps the weights before and after every step."""

    def __init__(self):
        self.points = []

    def keep(self, trainer, module, *args):
        self.points.append({n: whole(p.detach()).clone() for n, p in module.named_parameters()})

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
                "weights": whole(dict(module.state_dict())),
                "optimizer": whole(trainer.optimizers[0].state_dict()),
                "gradients": whole([p.grad for p in module.parameters()]),
                "metrics": dict(trainer.callback_metrics),
                "random": torch.random.get_rng_state(),
                "points": self.path.points,
                "rows": vars(history.rows) if history else None,
                "groups": history.groups if history else None,
                "held": sum(w.numel() for w in self.lca._training.snapshots.start.values())
                if history
                else None,
                "log_dir": str(self.lca.log_dir) if self.lca else None,
                "reduced": REDUCED,
            },
            f"{self.file}-{trainer.global_rank}.pt",
        )


def measure(self, *arguments, **options):
    """Measures, and notes what is reduced over processes on the way."""
    REDUCED.append([])
    reduce = processes.dist.all_reduce
    processes.dist = types.SimpleNamespace(
        all_reduce=lambda t, *a: REDUCED[-1].append(t.numel()) or reduce(t, *a),
        ReduceOp=torch.distributed.ReduceOp,
    )
    try:
        MEASURE(self, *arguments, **options)
    finally:
        processes.dist = torch.distributed


class Die(pl.Callback):
    """Ends one rank as a crash would, in mid-training."""

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == 3 and trainer.global_rank == 1:
            os._exit(9)


class Slow:
    """Moves a clock that stands still otherwise, so that the ranks disagree on the time.

    The time is kept at torch's own module: what the user's has is put back after each look.
    """

    def training_step(self, batch, batch_idx):
        torch.lca_now += 10.0
        return super().training_step(batch, batch_idx)

    @staticmethod
    def loss(module, batch):
        # A gradient of two batches: 2 s on rank zero, 6 s on the other.
        torch.lca_now += 3.0 if module.global_rank else 1.0
        return unrecorded(F.cross_entropy(module.net(batch[0]), batch[1]))


class SlowPlain(Slow, Plain):
    """The same, whole on both ranks."""


class SlowCut(Slow, Cut):
    """The same, cut over both."""


def probe_batches(dtype):
    """Four batches of unequal size."""
    xs, ys = toy_data(60, dtype=dtype).tensors
    return [list(b) for b in zip(xs.split([20, 10, 16, 14]), ys.split([20, 10, 16, 14]))]


def strategy(name):
    waits = {"process_group_backend": "gloo", "timeout": TIMEOUT}
    if name not in MESHES:
        return DDPStrategy(**waits, **DDP[name])
    data, tensor = MESHES[name]
    return ModelParallelStrategy(data_parallel_size=data, tensor_parallel_size=tensor, **waits)


def precision(name, option, double):
    if option == "mixed":
        return "bf16-mixed"
    return "64-true" if double and name not in MESHES else "32-true"


def train(directory, case, measured):
    name, _, option = case.partition("+")
    single = ("single", "drawn", "mixed", "budget", "die", "")
    double = option not in single
    dtype = torch.float64 if double else torch.float32
    pl.seed_everything(1, verbose=False)
    if name in MESHES:
        model = Cut(dtype)
    elif double or option == "single":
        model = Plain(optimizer=sgd)
    else:
        model = Talkative(unused=name == "unused")
    probe = probe_batches(dtype)
    options = {}
    if option == "budget":
        cost.clock, torch.lca_now = (lambda: torch.lca_now), 0.0
        model = SlowCut(dtype) if name in MESHES else SlowPlain(optimizer=sgd)
        options = {"max_overhead": 0.1, "loss_fn": Slow.loss}
    if option == "parts":
        options = {"exclude": ["net.2", "*.bias"]}
    if option in ("closed", "adaptive"):
        rule = "closed_trapezoid" if option == "closed" else option
        options = {"quadrature": rule}
    if option == "split":
        options = {"breakdown": True, "oscillation": True}
    # As where every step leaves more than it explains.
    Meter.measure, REDUCED[:] = measure, []
    Meter._misses_all = (lambda *_: True) if option == "halved" else MISSES_ALL
    probe = {"three": probe[:3], "drawn": "train"}.get(option, probe)
    tolerance = 1e-9 if option == "tolerance" else None
    lca = (
        LCACallback(
            probe=probe,
            figures=False,
            tolerance=tolerance,
            group_by="neuron" if option == "neuron" else "layer",
            neurons=name == "fsdp",
            **options,
        )
        if measured
        else None
    )
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
        devices=4 if name == "both" else 2,
        strategy=strategy(name),
        precision=precision(name, option, double),
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
