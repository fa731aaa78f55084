"""The tab on records that are damaged, or made to harm: no run takes another's answer along."""

import csv
import json
import math
import shutil
import time
import zlib

import numpy as np
import pytest
from support import TESTS
from support.hostile import CHUNKS, DESCRIPTIONS, STEMS, window
from support.records import ROUTES, Tab, bounded, chunk, description, good, packed, write

from lightning_lca import History
from lightning_lca.record import eventfile
from lightning_lca.tensorboard import runs, views

META = eventfile.META
KEPT = TESTS / "data" / "recorded_by_d28cd56"


def assert_answer(route, reply):
    """An answer, or what is wrong in words; never a failure."""
    code, text = reply
    if code == 200 and route == "export":
        assert len(list(csv.reader(text.splitlines()))) > 1
        return
    said = json.loads(text, parse_constant=pytest.fail)
    assert code == 200 or (code == 400 and said["error"]), text


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    """A run that is well, beside many that are not."""
    root = tmp_path_factory.mktemp("logs")
    good(root / "good")
    for name, (data, _) in DESCRIPTIONS.items():
        write(root / "described" / name, {META: data}, chunk())
        write(root / "later" / name, {META: description()}, chunk(), {META: data})
    for name, changed in CHUNKS.items():
        said = {META: description()}
        write(root / "chunk" / name, said, chunk(1), chunk(9, **changed), chunk(17))
    write(root / "extreme", {META: description()}, extreme())
    return Tab(root)


def extreme():
    """A chunk of numbers that are finite, but whose sums are not."""
    scalars = np.full((8, 8), 1e308)
    scalars[:, 4:7] = 1
    return chunk(1, allocated=np.full((8, 2), -1e308), scalars=scalars)


@pytest.mark.slow
def test_runs_are_told_one_by_one(tab):
    names = [run["name"] for run in tab.json("runs")["runs"]]
    with bounded(calls=math.inf):  # How often it is asked depends on the machine.
        while any(run["rows"] is None and not run["error"] for run in tab.json("runs")["runs"]):
            time.sleep(0.2)
    told = {run["name"]: run for run in tab.json("runs")["runs"]}
    assert list(told) == names
    assert (told["good"]["rows"], told["good"]["lost"]) == (16, 0)
    for name, (_, why) in DESCRIPTIONS.items():
        run = told[f"described/{name}"]
        assert why in run["error"], name
        assert run["lost"] >= 1
        run = told[f"later/{name}"]
        assert (run["rows"], run["lost"], run["error"]) == (8, 1, None), name
    for name in CHUNKS:
        run = told[f"chunk/{name}"]
        assert (run["rows"], run["lost"]) == (16, 1), name


@pytest.mark.slow
@pytest.mark.parametrize("route", ROUTES)
def test_every_route_answers_or_says_why_not(tab, route):
    some = {"channels": {"layer": "conv"}}.get(route, {})
    for run in tab.json("runs")["runs"]:
        other = {"run_b": run["name"]} if route == "compare" else {}
        reply = tab.reply(route, run=run["name"], **some, **other)
        assert_answer(route, reply)
        if run["name"].startswith("described/"):
            assert reply[0] == 400
    assert tab.reply(route, run="good", **some, **({"run_b": "good"} if other else {}))[0] in (
        (400,) if route == "channels" else (200,)
    )


def test_one_run_that_fails_altogether_is_told_as_such(tmp_path, monkeypatch):
    good(tmp_path / "good")
    good(tmp_path / "bad")
    fed = runs._feed

    def fail(source, name, *rest):
        if name == "bad":
            raise MemoryError("much")
        return fed(source, name, *rest)

    monkeypatch.setattr(runs, "_feed", fail)
    tab = Tab(tmp_path)
    assert tab.run("good")["rows"] == 16
    assert "MemoryError: much" in tab.run("bad")["error"]
    assert tab.reply("bins", run="good")[0] == 200
    code, text = tab.reply("bins", run="bad")
    assert code == 500
    assert "MemoryError: much" in json.loads(text)["error"]


def test_a_view_that_fails_says_so_in_json(tmp_path, monkeypatch):
    good(tmp_path / "good")
    monkeypatch.setattr(views, "bins", lambda *_: {"a": object()})
    code, text = Tab(tmp_path).reply("bins", run="good")
    assert code == 500
    assert "cannot be answered" in json.loads(text)["error"]


@pytest.mark.slow
def test_very_many_layers_are_answered_or_refused_in_little(tmp_path):
    groups = [f"layer.{i}" for i in range(50_000)]
    said = {META: description(groups=groups, sizes=[1] * len(groups))}
    ones = np.ones((1, len(groups)), np.uint8)
    parts = {"allocated": ones.astype(np.float32), "helping": ones, "idle": 0 * ones}
    tags = [chunk(i, rows=1, **parts) for i in (1, 10**15)]
    write(tmp_path / "run", said, *tags)
    tab = Tab(tmp_path)
    tab.run("run")
    for route in ROUTES:
        other = {"compare": {"run_b": "run"}, "channels": {"layer": "layer.1"}}.get(route, {})
        with bounded(calls=5e6, megabytes=400):
            code, _ = tab.reply(route, run="run", bins=2000, **other)
        assert code == (400 if route in ("channels", "synchrony") else 200), route


