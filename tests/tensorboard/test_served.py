"""What the page no longer computes: sums, limits and differences, against loops over the rows."""

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from support.routes import Store

from lightning_lca.figures import style
from lightning_lca.record.colours import DARK, LIGHT
from lightning_lca.record.history import History
from lightning_lca.record.tables import StepTable
from lightning_lca.tensorboard import plugin

LAYERS = ["first", "frozen", "last"]
BROKEN = [4, 30, 31, 32, 33, 34]  # Rows whose loss or credit is not finite; 5 and 35 follow suit.


def measured(steps, seed=0, broken=(), groups=LAYERS, group_by="layer"):
    """A history of made-up numbers; some rows are not finite, each in another column."""
    g = np.random.default_rng(seed)
    history = History(groups, np.full(len(groups), 100), group_by)
    allocated = g.normal(size=(len(steps), len(groups))) * 10.0 ** g.uniform(-3, 0, (len(steps), 1))
    if "frozen" in groups:
        allocated[:, groups.index("frozen")] = 0
    residual = g.normal(size=len(steps)) * 1e-3
    change = allocated.sum(1) + residual
    loss = 50 + np.concatenate([[0], np.cumsum(change)])
    converged = g.random(len(steps)) > 0.2
    for i in broken:
        residual[i], converged[i] = math.nan, False
        if i % 2:
            allocated[i, 0] = math.inf
        else:  # The next row starts from it.
            loss[i + 1] = residual[i + 1 : i + 2] = math.nan
            converged[i + 1 : i + 2] = False
    helping, hurting = g.integers(0, 50, (2, len(steps), len(groups)))
    rows = StepTable(
        steps=np.array(steps),
        allocated=allocated,
        helping=helping,
        hurting=hurting,
        loss_before=loss[:-1],
        loss_after=loss[1:],
        residual=residual,
        drift=np.zeros(len(steps)),
        splits=np.ones(len(steps), np.int64),
        converged=converged,
        trained=np.full(len(steps), 300),
        seconds=np.zeros(len(steps)),
    )
    history.append(rows)
    return history


@pytest.fixture(scope="module")
def histories():
    with_a_hole = [*range(1, 60), *range(75, 101)]
    return {
        "whole": measured(range(1, 101)),
        "broken": measured(with_a_hole, seed=1, broken=BROKEN),
        "chords": measured(range(5, 125, 5), seed=2),
        "hopeless": measured(range(1, 11), broken=range(10)),
    }


@pytest.fixture(scope="module")
def store(histories):
    return Store(**histories)


def sums(history, above, upto):
    """Adds up the finite rows of a stretch of steps: sum, number of rows, number of finite ones."""
    total, rows, finite = np.zeros(len(LAYERS)), 0, 0
    for t, step in enumerate(history.steps):
        if above < step <= upto:
            rows += 1
            if np.isfinite(history.rows.residual[t]):
                finite += 1
                total = total + history.allocated[t]
    return total, rows, finite


RANGES = [{}, {"bins": 7}, {"start": 21, "stop": 90, "bins": 10}, {"start": 28, "stop": 70}]


@pytest.mark.parametrize("span", RANGES, ids=str)
@pytest.mark.parametrize("run", ["whole", "broken", "chords"])
def test_sums_run_from_the_ranges_start_and_leave_out_what_is_not_finite(
    histories, store, run, span
):
    history, answer = histories[run], store.ask("bins", run=run, **span)
    edges = answer["edges"]
    running = np.array(answer["running"], float)  # None becomes nan.
    for k, edge in enumerate(edges):
        told, *_ = sums(history, edges[0], edge)
        _, rows, finite = sums(history, edges[k - 1], edge) if k else (0, 0, 0)
        if rows and not finite:
            assert np.isnan(running[:, k]).all(), "a gap"
            assert answer["running_total"][k] is None
            assert answer["not_finite"][k - 1] == rows
        else:
            np.testing.assert_allclose(running[:, k], told, atol=1e-12)
            assert answer["running_total"][k] == pytest.approx(told.sum(), abs=1e-12)
    assert answer["total"] == pytest.approx(sums(history, edges[0], edges[-1])[0], abs=1e-12)
    before = sums(history, 0, edges[0])[0]
    assert answer["before"] == pytest.approx(before, abs=1e-12)
    assert answer["before_total"] == pytest.approx(before.sum(), abs=1e-12)


@pytest.mark.parametrize("span", RANGES, ids=str)
@pytest.mark.parametrize("run", ["whole", "broken", "chords"])
def test_the_truth_is_the_losss_change_and_carries_on_where_nothing_was_measured(
    histories, store, run, span
):
    history, answer = histories[run], store.ask("bins", run=run, **span)
    losses = dict(zip(history.steps.tolist(), history.loss_after.tolist()))

    def loss_at(edge):
        return next((losses[s] for s in range(edge, 0, -1) if s in losses), history.loss_before[0])

    at = [loss_at(edge) for edge in answer["edges"]]
    start = next(loss for loss in at if math.isfinite(loss))
    for told, loss in zip(answer["running_truth"], at):
        wanted = pytest.approx(loss - start, abs=1e-12) if math.isfinite(loss) else None
        assert told == wanted
    assert answer["before_truth"] == pytest.approx(start - history.loss_before[0], abs=1e-12)


