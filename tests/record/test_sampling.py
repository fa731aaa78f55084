"""How far credit holds on other data, where the data is drawn here and its truth is known."""

from dataclasses import replace

import numpy as np
import pytest
from support.noise import noisy

from lightning_lca import figures
from lightning_lca.record import summary
from lightning_lca.record.sampling import of_run, signs

L, T = 6, 100


def drawn(seed, examples, batches=8, spread=1.0, layers=L):
    """A run on batches of so many examples each; its truth is the mean over all such data."""
    draws = np.random.default_rng(seed)
    truth = draws.standard_normal((T, layers)) * np.linspace(0.5, 2, layers)
    error = spread * draws.standard_normal((T, layers, batches)) / np.sqrt(examples)
    values = truth[:, :, None] + error
    run = noisy(seed, T, layers=layers)
    run.split_into({}, batches)
    run._parts = [replace(run.rows, allocated=values.mean(2), shares={"batch": values})]
    return run, truth


def test_the_interval_of_a_run_is_students_and_covers_the_truth_as_often_as_said():
    t = pytest.importorskip("scipy.stats").t
    covered = []
    for seed in range(100):
        run, truth = drawn(seed, 10, batches=4)
        found = of_run(run)
        sums = run.by_batch.allocated.sum(0)
        reach = t.ppf(0.975, 3) * sums.std(1, ddof=1) / 2
        np.testing.assert_allclose(found.reach, reach, rtol=1e-8)
        covered += list(np.abs(run.allocated.sum(0) - truth.sum(0)) <= found.reach)
    assert found.batches == 4
    assert 0.93 < np.mean(covered) < 0.97


@pytest.mark.parametrize("examples", [2, 20])
def test_signs_are_right_as_often_as_estimated(examples):
    """The estimate, and the number of examples that it asks for, against fresh draws."""
    told, true, needed = [], [], []
    for seed in range(20):
        run, truth = drawn(seed, examples, spread=3.0)
        found = signs(run, 8 * examples)
        told.append(found.right)
        true.append((np.sign(run.allocated) == np.sign(truth)).mean())
        needed.append(found.examples)
    assert np.mean(told) == pytest.approx(np.mean(true), abs=0.02)
    enough = []
    for seed in range(20):
        run, truth = drawn(seed, np.median(needed) / 8, spread=3.0)
        enough.append((np.sign(run.allocated) == np.sign(truth)).mean())
    assert np.mean(enough) == pytest.approx(0.95, abs=0.01)


def test_what_cannot_be_told_is_not():
    run, _ = drawn(0, 10, batches=3)
    assert signs(run, 30) is None, "too few batches"
    assert of_run(noisy()) is None, "one batch"
    run, _ = drawn(0, 10)
    run._parts = [run.rows[:5]]
    assert signs(run, 80) is None, "too few steps"
    run, _ = drawn(0, 10)
    pure = run.by_batch.allocated - run.allocated[:, :, None]
    run._parts = [replace(run.rows, allocated=0 * run.allocated + 1e-9, shares={"batch": pure})]
    assert signs(run, 80).examples is None, "no credit that is more than error"


def test_the_summary_and_the_figure_of_totals_show_it():
    run, _ = drawn(0, 10)
    reach = of_run(run).reach
    text = run.summary()
    assert "LCA  ± data" in text.splitlines()[0]
    for i, r in enumerate(reach):
        (row,) = [line for line in text.splitlines() if line.startswith(f"layer{i} ")]
        assert f"{r:.4f}" in row
    assert "± data: 95% interval over other data like the probe's, from 8 batches." in text
    assert f" ± {reach[2]:.4f} |" in summary.markdown(run)
    assert "± data" not in noisy().summary()
    two, _ = drawn(0, 10, batches=2)
    assert "Two tell next to nothing" in two.summary()
    figure = figures.totals(run)
    (axes,) = figure.axes
    (bars,) = [c for c in axes.collections if len(c.get_segments()) == L]
    lengths = [np.ptp(segment[:, 0]) / 2 for segment in bars.get_segments()]
    np.testing.assert_allclose(lengths, reach)
    assert "8 batches of the probe" in axes.get_xlabel()