@pytest.mark.slow
def test_many_neurons_are_not_made_before_there_are_rows(tmp_path):
    wide = packed("<f4", [1, 10**9], zlib.compress(bytes(2**28), 9))
    said = {META: description(windows=STEMS)}
    write(tmp_path / "run", said, chunk(), window(allocated=wide), window(first=9))
    with bounded():
        tab = Tab(tmp_path)
        assert (tab.run("run")["rows"], tab.run("run")["lost"]) == (8, 2)
        for route, reply in tab.routes("run").items():
            assert_answer(route, reply)


# -- clocks ---------------------------------------------------------------------------------------


def read_by_the_tab(root):
    tab = Tab(root)
    run = tab.run("run")
    if not run["rows"]:
        return [], run["lost"]
    table = list(csv.reader(tab.reply("export", run="run")[1].splitlines()))
    return [int(line[0]) for line in table[1:]], run["lost"]


@pytest.mark.parametrize("before", range(4), ids=lambda n: f"{n} chunks before")
def test_a_clock_set_back_by_two_hours_loses_nothing(tmp_path, before):
    now = time.time()
    chunks = [chunk(1 + 8 * i, loss=2 - 0.8 * i) for i in range(4)]
    times = [now + i for i in range(before + 1)]
    times += [now - 7200 + i for i in range(4 - before)]
    write(tmp_path / "run", {META: description()}, *chunks, at=times)
    assert read_by_the_tab(tmp_path) == (list(range(1, 33)), 0)
    assert len(History.load(tmp_path / "run")) == 32


@pytest.mark.parametrize("back", [0.5, 30, 7200])
def test_a_clock_set_back_in_a_second_session_loses_nothing(tmp_path, back):
    now = time.time()
    again = {META: description(first_step=8)}
    tags = [{META: description()}, chunk(1, loss=5), chunk(9, loss=4.2), again]
    tags += [chunk(9, rows=4, loss=4.2), chunk(13, loss=3.8), chunk(21, loss=3)]
    times = [now, now + 60, now + 120, now + 10_000, now + 10_060]
    times += [now + 10_060 - back, now + 10_061 - back]
    file = write(tmp_path / "run", *tags, at=times)
    assert history_steps(file.parent) == list(range(1, 29))
    assert read_by_the_tab(tmp_path) == (list(range(1, 29)), 0)


def history_steps(directory):
    return History.load(directory).steps.tolist()


def test_windows_are_found_with_the_chunks_that_they_belong_to(tmp_path):
    now = time.time()
    said = {META: description(windows={"neurons": {"stems": [["conv", 4]]}})}
    later = {"span": np.array([[16, 8]])}
    tags = [said, chunk(1), window(), chunk(9, loss=1.2), window(first=16, **later)]
    write(tmp_path / "run", *tags, at=[now, now + 1, now + 2, now - 7200, now - 7199])
    tab = Tab(tmp_path)
    assert tab.run("run")["rows"] == 16
    answer = tab.json("channels", run="run", layer="conv", bins=2)
    assert answer["credit"] == [[1.0, 1.0]] * 4


def test_what_a_former_training_left_is_void_and_not_lost(tmp_path):
    """It wrote further chunks, and trained on another seed."""
    now = time.time()
    first = [chunk(1 + 8 * i, loss=5 - 0.7 * i) for i in range(4)]
    tags = [{META: description()}, *first, {META: description()}, chunk(1), chunk(9, loss=1.2)]
    write(tmp_path / "run", *tags, at=[now + i for i in range(8)])
    assert history_steps(tmp_path / "run") == list(range(1, 17))
    assert read_by_the_tab(tmp_path) == (list(range(1, 17)), 0)


@pytest.mark.parametrize("seed", range(4))
def test_any_bytes_flipped_are_answered_or_told(tmp_path, seed):
    random = np.random.default_rng(seed)
    (whole,) = KEPT.glob("*tfevents*")
    data = whole.read_bytes()
    good(tmp_path / "good")
    for trial in range(6):
        some = bytearray(data)
        for _ in range(random.integers(1, 6)):
            some[random.integers(len(some))] ^= int(random.integers(1, 256))
        if trial % 3 == 0:
            del some[random.integers(len(some)) :]
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / whole.name).write_bytes(some)
        tab = Tab(tmp_path)
        told = tab.json("runs")["runs"]
        assert told[0]["rows"] == 16
        for run in told[1:]:
            for route, reply in tab.routes(run["name"]).items():
                assert_answer(route, reply)


@pytest.mark.parametrize("began", [None, -10_000])
@pytest.mark.parametrize("before", range(3))
def test_chunks_that_may_be_of_a_clock_set_back_are_never_dropped_in_silence(
    tmp_path, monkeypatch, before, began
):
    """Not even where nobody tells when the run began, or where it was long ago."""
    now = time.time()
    chunks = [chunk(1 + 8 * i, loss=5 - 0.8 * i) for i in range(4)]
    times = [now + i for i in range(before + 1)]
    times += [now - 7200 + i for i in range(4 - before)]
    write(tmp_path / "run", {META: description()}, *chunks, at=times)
    monkeypatch.setattr(runs.Source, "started", lambda *_: began and now + began)
    steps, lost = read_by_the_tab(tmp_path)
    assert (len(steps), lost) == ((32, 0) if before else (0, 4))
