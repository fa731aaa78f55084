"""The record as it is written: clocks, numbers of any size, and layers of none."""

import csv
import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from support.models import Classifier, toy_loader
from support.records import SIZES, Tab, chunk_parts, command, description
from support.training import fit
from tensorboard.compat.proto.event_pb2 import Event
from torch import nn

from lightning_lca import History, figures
from lightning_lca.record import eventfile
from lightning_lca.record.reader import Reader
from lightning_lca.record.tables import StepTable, WindowTable
from lightning_lca.record.writer import RecordWriter

NAME = "events.out.tfevents."


class Clock:
    """A clock that can be set."""

    def __init__(self, monkeypatch, now):
        self.now = now
        monkeypatch.setattr(time, "time", self)

    def __call__(self):
        self.now += 0.25
        return self.now


def table(first, loss):
    return StepTable.from_parts(chunk_parts(first, loss=loss), SIZES)


def session(directory, clock, first_step, starts=(), stream=None):
    """Writes chunks of eight steps; before each the clock is set, if at all."""
    writer = RecordWriter(directory, SIZES, stream, pytest.fail)
    writer.describe(json.loads(description(first_step=first_step)), first_step)
    for i, start in enumerate(starts):
        clock.now = clock.now if start is None else start
        first = first_step + 1 + 8 * i
        writer.add(None, table(first, loss=5 - 0.1 * (first - 1)))
        writer.write(everything=True)
    writer.close()


def events(path):
    """All wall times of a file, in the order of writing."""
    frames = (Event.FromString(frame[:-4]) for frame in eventfile._frames(path))
    return [event.wall_time for event in frames if event.summary.value]


def assert_steady(directory, rows):
    """Times rise from event to event and file to file, and all who read agree."""
    times = [t for path in sorted(directory.iterdir()) for t in events(path)]
    assert times == sorted(set(times))
    history = History.load(directory)
    assert (history.steps.tolist(), history.lost) == (list(range(1, rows + 1)), 0)
    tab = Tab(directory.parent)
    told = csv.reader(tab.reply("export", run=directory.name)[1].splitlines())
    assert [int(line[0]) for line in list(told)[1:]] == history.steps.tolist()
    assert tab.run(directory.name)["lost"] == 0


@pytest.mark.parametrize("back", [0.1, 7200, 10**9])
def test_times_never_step_back_in_mid_run(tmp_path, monkeypatch, back):
    now = time.time()
    clock = Clock(monkeypatch, now)
    session(tmp_path / "run", clock, 0, [None, now - back, None])
    assert_steady(tmp_path / "run", 24)


@pytest.mark.parametrize("back", [0.1, 7200, 10**9])
def test_times_never_step_back_from_session_to_session(tmp_path, monkeypatch, back):
    now = time.time()
    clock = Clock(monkeypatch, now)
    session(tmp_path / "run", clock, 0, [None, now + 100, None])
    clock.now = now - back
    session(tmp_path / "run", clock, 20, [None])
    clock.now = now - 2 * back
    session(tmp_path / "run", clock, 28, [None, None])
    assert len(list((tmp_path / "run").iterdir())) == 3
    assert_steady(tmp_path / "run", 44)


def test_a_clock_that_is_set_back_twice_is_followed(tmp_path, monkeypatch):
    """Neither the name of a file nor its own time tell then how late its events are."""
    clock = Clock(monkeypatch, now := time.time())
    session(tmp_path / "run", clock, 0, [None, now + 9000, now + 1800])
    for path in (tmp_path / "run").iterdir():
        os.utime(path, (now, now))
    clock.now = now + 3600
    session(tmp_path / "run", clock, 20, [None])
    assert_steady(tmp_path / "run", 28)


@pytest.mark.parametrize("wall_time", [float("nan"), float("inf"), -1e300, 1e18, 0.0])
def test_odd_times_of_others_do_not_count(tmp_path, monkeypatch, wall_time):
    file = eventfile.EventFile(tmp_path)
    file.write([Event(wall_time=wall_time, file_version="x" * n) for n in (1, 10**6, 2)])
    file.close()
    with open(file._file.name, "ab") as rest:
        rest.write(b"\xff" * 30)
    latest = eventfile.last_time(tmp_path)
    assert 0 < time.time() - latest < 60


