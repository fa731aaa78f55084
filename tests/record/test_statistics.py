"""Tests of a mean: Student's t, equal-weighted cosines and Holm's rule, against other ways."""

import math

import numpy as np
import pytest

from lightning_lca.record.statistics import LEAST, Mean, holm, quantile, upper_tail

DEGREES = [1, 2, 3, 4, 5, 13, 14, 40, 861]


def ar1(seed, steps, phi, series=1):
    """Series whose every value keeps phi of the one before, from their own distribution on."""
    random = np.random.default_rng(seed)
    values = random.normal(size=(steps, series))
    values[0] /= math.sqrt(1 - phi**2)
    for t in range(1, steps):
        values[t] += phi * values[t - 1]
    return values


def slow_error(series):
    """The standard error by the definition: sums over cosines, one by one."""
    steps = len(series)
    degrees = math.floor(0.4 * steps ** (2 / 3))
    variance = 0.0
    for j in range(1, degrees + 1):
        wave = sum(
            math.cos(math.pi * j * (t - 0.5) / steps) * series[t - 1] for t in range(1, steps + 1)
        )
        variance += 2 / steps * wave**2 / degrees
    return math.sqrt(variance / steps), degrees


@pytest.mark.parametrize("degrees", DEGREES)
def test_students_t_is_that_of_scipy(degrees):
    t = pytest.importorskip("scipy.stats").t
    for value in [-math.inf, -30, -2.5, -0.3, 0, 0.01, 1, 2.2, 8, 50, math.inf]:
        assert upper_tail(value, degrees) == pytest.approx(t.sf(value, degrees), abs=4e-15)
    for p in [1e-6, 0.001, 0.025, 0.4, 0.5, 0.8, 0.975, 0.9999]:
        expected = t.ppf(p, degrees)
        assert quantile(p, degrees) == pytest.approx(expected, rel=1e-8, abs=1e-9)


def test_one_and_two_degrees_have_closed_forms():
    for value in [-3.0, 0.2, 1.7]:
        cauchy = 0.5 - math.atan(value) / math.pi
        assert upper_tail(value, 1) == pytest.approx(cauchy, abs=1e-15)
        two = 0.5 - value / (2 * math.sqrt(2 + value**2))
        assert upper_tail(value, 2) == pytest.approx(two, abs=1e-15)


@pytest.mark.parametrize(("p", "degrees"), [(0, 3), (1, 3), (math.nan, 3), (0.5, 0), (0.5, 2.5)])
def test_what_is_no_chance_or_no_number_of_degrees_is_refused(p, degrees):
    with pytest.raises(ValueError, match=r"0 < p < 1|whole number from 1"):
        quantile(p, degrees)


@pytest.mark.parametrize("steps", [50, 51, 200, 333])
def test_the_error_is_that_of_sums_over_cosines(steps):
    series = ar1(steps, steps, 0.6, 3) * [1, 1e-3, 40] + [0, 1, -7]
    mean = Mean.of(series)
    for i in range(3):
        error, degrees = slow_error(series[:, i])
        assert mean.degrees[i] == degrees
        assert mean.mean[i] == pytest.approx(series[:, i].mean())
        assert mean.error[i] == pytest.approx(error, rel=1e-9)


def test_p_and_interval_are_those_of_the_t_statistic():
    t = pytest.importorskip("scipy.stats").t
    mean = Mean.of(ar1(3, 150, 0.5, 4) + np.array([0, 0.3, -0.3, 2]))
    statistic = mean.mean / mean.error
    np.testing.assert_allclose(mean.above(), t.sf(statistic, mean.degrees), atol=1e-14)
    np.testing.assert_allclose(mean.below(), t.cdf(statistic, mean.degrees), atol=1e-14)
    np.testing.assert_allclose(mean.apart(), 2 * t.sf(abs(statistic), mean.degrees), atol=1e-14)
    low, high = mean.interval(0.01)
    reach = t.ppf(0.99, mean.degrees) * mean.error
    np.testing.assert_allclose([low, high], [mean.mean - reach, mean.mean + reach], rtol=1e-8)


def test_many_long_series_in_blocks_are_each_by_itself(monkeypatch):
    series = ar1(0, 500, 0.3, 7)
    whole = Mean.of(series)
    monkeypatch.setattr("lightning_lca.record.statistics._CELLS", 1000)
    np.testing.assert_allclose(Mean.of(series).error, whole.error, rtol=1e-12)
    np.testing.assert_allclose(Mean.of(series[:, [4]]).error, whole.error[4], rtol=1e-12)


def test_constants_are_certain_and_nothing_is_nothing():
    mean = Mean.of(np.ones((60, 3)) * [0.1, 0, -0.1])
    assert mean.error.tolist() == [0, 0, 0]
    assert mean.above().tolist() == [0, 0.5, 1]
    assert mean.apart().tolist() == [0, 1, 0]


