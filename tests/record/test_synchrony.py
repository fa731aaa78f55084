"""Moments of learning, their coincidences, and what chance gives."""

import sys
import tracemalloc
from itertools import pairwise

import numpy as np
import pytest

from lightning_lca.record.synchrony import Dips, Synchrony, moments_of_learning, rates, synchrony

SHIFTS = [-2, -1, 1, 2]


def independent(seed, steps, layers, memory=0.0):
    random = np.random.default_rng(seed)
    series = random.normal(size=(steps, layers))
    for t in range(1, steps):
        series[t] += memory * series[t - 1]
    return series


def together(seed, steps, layers, noise=0.5):
    random = np.random.default_rng(seed)
    return random.normal(size=(steps, 1)) + noise * random.normal(size=(steps, layers))


def moments_by_a_plain_loop(table, strongest):
    found = np.zeros(table.shape, bool)
    for g in range(table.shape[1]):
        series = table[:, g]
        minima = [
            t
            for t in range(1, len(series) - 1)
            if np.isfinite(series[t - 1 : t + 2]).all()
            and series[t] < series[t - 1]
            and series[t] < series[t + 1]
        ]
        for t in sorted(minima, key=lambda t: (series[t], t))[:strongest]:
            found[t, g] = True
    return found


def shifted_counts(moments, random):
    """One draw by brute force, on an axis that is two longer at either end."""
    counts = np.zeros(len(moments) + 4, int)
    for g in range(moments.shape[1]):
        shift = random.choice(SHIFTS)
        counts[moments[:, g].nonzero()[0] + 2 + shift] += 1
    return counts


@pytest.mark.parametrize("strongest", [1, 7, 1000])
@pytest.mark.parametrize("digits", [1, 6])
def test_moments_are_those_of_a_plain_loop(strongest, digits):
    table = independent(0, 300, 5).round(digits)  # One digit: plateaus and equally deep minima.
    table[[40, 41, 90], 2] = np.nan
    table[[60, 200], 3] = np.inf, -np.inf
    expected = moments_by_a_plain_loop(table, strongest)
    np.testing.assert_array_equal(moments_of_learning(table, strongest), expected)
    assert expected.any(0).all()


@pytest.mark.slow
def test_the_expected_coincidences_and_their_band_are_those_of_many_random_shifts():
    found = synchrony(together(1, 60, 8), strongest=6)
    random = np.random.default_rng(0)
    draws = np.array([shifted_counts(found.moments, random)[2:-2] for _ in range(20_000)])
    error = draws.std(0) / np.sqrt(len(draws))
    assert (abs(draws.mean(0) - found.expected) <= 4.5 * error).all()
    np.testing.assert_allclose((found.band - found.expected) / 2, draws.std(0), atol=0.03)


