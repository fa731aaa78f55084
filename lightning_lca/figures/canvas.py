"""A matplotlib figure that looks the same whatever the user's settings, and leaves them alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO

import matplotlib.style
from matplotlib.backend_bases import RendererBase
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_LOOK = {
    "font.size": 12,
    "axes.titlesize": 12,
    "figure.titlesize": 13,
    "legend.fontsize": 12,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "0.4",
    "axes.linewidth": 0.8,
    "xtick.color": "0.3",
    "ytick.color": "0.3",
    "xtick.labelcolor": "black",
    "ytick.labelcolor": "black",
    "axes.formatter.limits": (-3, 4),
    "axes.formatter.useoffset": False,
    "axes.xmargin": 0,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
}


@contextmanager
def look() -> Iterator[None]:
    """Applies the look, on matplotlib's defaults in place of the user's settings; undone after."""
    with matplotlib.style.context(["default", _LOOK]):
        yield


class LcaFigure(Figure):
    """A figure that keeps its look when it is drawn: ticks and layouts are made only then."""

    def draw(self, renderer: RendererBase) -> None:
        """Draws with the look that the figure was made with."""
        with look():
            super().draw(renderer)

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        """Shows itself in a notebook, without ``%matplotlib``: twice as fine as it is wide."""
        file = BytesIO()
        self.savefig(file, format="png", dpi=2 * self.dpi)
        width, height = (round(inches * self.dpi) for inches in self.get_size_inches())
        return file.getvalue(), {"width": width, "height": height}


def blank(width: float, height: float) -> Figure:
    """Makes an empty figure, in inches, that pyplot does not know of."""
    figure = LcaFigure(figsize=(width, height), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    return figure
