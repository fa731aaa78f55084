"""How narrow the majority is: figures of the share of weights that help."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lightning_lca.figures import style
from lightning_lca.figures.timeline import Array, Shown, check, sample, timeline
from lightning_lca.record.history import History
from lightning_lca.record.statistics import LEAST, Mean
from lightning_lca.record.tables import Floats

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BINS = 100  # Of the curve over time: shares of single steps are noise.
_BARS = 50


def helping(history: History) -> Figure:
    """Draws the share of moving weights that help, over time and by layer. Needs T ≥ 1 rows.

    How to read it: of the weights that moved the loss at all, how many lowered it? Left, over time,
    for the whole network; one half would be a draw. Single steps lie far on either side of it,
    since weights move together: whether the mean over steps is beyond chance is told by its
    interval in the line on top (from 50 steps on), or by `History.findings`. Right, per layer over
    the whole run, the first on top: blue where a majority helped, red where it hurt.

    Raises:
        ValueError: Nothing was measured yet.
    """
    check(history)
    time = timeline(history, _BINS)
    helped, hurt = _votes(history)
    each, moved = time.sums(helped.values), time.sums(helped.values + hurt.values)
    share = _percent(each.sum(1), moved.sum(1))
    by_layer = _percent(each.sum(0), moved.sum(0))
    overall = float(_percent(each.sum(), moved.sum()))
    trained = float(history.trained[history.rows.finite].sum(dtype=np.float64))
    with style.page(style.tall(len(helped))) as figure:
        axes, right = figure.subplots(1, 2, width_ratios=[1.7, 1])
        axes.axhline(50, color="0.3", linewidth=0.8)
        axes.stairs(share, time.edges, baseline=None, color=style.HELPS, linewidth=1.6)
        axes.set_ylabel("weights that help")
        axes.yaxis.set_major_formatter("{x:g}%")
        style.step_axis(axes)
        rows = np.flatnonzero(np.isfinite(by_layer))
        shown = by_layer[rows]
        colours = style.signed(50 - shown)
        right.hlines(rows, 50, shown, color=colours, linewidth=2 if len(helped) < 40 else 0.6)
        right.scatter(shown, rows, color=colours, s=min(36, 1500 / len(helped)), zorder=3)
        right.axvline(50, color="0.3", linewidth=0.8)
        right.set_ylim(len(helped) - 0.5, -0.5)
        right.margins(x=0.12)
        right.locator_params("x", nbins=3)
        right.xaxis.set_major_formatter("{x:g}%")
        right.set_xlabel("whole run")
        style.label_rows(right, helped.names, figure.get_figheight())
        right.yaxis.tick_right()
        right.tick_params("y", length=0)
        right.spines["left"].set_visible(False)
        idle = 1 - moved.sum() / trained if trained else 0.0
        finding = f"{overall:.1f}% of the weights that move the loss help"
        style.headline(
            figure,
            finding if moved.any() else "No weight has moved the loss",
            f"{_between(history)}{max(idle, 0):.0%} idle; curve: mean {time.unit}",
        )
    return figure


def helping_per_step(history: History) -> Figure:
    """Draws in how many steps which share of weights helped, as a histogram. Needs T ≥ 1 rows.

    How to read it: a step counts once, at the percentage of its moving weights that helped. Blue
    steps had a majority that helped, red ones a majority that hurt. Learning is a narrow majority:
    the hill is expected close to the middle, a little to the right of it.

    Raises:
        ValueError: Nothing was measured yet, or no weight has moved.
    """
    check(history)
    helped, hurt = _votes(history)
    finite = history.rows.finite
    each = helped.values[finite].sum(1)
    share = _percent(each, each + hurt.values[finite].sum(1))
    share = share[np.isfinite(share)]
    if not len(share):
        raise ValueError("There is nothing to draw: no weight has moved the loss in any step.")
    reach = max(float(np.abs(share - 50).max()), 0.5)
    edges = 50 + np.linspace(-reach, reach, 2 * (_BARS // 2) + 1)
    with style.page() as figure:
        axes = figure.subplots()
        # A draw is no majority; it lies on the border, which belongs to the bar on its right.
        _bars(axes, np.histogram(share, edges)[0], edges, 50 - edges[:-1] - 1e-9)
        axes.axvline(50, color="0.3", linewidth=0.8)
        axes.xaxis.set_major_formatter("{x:g}%")
        axes.set_xlabel("weights that help, of those that move the loss")
        axes.set_ylabel("measured steps")
        style.headline(
            figure,
            f"On average {share.mean():.1f}% of weights help",
            f"A majority helps in {np.mean(share > 50):.0%} of {len(share):,} measured steps",
        )
    return figure


def helping_per_weight(history: History) -> Figure:
    """Draws how many weights helped in which share of the steps, as a histogram.

    How to read it: a weight of the random sample counts once, at the percentage of measured steps
    in which it helped. A wide hill says that some weights help steadily and others do not; how wide
    chance alone would make it is not known, since a weight's steps depend on one another and on
    those of others. Weights that never moved the loss are left out.

    Raises:
        ValueError: The record has no single weights, or none of them has moved.
    """
    weights = sample(history)
    assert weights.helping is not None
    steps = int(weights.measured.sum())
    moved = (weights.allocated != 0).any(0)
    helped = weights.helping.sum(0, dtype=np.int64)[moved]
    if not len(helped):
        raise ValueError("There is nothing to draw: no weight of the sample has moved the loss.")
    share = 100 * helped / steps
    # Borders between the possible numbers of steps, so that no bar holds one of them more.
    lowest, possible = helped.min(), np.ptp(helped) + 1
    span = -(-possible // _BARS)
    edges = 100 * (lowest - 0.5 + span * np.arange(-(-possible // span) + 1)) / steps
    with style.page() as figure:
        axes = figure.subplots()
        _bars(axes, np.histogram(share, edges)[0], edges, 50 - (edges[1:] + edges[:-1]) / 2)
        axes.axvline(50, color="0.3", linewidth=0.8)
        axes.xaxis.set_major_formatter("{x:g}%")
        axes.set_xlabel(f"of {steps:,} measured steps the weight helped in")
        axes.set_ylabel("weights")
        low, high = np.quantile(share, [0.05, 0.95])
        idle = int((~moved).sum())
        left_out = f" ({idle:,} idle left out)" if idle else ""
        style.headline(
            figure,
            f"{np.mean(share > 50):.0%} of weights help in more than half of the steps",
            f"{len(share):,} weights{left_out}, nine in ten within {low:.0f}–{high:.0f}%",
        )
    return figure


def _between(history: History) -> str:
    """Tells the 95% interval of the mean share in a step, where there are steps enough."""
    rows = history.rows[history.rows.finite]
    helped, hurt = (counts.sum(1, dtype=np.int64) for counts in (rows.helping, rows.hurting))
    share = _percent(helped, helped + hurt)
    share = share[np.isfinite(share)]
    if len(share) < LEAST:
        return ""
    (low,), (high,) = Mean.of(share[:, None]).interval(0.025)
    return f"95% interval {low:.1f}–{high:.1f}%; "


def _bars(axes: Axes, counts: Array, edges: Floats, sign: Floats) -> None:
    axes.bar(edges[:-1], counts, np.diff(edges), align="edge", color=style.signed(sign))


def _votes(history: History) -> tuple[Shown, Shown]:
    """Counts the weights of each layer that helped, and those that hurt [T, L]."""
    rows = history.rows
    return (
        Shown.of(history, rows.helping.astype(np.int64)),
        Shown.of(history, rows.hurting.astype(np.int64)),
    )


def _percent(part: Array, whole: Array) -> Floats:
    """Returns nan where nothing moved."""
    return 100 * part / np.where(whole > 0, whole, np.nan)
