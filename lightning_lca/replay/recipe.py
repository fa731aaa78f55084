"""How a run is set up for its replay: model, data and Trainer, as for training."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lightning_lca.probe.isolation import fence
from lightning_lca.probe.loggers import silent
from lightning_lca.replay.checkpoints import ReplayError, allowing, one_line, read
from lightning_lca.replay.player import LeftError, ReplayCallback, does_not_fit
from lightning_lca.runtime import lightnings
from lightning_lca.runtime.lightnings import LightningModule

_VERSION = "pytorch-lightning_version"  # Whatever Lightning saves has it.
_TALKATIVE = ("pytorch_lightning", "lightning.pytorch", "lightning.fabric", "lightning_fabric")
_HINTS = (
    "does not have many workers",
    "GPU available but not used",
    "smaller than the logging interval",
    "Experiment logs directory",
    "treespec",
    "Found keys that are",
    "You defined a `validation_step`",
    "You passed in a `val_dataloader`",
    "persistent_workers",
    "in eval mode",
)


@dataclass(frozen=True)
class Recipe:
    """What a run is built of; the same in every process that has part in its replay.

    Attributes:
        model: The LightningModule's class, or a function that builds it.
        data: A LightningDataModule, loaders, or what gives one of these.
        model_arguments: What the model is built with, in place of hyperparameters.
        data_arguments: The same for the data.
        accelerator: As the Trainer's.
        precision: As the Trainer's.
        weights_only: As for `read`.
        lca: Arguments of `LCACallback`.
    """

    model: Any
    data: Any
    model_arguments: Mapping[str, Any] | None
    data_arguments: Mapping[str, Any] | None
    accelerator: str
    precision: Any
    weights_only: bool
    lca: Mapping[str, Any]

    def play(
        self, player: ReplayCallback, first: Path, record: Path, *, device: int | None = None
    ) -> None:
        """Sets everything up as `Trainer.fit` does for training, until the player takes over.

        Args:
            player: The callback that plays.
            first: The first checkpoint of the run, which tells hyperparameters.
            record: Directory of the record.
            device: Which GPU, where there are several; None: the first.

        Raises:
            ReplayError: Checkpoints, model, data or Trainer do not fit together.
        """
        with fence(seed=self.lca.get("seed", 0)), _quiet():
            module = _build(self.model, self.model_arguments, first, self.weights_only, "model")
            loaders = _loaders(
                module, self.data, self.data_arguments, first, self.weights_only, player
            )
            trainer = self._trainer(module, player, record, device)
            _fit(trainer, module, loaders)

    def _trainer(
        self, module: LightningModule, player: ReplayCallback, record: Path, device: int | None
    ) -> Any:
        """Makes a Trainer that keeps silent and writes nothing but the record."""
        accelerator, precision = self.accelerator, self.precision
        logger = lightnings.of(module, ".loggers").TensorBoardLogger(
            record.parent, name="", version=record.name, default_hp_metric=False
        )
        devices: Any = 1
        several = accelerator in ("auto", "gpu", "cuda") and torch.cuda.device_count() > 1
        if device is not None and several:
            devices = [device % torch.cuda.device_count()]
        try:
            return lightnings.of(module, "").Trainer(
                accelerator=accelerator,
                devices=devices,
                precision=precision,
                callbacks=[player],
                logger=logger if player.writes else silent([logger]),
                default_root_dir=record,
                max_epochs=-1,
                max_steps=player.last_step,
                num_sanity_val_steps=0,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
        except Exception as error:
            raise ReplayError(
                f"There can be no Trainer(accelerator={accelerator!r}, precision={precision!r}): "
                f"{one_line(error)}"
            ) from error


def name_of(value: Any) -> str:
    """Names a class or function, or the class of anything else."""
    return str(getattr(value, "__qualname__", type(value).__name__))


def _build(
    make: Any, arguments: Mapping[str, Any] | None, path: Path, weights_only: bool, option: str
) -> Any:
    """Builds the module or the data: a class with hyperparameters, or a function."""
    given = dict(arguments or {})
    remedy = (
        f"Give what it needs, e.g. --{option}.ARGUMENT VALUE, or name a function that builds it."
    )
    load = getattr(make, "load_from_checkpoint", None) if isinstance(make, type) else None
    # A file that someone made by hand has no hyperparameters.
    if load is not None and _VERSION in read(path, weights_only=weights_only):
        given |= {"checkpoint_path": path, "map_location": "cpu"}
        if option == "model":
            given["strict"] = False  # Weights are loaded later, when all layers are there.
    elif callable(make):
        load = make
    else:
        raise ReplayError(f"{make!r} is neither a class nor a function. {remedy}")
    try:
        with allowing(weights_only):
            made = load(**given)
    except Exception as error:
        if "loading state_dict" in str(error):
            raise does_not_fit(path, make, error) from error
        raise ReplayError(
            f"{name_of(make)} cannot be built: {type(error).__name__}: {one_line(error)}. {remedy}"
        ) from error
    if option == "model" and not isinstance(made, lightnings.LIGHTNING_MODULES):
        raise ReplayError(
            f"{name_of(make)} gives a {type(made).__name__}, not a LightningModule. Name the class "
            "that was trained, or a function that builds it (--model package.module.Class)."
        )
    return made


def _loaders(
    module: LightningModule,
    data: Any,
    arguments: Mapping[str, Any] | None,
    path: Path,
    weights_only: bool,
    player: ReplayCallback,
) -> dict[str, Any]:
    """Returns what `Trainer.fit` takes as data."""
    made = _build(data, arguments, path, weights_only, "data") if callable(data) else data
    if isinstance(made, lightnings.of(module, "").LightningDataModule):
        return {"datamodule": made}
    if isinstance(made, tuple):
        return dict(zip(("train_dataloaders", "val_dataloaders"), made, strict=False))
    if made is not None:
        return {"train_dataloaders": made}
    base = lightnings.of(module, "").LightningModule
    own = {
        name
        for name in ("train", "val")
        if getattr(type(module), f"{name}_dataloader") is not getattr(base, f"{name}_dataloader")
    }
    if missing := player.draws_from - own:
        raise ReplayError(
            f"There is no probe: {type(module).__name__} has no {missing.pop()}_dataloader. Give "
            "its data (--data package.module.DataModule), or batches to measure on "
            "(--probe package.module.function)."
        )
    # Nothing is read from it, and the Trainer wants one.
    return {} if "train" in own else {"train_dataloaders": [0]}


def _fit(trainer: Any, module: Any, loaders: Mapping[str, Any]) -> None:
    """Sets everything up as for training, until the player takes over."""
    module.configure_callbacks = list  # Those of the training would save, stop and freeze.
    try:
        trainer.fit(module, **loaders)
    except LeftError:
        return
    except lightnings.of(trainer, ".utilities.exceptions").MisconfigurationException as error:
        raise ReplayError(one_line(error, 500)) from error
    raise ReplayError("The training data has no batch. Give a loader that has one (--data).")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps back what Lightning has to say to people who train."""
    loggers = [logging.getLogger(name) for name in _TALKATIVE]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for hint in _HINTS:
                warnings.filterwarnings("ignore", f".*{hint}")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
