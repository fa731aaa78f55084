"""Either Lightning: what `pytorch_lightning` and `lightning.pytorch` define twice, joined.

A class that derives from the bases of both works in both Trainers; at least one is installed.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from typing import TYPE_CHECKING, Any, Protocol

from tqdm import tqdm

_ROOTS = ("pytorch_lightning", "lightning.pytorch")


def _everywhere(module: str, name: str) -> tuple[type, ...]:
    """Collects a class from every Lightning that is installed, without repeats."""
    found: dict[type, None] = {}
    for root in _ROOTS:
        try:
            found[getattr(importlib.import_module(f"{root}{module}"), name)] = None
        except ModuleNotFoundError:
            continue
    return tuple(found)


LIGHTNING_MODULES = _everywhere("", "LightningModule")


AnyTrainer = Any  # What hooks get: neither Lightning declares all that its Trainer has.


class Trainer(Protocol):
    """What is used of a Trainer of either Lightning, all of it public but ``fit_loop``'s inside."""

    loggers: Any
    should_stop: bool

    @property
    def callbacks(self) -> Any:
        """All callbacks."""

    @property
    def optimizers(self) -> Any:
        """Those of the module."""

    @property
    def strategy(self) -> Any:
        """Knows the processes: distributed_sampler_kwargs, broadcast, batch_to_device."""

    @property
    def precision_plugin(self) -> Any:
        """Knows what computes: convert_input, train_step_context."""

    @property
    def fit_loop(self) -> Any:
        """Counts steps."""

    @property
    def fast_dev_run(self) -> Any:
        """Whether this is a trial that writes nothing."""

    @property
    def accumulate_grad_batches(self) -> int:
        """Batches of an optimizer step."""

    @property
    def received_sigterm(self) -> bool:
        """Whether it was asked to stop."""

    @property
    def train_dataloader(self) -> Any:
        """Loaders that training uses."""

    @property
    def val_dataloaders(self) -> Any:
        """Loaders of validation, once they are there."""

    @property
    def datamodule(self) -> Any:
        """The LightningDataModule, if there is one."""

    @property
    def global_step(self) -> int:
        """Optimizer steps done, of all optimizers together."""

    @property
    def global_rank(self) -> int:
        """Number of this process."""

    @property
    def world_size(self) -> int:
        """Number of processes."""

    @property
    def is_global_zero(self) -> bool:
        """Whether this process writes."""

    @property
    def precision(self) -> Any:
        """As it was given: "16-mixed" and so on."""

    @property
    def max_steps(self) -> int:
        """Optimizer steps after which training ends; -1: never."""

    @property
    def max_epochs(self) -> int | None:
        """Epochs after which it ends."""

    @property
    def current_epoch(self) -> int:
        """Which epoch this is, from 0."""

    @property
    def num_training_batches(self) -> Any:
        """Batches of an epoch, or infinity."""

    @property
    def log_every_n_steps(self) -> int:
        """Interval of the loggers."""

    @property
    def default_root_dir(self) -> str:
        """Where what has no other place is written."""

    @property
    def progress_bar_callback(self) -> Any:
        """The progress bar, if there is one."""

    @property
    def lightning_module(self) -> Any:
        """The LightningModule, bare."""


if TYPE_CHECKING:
    import pytorch_lightning as _lightning
    from lightning_fabric.utilities.exceptions import (
        MisconfigurationException as MisconfigurationException,
    )

    LightningCallback = _lightning.Callback
    LightningModule = _lightning.LightningModule
else:
    LightningModule = Any

    class LightningCallback(*_everywhere("", "Callback")):
        """The callback of either Lightning."""

    class MisconfigurationException(
        *_everywhere(".utilities.exceptions", "MisconfigurationException")
    ):
        """The Trainer's set-up cannot be measured; the message says why and what to do."""


def of(trainer: Any, module: str) -> Any:
    """Imports a module of the Lightning that this Trainer comes from, e.g. ``.utilities``.

    A LightningModule does as well.
    """
    for cls in type(trainer).__mro__:
        for root in _ROOTS:
            if cls.__module__.startswith(root + "."):
                return importlib.import_module(root + module)
    raise TypeError(f"Not a Lightning Trainer: {type(trainer)}.")


def tell(trainer: Trainer, text: str) -> None:
    """Says something once, on rank zero: above the progress bar, or to Lightning's log.

    Lightning's log writes where the cursor is, which is in the middle of a bar.
    """
    bar = trainer.progress_bar_callback
    if getattr(bar, "is_enabled", False):
        bar.print(text)
    else:
        of(trainer, ".utilities.rank_zero").rank_zero_info(text)


def warn(text: str) -> None:
    """Warns, at the line that called the caller; bars of tqdm step aside, as rich's do."""
    with tqdm.external_write_mode(file=sys.stderr):
        warnings.warn(text, stacklevel=3)
