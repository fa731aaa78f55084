"""Breakdowns in the record: what is written is read back, whatever other sessions or damage say."""

import numpy as np
import pytest
from support.records import GROUPS, SIZES, chunk, description, write

from lightning_lca import History, figures
from lightning_lca.record import eventfile, export, summary

NAMES = ("signal", "noise", "other")


def split(rows=8):
    """Shares that add up to the credit of `chunk`, -0.05 each."""
    shares = np.zeros((rows, len(GROUPS), 3), np.float32)
    shares[:] = [-0.5, 0.4375, 0.0125]
    return shares


def said(**more):
    return {eventfile.META: description(**({"breakdowns": {"part": NAMES}} | more))}


def test_a_record_without_a_breakdown_loads_and_one_with_it_is_read(tmp_path):
    write(tmp_path / "old", {eventfile.META: description()}, chunk())
    assert History.load(tmp_path / "old").breakdowns == {}
    write(tmp_path / "new", said(), chunk(split_part=split()))
    part = History.load(tmp_path / "new").breakdowns["part"]
    assert part.names == NAMES
    assert np.array_equal(part.allocated, split())


def test_sessions_with_and_without_it_are_one_history(tmp_path):
    """Steps that were measured without it have no shares, and no step is lost."""
    bare = {eventfile.META: description()}
    later = said(first_step=8)
    write(tmp_path, bare, chunk(), later, chunk(9, split_part=split()))
    history = History.load(tmp_path)
    assert (len(history), history.lost) == (16, 0)
    shares = history.breakdowns["part"].allocated
    assert np.isnan(shares[:8]).all()
    assert np.array_equal(shares[8:], split())
    text = summary.text(history)
    assert "signal" in text
    assert "-8.0000" in text, "8 steps, two layers of -0.5"
    figures.breakdown(history, "part")


def test_a_part_that_is_not_declared_is_of_a_later_version(tmp_path):
    write(tmp_path, {eventfile.META: description()}, chunk(split_part=split()))
    history = History.load(tmp_path)
    assert (len(history), history.lost, history.breakdowns) == (8, 0, {})


@pytest.mark.parametrize(
    "shares",
    [
        None,
        np.zeros((8, 2, 2), np.float32),
        np.zeros((8, 3, 3), np.float32),
        np.zeros((7, 2, 3), np.float32),
        np.zeros((8, 6), np.float32),
        np.zeros(8, np.float32),
        np.array(1.0, np.float32),
        np.zeros((8, 2, 3), np.int32),
        b"{}\n",
    ],
    ids=str,
)
def test_shares_that_do_not_fit_cost_their_own_steps(tmp_path, shares):
    write(tmp_path, said(), chunk(1, split_part=split()), chunk(9, split_part=shares))
    history = History.load(tmp_path)
    assert (history.steps.tolist(), history.lost) == ([*range(1, 9)], 1)


@pytest.mark.parametrize(
    ("breakdowns", "says"),
    [
        ([0], "breakdowns is a list of 1"),
        ({"A/b": NAMES}, "expected small letters"),
        ({"part": "signal"}, "expected a list"),
        ({"part": [1]}, "part holds 1"),
        ({"part": ["a", "a"]}, "'a' twice"),
    ],
    ids=str,
)
def test_a_description_that_cannot_be_used_is_told(tmp_path, breakdowns, says):
    write(tmp_path, said(breakdowns=breakdowns), chunk())
    with pytest.raises(FileNotFoundError, match=says):
        History.load(tmp_path)


def test_more_columns_than_can_be_are_refused(tmp_path):
    groups = [str(i) for i in range(1000)]
    more = {"groups": groups, "sizes": [1] * 1000, "breakdowns": {"a": groups, "b": groups}}
    write(tmp_path, said(**more, probes=["a", "b", "c"]), chunk())
    with pytest.raises(FileNotFoundError, match="2,001 columns each"):
        History.load(tmp_path)


def test_the_exports_have_a_column_per_share(tmp_path):
    write(tmp_path, said(), chunk(split_part=split()))
    history = History.load(tmp_path)
    wide, long, arrays = export.wide(history), export.long(history), export.arrays(history)
    for k, name in enumerate(NAMES):
        expected = split()[:, :, k]
        for g, group in enumerate(GROUPS):
            assert np.array_equal(wide[f"part/{name}/{group}"], expected[:, g])
        assert np.array_equal(long[f"part/{name}"], expected.reshape(-1))
    assert np.array_equal(arrays["part_allocated"], split())
    assert arrays["part_names"].tolist() == list(NAMES)


def test_the_figure_adds_up_and_says_what_is_missing(tmp_path):
    write(tmp_path, said(), chunk(split_part=split()))
    history = History.load(tmp_path)
    assert "breakdown_part" in figures.available(history)
    figure = figures.breakdown(history, "part")
    bars = {axes.get_title(): [bar.get_width() for bar in axes.patches] for axes in figure.axes}
    assert list(bars) == ["signal", "noise", "other", "LCA"]
    whole = np.sum([bars["signal"], bars["noise"], bars["other"]], axis=0)
    np.testing.assert_allclose(whole, bars["LCA"], rtol=1e-6)
    np.testing.assert_allclose(bars["signal"], [-4, -4])
    assert figure.get_suptitle().endswith("Signal helped most (−8), noise hurt most (+7)")
    with pytest.raises(ValueError, match=r"no breakdown 'order'.*LCACallback\(breakdown="):
        figures.breakdown(history, "order")


def test_a_table_names_its_columns(tmp_path):
    history = History(GROUPS, SIZES, breakdowns={"part": NAMES})
    assert history.breakdowns["part"].allocated.shape == (0, 2, 3)
    assert "no step" in history.summary()
