"""Which layers overfit, as the tab tells it: numpy's sums on the record, and planted verdicts."""

from dataclasses import replace

import numpy as np
import pytest
from support.noise import noisy
from support.routes import Store

from lightning_lca import History
from lightning_lca.record.overfitting import Overfitting
from lightning_lca.tensorboard.query import QueryError

STEPS, TURN = 200, 80
VERDICTS = ["overfits", "helps both", "helps val only", "hurts both", "helps train only"]


@pytest.fixture(scope="module")
def probes():
    """A layer for every verdict; the last hurts validation for too short a time to be told."""
    after = (np.arange(STEPS) >= TURN) * 1.0
    train = np.tile([-1.0, -1, 1, 1, -1], (STEPS, 1))
    val = np.stack([2 * after - 1, -after - 1.0, -after - 1.0, after + 1.0, 0 * after], 1)
    run = noisy(layers=5, steps=STEPS, planted=train, phi=0)
    val = noisy(seed=1, layers=5, steps=STEPS, planted=val, phi=0)
    # The last layer wanders on validation, and ends just above zero.
    credit = val.allocated
    credit[:, 4] -= credit[:, 4].mean() - 1e-5
    return {"train": run, "val": replaced(val, credit)}


def replaced(history, credit, rows=slice(None)):
    other = History(history.groups, history.sizes)
    other.append(replace(history.rows, allocated=credit)[rows])
    return other


@pytest.mark.parametrize(
    "span", [{}, {"bins": 7}, {"start": 31, "stop": 180, "bins": 11}, {"bins": 2000}], ids=str
)
def test_the_sums_at_every_edge_are_numpys_on_the_record(probes, span):
    answer = Store(run=probes).ask("generalization", run="run", **span)
    first, last = span.get("start", 1), span.get("stop", STEPS)
    assert (answer["edges"][0], answer["edges"][-1]) == (first - 1, last)
    assert answer["measured"] == last - first + 1
    for name, history in probes.items():
        since = [history.allocated[first - 1 : edge].sum(0) for edge in answer["edges"]]
        told = np.array(answer[name]).T
        assert told == pytest.approx(np.array(since), abs=1e-12)
        total = history.allocated[first - 1 : last].sum(0)
        assert answer[f"total_{name}"] == pytest.approx(total, abs=1e-12)


def test_every_layer_gets_its_verdict(probes):
    answer = Store(run=probes).ask("generalization", run="run")
    assert answer["verdict"] == VERDICTS
    since, *others = answer["since"]
    assert abs(since - TURN) <= 5
    assert others == [None] * 4
    given, *others = answer["given_back"]
    assert given == pytest.approx(probes["val"].allocated[since:, 0].sum())
    assert others == [None] * 4
    assert answer["most_telling"][0] == 0
    assert sorted(answer["most_telling"]) == list(range(5))
    # Before the turn nobody overfits: the verdict is that of the range.
    early = Store(run=probes).ask("generalization", run="run", stop=TURN)
    assert early["verdict"][0] == "helps both"
    # And it is the one of summary and figure.
    assert Overfitting.of(probes["train"], probes["val"]).verdicts == tuple(VERDICTS)


def test_only_steps_that_both_measured_and_that_are_finite_count(probes):
    train, val = probes["train"], probes["val"]
    broken = train.allocated.copy()
    broken[7] = np.nan
    every = np.arange(STEPS) % 4 == 3
    fourth = replaced(val, val.allocated, every)
    run = {"train": replaced(train, broken), "val": fourth}
    answer = Store(run=run).ask("generalization", run="run", bins=2000)
    assert answer["edges"] == list(range(0, STEPS + 1, 4))
    assert answer["measured"] == STEPS // 4
    assert answer["total_train"] == pytest.approx(np.delete(train.allocated, 7, 0).sum(0))
    assert answer["total_val"] == pytest.approx(val.allocated[every].sum(0))


def test_of_a_long_run_the_curves_are_exact_at_fewer_steps():
    steps, turn = 10_000, 6000
    turns = np.where(np.arange(steps)[:, None] >= turn, [1.0, -1], -1)
    run = {
        "train": noisy(steps=steps, layers=2, planted=-1),
        "val": noisy(seed=1, steps=steps, layers=2, planted=turns),
    }
    answer = Store(run=run).ask("generalization", run="run", bins=10)
    assert answer["measured"] == steps
    assert answer["verdict"] == ["overfits", "helps both"]
    assert abs(answer["since"][0] - turn) < 50
    for name, history in run.items():
        assert answer[f"total_{name}"] == pytest.approx(history.allocated.sum(0))
        for k, edge in enumerate(answer["edges"]):
            # At the last step before the edge that is looked at.
            near = [history.allocated[: edge - back].sum(0) for back in range(5)]
            told = [row[k] for row in answer[name]]
            assert any(told == pytest.approx(sums) for sums in near)


def test_a_range_without_a_step_is_answered(probes):
    answer = Store(run=probes).ask("generalization", run="run", start=500, stop=600)
    assert answer["measured"] == 0
    assert answer["verdict"] == ["does nothing"] * 5
    assert answer["total_val"] == [0] * 5


def test_what_cannot_be_compared_is_told(probes):
    with pytest.raises(QueryError, match=r"no probes named train and val.*LCACallback\(probe="):
        Store(run=probes["train"]).ask("generalization", run="run")
    other = History(["elsewhere"], [3])
    other.append(noisy(layers=1).rows)
    with pytest.raises(QueryError, match="no layer in common"):
        Store(run=probes | {"val": other}).ask("generalization", run="run")
