"""A long training with many tensors: what grows with its length, and what does not.

    python tests/benchmarks/long_run.py [--steps 100000] [--tensors 2000] [--out picture.png]

Trains a chain of tiny layers, measures every step and looks at itself from time to time: time per
step (median of the last ones, and how much of it is measuring), memory of the process, what the
history holds (all rows are kept: credit, two counts per group and ten numbers, eight bytes each),
size of the callback's part of a checkpoint, of the record on disk, and open files. Prints a table,
and says what grew from the first tenth to the last.
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import statistics
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_lca import LCACallback

PICTURES = {"long_run": "what grows with the length of a run"}  # That the guide shows, by --out.
LOOKS = 50
MIB = 2**20


class Chain(pl.LightningModule):
    """Many tensors of a few weights: a product of all would vanish, so that they are added up."""

    def __init__(self, tensors: int) -> None:
        """Makes that many tensors of four weights."""
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ParameterDict({"weight": torch.randn(4) / 4, "bias": torch.randn(4) / 4})
            for _ in range(tensors // 2)
        )

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Fits a sum of waves."""
        weights = torch.stack([b["weight"] for b in self.blocks])  # type: ignore[index]
        biases = torch.stack([b["bias"] for b in self.blocks])  # type: ignore[index]
        found = torch.tanh(batch[:, None, None] * weights + biases).mean((1, 2))
        return ((found - torch.sin(3 * batch) / 4) ** 2).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Returns plain SGD, whose own time is small."""
        return torch.optim.SGD(self.parameters(), lr=0.5)


class Points(Dataset[Tensor]):
    """As many numbers as there are steps."""

    def __init__(self, count: int) -> None:
        """Takes the number."""
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> Tensor:
        if i >= self.count:
            raise IndexError(i)
        return torch.tensor(2 * ((i * 0.61803) % 1) - 1)


@dataclass
class Look:
    """What was seen at one time."""

    step: int
    step_ms: float
    measuring_ms: float
    memory_mib: float
    history_mib: float
    checkpoint_kib: float
    record_mib: float
    files: int


class Watch(pl.Callback):
    """Looks from time to time; comes after the callback in the list."""

    def __init__(self, lca: LCACallback, every: int) -> None:
        """Takes the callback that is watched."""
        self.lca, self.every = lca, every
        self.looks: list[Look] = []
        self._times: list[float] = []
        self._at = 0.0

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any
    ) -> None:
        """Times the step, and looks if it is time to."""
        now = time.process_time()  # On one thread: that of others on the machine is not in it.
        self._times.append(now - self._at)
        if trainer.global_step % self.every == 0:
            self.looks.append(self._look(trainer.global_step))
            self._times = []
        self._at = time.process_time()

    def _look(self, step: int) -> Look:
        rows = self.lca.history.rows
        held = sum(a.nbytes for a in rows.arrays.values())
        file = io.BytesIO()
        torch.save(self.lca.state_dict(), file)
        status = Path("/proc/self/status").read_text()
        resident = next(line for line in status.splitlines() if line.startswith("VmRSS"))
        directory = Path(self.lca.log_dir or ".")
        return Look(
            step,
            1e3 * statistics.median(self._times[1:]),
            1e3 * statistics.median(rows.seconds[-len(self._times) :].tolist()),
            int(resident.split()[1]) / 1024,
            held / MIB,
            len(file.getvalue()) / 1024,
            sum(f.stat().st_size for f in directory.glob("events*")) / MIB,
            len(os.listdir("/proc/self/fd")),
        )


def run(steps: int, tensors: int) -> list[Look]:
    """Trains, and returns what was seen."""
    lca = LCACallback(group_by="parameter", figures=False)
    watch = Watch(lca, max(2, steps // LOOKS))
    with tempfile.TemporaryDirectory() as path:
        trainer = pl.Trainer(
            default_root_dir=path,
            callbacks=[lca, watch],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            max_epochs=1,
            accelerator="cpu",
        )
        trainer.fit(Chain(tensors), DataLoader(Points(8 * steps), batch_size=8))
    return watch.looks


def report(looks: list[Look]) -> None:
    """Prints what was seen, and what grew."""
    names = list(asdict(looks[0]))
    print("  ".join(f"{name:>14}" for name in names))
    for look in looks[:: max(1, len(looks) // 10)]:
        print("  ".join(f"{value:14,.6g}" for value in asdict(look).values()))
    tenth = max(1, len(looks) // 10)
    print("\nFrom the first tenth to the last (medians):")
    for name in names[1:]:
        first, last = (
            statistics.median(getattr(look, name) for look in some)
            for some in (looks[:tenth], looks[-tenth:])
        )
        print(f"  {name:>14}: {first:,.4g} -> {last:,.4g}")


def draw(looks: list[Look], tensors: int, file: Path) -> None:
    """Draws it."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    figure = Figure(figsize=(9, 5), layout="constrained")
    steps = [look.step for look in looks]
    panels = [
        ("milliseconds", {"a step": "step_ms", "of these, measuring": "measuring_ms"}),
        (
            "MiB",
            {
                "memory of the process": "memory_mib",
                "of this, the history": "history_mib",
                "record on disk": "record_mib",
            },
        ),
        ("KiB", {"the callback's part of a checkpoint": "checkpoint_kib"}),
        ("count", {"open files": "files"}),
    ]
    for axes, (unit, lines) in zip(figure.subplots(2, 2, sharex=True).flat, panels, strict=True):
        for label, name in lines.items():
            axes.plot(steps, [getattr(look, name) for look in looks], label=label)
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.set_ylabel(unit)
        axes.legend(frameon=False)
        axes.grid(alpha=0.3)
    figure.supxlabel("steps of training")
    figure.suptitle(f"{steps[-1]:,} measured steps, {tensors:,} tensors, a row each")
    figure.savefig(file, dpi=110)


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--tensors", type=int, default=2_000)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    looks = run(arguments.steps, arguments.tensors)
    report(looks)
    if arguments.out:
        draw(looks, arguments.tensors, arguments.out)


if __name__ == "__main__":
    main()
