"""Periods that were put there are found, and none in noise."""

import numpy as np
import pytest

from lightning_lca import History, figures
from lightning_lca.analysis.oscillation import LAGS, WINDOW, autocorrelation, period
from lightning_lca.record.tables import StepTable

STEPS = 400


def slow(lags, rest):
    """The same by loops: mean and scale around each step, then products at each lag."""
    half = WINDOW // 2
    around = lambda x, t: x[max(0, t - half) : t + half + 1].mean(0)  # noqa: E731
    rest = np.array([rest[t] - around(rest, t) for t in range(len(rest))])
    rest = np.array([rest[t] / np.sqrt(around(rest**2, t)) for t in range(len(rest))])
    return np.array(
        [
            np.mean([rest[t] * rest[t - k] for t in range(k, len(rest))], 0) / (rest**2).mean(0)
            for k in range(1, lags + 1)
        ]
    )


def test_it_is_the_autocorrelation_by_loops():
    values = np.random.default_rng(0).normal(0, 1, (90, 3)).cumsum(0)
    np.testing.assert_allclose(autocorrelation(values, 5), slow(5, values), rtol=1e-9)


@pytest.mark.parametrize("length", [2, 3, 5, 8])
def test_a_planted_period_is_found_below_noise_and_a_falling_scale(length):
    random = np.random.default_rng(length)
    t = np.arange(STEPS)
    scale = 10.0 ** (-3 * t / STEPS)
    wave = np.cos(2 * np.pi * t / length) * scale - 3 * scale
    noisy = wave + random.normal(0, 0.3, STEPS) * scale
    assert period(autocorrelation(noisy[:, None])[:, 0]) == length


def test_noise_has_no_period():
    random = np.random.default_rng(1)
    noise = random.normal(0, 1, (STEPS, 200))
    slow_noise = noise.copy()
    for t in range(1, STEPS):
        slow_noise[t] += 0.7 * slow_noise[t - 1]
    for values in (noise, slow_noise):
        found = autocorrelation(values)
        assert sum(period(column) is not None for column in found.T) <= 2


def test_nothing_can_be_said_of_few_steps_or_of_rest():
    assert np.isnan(autocorrelation(np.ones((2 * LAGS - 1, 2)))).all()
    assert np.isnan(autocorrelation(np.ones((STEPS, 2)))).all()
    values = np.tile([1.0, -1.0], STEPS // 2)[:, None]
    values[7] = np.nan
    assert period(autocorrelation(values)[:, 0]) == 2


def test_the_figure_says_who_oscillates():
    random = np.random.default_rng(2)
    credit = random.normal(0, 1, (STEPS, 2))
    credit[:, 1] += 3 * np.tile([1, -1], STEPS // 2)
    counts, ones = np.ones((STEPS, 2), int), np.ones(STEPS)
    turns = np.full((STEPS, 2, 4), 0.25)
    turns[0] = np.nan
    turns[1:, 1, 0] = 0.75
    names = ("reversed", "flipped", "cosine_start", "cosine_end")
    history = History(["calm", "swings"], [2, 2], breakdowns={"oscillation": names})
    rows = (np.arange(1, STEPS + 1), credit, counts, counts, ones, ones, 0 * ones, 0 * ones)
    history.append(
        StepTable(*rows, counts[:, 0], ones > 0, counts[:, 0], ones, {"oscillation": turns})
    )
    assert history.breakdowns == {}
    assert "oscillation" in figures.available(history)
    figure = figures.oscillation(history)
    assert figure.get_suptitle() == (
        "swings oscillates with a period of 2 steps\nNo other layer does"
    )
    bars = figure.axes[1].patches
    np.testing.assert_allclose([bar.get_width() for bar in bars], [25, 75])
    with pytest.raises(ValueError, match="this record has 0"):
        figures.oscillation(_short(history))


def _short(history):
    other = History(history.groups, history.sizes)
    rows = history.rows[:3]
    nan = np.full((3, 2), np.nan)
    other.append(
        StepTable(
            rows.steps,
            nan,
            *[
                getattr(rows, n)
                for n in (
                    "helping",
                    "hurting",
                    "loss_before",
                    "loss_after",
                    "residual",
                    "drift",
                    "splits",
                    "converged",
                    "trained",
                    "seconds",
                )
            ],
        )
    )
    return other
