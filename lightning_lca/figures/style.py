"""The visual language of all figures, in one place.

Blue helps and red hurts, as in the dashboard. The true loss change is black. Layers run from top to
bottom in network order. Axes bear units.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from lightning_lca.analysis.scale import colour_limit
from lightning_lca.figures.timeline import Array
from lightning_lca.record.colours import LIGHT
from lightning_lca.record.tables import Floats

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

    Colour = str | tuple[float, float, float]

HELPS, HURTS = LIGHT["helps"], LIGHT["hurts"]
TRUE = "black"
CHANCE = "0.78"
QUIET = "0.6"
WIDTH, HEIGHT, TALLEST = 6.4, 3.4, 7.5  # Inches.
POINTS = 1000  # Of a line.
COLUMNS = 400  # Of a heatmap: about the pixels that it gets, so that none is dropped.
_ROW = 0.22  # Inches that a line of text needs.
_NAME = 18  # Letters of a layer's name.


@contextmanager
def page(height: float = HEIGHT) -> Iterator[Figure]:
    """Returns an empty figure, and the look while it is filled. Matplotlib is imported here."""
    from lightning_lca.figures import canvas

    with canvas.look():
        yield canvas.blank(WIDTH, min(max(height, HEIGHT), TALLEST))


def diverging() -> Colormap:
    """Colours from the most helpful (dark blue) over white to the most harmful (red)."""
    from matplotlib.colors import LinearSegmentedColormap

    stops = [(0, "#0b2c5c"), (0.25, "#3f7dc0"), (0.5, "white"), (0.75, "#f6a183"), (1, "#d9471f")]
    return LinearSegmentedColormap.from_list("lca", stops).with_extremes(bad="0.85")


def ramp(colour: str, count: int) -> list[tuple[float, float, float]]:
    """Shades of a colour for layers from first (full) to last (pale)."""
    from matplotlib.colors import to_rgb

    base = np.array(to_rgb(colour))
    pale = np.linspace(0, 0.72, count)[:, None] if count > 1 else np.zeros((1, 1))
    return [(float(r), float(g), float(b)) for r, g, b in base + (1 - base) * pale]


def by_depth(count: int) -> list[tuple[float, float, float]]:
    """Colours for lines of layers from first to last, apart from blue, red and black."""
    from matplotlib import colormaps

    places = np.linspace(0, 0.78, count) if count > 1 else [0.5]
    return [tuple(c[:3]) for c in colormaps["viridis"](places)]


def signed(values: Array) -> list[str]:
    """Colours numbers by their sign."""
    return [HURTS if v > 0 else HELPS for v in values]


def number(value: float, digits: int = 3) -> str:
    """Writes a signed number briefly, with a real minus sign.

    >>> number(-0.92213)
    '−0.922'
    """
    return f"{value:+.{digits}g}".replace("-", "\N{MINUS SIGN}")


def elide(names: Sequence[str], most: int = _NAME) -> list[str]:
    """Shortens names if one is long: drops the path that all share, then letters in the middle.

    Where to cut is chosen so that the names stay as distinct as can be.

    >>> elide(["conv1", "fc"])
    ['conv1', 'fc']
    >>> elide(["encoder.layers.10.attention.out_proj", "encoder.layers.11.attention.query"])
    ['10.attent…out_proj', '11.attention.query']
    """
    names = list(names)
    if max(map(len, names), default=0) > most and len(names) > 1:
        paths = [name.split(".")[:-1] for name in names]
        shared = 0
        while all(len(p) > shared and p[shared] == paths[0][shared] for p in paths):
            shared += 1
        names = [name.split(".", shared)[-1] for name in names]

    def cut(name: str, head: int) -> str:
        tail = most - 1 - head
        short = name[:head] + "…" + (name[-tail:] if tail else "")
        return name if len(name) <= most else short

    heads = sorted(range(most), key=lambda head: abs(head - most // 2))
    best = max(heads, key=lambda head: len({cut(name, head) for name in names}))
    return [cut(name, best) for name in names]


def tall(rows: int, around: float = 1.2) -> float:
    """The height in inches of a figure with a line of text per row, before its limit."""
    return around + _ROW * rows


def label_rows(axes: Axes, names: Sequence[str], height: float) -> None:
    """Names rows 0, 1, … from top to bottom; every nth where the height has no room for all."""
    room = max(height - 1.2, _ROW) / _ROW
    every = max(1, int(np.ceil(len(names) / room - 1e-6)))
    shown = range(0, len(names), every)
    axes.set_yticks(list(shown), [elide(names)[i] for i in shown])
    axes.tick_params("y", length=0)


def headline(figure: Figure, *lines: str) -> None:
    """Says the finding above the figure, in a line or two."""
    figure.suptitle("\n".join(filter(None, lines)), x=0.01, ha="left", linespacing=1.25)


def step_axis(axes: Axes) -> None:
    """Names the x axis, with few ticks at whole steps."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.xaxis.set_major_formatter(
        lambda step, _: f"{step / 1000:g}k" if step >= 10_000 else f"{step:g}"
    )
    axes.set_xlabel("optimizer step")


