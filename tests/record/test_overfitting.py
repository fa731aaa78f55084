"""Which layers help train and hurt validation, since when: planted ones are found, others not."""

import numpy as np
import pytest
from support.training import fit

from lightning_lca import History, figures
from lightning_lca.record import overfitting
from lightning_lca.record.overfitting import Overfitting
from lightning_lca.record.tables import StepTable

NAMES = ("good", "turns", "hurts")
STEPS, TURN = 200, 80


def run(credit, every=1, names=NAMES):
    """A history with these credits [T, L], whose ledger closes."""
    steps, groups = credit.shape
    loss = 4 + np.append(0, np.nan_to_num(credit).sum(1).cumsum())
    none, count = np.zeros(steps), np.ones((steps, groups), np.uint8)
    history = History(list(names), [9] * groups)
    history.append(
        StepTable(
            every * np.arange(1, steps + 1),
            credit.astype(np.float32),
            count,
            count,
            loss[:-1],
            loss[1:],
            none,
            none,
            np.ones(steps, int),
            np.full(steps, True),
            np.full(steps, 9 * groups),
            none,
        )
    )
    return history


def planted(seed=0, turn=TURN, noise=0.004):
    """Train and val: one layer generalizes, one turns at a step, one hurts val throughout."""
    random = np.random.default_rng(seed)
    after = np.arange(STEPS) >= turn
    val = np.stack([np.full(STEPS, -0.01), np.where(after, 0.01, -0.01), np.full(STEPS, 0.01)], 1)
    train = np.full((STEPS, 3), -0.01)
    return [run(c + random.normal(0, noise, c.shape)) for c in (train, val)]


@pytest.mark.parametrize("turn", [50, 80, 150])
def test_a_layer_that_turns_is_found_with_the_step_at_which_it_does(turn):
    found = Overfitting.of(*planted(turn=turn))
    assert found.overfits.tolist() == [False, True, True]
    assert abs(found.since[1] - turn) <= 3
    assert found.since[2] <= 3
    assert found.given_back[1] == pytest.approx(0.01 * (STEPS - turn), abs=0.15)


def test_what_hurts_both_or_helps_both_is_no_overfitting():
    train, val = planted()
    assert not Overfitting.of(val, val).overfits.any()
    assert not Overfitting.of(train, train).overfits.any()
    assert not Overfitting.of(val, train).overfits.any()


def test_swings_without_direction_are_seldom_called_overfitting():
    random = np.random.default_rng(0)
    called = []
    for _ in range(100):
        val = random.normal(0, 0.01, (STEPS, 3))
        train = run(np.full((STEPS, 3), -0.01))
        called.append(Overfitting.of(train, run(val)).overfits.mean())
    assert np.mean(called) < 0.12


def test_few_steps_are_no_ground_for_a_verdict():
    train, val = (run(h.allocated[:40]) for h in planted(turn=10))
    assert not Overfitting.of(train, val).overfits.any()


def test_the_sums_are_those_of_the_histories_whatever_steps_they_share():
    train, val = planted()
    sparse = run(val.allocated.reshape(-1, 4, 3).sum(1), every=4)
    found = Overfitting.of(train, sparse)
    assert found.steps.tolist() == list(range(0, STEPS + 1, 4))
    assert found.train[-1] == pytest.approx(train.allocated.sum(0))
    assert found.val[-1] == pytest.approx(val.allocated.sum(0), rel=1e-5)
    assert found.train[5] == pytest.approx(train.allocated[:20].sum(0))


def test_steps_that_are_not_finite_are_left_out():
    train, val = planted()
    credit = val.allocated.copy()
    credit[3] = np.nan
    found = Overfitting.of(train, run(credit))
    assert found.val[-1] == pytest.approx(np.delete(val.allocated, 3, 0).sum(0))
    assert found.overfits.tolist() == [False, True, True]


def test_histories_that_share_nothing_are_refused():
    train, val = planted()
    with pytest.raises(ValueError, match="no layer or no measured step in common"):
        Overfitting.of(train, run(val.allocated, names=("a", "b", "c")))


def test_the_summary_marks_layers_that_overfit():
    train, val = planted()
    head, good, turns, hurts = overfitting.text({"train": train, "val": val}).splitlines()
    assert head.split() == ["LCA", "train", "val"]
    assert "overfits" not in good
    assert "overfits since step" in turns
    assert "overfits since step" in hurts
    assert [float(v) for v in good.split()[1:]] == pytest.approx(
        [train.allocated[:, 0].sum(), val.allocated[:, 0].sum()], abs=1e-4
    )
    assert overfitting.text({"train": train}) == overfitting.text({None: train}) == ""


def test_the_callback_tells_train_from_val_where_both_are_probes(tmp_path):
    from support.models import Validated, toy_loader

    data = toy_loader(), toy_loader(shuffle=False)
    probes = {"train": "train", "val": "val"}
    told = fit(tmp_path, model=Validated, data=data, probe=probes).lca.summary()
    assert len([line for line in told.splitlines() if line.split() == ["LCA", "train", "val"]]) == 1
    assert told.count("probe 'val'") == 1


def test_the_figure_marks_what_overfits_and_nothing_else():
    train, val = planted()
    figure = figures.generalization(train, val)
    titles = {axes.get_title("left"): axes.get_title("right") for axes in figure.axes}
    found = Overfitting.of(train, val)
    assert titles["good"] == ""
    assert titles["turns"] == f"overfits from step {found.since[1]}"
    for axes, name in zip(figure.axes, NAMES):
        i = NAMES.index(name)
        helped, checked = axes.lines[1:3]
        assert helped.get_ydata()[-1] == pytest.approx(found.train[-1, i])
        assert checked.get_ydata()[-1] == pytest.approx(found.val[-1, i])
        assert len(axes.collections) == found.overfits[i]
    assert "2 of 3 layers overfit" in figure.get_suptitle()
    assert "No layer" in figures.generalization(train, train).get_suptitle()


def test_of_many_layers_those_that_overfit_are_among_the_eight_drawn():
    random = np.random.default_rng(0)
    names = [f"layers.{i}" for i in range(40)]
    train = random.normal(-0.1, 0.001, (STEPS, 40))
    val = train.copy()
    train[:, 17], val[:, 17] = -0.001, 0.001
    figure = figures.generalization(run(train, names=names), run(val, names=names))
    shown = [axes.get_title("left") for axes in figure.axes]
    assert len(shown) == 8
    assert "layers.17" in shown
    assert shown == sorted(shown, key=names.index)


def test_probes_are_drawn_together_where_they_are_train_and_val():
    train, val = planted()
    assert list(figures.between({"train": train, "val": val})) == ["generalization"]
    assert figures.between({"train": train, "class_1": val}) == {}
    assert figures.between({"train": train, "val": History(["a"], [1])}) == {}
