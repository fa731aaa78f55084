"""Data frames: the same numbers as the history's, under their steps, groups and units."""

import builtins

import numpy as np
import pytest
from support.models import Validated, toy_loader
from support.training import fit

from lightning_lca import History
from lightning_lca.record.frames import frame


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A run with every table, in memory and as it is read back."""
    lca = fit(
        tmp_path_factory.mktemp("run"),
        model=Validated,
        data=(toy_loader(), toy_loader(shuffle=False)),
        steps=24,
        trainer={"log_every_n_steps": 7},
        neurons=True,
        track_parameters=True,
        breakdown=True,
        oscillation=True,
        probe_batches=3,
    ).lca
    return {"memory": lca.history, "disk": History.load(lca.log_dir)}


@pytest.fixture(params=["memory", "disk"])
def history(measured, request):
    return measured[request.param]


def test_steps_have_a_row_each_with_losses_and_the_sum_of_credits(history):
    steps = history.to_pandas()
    assert steps.index.name == "step"
    assert steps.index.tolist() == history.steps.tolist()
    for name in ("loss_before", "loss_after", "residual", "drift", "splits", "converged"):
        assert np.array_equal(steps[name], getattr(history, name)), name
    for name in ("trained", "seconds", "finite"):
        assert np.array_equal(steps[name], getattr(history, name)), name
    whole = steps["loss_after"].iloc[-1] - steps["loss_before"].iloc[0]
    assert steps[["lca", "residual", "drift"]].to_numpy().sum() == pytest.approx(whole)


def test_groups_have_a_row_for_each_step(history):
    groups = history.to_pandas("groups")
    assert groups.index.names == ["step", "group"]
    assert len(groups) == len(history) * len(history.groups)
    for name, values in (
        ("lca", history.allocated),
        ("helping", history.helping),
        ("hurting", history.hurting),
        ("sampling_error", history.sampling_error),
    ):
        assert np.array_equal(groups[name].unstack()[list(history.groups)], values), name
    for k, name in enumerate(history.oscillation.names):
        turns = groups[name].unstack()[list(history.groups)]
        assert np.array_equal(turns, history.oscillation.allocated[:, :, k], equal_nan=True)
    of_one = groups.xs(history.groups[1], level="group")
    assert set(of_one["layer"]) == {history.layers[1]}
    assert set(of_one["weights"]) == {history.sizes[1]}


def test_shares_of_a_breakdown_add_up_to_the_credit(history):
    groups, shares = history.to_pandas("groups"), history.to_pandas("breakdowns")
    assert shares.index.equals(groups.index)
    assert shares.columns.names == ["breakdown", "share"]
    assert set(shares.columns.get_level_values(0)) == set(history.breakdowns)
    for name, split in history.breakdowns.items():
        assert tuple(shares[name].columns) == split.names
        assert shares[name].sum(axis=1).to_numpy() == pytest.approx(groups["lca"], abs=1e-6)


def test_batches_have_the_credit_on_each(history):
    batches = history.to_pandas("batches")
    assert batches.columns.tolist() == [0, 1, 2]
    mean = batches.mean(axis=1).to_numpy()
    assert mean == pytest.approx(history.to_pandas("groups")["lca"].to_numpy(), abs=1e-6)


@pytest.mark.parametrize("table", ["parameters", "neurons", "weights"])
def test_windows_have_a_row_for_each_thing(history, table):
    windows, made = getattr(history, table), history.to_pandas(table)
    assert made.index.names == ["step", table[:-1]]
    wide = made["lca"].unstack()[list(windows.names)]
    assert wide.index.tolist() == windows.steps.tolist()
    assert np.array_equal(wide, windows.allocated)
    assert made["measured"].groupby("step").first().tolist() == windows.measured.tolist()
    if table == "weights":
        assert made["helped"].tolist() == windows.helping.ravel().tolist()
    else:
        last = made.loc[windows.steps[-1]]
        assert tuple(last["layer"]) == windows.layers
        sums = last.groupby("layer", observed=True, sort=False)["lca"].sum()
        assert tuple(sums.index) == tuple(dict.fromkeys(windows.layers))
    if table == "parameters":
        assert tuple(made.loc[windows.steps[0]]["kind"]) == windows.kinds


def test_what_was_not_recorded_is_said_with_what_records_it(tmp_path):
    history = fit(tmp_path, steps=4).lca.history
    for table, remedy in (
        ("neurons", r"no neurons.*LCACallback\(neurons=True\)"),
        ("weights", r"no weights.*LCACallback\(track_parameters=True\)"),
        ("breakdowns", r"no breakdowns.*LCACallback\(breakdown=True\)"),
        ("batches", r"no credit of single batches.*LCACallback\(probe_batches=4\)"),
    ):
        with pytest.raises(ValueError, match=remedy):
            history.to_pandas(table)
    with pytest.raises(ValueError, match=r"table must be one of 'steps', 'groups'.*; got 'layers'"):
        history.to_pandas("layers")


def test_without_pandas_one_error_says_what_to_do(monkeypatch):
    found = builtins.__import__

    def absent(name, *args, **kwargs):
        if name == "pandas":
            raise ModuleNotFoundError("No module named 'pandas'", name="pandas")
        return found(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ModuleNotFoundError, match=r"Run: pip install pandas\. Without it") as error:
        History(["a"], [1]).to_pandas()
    assert error.value.name == "pandas"


def test_a_run_without_steps_gives_empty_frames():
    history = History(["conv", "fc"], [100, 7])
    assert history.to_pandas().empty
    assert frame(history, "groups").index.names == ["step", "group"]