def grid_of_credit(figure: Figure, axes: Axes, steps: Array, credit: Floats, unit: str) -> None:
    """Draws rows × bins in colour [N, B], clipped at the 99 % quantile, on a square-root scale."""
    from matplotlib.colors import FuncNorm

    largest = float(np.abs(credit[np.isfinite(credit)]).max(initial=0))
    limit = colour_limit(credit) or 1.0
    norm = FuncNorm((_root, _square), -limit, limit)
    # Row 0 on top.
    borders = np.arange(len(credit) + 1) - 0.5
    image = axes.pcolorfast(steps, borders, credit, cmap=diverging(), norm=norm)
    axes.set_ylim(len(credit) - 0.5, -0.5)
    bar = figure.colorbar(
        image,
        ax=axes,
        extend="both" if largest > limit else "neither",
        ticks=[-limit, -limit / 4, 0, limit / 4, limit],
        format=tick,
        pad=0.02,
        # As thick in a tall figure as in a low one.
        aspect=8 * figure.get_figheight(),
        extendfrac=0.05 * HEIGHT / figure.get_figheight(),
    )
    bar.set_label(f"LCA (loss {unit})")
    bar.ax.set_title("hurts", color=HURTS, pad=12)
    bar.ax.set_xlabel("helps", color=HELPS, labelpad=14 if largest > limit else 24)
    for side in [*axes.spines.values(), bar.outline]:
        side.set_visible(False)
    step_axis(axes)


def tick(value: float, _: int | None = None) -> str:
    """Writes credit for a tick in few letters.

    >>> tick(-0.00068), tick(0.049), tick(0)
    ('−7e−4', '+0.049', '0')
    """
    if not value:
        return "0"
    text = f"{value:+.2g}" if 1e-3 <= abs(value) < 1e4 else f"{value:+.0e}".replace("e-0", "e-")
    return text.replace("-", "\N{MINUS SIGN}")


def _root(values: Array) -> Array:
    return np.sign(values) * np.sqrt(np.abs(values))


def _square(values: Array) -> Array:
    return np.sign(values) * np.square(values)


def end_labels(
    axes: Axes,
    ends: Sequence[float],
    labels: Sequence[str],
    colours: Sequence[Colour],
    height: float = HEIGHT - 1.3,
) -> None:
    """Names lines at their right ends, moved apart where they would overlap.

    `height` is that of the axes in inches, about: their layout is made when they are drawn.
    """
    if not labels:
        return
    low, high = axes.get_ylim()
    gap = (high - low) * _ROW / height
    order = np.argsort(ends, kind="stable")
    places = spread(np.array(ends, float)[order], gap, low, high)
    beside = axes.get_yaxis_transform()
    for place, i in zip(places, order, strict=True):
        axes.plot(
            [1.005, 1.035],
            [ends[i], place],
            color=colours[i],
            linewidth=0.8,
            transform=beside,
            clip_on=False,
            scalex=False,
            scaley=False,
        )
        axes.text(1.045, place, labels[i], va="center", color=colours[i], transform=beside)


def spread(places: Floats, gap: float, low: float, high: float) -> Floats:
    """Moves sorted places apart to a gap, as little as needed, and into a range where they fit.

    >>> spread(np.array([0.0, 0.1, 3.0]), 1.0, -1.0, 4.0)
    array([-0.45,  0.55,  3.  ])
    """
    blocks: list[list[float]] = []  # Each: sum of the wished starts, number of places.
    for i, place in enumerate(places):
        blocks.append([place - i * gap, 1])
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] >= blocks[-1][0] / blocks[-1][1]:
            wished, count = blocks.pop()
            blocks[-1][0] += wished
            blocks[-1][1] += count
    starts = np.concatenate([np.full(int(n), s / n) for s, n in blocks])
    last = high - (len(places) - 1) * gap
    moved = np.minimum(np.maximum(starts, low), max(low, last)) + np.arange(len(places)) * gap
    return np.asarray(moved, float)


def last(line: Array) -> float:
    """The last finite number of a line, 0 if there is none."""
    finite = line[np.isfinite(line)]
    return float(finite[-1]) if len(finite) else 0.0