class Stream:
    """A logger's writer of events."""

    def __init__(self, path):
        self.file = eventfile.EventFile(path.parent)
        Path(self.file._file.name).rename(path)

    def add_event(self, event):
        self.file.write([event])

    def flush(self):
        pass

    close = flush


def test_a_loggers_file_that_would_be_read_too_early_is_not_used(tmp_path, monkeypatch):
    run = tmp_path / "run"
    run.mkdir()
    clock = Clock(monkeypatch, now := time.time())
    logger = Stream(run / f"{NAME}{int(now)}.host.1.0")
    session(run, clock, 0, [None, None], lambda: logger)
    logger.file.close()
    assert len(list(run.iterdir())) == 1, "as long as the clock runs, the logger's is used"
    clock.now = now - 7200
    logger = Stream(run / f"{NAME}{int(clock.now)}.host.2.0")
    session(run, clock, 16, [None], lambda: logger)
    logger.file.close()
    assert len(list(run.iterdir())) == 3
    assert_steady(run, 24)


def test_names_sort_in_the_order_of_writing(tmp_path, monkeypatch):
    clock = Clock(monkeypatch, now := float(int(time.time())) + 0.1)
    (tmp_path / f"{NAME}{int(now)}.host.1.0").touch()  # As a logger names it, in the same second.
    for back in (0, 0, 1, 7200, -5, 10**9):
        clock.now = now - back
        eventfile.EventFile(tmp_path).close()
    by_time = sorted(tmp_path.iterdir(), key=lambda path: path.stat().st_ctime_ns)
    assert by_time == sorted(tmp_path.iterdir())


def test_files_of_loggers_within_one_second_are_read_in_the_order_of_writing(tmp_path, monkeypatch):
    """Their names tell the second and the process, and a resumed training may have any number."""
    clock = Clock(monkeypatch, now := float(int(time.time())))
    for first, process in ((0, 900), (8, 90), (16, 9000)):
        logger = Stream(tmp_path / "run" / f"{NAME}{int(now)}.host.{process}.0")
        session(tmp_path / "run", clock, first, [None], lambda logger=logger: logger)
        logger.file.close()
        clock.now = now + 0.3 * (1 + first // 8)
    history = History.load(tmp_path / "run")
    assert (history.steps.tolist(), history.lost) == (list(range(1, 25)), 0)


def test_a_time_far_ahead_is_no_trap(tmp_path, monkeypatch):
    clock = Clock(monkeypatch, time.time())
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / f"{NAME}9999999999.host.1.0").touch()
    session(tmp_path / "run", clock, 0, [None, None])
    assert len(History.load(tmp_path / "run")) == 16


def test_many_windows_are_written_in_pieces(tmp_path):
    names = tuple(f"wide/{i}" for i in range(5000))
    steps = np.arange(1, 41)
    credit = np.random.default_rng(0).normal(size=(40, 5000))
    writer = RecordWriter(tmp_path, SIZES, None, pytest.fail)
    said = {"probes": [None], "groups": ["conv", "head"], "sizes": SIZES.tolist()}
    writer.describe(said | {"windows": {"neurons": {"stems": [["wide", 5000]]}}}, 0)
    writer.add_windows(None, {"neurons": WindowTable(names, steps, np.ones_like(steps), credit)})
    writer.close()
    (path,) = tmp_path.iterdir()
    assert max(map(len, eventfile._frames(path))) < 2**18
    history = History.load(tmp_path)
    assert history.neurons.steps.tolist() == steps.tolist()
    assert np.array_equal(history.neurons.allocated, credit.astype(np.float32))


# -- numbers --------------------------------------------------------------------------------------


class Scaled(Classifier):
    """A network in double precision whose loss is multiplied."""

    def __init__(self, factor):
        super().__init__(optimizer=lambda p: torch.optim.SGD(p, lr=0.1 / factor))
        self.factor = factor
        self.double()

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * self.factor


