"""What is drawn is what was measured, and it can be read."""

import subprocess
import sys
from itertools import pairwise

import matplotlib
import numpy as np
import pytest
from matplotlib.patches import Rectangle, StepPatch

from lightning_lca import History, figures
from lightning_lca.figures import style
from lightning_lca.record import synchrony as core
from lightning_lca.record.statistics import Mean
from lightning_lca.record.tables import StepTable, WindowTable

NAMES = ("conv1", "norm1", "conv2", "fc")
WINDOW = 10


def history(steps=230, names=NAMES, every=1, by="layer", seed=0, detail=True):
    """A run of noise and trend, with every table; its ledger closes."""
    random = np.random.default_rng(seed)
    t, groups = np.arange(1, steps + 1) * every, len(names)
    allocated = random.normal(-0.003, 0.01, (steps, groups))
    allocated[:, -1] += 0.005  # The last layer hurts.
    residual, drift = random.normal(0, 1e-4, (2, steps))
    loss = 4 + np.concatenate([[0], (allocated.sum(1) + residual + drift).cumsum()])
    sizes = random.integers(200, 250, groups)
    helping = random.binomial(sizes, 0.5, (steps, groups)).astype(np.uint8) - random.integers(
        0, 8, (steps, groups), np.uint8
    )
    hurting = (sizes - 9 - helping).astype(np.uint8)  # As narrow as when read from a record.
    true = np.full(steps, True)
    run = History(names, sizes, by)
    run.append(
        StepTable(
            t,
            allocated.astype(np.float32),
            helping,
            hurting,
            loss[:-1] + drift,
            loss[1:],
            residual,
            drift,
            true * 1,
            true,
            true * sizes.sum(),
            true * 0.1,
        )
    )
    if detail:
        ends = [*range(WINDOW, steps, WINDOW), steps]
        measured = np.diff([0, *ends])
        at = t[np.array(ends) - 1]
        layers = names if by == "layer" else run.shown.names
        kinds = {f"{n}.weight": "norm" if "norm" in n else "kernel" for n in layers}
        kinds |= {f"{n}.bias": "bias" for n in layers}
        run.append_windows(
            "parameters",
            WindowTable(
                tuple(kinds),
                at,
                measured,
                random.normal(-0.01, 0.02, (len(at), len(kinds))),
                kinds=tuple(kinds.values()),
            ),
        )
        neurons = tuple(f"{n}/{i}" for n in layers for i in range(5))
        run.append_windows(
            "neurons",
            WindowTable(neurons, at, measured, random.normal(0, 0.02, (len(at), len(neurons)))),
        )
        credit = random.normal(-1e-4, 2e-3, (len(at), 300)) * random.exponential(1, 300)
        credit[:, 7] = 0
        helped = random.binomial(measured[:, None], 0.5, (len(at), 300))
        run.append_windows(
            "weights",
            WindowTable(
                tuple(f"conv1.weight[{i}, 0]" for i in range(300)),
                at,
                measured,
                credit,
                helped * (credit[:1] != 0),
                sampled_from=900,
            ),
        )
    return run


def image(axes):
    (shown,) = axes.images
    return np.ma.getdata(shown.get_array())


def colour(artist):
    return matplotlib.colors.to_hex(artist.get_facecolor())


def bars(axes):
    return [p for p in axes.patches if isinstance(p, Rectangle)]


def line(axes, expected):
    """The one line that shows these numbers."""
    found = [
        drawn
        for drawn in axes.lines
        if len(drawn.get_ydata()) == len(expected)
        and np.allclose(drawn.get_ydata(), expected, atol=1e-12, equal_nan=True)
    ]
    assert len(found) == 1
    return found[0]


