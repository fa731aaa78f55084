"""What is said while training runs, so that a progress bar stays whole."""

from __future__ import annotations

import sys
import warnings
from typing import Any

from tqdm import tqdm

from lightning_lca.runtime import lightnings


def tell(trainer: Any, text: str) -> None:
    """Says something once, on rank zero: above the progress bar, or to Lightning's log.

    Lightning's log writes where the cursor is, which is in the middle of a bar.
    """
    bar = trainer.progress_bar_callback
    if getattr(bar, "is_enabled", False):
        bar.print(text)
    else:
        lightnings.of(trainer, ".utilities.rank_zero").rank_zero_info(text)


def warn(text: str) -> None:
    """Warns, at the line that called the caller; bars of tqdm step aside, as rich's do."""
    with tqdm.external_write_mode(file=sys.stderr):
        warnings.warn(text, stacklevel=3)