@pytest.mark.parametrize("factor", [1.0, 1e60, 1e-60, 1e-42], ids=str)
def test_numbers_beyond_single_precision_are_kept(tmp_path, capsys, factor):
    loader = toy_loader(dtype=torch.float64)
    lca = fit(tmp_path, model=Scaled(factor), data=loader, steps=16, neurons=True).lca
    memory, loaded = lca.history, History.load(lca.log_dir)
    narrow = factor == 1
    exact = memory.allocated.astype(np.float32) if narrow else memory.allocated
    assert np.array_equal(loaded.allocated, exact)
    assert loaded.rows.allocated.dtype == (np.float32 if narrow else np.float64)
    assert loaded.neurons.allocated.sum() == pytest.approx(memory.allocated.sum(), rel=1e-6, abs=0)
    assert loaded.converged.all()
    _, out, _ = command(capsys, "summary", lca.log_dir)
    line = next(line for line in out.splitlines() if "allocated" in line)
    shown = float(line.split()[1])
    told = Tab(lca.log_dir.parent).json("table", run=lca.log_dir.name)["allocated"]
    assert told == pytest.approx(loaded.allocated.sum(), rel=1e-12, abs=0)
    assert shown == pytest.approx(told, rel=1e-5, abs=0)


def test_only_a_part_that_needs_it_is_wide():
    def dtype(*values):
        rows = table(1, 2.0)
        rows.allocated[: len(values), 0] = values
        wide = rows.allocated.astype(np.float64)
        wide[: len(values), 0] = values
        columns = {n: getattr(rows, n) for n in StepTable.__dataclass_fields__}
        return StepTable(**columns | {"allocated": wide}).parts(SIZES)["allocated"].dtype

    with np.errstate(over="ignore"):
        assert dtype(0.1, -0.0, 3e38, 1.2e-38) == np.float32
        assert dtype(np.inf, np.nan) == np.float32
        assert dtype(4e38) == dtype(1e-46) == dtype(1e-40) == np.float64


# -- layers without weights ------------------------------------------------------------------------


class Hollow(nn.Module):
    """A network with a layer of no weight, beside others."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(12, 6), nn.Linear(6, 4)
        self.none = nn.ParameterDict({"empty": nn.Parameter(torch.zeros(0, 3))})

    def forward(self, x):
        return self.last(torch.tanh(self.first(x))) + self.none["empty"].sum()


@pytest.mark.slow
@pytest.mark.parametrize("group_by", ["layer", "parameter", "neuron"])
def test_a_layer_of_no_weights_goes_all_the_way(tmp_path, capsys, group_by):
    logger = TensorBoardLogger(tmp_path / "logs", name=None, version="run")
    options = {"neurons": True, "track_parameters": True, "group_by": group_by}
    model, trainer = lambda: Classifier(Hollow()), {"logger": logger}
    lca = fit(tmp_path, model=model, steps=12, trainer=trainer, **options).lca
    history = History.load(lca.log_dir)
    assert len(history) == 12
    assert history.sizes.tolist() == lca.history.sizes.tolist()
    assert np.isfinite(history.helping).all()
    assert command(capsys, "summary", lca.log_dir)[1].strip() == lca.summary()
    for draw in figures.available(history).values():
        draw(history)
    for to in ("a.csv", "a.npz"):
        assert command(capsys, "export", lca.log_dir, "--to", tmp_path / to)[0] == 0
    tab = Tab(tmp_path / "logs")
    layers = tab.run("run")["layers"]
    for route in ("bins", "table", "synchrony", "helping", "export"):
        assert tab.reply(route, run="run")[0] == 200
    for layer in layers:
        assert tab.reply("helping", run="run", layer=layer)[0] == 200
        assert tab.reply("channels", run="run", layer=layer)[0] in (200, 400)


def test_a_record_tells_whose_it_is(tmp_path):
    lca = fit(tmp_path).lca
    assert Reader.of(lca.log_dir).description.callback == lca.state_key
    assert Reader.of(lca.log_dir).description.is_steady