@pytest.mark.parametrize("size", [1e-200, 1e200])
def test_credits_of_any_size_have_the_same_p(size):
    series = ar1(2, 100, 0.5) + 0.4
    assert Mean.of(size * series).above() == pytest.approx(Mean.of(series).above())


def test_too_few_steps_and_what_is_not_finite_are_refused():
    assert Mean.of(np.ones((LEAST, 1))).degrees == 5
    with pytest.raises(ValueError, match="at least 50 steps, got 49"):
        Mean.of(np.ones((LEAST - 1, 1)))
    with pytest.raises(ValueError, match="must be finite"):
        Mean.of(np.full((60, 1), np.nan))
    with pytest.raises(ValueError, match=r"\[steps, series\], got shape \[60\]"):
        Mean.of(np.ones(60))


def test_holm_is_its_definition():
    random = np.random.default_rng(0)
    for size in (1, 2, 7):
        p = random.uniform(size=size) ** 3
        corrected = holm(p)
        ordered = sorted(p)
        for value, told in zip(p, corrected):
            rank = ordered.index(value)
            steps = [(size - k) * ordered[k] for k in range(rank + 1)]
            assert told == pytest.approx(min(1, max(steps)))
    assert holm([]).size == 0


def rejections(phi, steps, runs=2000):
    """Share of series of noise that a nominal 5 % finds something in."""
    found = Mean.of(ar1(5, steps, phi, runs)).apart() <= 0.05
    return found.mean()


@pytest.mark.parametrize(("phi", "most"), [(-0.6, 0.06), (0, 0.065), (0.5, 0.065), (0.8, 0.10)])
def test_noise_is_significant_as_often_as_it_should_be(phi, most):
    assert 0.02 < rejections(phi, 200) < most
    # What the plain t-test makes of it, so that the comparison can fail.
    if phi == 0.8:
        series = ar1(5, 200, phi, 2000)
        plain = abs(series.mean(0)) / (series.std(0, ddof=1) / math.sqrt(200)) > 1.97
        assert plain.mean() > 0.4


def test_a_mean_of_three_standard_errors_is_found_in_most_runs():
    phi, steps = 0.5, 200
    true_error = 1 / (1 - phi) / math.sqrt(steps)
    found = Mean.of(ar1(6, steps, phi, 1000) + 3 * true_error).apart() <= 0.05
    assert 0.75 < found.mean() < 0.92


def test_errors_of_steps_and_of_data_add_up_in_squares():
    stats = pytest.importorskip("scipy.stats")
    draws = np.random.default_rng(5)
    mean = Mean.of(draws.standard_normal((300, 3)) + 0.1)
    batches = draws.standard_normal((5, 3)) * np.array([0.0, 0.1, 10.0])
    wide = mean.over(batches)
    np.testing.assert_allclose(wide.error**2, mean.error**2 + batches.var(0, ddof=1) / 5)
    low, high = wide.interval(0.025)
    np.testing.assert_allclose(high - low, 2 * stats.t.ppf(0.975, 4) * wide.error, rtol=1e-8)
    many = draws.standard_normal((100, 3))
    assert mean.over(many).degrees.tolist() == mean.degrees.tolist()


@pytest.mark.parametrize("steps", [999, 1000, 1001, 3500])
def test_of_a_long_series_means_of_neighbours_stand_for_its_steps(monkeypatch, steps):
    series = ar1(0, steps, 0.5, 3) + np.array([0, 1e3, -1])
    pieces = [series[:1], series[1:1], series[1:400], series[400:]]
    short = Mean.of_pieces(pieces, steps)
    whole = Mean.of(series)
    np.testing.assert_allclose(short.mean, whole.mean, rtol=1e-12)
    np.testing.assert_allclose(short.error, whole.error, rtol=1e-12)
    monkeypatch.setattr("lightning_lca.record.statistics._LONGEST", 500)
    found = Mean.of_pieces(pieces, steps)
    every = math.ceil(steps / 500)
    blocks = [series[i : i + every].mean(0) for i in range(0, steps - every + 1, every)]
    np.testing.assert_allclose(found.mean, series.mean(0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(found.error, Mean.of(np.array(blocks)).error, rtol=1e-12)
    assert found.degrees.tolist() == [int(0.4 * len(blocks) ** (2 / 3))] * 3


@pytest.mark.slow
@pytest.mark.parametrize("phi", [-0.6, 0, 0.8])
def test_the_mean_of_a_long_noise_is_called_apart_from_0_no_more_often_than_said(phi):
    p = Mean.of_pieces([ar1(1, 40_000, phi, 400)], 40_000).apart()
    assert (p < 0.05).sum() <= 0.05 * 400 + 2.33 * math.sqrt(0.05 * 0.95 * 400)