def test_a_bin_of_the_heatmap_is_the_sum_of_its_steps():
    run = history(steps=1003)
    axes = figures.heatmap(run).axes[0]
    shown = image(axes)
    assert shown.shape == (4, 335)  # Bins of 3 steps, and one of 1.
    np.testing.assert_allclose(shown[:, 0], run.allocated[:3].sum(0))
    np.testing.assert_allclose(shown[:, -1], run.allocated[-1])
    np.testing.assert_allclose(shown.sum(1), run.allocated.sum(0))
    assert axes.get_ylim() == (3.5, -0.5), "the first layer is on top"
    assert axes.get_xlim() == (0, 1003)
    assert "per 3 steps" in str([a.get_ylabel() for a in figures.heatmap(run).axes])


def test_blue_helps_and_red_hurts_in_every_heatmap():
    run = history()
    run.rows.allocated[:] = -1
    run.rows.allocated[:, 3] = 1
    (drawn,) = figures.heatmap(run).axes[0].images
    red, _, blue, _ = drawn.to_rgba(drawn.get_array())[0, 0]
    assert blue > red
    red, _, blue, _ = drawn.to_rgba(drawn.get_array())[3, 0]
    assert red > blue


def test_blue_is_darker_than_red_in_grey():
    grey = [np.dot(matplotlib.colors.to_rgb(c), [0.299, 0.587, 0.114]) for c in style_colours()]
    assert grey[0] + 0.2 < grey[1]
    low, high = (np.dot(style.diverging()(x)[:3], [0.299, 0.587, 0.114]) for x in (0.0, 1.0))
    assert low + 0.2 < high


def style_colours():
    return style.HELPS, style.HURTS


