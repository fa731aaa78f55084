"""Sums of ranges from sums of blocks: those of numpy on all rows, whatever the range."""

import math
from dataclasses import replace

import numpy as np
import pytest
from support.noise import noisy

from lightning_lca import History
from lightning_lca.analysis.bins import Bins
from lightning_lca.analysis.sums import BLOCK, Column
from lightning_lca.record.layers import Layers
from lightning_lca.record.summary import PerStep
from lightning_lca.record.tables import StepTable
from lightning_lca.tensorboard.digest import Digester

ROWS = 1000


def dyadic(seed=0, shape=(ROWS, 5)):
    """Credits of which any sum is exact in float64, so that the order of adding does not matter."""
    whole = np.random.default_rng(seed).integers(-(2**23), 2**23, shape)
    return (whole * 2.0**-20).astype(np.float32)


def ranges():
    edges = [0, 1, 63, 64, 65, 127, 128, 129, 500, 512, 959, 960, 961, 999, 1000]
    return [(a, b) for a in edges for b in edges if a <= b]


@pytest.mark.parametrize("broken", [(), (0, 3, 64, 70, 127, 128, 500, 999)])
def test_a_range_is_the_exact_sum_of_its_rows(broken):
    values, counts = dyadic(), np.ones(ROWS, bool)
    counts[list(broken)] = False
    values[~counts] = [np.nan, np.inf, 1, -np.inf, 1e30]
    clean = np.where(counts[:, None], values, 0).astype(np.float64)
    column = Column.of(values, counts)
    for start, stop in ranges():
        total = column.total(slice(start, stop))
        if start < stop and not counts[start:stop].any():
            assert np.isnan(total).all()
        else:
            assert np.array_equal(total, clean[start:stop].sum(0))
    for most in (1, 2, 3, 7, 15, 16, 17, 333, 1000):
        tiles = Bins.by_steps(np.arange(1, ROWS + 1), 1, ROWS, most, finite=counts)
        bins = zip(tiles.cuts, tiles.cuts[1:])
        wanted = [clean[a:b].sum(0) if counts[a:b].any() else np.full(5, np.nan) for a, b in bins]
        assert np.array_equal(column.per_bin(tiles), wanted, equal_nan=True)


def test_of_any_credits_sums_are_exact_but_for_the_rounding_of_float64():
    random = np.random.default_rng(0)
    values = random.normal(size=(ROWS, 3)) * 10.0 ** random.uniform(-30, 30, (ROWS, 3))
    column = Column.of(values, np.ones(ROWS, bool))
    for start, stop in ranges():
        for told, part in zip(column.total(slice(start, stop)), values[start:stop].T):
            # The error of any order of adding (Higham 2002, equation 4.4).
            most = len(part) * 2.0**-53 * math.fsum(abs(part))
            assert abs(told - math.fsum(part)) <= most


def test_counts_are_whole_numbers():
    counts = np.random.default_rng(0).integers(0, 2**32, (ROWS, 4), np.uint32)
    column = Column.of(counts, np.ones(ROWS, bool))
    for start, stop in ranges():
        total = column.total(slice(start, stop))
        assert total.dtype == np.int64
        assert total.tolist() == [sum(part) for part in counts[start:stop].T.tolist()]


def test_a_digest_that_grew_is_one_made_at_once():
    run = noisy(steps=ROWS, layers=5)
    shares = {"part": dyadic(1, (ROWS, 5, 2))}
    shares["part"][100:200] = np.nan
    allocated = dyadic()
    allocated[[7, 80, 640]] = np.nan
    rows = replace(run.rows, allocated=allocated, shares=shares)
    history = History(run.groups, run.sizes, breakdowns={"part": ("a", "b")})
    growing = Digester(history)
    random = np.random.default_rng(0)
    for stop in [0, 0, *sorted(random.integers(0, ROWS, 60)), ROWS, ROWS]:
        digest = growing.digest(rows[:stop])
    at_once = Digester(history).digest(rows)
    finite = np.isfinite(allocated).all(1)
    for told in (digest, at_once):
        assert np.array_equal(told.per_step.finite, finite)
        credited = np.abs(np.where(finite[:, None], allocated, 0)).sum(1, dtype=float)
        assert np.array_equal(told.per_step.credited, credited)
        assert not told.per_step.unmoved.any()
        for name, column in told.columns.items():
            whole = shares["part"] if name == "part" else getattr(rows, name)
            counts = finite & np.isfinite(whole).reshape(ROWS, -1).all(1)
            assert np.array_equal(column.counts, counts)
            clean = np.where(counts.reshape(-1, *[1] * (whole.ndim - 1)), whole, 0)
            blocks = [
                clean[i : i + BLOCK].astype(column.blocks.dtype).sum(0)
                for i in range(0, ROWS - BLOCK + 1, BLOCK)
            ]
            assert np.array_equal(column.blocks, blocks)


def test_what_judges_a_step_is_the_same_for_many_and_for_one():
    rows = noisy(steps=60, layers=4).rows
    still = replace(rows, helping=rows.helping * 0, hurting=rows.hurting * 0)
    table = StepTable.join([rows, still])
    layers = Layers.of(["a", "a", "b", "c"])
    judged = PerStep.of(table, layers)
    assert judged.unmoved.tolist() == [False] * 60 + [True] * 60
    for i in (0, 59, 60, 119):
        a, b, c, d = table.allocated[i]
        assert judged.credited[i] == abs(a + b) + abs(c) + abs(d)
