"""What a notebook shows of a training: the tables and a figure, also while it runs."""

from __future__ import annotations

import sys
import time
from base64 import b64encode
from collections.abc import Callable, Mapping
from io import BytesIO
from typing import Any

from lightning_lca.record import notebook
from lightning_lca.record.history import History
from lightning_lca.reporting.figures import length
from lightning_lca.runtime.lightnings import Trainer, tell, warn

EVERY = 1.0  # Seconds from one update to the next, at least.
MOST_TIME = 0.1  # Of training, for updates, but for the first one and the last.
clock = time.monotonic

Histories = Mapping[str | None, History]


def page(histories: Histories) -> str:
    """Draws what was measured as HTML: tables with bars, findings, and the heatmap.

    Args:
        histories: By probe; the name of a single one is None.
    """
    parts = notebook.of_probes(histories)
    return notebook.document([*parts, *_image(heatmap(histories))])


def heatmap(histories: Histories) -> bytes:
    """Draws the first probe's heatmap as PNG; empty where there is nothing to draw."""
    history = next(iter(histories.values()), None)
    if history is None or not len(history) or not history.groups:
        return b""
    from lightning_lca import figures  # Matplotlib is not loaded before there is a need.

    file = BytesIO()
    figures.heatmap(history).savefig(file, format="png", dpi=150)
    return file.getvalue()


def _image(png: bytes) -> list[str]:
    if not png:
        return []
    source = f"data:image/png;base64,{b64encode(png).decode()}"
    text = "LCA of every layer at every step, blue where it lowered the loss"
    return [f'<img class="lca-figure" alt="{text}" src="{source}">']


class LiveView:
    """Keeps an output of the cell that trains up to date, at most once a second.

    Works where IPython runs in a notebook (Jupyter, Colab, VS Code), without widgets: the same
    output is shown anew. Whatever goes wrong in it, training goes on.
    """

    def __init__(self, trainer: Trainer) -> None:
        """Finds the notebook, and says so if there is none; shows nothing yet."""
        self._display = _display() if trainer.is_global_zero else None
        if trainer.is_global_zero and self._display is None:
            tell(
                trainer,
                "LCA: live=True shows its view in a notebook (Jupyter, Colab, VS Code), and this "
                "is none. Training goes on without a view.",
            )
        self._length = length(trainer)
        self._handle: Any = None
        self._due = self._figure_due = 0.0
        self._png = b""

    @property
    def is_due(self) -> bool:
        """Whether it is time for an update."""
        return self._display is not None and clock() >= self._due

    def show(self, histories: Histories, *, last: bool = False) -> None:
        """Shows what was measured.

        Args:
            histories: By probe; the name of a single one is None.
            last: Whether this is the end, where findings are shown, too.
        """
        if self._display is None:
            return
        try:
            self._update(self._display, histories, last=last)
        except Exception as error:  # A view is never worth a training.
            self._display = None
            warn(
                f"LCA: {type(error).__name__} in the live view: {error}. Training goes on without "
                "it; print(lca.summary()) shows what was measured."
            )

    def _update(self, display: Callable[..., Any], histories: Histories, *, last: bool) -> None:
        began = clock()
        if last or began >= self._figure_due:
            self._png = heatmap(histories)
            self._figure_due = clock() + (clock() - began) / MOST_TIME
            began = clock()
        title = self._title(histories, last=last)
        parts = notebook.of_probes(histories, finds=last)
        html = notebook.document([*notebook.heading(title), *_image(self._png), *parts])
        bundle = {"text/plain": title, "text/html": html}
        if self._handle is None:
            self._handle = display(bundle, raw=True, display_id=True)
        else:
            self._handle.update(bundle, raw=True)
        self._due = clock() + max(EVERY, (clock() - began) / MOST_TIME)

    def _title(self, histories: Histories, *, last: bool) -> str:
        history = next(iter(histories.values()))
        if not len(history):
            return "LCA: no step was measured yet."
        done = history.last_step
        of = f" of {self._length:,}" if self._length else ""
        return (
            f"LCA {'up to' if last else 'at'} step {done:,}{of}: loss on the probe "
            f"{history.loss_before[0]:.4g} → {history.loss_after[-1]:.4g}"
        )


def _display() -> Callable[..., Any] | None:
    """Finds IPython's way to show something in a notebook; None where this is none."""
    ipython = sys.modules.get("IPython")  # Who runs a notebook has imported it.
    shell = None if ipython is None else ipython.get_ipython()
    if getattr(shell, "kernel", None) is None:  # IPython in a terminal has no kernel.
        return None
    from IPython import display

    found: Callable[..., Any] = display.display
    return found
