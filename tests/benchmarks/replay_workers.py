"""How much faster a replay is by several processes than by one, each on one thread.

    python tests/benchmarks/replay_workers.py [--steps 300] [--workers 2] [--rounds 3]

Trains a narrow ResNet-18 that saves every step, and replays it by the command with one process and
with several, one after the other. The record must be the same to the bit. All that the command
takes is timed, from its start to its end.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import simplest
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_lca import History


def model() -> pl.LightningModule:
    """Makes the network."""
    return simplest.Module(simplest.resnet(16))


def data() -> DataLoader[tuple[torch.Tensor, ...]]:
    """Makes noise with ten labels."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1024, 3, 16, 16, generator=generator)
    y = torch.randint(0, 10, (1024,), generator=generator)
    return DataLoader(TensorDataset(x, y), 32)


def train(steps: int, path: Path) -> None:
    """Trains, and saves the weights after every step."""
    pl.seed_everything(0, verbose=False)
    saves = ModelCheckpoint(
        path, save_top_k=-1, every_n_train_steps=1, save_weights_only=True, filename="{step}"
    )
    trainer = pl.Trainer(
        max_steps=steps,
        callbacks=[saves],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    trainer.fit(model(), data())


def replayed(path: Path, out: Path, workers: int) -> tuple[float, History]:
    """Replays, and returns how long that took, in seconds, and what was found."""
    here = str(Path(__file__).parent)
    command = [sys.executable, "-m", "lightning_lca", "replay", str(path), "--out", str(out)]
    command += ["--model", "replay_workers.model", "--data", "replay_workers.data"]
    command += ["--accelerator", "cpu", "--probe_batches", "4", "--no_figures"]
    command += ["--workers", str(workers), "--threads", "1"]
    around = os.environ | {
        "PYTHONPATH": os.pathsep.join([here, os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
    }
    began = time.perf_counter()
    subprocess.run(command, check=True, env=around, capture_output=True)
    took = time.perf_counter() - began
    (record,) = {events.parent for events in out.rglob("events*")}
    return took, History.load(record)


def main() -> None:
    """Prints the times."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    ratios = []
    with tempfile.TemporaryDirectory() as path:
        train(options.steps, Path(path, "run"))
        for i in range(options.rounds):
            one, alone = replayed(Path(path, "run"), Path(path, f"one{i}"), 1)
            many, shared = replayed(Path(path, "run"), Path(path, f"many{i}"), options.workers)
            assert np.array_equal(alone.allocated, shared.allocated)
            ratios.append(one / many)
            print(
                f"{options.steps} segments: one process {one:.1f} s, {options.workers} workers "
                f"{many:.1f} s, {one / many:.2f} times as fast",
                flush=True,
            )
    print(f"median {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
