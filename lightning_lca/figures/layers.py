"""Which layers learn: figures of the credit of layers over the run, and of how it adds up."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lightning_lca.analysis.bins import Bins
from lightning_lca.figures import style
from lightning_lca.figures.timeline import (
    Array,
    Shown,
    credit,
    finite_or_nan,
    timeline,
    total,
)
from lightning_lca.record.history import History
from lightning_lca.record.sampling import of_run
from lightning_lca.record.summary import Trust
from lightning_lca.record.tables import Floats

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LINES = 8  # Lines that get a colour and a name.
_KINDS = ("kernel", "bias", "norm")


def heatmap(history: History) -> Figure:
    """Draws the LCA of every layer over time, in colour. Needs T ≥ 1 rows.

    How to read it: a row is a layer, the first one on top, and time runs to the right. Dark blue
    helped (lowered the loss), red hurt. A column of one colour is a moment in which the layers
    moved together; a row that alternates oscillates. In long runs a cell is the sum of several
    steps, as the colour bar says. The scale is that of square roots, so that weak credit shows
    beside strong; one cell in a hundred may lie beyond its ends. Grey is not finite.

    Raises:
        ValueError: Nothing was measured yet.
    """
    layers = credit(history)
    time = timeline(history, style.COLUMNS)
    height = style.tall(len(layers))
    with style.page(height) as figure:
        axes = figure.subplots()
        style.grid_of_credit(figure, axes, time.edges, time.sums(layers.values).T, time.unit)
        style.label_rows(axes, layers.names, figure.get_figheight())
        style.headline(figure, *_who_helped_and_who_hurt(history, layers))
    return figure


def cumulative(history: History) -> Figure:
    """Draws the LCA of every layer, added up over time, and the true loss change. Needs T ≥ 1 rows.

    How to read it: a line that falls is a layer that learns, one that rises un-learns; where it
    ends is the layer's part of the whole loss change. The black line is the true loss change: the
    layers add up to it, but for the residual. The eight layers that moved the loss most have a
    colour, by depth from dark to light, and a name; the others are grey. Where single layers are
    small against the whole, the black line has a panel of its own.

    Raises:
        ValueError: Nothing was measured yet.
    """
    layers = credit(history)
    time = timeline(history, style.POINTS)
    lines = time.running(layers.values)
    true = _true_change(history, time)
    reach = np.nanmax(np.abs(lines), axis=0, initial=0)
    # In network order again, so that the colours run with depth.
    named = np.sort(np.argsort(-reach, kind="stable")[:_LINES])
    apart = _extent(true) > 4 * _extent(lines[:, named])
    with style.page(4.4 if apart else style.HEIGHT + 0.2) as figure:
        if apart:
            above, axes = figure.subplots(2, sharex=True, height_ratios=[1, 2.2])
        else:
            above = axes = figure.subplots()
        axes.axhline(0, color="0.75", linewidth=1)
        quiet = [i for i in range(len(layers)) if i not in named]
        for i in quiet:
            axes.plot(time.edges, lines[:, i], color="0.8", linewidth=0.8)
        colours = style.by_depth(len(named))
        for colour, i in zip(colours, named, strict=True):
            # A single layer is all of the loss change: it shows around the black line.
            axes.plot(time.edges, lines[:, i], color=colour, linewidth=2 if len(layers) > 1 else 6)
        above.plot(time.edges, true, color=style.TRUE, linewidth=2.2)
        labels = [style.elide(layers.names)[i] for i in named]
        ends = [style.last(lines[:, i]) for i in named]
        if apart:
            style.end_labels(above, [style.last(true)], ["true change"], [style.TRUE])
            above.set_ylabel("loss change")
        else:
            labels, ends = [*labels, "true change"], [*ends, style.last(true)]
            colours = [*colours, (0.0, 0.0, 0.0)]
        style.end_labels(axes, ends, labels, colours)
        axes.set_ylabel("cumulative LCA (loss)")
        style.step_axis(axes)
        others = f"; grey: {len(quiet)} more layers" if quiet else ""
        style.headline(
            figure, _who_helped_and_who_hurt(history, layers)[0], f"Down is learning{others}"
        )
    return figure


def stack(history: History) -> Figure:
    """Draws what the layers have done so far as areas on top of each other. Needs T ≥ 1 rows.

    How to read it: below zero, in blue, is what layers have helped so far; above, in red, what
    others have hurt. The first layer is the darkest and next to zero, the last the palest. The
    black line is the true loss change: the blue height less the red one, but for the residual. A
    thick red area says that layers worked against each other.

    Raises:
        ValueError: Nothing was measured yet.
    """
    layers = credit(history)
    time = timeline(history, style.POINTS)
    lines = time.running(layers.values)
    true = _true_change(history, time)
    whole = total(layers.values)
    with style.page(style.HEIGHT + 0.2) as figure:
        axes = figure.subplots()
        ends, shades = np.zeros(len(layers)), list(style.ramp(style.HELPS, len(layers)))
        for colour, part in (
            (style.HELPS, np.minimum(lines, 0)),
            (style.HURTS, np.maximum(lines, 0)),
        ):
            outer = np.cumsum(part, axis=1)
            for i, shade in enumerate(style.ramp(colour, len(layers))):
                inner = outer[:, i] - part[:, i]
                axes.fill_between(time.edges, inner, outer[:, i], color=shade, linewidth=0)
                if (whole[i] > 0) == (colour == style.HURTS):
                    ends[i] = style.last((inner + outer[:, i]) / 2)
                    shades[i] = shade
        axes.plot(time.edges, true, color=style.TRUE, linewidth=2.2)
        axes.axhline(0, color="0.3", linewidth=0.8)
        largest = np.sort(np.argsort(-np.abs(whole), kind="stable")[:_LINES])
        labels = style.elide(layers.names)
        style.end_labels(
            axes,
            [*ends[largest], style.last(true)],
            [*(labels[i] for i in largest), "true change"],
            [*("0.25" for _ in largest), style.TRUE],
        )
        axes.set_ylabel("cumulative LCA (loss)")
        style.step_axis(axes)
        helped, hurt = whole[whole < 0].sum(), whole[whole > 0].sum()
        style.headline(
            figure,
            f"Layers helped by {abs(helped):.3g}, "
            + (f"hurt by {hurt:.3g}" if hurt else "none hurt"),
            "Blue helps, red hurts; dark: first layer, pale: last",
        )
    return figure


def ledger(history: History) -> Figure:
    """Draws the true loss change against the sum of all LCA, and what is between. Needs T ≥ 1 rows.

    How to read it: above, the black line (true) should run in the middle of the pale one (LCA
    added up). Below is the residual of each step, or its sum over several steps as the axis says:
    what the quadrature missed; where a rule shares that out over the weights, the raw one, before.
    It should be small against the steps of the black line and of no steady sign. Drift, if there is
    any, is loss change by other code than the optimizer.

    Raises:
        ValueError: Nothing was measured yet.
    """
    layers = credit(history)
    time = timeline(history, style.POINTS)
    true = _true_change(history, time)
    summed = time.running(np.asarray(layers.values).sum(1))
    drift = time.sums(history.drift)
    drifted = bool(np.any(np.nan_to_num(drift)))
    with style.page(4.2) as figure:
        above, below = figure.subplots(2, sharex=True, height_ratios=[1.7, 1])
        above.plot(time.edges, summed, color="#8fbbe8", linewidth=6, label="LCA added up")
        above.plot(time.edges, true, color=style.TRUE, linewidth=1.6, label="true")
        above.set_ylabel("loss change")
        above.legend(loc="best", handlelength=1.4)
        below.stairs(time.sums(history.raw_residual), time.edges, fill=True, color="0.35")
        if drifted:
            below.stairs(
                drift, time.edges, color="#9467bd", linewidth=1.6, label="drift", zorder=0.5
            )
            below.legend(loc="best", handlelength=1.4, frameon=True, framealpha=0.7)
        below.axhline(0, color="0.3", linewidth=0.8)
        what = "raw residual" if history.closes else "residual"
        below.set_ylabel(f"{what}\n(loss {time.unit})")
        below.yaxis.set_major_formatter(style.tick)
        style.step_axis(below)
        trust = Trust.of(history)
        share = 0.0 if trust.unexplained is None else trust.unexplained
        second = f"Loss change {style.number(style.last(true))}"
        if trust.not_finite:
            second += f"; {trust.not_finite:,} of {len(history):,} steps not finite, left out"
        elif trust.unconverged:
            second += f"; {trust.unconverged:,} of {len(history):,} steps did not converge"
        style.headline(
            figure,
            f"{'Raw residuals' if history.closes else 'Residuals'} are {_percent(share)} of all "
            "credit"
            if np.isfinite(share)
            else "No credit explains the loss change",
            second,
        )
    return figure


def totals(history: History) -> Figure:
    """Draws the total LCA of every layer as bars, kernels apart from the rest. Needs T ≥ 1 rows.

    How to read it: a bar to the left (blue) is a layer that helped over the whole run, one to the
    right (red) a layer that hurt. The full colour is what its kernels did alone; biases and the
    weights of normalizations follow in paler shades, on either side of zero. The black mark is the
    total of all its tensors. Records without credit per parameter show that total as the bar. Where
    the probe has several batches, whiskers tell how far the total holds on other data like them.

    Raises:
        ValueError: Nothing was measured yet.
    """
    layers = credit(history)
    whole = total(layers.values)
    parts = _by_kind(history, layers.names)
    height = style.tall(len(layers), 1.7)
    with style.page(height) as figure:
        axes = figure.subplots()
        rows = np.arange(len(layers))
        if parts is None:
            axes.barh(rows, whole, 0.75, color=style.signed(whole))
            second = ""
        else:
            for sign, colour in ((-1, style.HELPS), (1, style.HURTS)):
                side = np.where(np.sign(parts) == sign, parts, 0.0)
                left = side.cumsum(0) - side
                for kind, shade in enumerate(style.ramp(colour, 3)):
                    axes.barh(rows, side[kind], 0.75, left[kind], color=shade)
            axes.vlines(whole, rows - 0.46, rows + 0.46, color=style.TRUE, linewidth=2)
            _legend_of_kinds(figure)
            shares = 100 * parts.sum(1) / parts.sum() if parts.sum() else np.zeros(3)
            kernels, biases, norms = shares.round() + 0.0  # So that there is no "-0%".
            second = f"Kernels {kernels:.0f}%, biases {biases:.0f}%, norms {norms:.0f}%"
        label = "total LCA (loss):  helps  ←   →  hurts"
        if (data := of_run(history, history.shown)) is not None:
            axes.errorbar(whole, rows, None, data.reach, fmt="none", ecolor="0.2", capsize=2.5)
            label += f"\nwhiskers: 95% over other data, from {data.batches} batches of the probe"
        axes.axvline(0, color="0.3", linewidth=0.8)
        axes.set_ylim(len(layers) - 0.5, -0.5)
        axes.use_sticky_edges = False
        axes.margins(x=0.04)
        style.label_rows(axes, layers.names, figure.get_figheight())
        axes.set_xlabel(label)
        axes.spines["left"].set_visible(False)
        style.headline(figure, _who_helped_and_who_hurt(history, layers)[-1], second)
    return figure


def _by_kind(history: History, names: tuple[str, ...]) -> Floats | None:
    """Adds up the credit of kernels, biases and norms of every layer [3, L], or gives None."""
    windows = history.parameters
    if windows is None or not len(windows):
        return None
    parts = np.zeros((3, len(names)))
    place = {name: i for i, name in enumerate(names)}
    for name, layer, kind, value in zip(
        windows.names, windows.layers, windows.kinds, total(windows.allocated), strict=True
    ):
        owner = place.get(name, place.get(layer))
        if owner is None:
            return None
        parts[_KINDS.index(kind), owner] += value
    return parts


def _legend_of_kinds(figure: Figure) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    shades = style.ramp("0.25", 3)
    handles = [Patch(color=s, label=k) for k, s in zip(_KINDS, shades, strict=True)]
    mark = Line2D([], [], color=style.TRUE, marker="|", markersize=13, markeredgewidth=2, ls="")
    figure.legend(
        [*handles, mark],
        [*_KINDS, "all tensors"],
        loc="outside lower center",
        ncols=4,
        handlelength=1.0,
        columnspacing=1.2,
    )


def _percent(share: float) -> str:
    return "less than 0.01%" if 0 < share < 1e-4 else f"{share:.2%}"


def _true_change(history: History, time: Bins) -> Floats:
    """The loss at the borders of the bins, less that at the start [B + 1]."""
    loss = finite_or_nan(np.concatenate([history.loss_before[:1], history.loss_after]))
    change: Floats = loss[time.cuts] - loss[0]
    return change


def _extent(lines: Array) -> float:
    return float(np.nanmax(lines, initial=0) - np.nanmin(lines, initial=0))


def _who_helped_and_who_hurt(history: History, layers: Shown) -> tuple[str, str]:
    """Says in a line who helped most, and in another how many hurt."""
    whole = total(layers.values)
    change = history.loss_after[-1] - history.loss_before[0]
    names = style.elide(layers.names)
    best, worst = int(whole.argmin()), int(whole.argmax())
    if len(names) == 1:
        verb = "hurt" if whole[0] > 0 else "helped"
        return f"{names[0]}: LCA {style.number(whole[0])}", f"The only layer {verb} overall"
    if whole[best] >= 0:
        first = "No layer helped"
    elif change < 0:
        first = f"{names[best]} helped most: {whole[best] / change:.0%} of the loss change"
    else:
        first = f"{names[best]} helped most: {style.number(whole[best])}"
    hurting = int((whole > 0).sum())
    if not hurting:
        return first, "No layer hurt overall"
    most = style.number(whole[worst], 2)
    if hurting == 1:
        return first, f"Only {names[worst]} hurt overall ({most})"
    return first, f"{hurting} of {len(layers)} layers hurt overall, {names[worst]} most ({most})"
