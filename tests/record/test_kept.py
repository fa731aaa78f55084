"""A record of the version before the folders (commit d28cd56) reads as it did then."""

import json

import numpy as np
import pytest
from support import TESTS
from support.records import Tab, command

from lightning_lca import History, figures

KEPT = TESTS / "data" / "recorded_by_d28cd56"
THEN = json.loads((KEPT / "answers.json").read_text())


def lines(figure):
    return sorted(float(np.nansum(line.get_ydata())) for a in figure.axes for line in a.lines)


def assert_told(now, then, where=""):
    """What was told then is told now; more may be told."""
    if isinstance(then, dict):
        assert then.keys() <= now.keys(), where
        for key in then:
            assert_told(now[key], then[key], f"{where}.{key}")
    elif isinstance(then, list):
        assert len(now) == len(then), where
        for i, (a, b) in enumerate(zip(now, then)):
            assert_told(a, b, f"{where}.{i}")
    elif isinstance(then, float):
        assert now == pytest.approx(then, rel=1e-12, abs=1e-15), where
    else:
        assert now == then, where


@pytest.mark.parametrize("probe", ["train", "val"])
def test_the_history_is_the_same(probe):
    history, then = History.load(KEPT, probe), THEN[probe]
    assert (history.steps.tolist(), list(history.groups)) == (then["steps"], then["groups"])
    assert (history.sizes.tolist(), history.lost) == (then["sizes"], 0)
    for name, total in then["sums"].items():
        column = np.asarray(getattr(history, name), float)
        assert column.sum(0).tolist() == pytest.approx(total, rel=1e-12), name
    for name, window in then["windows"].items():
        table = history.windows[name]
        assert (len(table.names), table.names[0], table.names[-1]) == (
            window["names"],
            window["first"],
            window["last"],
        )
        assert table.steps.tolist() == window["steps"]
        assert table.allocated.sum() == pytest.approx(window["sum"], rel=1e-12)
        assert list(table.kinds) == list(window["kinds"])
        assert table.sampled_from == window["of"]
        assert (None if table.helping is None else table.helping.sum()) == window["helping"]


@pytest.mark.parametrize("probe", ["train", "val"])
def test_the_summary_tells_the_same_numbers(probe, capsys):
    _, out, err = command(capsys, "summary", KEPT, "--probe", probe)
    now = [line for line in out.splitlines() if not line.startswith("probe")]
    # Of the ledger, the number of each line; the words beside it may change.
    table = THEN[probe]["summary"].index("")
    assert now[: table + 1] == THEN[probe]["summary"][: table + 1]
    for a, b in zip(now[table + 1 : table + 6], THEN[probe]["summary"][table + 1 :]):
        assert a[:28] == b[:28]
    assert err == ""


@pytest.mark.parametrize("probe", ["train", "val"])
def test_figures_draw_the_same(probe):
    history, then = History.load(KEPT, probe), THEN[probe]["figures"]
    axes = figures.heatmap(history).axes[0]
    (mesh,) = [c for c in [*axes.collections, *axes.images] if c.get_array() is not None]
    cells = np.asarray(mesh.get_array(), float).reshape(len(history.groups), -1)
    assert cells.sum(1).tolist() == pytest.approx(then["heatmap"], rel=1e-12)
    assert lines(figures.cumulative(history)) == pytest.approx(then["cumulative"], rel=1e-9)
    assert lines(figures.ledger(history)) == pytest.approx(then["ledger"], rel=1e-9)


def test_the_tab_answers_the_same():
    tab = Tab(KEPT.parent)
    run = tab.run(KEPT.name)
    then = {k: v for k, v in THEN["runs"][0].items() if k not in ("name", "stamp")}
    assert_told(run, then)
    for probe in ("train", "val"):
        asked = {"run": KEPT.name, "probe": probe}
        then = THEN[probe]
        assert_told(tab.json("bins", bins=7, **asked), then["bins"])
        assert_told(tab.json("table", **asked), then["table"])
        assert_told(tab.json("helping", bins=3, **asked), then["helping"])
        layer = then["channels"]["layer"]
        assert_told(tab.json("channels", bins=3, layer=layer, **asked), then["channels"])
