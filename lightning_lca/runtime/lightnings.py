"""Either Lightning: what `pytorch_lightning` and `lightning.pytorch` define twice, joined.

A class that derives from the bases of both works in both Trainers; at least one is installed.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from lightning_fabric.utilities.exceptions import (
        MisconfigurationException as MisconfigurationException,
    )
    from pytorch_lightning import Callback

    LightningCallback = Callback
else:

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


def tell(trainer: Any, text: str) -> None:
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