@pytest.mark.slow
def test_the_drawn_counts_are_those_of_random_shifts():
    found = synchrony(together(1, 60, 8), strongest=6, draws=20_000)
    random = np.random.default_rng(0)
    twin = [shifted_counts(found.moments, random) for _ in range(20_000)]
    shared = np.array([c[c > 1].sum() for c in twin])
    pairs = np.array([(c * (c - 1) // 2).sum() for c in twin])
    for drawn, brute in ((found.null, shared), (found.null_pairs, pairs)):
        error = np.hypot(drawn.std(), brute.std()) / np.sqrt(20_000)
        assert abs(drawn.mean() - brute.mean()) < 4.5 * error
        assert drawn.std() == pytest.approx(brute.std(), rel=0.03)
    counts = found.moments.sum(1)
    np.testing.assert_array_equal(found.coincidences, counts)
    assert found.synchronized == counts[counts > 1].sum()
    assert found.pairs == sum(c * (c - 1) // 2 for c in counts)
    assert found.p_value == (1 + (found.null >= found.synchronized).sum()) / 20_001
    assert found.p_pairs == (1 + (found.null_pairs >= found.pairs).sum()) / 20_001


@pytest.mark.parametrize("layers", [6, 20])
def test_planted_synchrony_is_found(layers):
    found = synchrony(together(0, 1000, layers))
    assert found.p_value < 0.005
    assert found.p_pairs < 0.005


def test_pairs_find_the_synchrony_of_many_layers_where_the_shared_moments_cannot():
    found = synchrony(np.repeat(independent(0, 1000, 1), 50, axis=1))
    assert found.synchronized == 1000
    assert found.p_value > 0.5  # Four shifts leave every moment in company.
    assert found.p_pairs < 0.002
    assert found.null_pairs.mean() == pytest.approx(found.pairs / 4, rel=0.1)


@pytest.mark.parametrize("memory", [0.0, 0.9])
def test_independent_layers_are_called_synchronized_no_more_often_than_promised(memory):
    runs = 400
    found = [synchrony(independent(s, 300, 8, memory), draws=200, seed=s) for s in range(runs)]
    most = runs * 0.05 + 3 * np.sqrt(runs * 0.05 * 0.95)
    for alarms in (sum(f.p_value <= 0.05 for f in found), sum(f.p_pairs <= 0.05 for f in found)):
        # Conservative, by the draws that keep an alignment, but a test that never fires is no test.
        assert 1 <= alarms <= most


def test_a_few_layers_cannot_be_significant():
    for layers, least in ((2, 1 / 4), (3, 1 / 16)):
        found = synchrony(np.repeat(independent(0, 1000, 1), layers, axis=1), draws=4000)
        assert found.p_pairs == pytest.approx(least, rel=0.2)


def test_correlation_is_pearsons():
    table = together(0, 200, 4)
    expected = np.corrcoef(table.T)
    np.testing.assert_allclose(synchrony(table).correlation, expected, atol=1e-12)
    tiny = synchrony(table * [1e-200, 1e200, 1, 1]).correlation
    np.testing.assert_allclose(tiny, expected, atol=1e-12)
    table[:, 1] = 0.1
    table[7, 2] = np.nan
    found = synchrony(table).correlation
    assert np.isnan(found[1]).all()
    rest, rows = [0, 2, 3], np.arange(200) != 7
    expected = np.corrcoef(table[rows][:, rest].T)
    np.testing.assert_allclose(found[np.ix_(rest, rest)], expected, atol=1e-12)


def test_adding_a_constant_or_scaling_changes_nothing_and_waiting_moves_everything():
    table = together(3, 200, 5)
    found = synchrony(table)
    other = synchrony(4 * table + 8)
    np.testing.assert_array_equal(other.moments, found.moments)
    later = synchrony(np.concatenate([np.zeros((30, 5)), table, np.zeros((30, 5))])[:-29])
    np.testing.assert_array_equal(later.null_pairs, found.null_pairs)
    np.testing.assert_allclose(later.expected[30:-1], found.expected)


def test_what_is_drawn_does_not_depend_on_how_it_is_cut_into_blocks(monkeypatch):
    table = together(0, 200, 5)
    whole = synchrony(table)
    monkeypatch.setattr("lightning_lca.record.synchrony._CELLS", 1000)
    np.testing.assert_array_equal(synchrony(table).null, whole.null)
    assert (synchrony(table, seed=1).null != whole.null).any()


def test_the_rates_of_one_call_are_those_of_two():
    table = together(0, 500, 6)
    edges = [0, 3, 100, 100 + 1, 500]
    found = synchrony(table, strongest=9, draws=300)
    at_once = Synchrony.of(Dips.of(table, 9), 500, 300, edges=edges)
    for name, values in vars(rates(found.moments, edges, draws=300)).items():
        np.testing.assert_array_equal(getattr(at_once.rates, name), values)
    np.testing.assert_array_equal(at_once.null_pairs, found.null_pairs)


@pytest.mark.parametrize("looked_at", [1, 12, 100, 10**6])
@pytest.mark.parametrize("falling", [-1, 0, 1])
def test_moments_do_not_depend_on_how_many_steps_are_looked_at_at_once(
    monkeypatch, looked_at, falling
):
    monkeypatch.setattr("lightning_lca.record.synchrony._LOOKED_AT", looked_at)
    table = independent(0, 400, 4) + falling * np.linspace(0, 20, 400)[:, None]
    table = table.round(1).astype(np.float32)  # As of a record; some are equally deep.
    dips = Dips.of(table, 7)
    np.testing.assert_array_equal(dips.moments(400), moments_by_a_plain_loop(table, 7))
    assert dips.depth.tolist() == table[dips.at, dips.layer].tolist()
    assert (np.lexsort((dips.layer, dips.at)) == np.arange(len(dips.at))).all()


def test_iterations_that_do_not_count_are_as_good_as_not_finite(monkeypatch):
    monkeypatch.setattr("lightning_lca.record.synchrony._LOOKED_AT", 30)
    table, counts = independent(0, 300, 4), np.random.default_rng(0).random(300) < 0.9
    without = np.where(counts[:, None], table, np.nan)
    found = Dips.of(table, 9, counts).moments(300)
    np.testing.assert_array_equal(found, moments_by_a_plain_loop(without, 9))


def test_rates_are_pairs_per_iteration_and_add_up():
    found = synchrony(together(0, 500, 6), draws=300)
    edges = np.array([0, 3, 100, 500])
    binned = rates(found.moments, edges, draws=300)
    pairs = found.coincidences * (found.coincidences - 1) // 2
    expected = [pairs[a:b].mean() for a, b in pairwise(edges)]
    np.testing.assert_allclose(binned.observed, expected)
    ends = rates(found.moments, [0, 500], draws=300)
    beyond = found.null_pairs.mean() - ends.expected[0] * 500  # Shifted off an end: a few at most.
    assert 0 <= beyond <= 1
    np.testing.assert_allclose(ends.expected * 500, binned.expected @ np.diff(edges))
    assert (binned.low <= binned.expected).all()
    assert (binned.expected <= binned.high).all()
    assert binned.observed[2] > binned.high[2]
    single = rates(found.moments, np.arange(501), draws=300)
    assert not single.expected[found.expected == 0].any()


@pytest.mark.parametrize("shape", [(0, 3), (1, 3), (2, 3), (5, 0), (5, 1)])
def test_short_and_narrow_tables_work(shape):
    found = synchrony(np.arange(np.prod(shape), dtype=float).reshape(shape))
    assert not found.moments.any()
    assert found.expected.shape == found.band.shape == shape[:1]
    assert found.correlation.shape == (shape[1], shape[1])
    assert (found.synchronized, found.p_value, found.p_pairs) == (0, 1, 1)


def test_numbers_that_are_not_finite_make_no_moment():
    table = np.array([[0, -np.inf, 0, np.nan, -1, np.nan, 0, -1, 0, np.inf, -1, 0]]).T
    assert moments_of_learning(table).nonzero()[0].tolist() == [7]
    assert np.isnan(synchrony(np.full((9, 2), np.nan)).correlation).all()


def work(table):
    """How many functions are called for a table, and how many times its size is held at most."""
    calls = 0

    def count(frame, event, argument):
        nonlocal calls
        calls += event in ("call", "c_call")

    tracemalloc.start()
    sys.setprofile(count)
    try:
        synchrony(table)
    finally:
        sys.setprofile(None)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return calls, most / table.nbytes


def test_a_long_run_takes_a_moment():
    short, _ = work(independent(0, 1_000, 50))
    long, size = work(independent(0, 100_000, 50))
    assert long < short + 1_000, "no loop goes over the steps"
    assert size < 3


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"allocated": [1.0, 2.0]}, r"\[2\]"),
        ({"allocated": [["a"]]}, "a"),
        ({"allocated": [[1j]]}, "1j"),
        ({"allocated": [[1.0], [1.0, 2.0]]}, r"\[1.0, 2.0\]"),
        ({"strongest": 0}, "strongest .* 0"),
        ({"strongest": 2.5}, "strongest .* 2.5"),
        ({"draws": 0}, "draws .* 0"),
        ({"seed": -1}, "seed .* -1"),
    ],
)
def test_bad_arguments_are_named(change, found):
    with pytest.raises(ValueError, match=found):
        synchrony(**{"allocated": np.zeros((9, 2)), **change})


@pytest.mark.parametrize("edges", [[0], [0, 0], [4, 2], [-1, 3], [0, 10], [[0, 1]]])
def test_bad_edges_are_named(edges):
    with pytest.raises(ValueError, match="Edges must"):
        rates(np.zeros((9, 2), bool), edges)
