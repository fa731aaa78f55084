"""What `test_replay` names by import path: models, data and probes of a project of its own."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from support.models import pl, toy_data, toy_loader, unrecorded
from support.processes import PATIENCE
from torch import nn
from torch.utils.data import DataLoader, IterableDataset


class Net(pl.LightningModule):
    """BatchNorm, dropout, tied weights and a frozen one; built whole, or by configure_model."""

    def __init__(self, width=16, *, late=False, anneals=False, compiles=False):
        super().__init__()
        self.save_hyperparameters()
        if not late:
            self.build()

    def configure_model(self):
        if self.hparams.late and not hasattr(self, "head"):
            self.build()

    def build(self):
        width = self.hparams.width
        tied = [nn.Linear(width, width) for _ in range(2)]
        tied[1].weight = tied[0].weight
        body = nn.Sequential(
            nn.Linear(12, width),
            nn.BatchNorm1d(width),
            nn.Tanh(),
            tied[0],
            nn.Dropout(0.2),
            nn.Tanh(),
            tied[1],
        )
        self.body = torch.compile(body, backend="eager") if self.hparams.compiles else body
        self.scale = nn.Parameter(torch.ones(width), requires_grad=False)
        self.head = nn.Linear(width, 4)

    def loss(self, batch):
        x, y = batch
        return F.cross_entropy(self.head(self.scale * self.body(x)), y)

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss * (1 + 0.1 * self.global_step) if self.hparams.anneals else loss

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.1, 0.9)


class ByHand(Net):
    """Two optimizers that take turns, by manual optimization."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), 0.05) for part in (self.body, self.head)]


class Data(pl.LightningDataModule):
    """`toy_data`, in shuffled batches."""

    def __init__(self, batch_size=16):
        super().__init__()
        self.save_hyperparameters()

    def setup(self, stage):
        self.data = toy_data()

    def train_dataloader(self):
        return DataLoader(self.data, self.hparams.batch_size, shuffle=True)


class Rows(IterableDataset):
    """Reads a file that is open, row by row, as it were."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


class Stream(Data):
    """The same without an order to draw from."""

    def train_dataloader(self):
        return DataLoader(Rows(list(self.data)), 16)


class Once(Data):
    """The same, and gone when it was read."""

    def train_dataloader(self):
        return DataLoader(Rows(row for row in list(self.data) * 9), 16)


class Watched(Net):
    """Knows its own data, builds a layer when it has seen them, and names it otherwise on disk."""

    def on_save_checkpoint(self, checkpoint):
        checkpoint["state_dict"]["output.bias"] = checkpoint["state_dict"].pop("head.bias")

    def on_load_checkpoint(self, checkpoint):
        checkpoint["state_dict"]["head.bias"] = checkpoint["state_dict"].pop("output.bias")

    def build(self):
        super().build()
        del self.head

    def setup(self, stage):
        self.head = nn.Linear(self.hparams.width, int(toy_data().tensors[1].max()) + 1)

    def train_dataloader(self):
        return toy_loader()


def probe():
    """Gives three batches."""
    return list(toy_loader(shuffle=False))[:3]


def terms(module, batch):
    weights = [p for p in module.parameters() if p.requires_grad]
    return {"loss": loss_fn(module, batch), "decay": 0.01 * sum(w.square().sum() for w in weights)}


def loss_fn(module, batch):
    return module.loss(batch)


def by_code(module, batch):
    return unrecorded(module.loss(batch))


def cut_off(module, batch):
    """A loss whose gradient lacks a part: finer panels gain nothing."""
    loss = module.loss(batch)
    return loss + loss.detach().square()


def turning(module, batch):
    """Another loss from step 7 on, which only the user's code can tell."""
    return unrecorded(module.loss(batch)) * (2 if module.global_step > 6 else 1)


def of_process(module, batch):
    """Another loss in every process."""
    return together(module, batch) * (1 + os.getpid() / 1e3)


def together(module, batch):
    """As `noted`; the first of several processes waits for a second to take part."""
    loss, patience = noted(module, batch), time.monotonic() + 120
    is_one_of_many = multiprocessing.parent_process() or "REPLAY_TOGETHER" in os.environ
    while is_one_of_many and len(_processes()) < 2:
        assert time.monotonic() < patience, "nobody else takes part"
        time.sleep(0.02)
    return loss


def _processes():
    lines = Path(os.environ["REPLAY_NOTES"]).read_text().splitlines()
    return {line.partition(" ")[0] for line in lines}


def bent(module, batch):
    """A loss with waves as long as some early steps, which are measured in halves."""
    return module.loss(batch) + 0.5 * torch.sin(100 * module.head.weight.square().sum())


def noted(module, batch):
    """Notes for which step the user's code runs, and in which process."""
    with open(os.environ["REPLAY_NOTES"], "a") as notes:
        notes.write(f"{os.getpid()} {module.global_step}\n")
    return unrecorded(module.loss(batch))


def deadly(module, batch):
    """Ends its process at step 9: the first one that comes there, or each."""
    if multiprocessing.parent_process() is not None and module.global_step == 9:
        mark = Path(os.environ["REPLAY_MARK"])
        if not mark.exists() or mark.read_text() == "each":
            mark.exists() or mark.write_text("once")
            os.kill(os.getpid(), signal.SIGKILL)
    return noted(module, batch)


def held_up(module, batch):
    """Waits at step 9, if it is told to, for as long as the process lives that started it."""
    starter = os.environ.get("REPLAY_HOLDS") and multiprocessing.parent_process()
    while starter and module.global_step == 9 and starter.is_alive():
        time.sleep(0.05)
    return noted(module, batch)


def mistaken(module, batch):
    """Fails at step 9."""
    if module.global_step == 9:
        raise ZeroDivisionError("of the user's own")
    return unrecorded(module.loss(batch))


def loss_until_saved(module, batch):
    """Waits to be killed as soon as the file is there that the environment names."""
    if Path(os.environ.get("REPLAY_WAITS_AT", "nowhere")).is_file():
        time.sleep(PATIENCE)
    return unrecorded(module.loss(batch))  # A recording would not wait.


def nothing():
    """Gives no batch."""
    return []


def loaders():
    """Gives a training and a validation loader."""
    return toy_loader(), toy_loader(shuffle=False)


BATCHES = probe()
NOT_CALLABLE = 3


class Plain(nn.Linear):
    """No LightningModule."""

    def __init__(self):
        super().__init__(2, 2)


class Needy(Net):
    """Has an argument that no checkpoint tells."""

    def __init__(self, depth, **kwargs):
        super().__init__(**kwargs)


class Deeper(Net):
    """Another model: it has a layer more."""

    def __init__(self, width=16, **kwargs):
        super().__init__(width, **kwargs)
        self.extra = nn.Linear(3, 3)
