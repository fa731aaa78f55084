"""Loggers: scalars go to all of them, figures to those that can show them.

    python examples/recipes/loggers.py tensorboard csv
    python examples/recipes/loggers.py wandb        # offline; needs pip install wandb
    python examples/recipes/loggers.py mlflow       # in ./mlflow.db; needs pip install mlflow
    python examples/recipes/loggers.py trackio      # in ./trackio; needs pip install trackio

Whatever loggers there are, the record of every step lies in the log directory, for the LCA tab, for
``lightning-lca summary`` and for `History.load`.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.loggers import (
    CSVLogger,
    Logger,
    MLFlowLogger,
    TensorBoardLogger,
    WandbLogger,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lca import History, LCACallback


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 32), nn.Linear(32, 4)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self.second(torch.tanh(self.first(x))), y)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


class TrackioLogger(Logger):
    """A logger of your own, for what Lightning has none: figures come where `log_image` is."""

    name, version = "lca", "run"

    def __init__(self) -> None:
        super().__init__()
        os.environ["TRACKIO_DIR"] = str(Path("trackio").resolve())
        import trackio

        self.trackio = trackio
        trackio.init(self.name, name=self.version, embed=False, auto_log_cpu=False)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Notes nothing: this net has none."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.trackio.log(dict(metrics), step=step)

    def log_image(self, key: str, images: Sequence[Any], step: int | None = None) -> None:
        self.trackio.log({key: self.trackio.Image(images[0])}, step=step)

    def finalize(self, status: str) -> None:
        self.trackio.finish()


def make(name: str) -> Logger:
    """Makes a logger that writes to this directory and asks no server."""
    if name in ("wandb", "mlflow", "trackio") and importlib.util.find_spec(name) is None:
        sys.exit(f"{name} is not installed: pip install {name}")
    if name == "wandb":
        return WandbLogger(project="lca", save_dir=".", offline=True)
    if name == "mlflow":
        return MLFlowLogger(experiment_name="lca", tracking_uri="sqlite:///mlflow.db")
    if name == "trackio":
        return TrackioLogger()
    return CSVLogger(".") if name == "csv" else TensorBoardLogger(".")


def logged(logger: Logger) -> list[str]:
    """Lists what a logger was given."""
    if isinstance(logger, MLFlowLogger):
        return list(logger.experiment.get_run(logger.run_id).data.metrics)
    if isinstance(logger, WandbLogger):
        return list(logger.experiment.summary.keys())
    if isinstance(logger, TrackioLogger):
        from trackio.sqlite_storage import SQLiteStorage

        rows = SQLiteStorage.get_logs(logger.name, logger.version)
        return list({key for row in rows for key in row if "_figures/" not in key})
    if isinstance(logger, CSVLogger):
        return Path(logger.log_dir, "metrics.csv").read_text().partition("\n")[0].split(",")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return list(EventAccumulator(logger.log_dir).Reload().Tags()["scalars"])


def main() -> None:
    parser = argparse.ArgumentParser(description="LCA in several loggers.")
    names = ["tensorboard", "csv", "wandb", "mlflow", "trackio"]
    parser.add_argument("names", nargs="+", choices=names)
    loggers = [make(name) for name in parser.parse_args().names]
    pl.seed_everything(0, verbose=False)
    x = torch.randn(256, 12)
    y = (x @ torch.randn(12, 4)).argmax(1)
    lca = LCACallback(log_every_n_steps=8)
    trainer = pl.Trainer(
        max_epochs=6,
        callbacks=[lca],
        logger=loggers,
        log_every_n_steps=8,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(Net(), DataLoader(TensorDataset(x, y), batch_size=32, shuffle=True))
    for logger in loggers:
        keys = sorted(key for key in logged(logger) if key.startswith("lca"))
        print(f"{type(logger).__name__}: {len(keys)} scalars, {', '.join(keys[:3])}, ...")
    print(f"record of {len(History.load(lca.log_dir))} steps: {lca.log_dir}")


if __name__ == "__main__":
    main()