@pytest.mark.parametrize("steps", [230, 2500])
def test_cumulative_lines_are_running_sums_and_the_true_change_is_black(steps):
    run = history(steps=steps)
    (axes,) = figures.cumulative(run).axes
    borders = np.unique(np.append(np.arange(0, steps, -(-steps // 1000)), steps))
    for layer in range(4):
        sums = np.concatenate([[0], run.allocated[:, layer].cumsum()])[borders]
        drawn = line(axes, sums)
        np.testing.assert_array_equal(drawn.get_xdata(), borders)
    true = np.concatenate([run.loss_before[:1], run.loss_after])[borders] - run.loss_before[0]
    assert line(axes, true).get_color() == "black"


def test_of_many_layers_eight_are_named_and_the_loss_has_its_own_panel():
    run = history(names=tuple(f"transformer.block.{i}.linear" for i in range(60)))
    above, axes = figures.cumulative(run).axes
    assert line(above, np.append(0, run.loss_after - run.loss_before[0])).get_color() == "black"
    named = [t.get_text() for t in axes.texts]
    reach = np.abs(run.allocated.cumsum(0)).max(0)
    assert sorted(named) == sorted(f"{i}.linear" for i in np.argsort(-reach)[:8])


def test_the_stack_is_as_deep_as_helping_and_as_high_as_hurting():
    run = history()
    (axes,) = figures.stack(run).axes
    edges = np.array([c.get_paths()[0].vertices for c in axes.collections])
    sums = np.concatenate([np.zeros((1, 4)), run.allocated.cumsum(0)])
    for step in (1, 100, 230):
        at = edges[..., 1][edges[..., 0] == step]
        assert at.min() == pytest.approx(np.minimum(sums[step], 0).sum())
        assert at.max() == pytest.approx(np.maximum(sums[step], 0).sum())
    thick = [np.ptp(area[area[:, 0] == 230, 1]) for area in edges]  # All blue ones, then all red.
    expected = [*-np.minimum(sums[-1], 0), *np.maximum(sums[-1], 0)]
    np.testing.assert_allclose(thick, expected, atol=1e-12)
    assert line(axes, np.append(0, run.loss_after - run.loss_before[0])).get_color() == "black"


def test_the_ledger_shows_true_and_summed_loss_change_and_what_is_between():
    run = history()
    figure = figures.ledger(run)
    above, below = figure.axes
    true = run.loss_after - run.loss_before[0]
    line(above, np.append(0, true))
    line(above, np.append(0, run.allocated.sum(1).cumsum()))
    residual, drift = (p.get_data().values for p in below.patches)
    np.testing.assert_allclose(residual, run.residual)
    np.testing.assert_allclose(drift, run.drift)
    share = np.abs(run.residual).sum() / np.abs(run.allocated).sum()
    assert f"{share:.2%}" in figure.get_suptitle()


def test_totals_are_split_into_kernels_biases_and_norms():
    run = history()
    (axes,) = figures.totals(run).axes
    marks = axes.collections[0].get_segments()
    np.testing.assert_allclose([m[0][0] for m in marks], run.allocated.sum(0))
    credit = run.parameters.allocated.sum(0)
    for layer in range(4):
        drawn = sorted(p.get_width() for p in bars(axes) if p.get_y() == layer - 0.375)
        drawn = [w for w in drawn if w]
        assert drawn == pytest.approx(sorted([credit[layer], credit[4 + layer]]))
    for bar in bars(axes):
        red, _, blue = matplotlib.colors.to_rgb(bar.get_facecolor()[:3])
        assert not bar.get_width() or (bar.get_width() > 0) == (red > blue)


def test_totals_without_parameters_are_plain_bars():
    run = history(detail=False)
    (axes,) = figures.totals(run).axes
    np.testing.assert_allclose([p.get_width() for p in bars(axes)], run.allocated.sum(0))
    assert [colour(p) for p in bars(axes)] == [style.HELPS] * 3 + [style.HURTS]


def test_helping_is_the_share_of_moving_weights_with_the_interval_of_its_mean():
    run = history(steps=250)
    helping, hurting = (c.astype(int) for c in (run.rows.helping, run.rows.hurting))
    figure = figures.helping(run)
    left, right = figure.axes
    (curve,) = (p for p in left.patches if isinstance(p, StepPatch))
    first = slice(0, 3)
    moved = helping[first].sum() + hurting[first].sum()
    assert curve.get_data().values[0] == pytest.approx(100 * helping[first].sum() / moved)
    assert len(curve.get_data().values) == 84
    assert not left.collections  # No band: coins are no chance that weights are like.
    share = 100 * helping.sum(1) / (helping + hurting).sum(1)
    (low,), (high,) = Mean.of(share[:, None]).interval(0.025)
    assert f"95% interval {low:.1f}–{high:.1f}%" in figure.get_suptitle()
    assert "interval" not in figures.helping(history(steps=49)).get_suptitle()
    dots = right.collections[1].get_offsets()
    np.testing.assert_allclose(dots[:, 0], 100 * helping.sum(0) / (helping + hurting).sum(0))
    np.testing.assert_array_equal(dots[:, 1], range(4))


def test_neurons_are_added_up_to_layers_whatever_the_width_of_their_counts():
    run = history(names=tuple(f"{n}/{i}" for n in "ab" for i in range(9)), by="neuron")
    helping, hurting = (c.astype(int).sum(0) for c in (run.rows.helping, run.rows.hurting))
    helped, moved = (c.reshape(2, 9).sum(1) for c in (helping, helping + hurting))
    dots = figures.helping(run).axes[1].collections[1].get_offsets()
    np.testing.assert_allclose(dots[:, 0], 100 * helped / moved)
    shown = image(figures.heatmap(run).axes[0])
    np.testing.assert_allclose(shown[1], run.allocated[:, 9:].sum(1))


def test_every_step_is_in_the_histogram_of_steps_on_its_side():
    run = history()
    helping, hurting = (c.astype(int).sum(1) for c in (run.rows.helping, run.rows.hurting))
    (axes,) = figures.helping_per_step(run).axes
    blue = sum(p.get_height() for p in bars(axes) if colour(p) == style.HELPS)
    red = sum(p.get_height() for p in bars(axes) if colour(p) == style.HURTS)
    assert (blue, red) == ((helping >= hurting).sum(), (helping < hurting).sum())
    assert min(blue, red) > 50


@pytest.mark.parametrize("steps", [24, 230, 2000])
def test_every_weight_is_in_the_histogram_of_weights(steps):
    run = history(steps=steps)
    (axes,) = figures.helping_per_weight(run).axes
    heights, edges = [p.get_height() for p in bars(axes)], [p.get_x() for p in bars(axes)]
    share = 100 * np.delete(run.weights.helping.sum(0), 7) / steps
    assert sum(heights) == 299, "the idle weight is left out"
    widths = {round(p.get_width() * steps / 100, 6) for p in bars(axes)}
    assert len(widths) == 1
    assert widths.pop().is_integer(), "a bar holds as many possible values as any other"
    i = int(np.argmax(heights))
    assert heights[i] == ((share > edges[i]) & (share < edges[i + 1])).sum()
    assert not any(isinstance(p, StepPatch) for p in axes.patches), "weights are no coins"
    low, high = np.quantile(share, [0.05, 0.95])
    texts = " ".join(t.get_text() for t in axes.figure.findobj(lambda o: hasattr(o, "get_text")))
    assert f"nine in ten within {low:.0f}–{high:.0f}%" in texts


def test_the_distribution_holds_every_weight_on_its_side_of_zero():
    run = history()
    above, below = figures.distribution(run).axes
    whole = np.delete(run.weights.allocated.sum(0), 7)
    blue = sum(p.get_height() for p in bars(below) if colour(p) == style.HELPS)
    red = sum(p.get_height() for p in bars(below) if colour(p) == style.HURTS)
    assert (blue, red) == ((whole < 0).sum(), (whole > 0).sum())
    assert below.get_yscale() == "log"
    near = sum(p.get_height() for p in bars(above))
    assert 0.98 * 299 < near < 299


def test_neurons_are_sorted_from_the_best_to_the_worst():
    run = history()
    shown = image(figures.neurons(run, "conv2").axes[0])
    credit = run.neurons.allocated[:, 10:15]
    order = np.argsort(credit.sum(0))
    np.testing.assert_allclose(shown, credit[:, order].T)


def test_more_neurons_than_rows_are_added_up():
    names = tuple(f"wide/{i}" for i in range(1000))
    run = history(names=names, by="neuron", steps=30, detail=False)
    shown = image(figures.neurons(run, "wide").axes[0])
    assert shown.shape == (250, 30)
    best = np.sort(run.allocated.sum(0))[:4].sum()
    assert shown[0].sum() == pytest.approx(best)


def test_trajectories_are_those_of_the_best_and_of_random_weights():
    run = history()
    left, right = figures.trajectories(run).axes
    credit = run.weights.allocated
    for weight in np.argsort(credit.sum(0))[:10]:
        line(left, np.append(0, credit[:, weight].cumsum()))
    assert len(left.lines) == len(right.lines) == 11  # And a line at zero.
    for drawn in right.lines[1:]:
        expected = style.HURTS if drawn.get_ydata()[-1] > 0 else style.HELPS
        assert drawn.get_color() == expected


def test_moments_of_learning_and_their_coincidences_are_drawn_over_what_chance_gives():
    run = history(steps=100)
    figure = figures.synchrony(run)
    above, below = figure.axes
    found = core.synchrony(run.allocated)
    alone, shared = (c.get_offsets() for c in above.collections)
    assert len(shared) == found.synchronized
    marks = {(x + 0.5, y) for x, y in np.concatenate([alone, shared])}
    assert marks == {(t + 1, g) for t, g in zip(*found.moments.nonzero())}
    heights = np.zeros(100)
    for bar in bars(below):
        heights[round(bar.get_x())] = bar.get_height()
    np.testing.assert_array_equal(heights, found.coincidences)
    (band,) = (p for p in below.patches if isinstance(p, StepPatch))
    np.testing.assert_allclose(band.get_data().values, found.band)
    much = f"{abs(found.excess):.0%} {'more' if found.excess > 0 else 'less'} often than by chance"
    assert f"Moments coincide {much}" in figure.get_suptitle()
    assert f"p = {found.p_pairs:.2g}" in figure.get_suptitle()


def test_coincidences_of_a_long_run_are_rates():
    run = history(steps=1000)
    _, below = figures.synchrony(run).axes
    rates = core.rates(core.moments_of_learning(run.allocated), np.arange(0, 1001, 10))
    high, observed, expected = (p.get_data().values for p in below.patches)
    np.testing.assert_allclose(observed, rates.observed)
    np.testing.assert_allclose(high, rates.high)
    np.testing.assert_allclose(expected, rates.expected)


def every_figure(run):
    names = [n for n in figures.available(run) if not n.startswith("neurons_")]
    neurons = [n for n in figures.available(run) if n.startswith("neurons_")][:1]
    return [(name, figures.available(run)[name](run)) for name in names + neurons]


def spoiled():
    run = history(steps=60)
    run.rows.allocated[20:25] = np.nan
    run.rows.allocated[25] = np.inf
    run.rows.allocated[26] = -np.inf
    run.rows.residual[22] = np.nan
    run.rows.loss_after[30] = np.inf
    run.weights.allocated[3] = np.nan
    run.neurons.allocated[2:4] = np.inf
    return run


def without_a_finite_number():
    run = history(steps=12)
    for table in (run.rows, run.parameters, run.neurons, run.weights):
        table.allocated[:] = np.nan
    run.rows.loss_after[:] = np.nan
    run.rows.loss_before[:] = np.nan
    return run


def all_zero():
    run = history(steps=12)
    for table in (run.rows, run.parameters, run.neurons, run.weights):
        table.allocated[:] = 0
    run.rows.loss_after[:] = run.rows.loss_before[:] = 1
    run.rows.helping[:] = run.rows.hurting[:] = 0
    return run


RUNS = {
    "usual": history,
    "one step": lambda: history(steps=1),
    "two steps": lambda: history(steps=2, every=10),
    "one layer": lambda: history(names=("encoder.layers.0.attention.output.projection",)),
    "150 layers": lambda: history(
        steps=50, names=tuple(f"encoder.layers.{i}.attention.out_proj" for i in range(150))
    ),
    "12 layers": lambda: history(
        names=tuple(f"backbone.stage{i}.block.convolution_{i}" for i in range(12))
    ),
    "neurons": lambda: history(
        names=tuple(f"{n}/{i}" for n in ("a.weight", "b") for i in range(9)), by="neuron"
    ),
    "not finite": spoiled,
    "without a finite number": without_a_finite_number,
    "zero": all_zero,
    "long": lambda: history(steps=5000, every=7),
}


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
def test_everything_written_is_large_enough_and_nothing_is_cut_off_or_overlaps(run):
    for name, figure in every_figure(RUNS[run]()):
        figure.canvas.draw()
        width, height = figure.canvas.get_width_height()
        assert width == 640
        assert 340 <= height <= 750
        for axes in figure.axes:
            for axis in (axes.xaxis, axes.yaxis):
                labels = [t.get_window_extent() for t in axis.get_ticklabels() if t.get_text()]
                for a, b in pairwise(labels):
                    assert not a.shrunk(0.9, 0.9).overlaps(b.shrunk(0.9, 0.9)), (name, axis)
            named = [t.get_window_extent() for t in axes.texts]
            for i, a in enumerate(named):
                assert not any(a.shrunk(0.9, 0.8).overlaps(b) for b in named[i + 1 :]), name
        for text in figure.findobj(matplotlib.text.Text):
            if text.get_text() and text.get_visible():
                assert text.get_fontsize() >= 12 or "$" in text.get_text()
                box = text.get_window_extent()
                inside = axes_tick_inside(text, figure)
                assert not inside or (
                    box.x0 > -3 and box.x1 < width + 3 and box.y0 > -3 and box.y1 < height + 3
                ), (name, text.get_text(), box)


def axes_tick_inside(text, figure):
    """Ticks beyond the view are made but not drawn."""
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in axis.get_major_ticks():
                if text in (tick.label1, tick.label2) and not low <= tick.get_loc() <= high:
                    return False
    return True


def test_numbers_that_are_not_finite_are_gaps():
    run = spoiled()
    shown = image(figures.heatmap(run).axes[0])
    left_out = [*range(20, 27), 30]
    assert np.isnan(shown[:, left_out]).all()
    assert np.isfinite(np.delete(shown, left_out, axis=1)).all()
    (axes,) = figures.cumulative(run).axes
    drawn = next(entry for entry in axes.lines if len(entry.get_ydata()) == 61).get_ydata()
    assert np.isnan(drawn[21:28]).all()
    assert drawn[28] == pytest.approx(drawn[20] + run.allocated[27, 0])


USERS = {
    "font.size": 30,
    "axes.facecolor": "red",
    "figure.dpi": 40,
    "xtick.labelsize": 30,
    "axes.spines.top": True,
    "image.cmap": "hot",
    "axes.formatter.limits": (0, 0),
}


@pytest.mark.parametrize("name", ["heatmap", "ledger", "synchrony", "trajectories"])
def test_the_users_settings_neither_leak_in_nor_change(name):
    run = history()
    draw = figures.available(run)[name]

    def pixels():
        figure = draw(run)
        figure.canvas.draw()
        return np.asarray(figure.canvas.buffer_rgba())

    expected = pixels()
    with matplotlib.rc_context(USERS):
        before = dict(matplotlib.rcParams)
        found = pixels()
        assert dict(matplotlib.rcParams) == before
    np.testing.assert_array_equal(found, expected)


def test_drawing_needs_neither_pyplot_nor_torch_and_importing_not_even_matplotlib():
    code = """
import sys
from lightning_lca import History, figures
assert not {"matplotlib", "torch"} & set(sys.modules)
from lightning_lca.record.tables import StepTable
import numpy as np
run = History(["a"], [3])
one = np.ones(1, int)
credit = -np.ones((1, 1))
run.append(StepTable(one, credit, one[None], one[None], *(one * 1.0,) * 4, one, one > 0, one, one))
for draw in figures.available(run).values():
    draw(run).canvas.draw()
assert not {"matplotlib.pyplot", "torch"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_can_be_drawn_is_listed_under_names_that_are_safe_in_paths():
    plain = history(names=tuple(f"down/blocks {i}" for i in range(12)))
    names = list(figures.available(plain))
    assert all(set(n) <= set("abcdefghijklmnopqrstuvwxyz0123456789_") for n in names)
    assert sum(n.startswith("neurons_down_blocks_") for n in names) == 8
    assert {"helping_per_weight", "distribution", "trajectories"} < set(names)
    bare = figures.available(history(detail=False))
    assert set(bare) < set(names)
    assert len(bare) == 8
    assert figures.available(History(["a"], [1])) == {}


def test_missing_data_are_named_with_the_remedy():
    empty, bare = History(["a"], [1]), history(detail=False)
    for name in set(figures.__all__) - {"available", "between", "generalization", "neurons"}:
        with pytest.raises(ValueError, match=r"no step was measured|no single weights"):
            getattr(figures, name)(empty)
    for name in ("helping_per_weight", "distribution", "trajectories"):
        with pytest.raises(ValueError, match=r"LCACallback\(track_parameters=True\)"):
            getattr(figures, name)(bare)
    with pytest.raises(ValueError, match=r"LCACallback\(neurons=True\)"):
        figures.neurons(bare, "conv1")
    with pytest.raises(ValueError, match=r"No layer 'conv9' .* conv1, norm1, conv2, fc"):
        figures.neurons(history(), "conv9")
    with pytest.raises(ValueError, match="no weight has moved"):
        figures.helping_per_step(all_zero())


def test_names_are_shortened_to_what_tells_them_apart():
    long = [f"encoder.layers.{i}.attention.self.query" for i in range(3)]
    assert style.elide(long) == [f"{i}.attenti…lf.query" for i in range(3)]
    ends = ["a" * 40 + "1", "a" * 40 + "2"]
    assert len(set(style.elide(ends))) == 2
    assert style.elide(["conv1", "fc"]) == ["conv1", "fc"]
    assert all(len(n) <= 18 for n in style.elide([*long, *ends]))