@pytest.mark.parametrize("run", ["whole", "broken"])
def test_the_colour_scale_ends_where_99_of_100_cells_with_credit_end(store, run):
    answer = store.ask("bins", run=run)
    cells = sorted(abs(v) for row in answer["credit"] for v in row if v)
    assert answer["limit"] in cells
    place = cells.index(answer["limit"])
    assert (place - 1) / (len(cells) - 1) < 0.99 <= place / (len(cells) - 1)
    assert store.ask("bins", run=run, start=1, stop=1)["limit"] > 0
    assert store.ask("bins", run="hopeless")["limit"] == 0


def test_a_range_without_a_finite_step_has_no_sums(store):
    answer = store.ask("bins", run="hopeless", bins=2)
    assert answer["total"] == [None] * 3
    assert answer["credit"] == [[None, None]] * 3
    assert answer["running"] == [[0, None, None]] * 3
    assert answer["not_finite"] == answer["measured"] == [5, 5]
    table = store.ask("table", run="hopeless")
    assert [layer["credit"] for layer in table["layers"]] == [None] * 3
    assert table["allocated"] is None
    assert (table["rows"], table["not_finite"], table["beyond_tolerance"]) == (10, 10, 0)


def test_steps_beyond_the_tolerance_are_counted_apart_from_those_not_finite(histories, store):
    rows = histories["broken"].rows
    beyond = int((~rows.converged & np.isfinite(rows.residual)).sum())
    answer, table = store.ask("bins", run="broken", bins=9), store.ask("table", run="broken")
    assert sum(answer["beyond_tolerance"]) == table["beyond_tolerance"] == beyond > 0
    assert sum(answer["unconverged"]) == table["unconverged"] == beyond + len(BROKEN) + 2


@pytest.mark.parametrize("span", [{}, {"start": 30, "stop": 110, "bins": 4}], ids=str)
def test_two_runs_differ_by_b_minus_a_where_both_were_measured(histories, store, span):
    answer = store.ask("compare", run="broken", run_b="chords", **span)
    edges = answer["edges"]
    cells = []
    for k, (above, upto) in enumerate(pairwise(edges)):
        a, rows_a, finite_a = sums(histories["broken"], above, upto)
        b, rows_b, finite_b = sums(histories["chords"], above, upto)
        assert (answer["measured_a"][k], answer["measured_b"][k]) == (rows_a, rows_b)
        told = [row[k] for row in answer["difference"]]
        if finite_a and finite_b:
            assert told == pytest.approx(b - a, abs=1e-12)
            cells += [abs(v) for v in told if v]
        else:
            assert told == [None] * 3
    assert answer["limit_difference"] in cells
    total = {
        x: sums(histories[n], edges[0], edges[-1])[0] for x, n in zip("ab", ["broken", "chords"])
    }
    assert answer["total_difference"] == pytest.approx(total["b"] - total["a"], abs=1e-12)
    for letter, name in (("a", "broken"), ("b", "chords")):
        history = histories[name]
        assert answer[f"total_{letter}"] == pytest.approx(total[letter], abs=1e-12)
        before = sums(history, 0, edges[0])[0]
        assert answer[f"before_total_{letter}"] == pytest.approx(before.sum(), abs=1e-12)
        for k, edge in enumerate(edges):
            told = answer[f"running_total_{letter}"][k]
            _, rows, finite = sums(history, edges[k - 1], edge) if k else (0, 0, 0)
            if k and edges[k - 1] >= history.steps[-1]:
                assert told is None, "a line ends with its run"
            elif rows and not finite:
                assert told is None
            else:
                assert told == pytest.approx(sums(history, edges[0], edge)[0].sum(), abs=1e-12)
            whole = [row[k] for row in answer[f"running_{letter}"]]
            assert told == (None if whole[0] is None else pytest.approx(sum(whole), abs=1e-12))


@pytest.mark.parametrize("bins", [1, 7, 500])
def test_the_mean_share_is_that_of_the_range_whatever_the_bins(histories, store, bins):
    rows = histories["broken"].rows
    finite = np.isfinite(rows.residual)
    helped, hurt = rows.helping[finite], rows.hurting[finite]
    answer = store.ask("helping", run="broken", bins=bins, layer="last")
    assert answer["network"]["mean"] == helped.sum() / (helped.sum() + hurt.sum())
    mean = helped[:, 2].sum() / (helped[:, 2].sum() + hurt[:, 2].sum())
    assert answer["layer"]["mean"] == mean
    assert store.ask("helping", run="hopeless", bins=bins)["network"]["mean"] is None


def test_channels_that_helped_are_counted_though_not_all_are_shown():
    groups = [f"wide/{i}" for i in range(300)]
    history = measured(range(1, 11), groups=groups, group_by="neuron")
    answer = Store(run=history).ask("channels", run="run", layer="wide")
    assert (answer["shown"], answer["of"]) == (256, 300)
    total = history.allocated.sum(0)
    assert (answer["helped"], answer["hurt"]) == ((total < 0).sum(), (total > 0).sum())


def test_moments_are_told_with_their_company(store):
    answer = store.ask("synchrony", run="whole")
    at_once = Counter(step for _, step in answer["raster"])
    assert answer["raster_at_once"] == [at_once[step] for _, step in answer["raster"]]
    for i in range(len(LAYERS)):
        own = [step for layer, step in answer["raster"] if layer == i]
        assert answer["moments_by_layer"][i] == len(own)
        assert answer["shared_by_layer"][i] == sum(at_once[step] > 1 for step in own)
    assert sum(answer["shared_by_layer"]) == answer["synchronized"]


def test_page_and_figures_have_the_same_blue_and_red():
    assert {"helps": style.HELPS, "hurts": style.HURTS} == LIGHT
    module = plugin.colours()
    assert all(colour in module for theme in (LIGHT, DARK) for colour in theme.values())
