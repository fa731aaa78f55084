"""Replay over processes: one record, to the bit that of one process, whatever is killed."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import warnings
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scripts import replayed
from scripts.replayed import ByHand, Data, Net, Once, Stream
from support.processes import PATIENCE, environment, wait_for
from support.replays import assert_one_record, train

from lightning_lca import History
from lightning_lca.cli.main import main
from lightning_lca.replay.checkpoints import Checkpoint, ReplayError
from lightning_lca.replay.parallel import Block, Dealer, Parts, Plan, Ticked, blocks_of, cuts_of
from lightning_lca.replay.runs import RECORD, replay

slow = pytest.mark.slow  # It trains, and starts processes.

SMALL = {"log_every_n_steps": 4}
CASES = {
    "two probes of several batches, single neurons and weights": (
        Net,
        {},
        Data,
        {
            "probe": {"train": "train", "own": replayed.BATCHES},
            "probe_batches": 2,
            "group_by": "neuron",
            "track_parameters": True,
        },
    ),
    "shares of some parameters, three workers": (
        Net,
        {},
        Data,
        {
            "breakdown": ["order", "term"],
            "oscillation": True,
            "loss_fn": replayed.terms,
            "exclude": "*.bias",
            "group_by": "parameter",
            "workers": 3,
        },
    ),
    "chords, and what is left of the last": (
        Net,
        {},
        Data,
        {"every_n_steps": 5, "neurons": True, "oscillation": True},
    ),
    "refined": (Net, {}, Data, {"tolerance": 1e-7, "group_by": "module:1"}),
    "running statistics that move": (Net, {}, Data, {"probe_mode": "eval", "breakdown": True}),
    "another rule, dropout on": (
        Net,
        {},
        Data,
        {"quadrature": "gauss2", "probe_mode": "train", "seed": 5, "include": ["head", "body.*"]},
    ),
    "the user's code at every node": (
        Net,
        {},
        None,
        {"loss_fn": replayed.by_code, "probe": replayed.BATCHES, "figures": False},
    ),
    "manual optimization, double precision": (
        ByHand,
        {},
        Data,
        {"loss_fn": replayed.loss_fn, "precision": "64-true"},
    ),
    "a stream": (Net, {}, Stream, {"probe_batches": 2}),
    "what is read but once, mixed precision": (Net, {}, Once, {"precision": "bf16-mixed"}),
}


def both(path, model, data, **options):
    """Replays by one process and by workers; gives both records."""
    workers = options.pop("workers", 2)
    (one,) = replay(path, model, data, out=path / "one", **options)
    (many,) = replay(path, model, data, out=path / "many", workers=workers, **options)
    return one, many


@slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization")
@pytest.mark.filterwarnings("ignore:.*IterableDataset.*")
def test_workers_write_the_record_of_one_process(tmp_path, case):
    model, arguments, data, options = CASES[case]
    where = {name: options[name] for name in ("precision",) if name in options}
    train(tmp_path, model(**arguments), Data(), measured=False, steps=16, **where)
    one, many = both(tmp_path, model, data, **SMALL | options)
    assert_one_record(one, many)


@slow
def test_where_finer_panels_gain_nothing_one_worker_goes_on_alone(tmp_path):
    train(tmp_path, Net(), Data(), measured=False, steps=30)
    options = {"tolerance": 1e-9, "loss_fn": replayed.cut_off, **SMALL}
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        one, many = both(tmp_path, Net, Data, **options)
    said = [str(w.message) for w in warned]
    assert sum("finer panels explained no more" in text for text in said) == 2, "by each way, once"
    assert sum("one worker measures alone, in order: finer panels" in text for text in said) == 1
    assert_one_record(one, many)
    assert len(set(History.load(one).splits)) > 1, "most steps are not refined"


@slow
@pytest.mark.filterwarnings("ignore:LCA. the probe loss changed from")
def test_where_the_loss_knows_the_step_one_worker_measures_alone(tmp_path):
    train(tmp_path, Net(anneals=True), Data(), measured=False)
    with pytest.warns(UserWarning, match="alone, in order: the loss depends on more than the wei"):
        one, many = both(tmp_path, Net, Data, **SMALL)
    assert_one_record(one, many)
    assert np.abs(History.load(one).drift).max() > 0


@slow
def test_a_loss_that_is_another_from_some_step_on_is_so_for_workers(tmp_path):
    train(tmp_path, Net(), Data(), measured=False)
    options = {"loss_fn": replayed.turning, "probe": replayed.BATCHES}
    one, many = both(tmp_path, Net, None, **SMALL | options)
    assert_one_record(one, many)
    assert History.load(one).residual[6] > 0.5, "nothing shows that but the residual"


@slow
def test_a_loss_that_another_process_finds_another_is_found_out_at_the_joint(tmp_path, monkeypatch):
    monkeypatch.setenv("REPLAY_NOTES", str(tmp_path / "notes"))
    train(tmp_path, Net(), Data(), measured=False)
    options = {"loss_fn": replayed.of_process, "probe": replayed.BATCHES}
    told = "one worker measures alone, in order: the loss depends on more than the weights"
    with pytest.warns(UserWarning, match=told):
        (history,) = replay(tmp_path, Net, workers=2, **options).values()
    assert len(history) == 12
    assert (history.drift != 0).sum() <= 1


@slow
def test_early_steps_that_are_halved_are_the_same_ones(tmp_path):
    torch.manual_seed(3)
    train(tmp_path, Net(), Data(), measured=False, steps=30)
    one, many = both(tmp_path, Net, Data, loss_fn=replayed.bent, **SMALL)
    assert_one_record(one, many)
    splits = History.load(one).splits
    assert (splits == 2).any()
    assert (splits == 1).any()


# -- whatever is killed ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Checkpoints of 24 steps."""
    path = tmp_path_factory.mktemp("trained")
    train(path, Net(), Data(), measured=False, steps=24, slim=True)
    return path / "checkpoints"


@pytest.fixture
def runs(trained, tmp_path):
    """Two runs in one directory, as Lightning lays them out."""
    for name in ("a", "b"):
        shutil.copytree(trained, tmp_path / "runs" / name / "checkpoints")
    return tmp_path / "runs"


def steps_in(notes):
    """At which steps the user's code ran, how often, by process: {process: {step: times}}."""
    ran = {}
    for line in notes.read_text().splitlines():
        process, step = map(int, line.split())
        ran.setdefault(process, Counter())[step] += 1
    return ran


NAMES = ("--model", "scripts.replayed.Net", "--probe", "scripts.replayed.probe")


@slow
def test_a_worker_that_is_killed_is_replaced(runs, tmp_path, monkeypatch):
    notes, mark = tmp_path / "notes", tmp_path / "mark"
    monkeypatch.setenv("REPLAY_NOTES", str(notes))
    monkeypatch.setenv("REPLAY_MARK", str(mark))
    options = {"probe": replayed.BATCHES, "loss_fn": replayed.deadly, **SMALL}
    with pytest.warns(UserWarning, match="was killed by SIGKILL while it measured steps 8 to 11"):
        (many,) = replay(runs / "a", Net, workers=2, **options)
    assert mark.read_text() == "once"
    ran = sum(steps_in(notes).values(), Counter())
    # Three batches, in the middle of a segment and at its end; where blocks begin, at the end once.
    assert {ran[step] for step in (9, 10, 12, 13, 15, 17, 19, 21, 23)} == {6}, "each once"
    assert ran[8] in (6 + 3, 6 + 3 + 3), "twice a block began there; a worker may have stood there"
    (one,) = replay(runs / "b", Net, **options)
    assert_one_record(one, many)

    mark.write_text("each")
    again = {"out": tmp_path / "again", "workers": 2}
    told = "from step 8 on ended 3 times; the last one was killed by SIGKILL. If memory ran out"
    with (
        pytest.warns(UserWarning, match="was killed by SIGKILL"),
        pytest.raises(ReplayError, match=told),
    ):
        replay(runs / "a", Net, **again, **options)
    mark.unlink()
    mark.write_text("once")
    (record,) = replay(runs / "a", Net, **again, **options)
    assert_one_record(one, record, resumed=True)


@slow
def test_a_replay_that_is_killed_does_only_what_is_missing(runs, tmp_path, monkeypatch):
    notes = tmp_path / "notes"
    options = (*NAMES, "--loss_fn", "scripts.replayed.held_up", "--log_every_n_steps", "5")
    command = [sys.executable, "-m", "lightning_lca", "replay", runs / "a", *options]
    around = environment(REPLAY_NOTES=str(notes), REPLAY_HOLDS="yes")
    with open(tmp_path / "told", "w") as told:
        process = subprocess.Popen([*command, "--workers", "2"], env=around, stderr=told)
    parts = runs / "a" / RECORD / "replay.parts"
    try:
        wait_for(
            lambda: [path for path in parts.glob("*.pt") if path.stem.endswith("-24")],
            "all other blocks",
            process=process,
        )
        workers = steps_in(notes)
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL, (tmp_path / "told").read_text()
    for worker in workers:
        wait_for(lambda pid=worker: not is_there(pid), "the workers to follow")
    assert (
        torch.load(runs / "a" / RECORD / "replay.pt", weights_only=True)["callback"]["steps"] == 5
    )

    notes.unlink()
    monkeypatch.setenv("REPLAY_NOTES", str(notes))
    assert main(["replay", str(runs / "a"), *options, "--workers", "2"]) == 0
    ran = sum(steps_in(notes).values(), Counter())
    # At step 6 every worker looks at the loss; at step 8 one stands, to measure from there on.
    assert set(ran) == {6, 8, 9, 10, 11}
    assert (ran[8], ran[9]) == (3, 6), "three batches"
    assert not parts.exists()
    assert main(["replay", str(runs / "b"), *options]) == 0
    assert_one_record(runs / "b" / RECORD, runs / "a" / RECORD, resumed=True)


def is_there(process):
    """Whether a process runs; one that has ended and that nobody asks for does not."""
    try:
        with open(f"/proc/{process}/stat") as status:
            return status.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@slow
def test_several_processes_of_torchrun_write_one_record(runs, tmp_path):
    """Two processes, each of which measures; the first also writes."""
    notes = tmp_path / "notes"
    options = (*NAMES, "--loss_fn", "scripts.replayed.together", "--log_every_n_steps", "4")
    launch = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    done = subprocess.run(
        [*launch, "-m", "lightning_lca", "replay", runs, *options, "--oscillation"],
        env=environment(REPLAY_NOTES=str(notes), REPLAY_TOGETHER="yes"),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("24 segments are in") == 2, "the first process tells of both runs"
    assert len(steps_in(notes)) == 2
    os.environ["REPLAY_NOTES"] = str(notes)
    try:
        for record in replay(
            runs,
            Net,
            probe=replayed.probe(),
            loss_fn=replayed.noted,
            oscillation=True,
            out=tmp_path / "one",
            **SMALL,
        ):
            assert_one_record(record, runs / record.name / RECORD)
    finally:
        del os.environ["REPLAY_NOTES"]


# -- on the way -----------------------------------------------------------------------------------


@slow
def test_what_is_added_later_goes_on_by_one_process_or_many(runs, tmp_path):
    later = tmp_path / "later"
    later.mkdir()
    options = {"probe": replayed.BATCHES, "oscillation": True, "every_n_steps": 2, **SMALL}
    saved = runs / "a" / "checkpoints"
    late = [path for path in saved.iterdir() if int(step_of(path)) > 13]
    for path in late:
        path.rename(later / path.name)
    replay(runs / "a", Net, workers=2, out=tmp_path / "x", **options)
    replay(runs / "a", Net, out=tmp_path / "y", **options)
    for path in late:
        shutil.copy(later / path.name, path)
    (x,) = replay(runs / "a", Net, out=tmp_path / "x", **options)
    (y,) = replay(runs / "a", Net, workers=2, out=tmp_path / "y", **options)
    assert_one_record(x, y, resumed=True)
    turns = History.load(x).oscillation
    assert np.isfinite(turns.allocated[1:, :, turns.names.index("reversed")]).any(1).all()


def step_of(path):
    return torch.load(path, weights_only=True)["global_step"]


@slow
def test_the_command_shows_one_bar_and_says_as_much_as_one_process(runs, capsys, monkeypatch):
    shown = []

    def bar(items, **options):
        yield from items
        shown.append((len(items), options["unit"]))

    monkeypatch.setattr("lightning_lca.replay.runs.tqdm", bar)
    assert main(["replay", str(runs), *NAMES, "--workers", "2", "--threads", "1"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(" are in ")[0] for line in lines] == ["24 segments"] * 2
    assert shown == [(26, "checkpoint"), (24, "checkpoint")] * 2, "those read, and those measured"


MISTAKES = {
    "workers": ({"workers": 0}, ValueError, "workers must be at least 1, got 0"),
    "threads": ({"threads": True}, TypeError, "threads must be a whole number, got True"),
    "a lambda": (
        {"loss_fn": lambda module, batch: module.loss(batch)},
        ReplayError,
        "loss_fn cannot be handed to other processes: .* Or leave workers out",
    ),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_what_cannot_be_dealt_out_is_refused_before_anything_is_read(tmp_path, what):
    options, kind, told = MISTAKES[what]
    (tmp_path / "a.ckpt").write_text("no checkpoint")
    with pytest.raises(kind, match=told):
        replay(tmp_path, Net, **{"workers": 2, "probe": replayed.BATCHES} | options)


@pytest.mark.parametrize("option", ["--workers", "--threads"])
def test_the_command_says_what_it_needs(tmp_path, capsys, option):
    assert main(["replay", str(tmp_path), *NAMES, option, "0"]) == 2
    assert capsys.readouterr().err == f"lightning-lca: {option} must be at least 1, got 0.\n"


def test_torchrun_says_how_many_there_are(tmp_path, monkeypatch):
    told = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("lightning_lca.replay.workers.Meeting", lambda address: None)
    with pytest.raises(ReplayError, match="torchrun says how many processes there are; got w"):
        replay(tmp_path, Net, workers=2, probe=replayed.BATCHES)
    assert os.environ["WORLD_SIZE"] == "2", "it is there again"


@slow
def test_a_mistake_in_the_users_code_is_told_with_its_place(runs):
    options = {"probe": replayed.BATCHES, "loss_fn": replayed.mistaken, "workers": 2}
    with pytest.raises(RuntimeError, match="ZeroDivisionError: of the user's own") as told:
        replay(runs / "a", Net, **options)
    assert 'replayed.py", line' in str(told.value)


# -- who measures what ----------------------------------------------------------------------------


def test_segments_begin_and_end_as_in_one_process():
    assert cuts_of([0, 1, 2, 3], 1) == [0, 1, 2, 3]
    assert cuts_of([0, 1, 2, 3, 4], 3) == [0, 3, 4], "the last has what is left"
    assert cuts_of([5, 7, 8, 30, 31], 2) == [0, 1, 3, 4]
    assert cuts_of([0, 1, 2, 3], 1, first=2) == [0, 2, 3], "the loss was first found at the second"
    assert cuts_of([0, 9], 20) == [0, 1]


def test_blocks_are_all_segments_once_and_hold_what_there_is_already():
    draw = random.Random(0)
    for _ in range(300):
        segments, workers = draw.randint(1, 400), draw.randint(1, 9)
        edges = sorted(draw.sample(range(segments + 1), k=min(segments, 6) // 2 * 2))
        kept = list(zip(edges[::2], edges[1::2], strict=True))
        blocks = blocks_of(segments, workers, kept)
        assert [i for begin, end in blocks for i in range(begin, end)] == list(range(segments))
        assert set(kept) <= set(blocks)


class World:
    """A path of which one process would find certain rows, because of what it found before.

    From ``triggers`` on three segments go by what was found there; from ``stays`` on all do; and
    from ``hidden`` on all do, and nobody knows.
    """

    def __init__(self, seed):
        self.draw = draw = random.Random(seed)
        self.segments = draw.randint(1, 60)
        self.triggers = {j for j in range(self.segments) if draw.random() < 0.06}
        odd = draw.choice(["stays", "hidden", "", ""])
        at = draw.randrange(self.segments)
        self.stays, self.hidden = (at if odd == name else None for name in ("stays", "hidden"))
        self.dies = draw.choice([0, 0, 0.03])
        self.spoils = draw.choice([0, 0, 0.2])  # What was set up is void, and is set up anew.

    def after(self, j, state):
        left, hidden = state
        left = 3 if j in self.triggers else max(0, left - 1)
        left = 9 if j == self.stays or left == 8 else left
        return left, hidden or j == self.hidden

    def alone(self):
        rows, state = [], (0, False)
        for j in range(self.segments):
            rows.append((j, *state))
            state = self.after(j, state)
        return rows


class Hand:
    """A worker of such a world, which does a block at a time."""

    def __init__(self, world):
        self.world, self.host, self.run, self.is_ready, self.stretch = world, "", 0, False, None
        self.how_it_ended = "was killed"
        self.heard, self.says, self.work = [], [{"kind": "hello", "host": "here"}], None

    def send(self, kind, **content):
        self.heard.append({"kind": kind, **content})

    def next(self):
        """Does something; gives what it says, None if it dies."""
        if self.says:
            return self.says.pop(0)
        if self.work is None and self.heard:
            message = self.heard.pop(0)
            if message["kind"] == "run":
                self.number = message["run"]
                return {"kind": "ready", "run": self.number, "at": 1, "looks": {}}
            if message["kind"] == "plan":
                self.blocks = message["blocks"].tolist()
            elif message["kind"] == "measure" and self.world.draw.random() < self.world.spoils:
                self.blocks = None
                return {"kind": "ready", "run": self.number, "at": 1, "looks": {}}
            elif message["kind"] == "measure":
                state = (0, False)  # As if nothing had been found before.
                self.work = message["block"], message["block"], state, message["through"]
        elif self.work is not None:
            return self.measure()
        return ()

    def measure(self):
        if self.world.draw.random() < self.world.dies:
            return None
        block, stretch, state, through = self.work
        begin, end = self.blocks[block]
        first = [(begin + state[1], 0.0)] if begin else []
        rows = []
        for j in range(begin, end):
            rows.append((j, *state))
            state = self.world.after(j, state)
        goes_on = (state[0] or through) and block + 1 < len(self.blocks) and not self.heard
        self.work = (block + 1, stretch, state, through) if goes_on else None
        if not goes_on:
            self.says = [{"kind": "idle", "run": self.number}]
        return {
            **{"kind": "block", "run": self.number, "block": block, "stretch": stretch},
            **{"at": rows, "first": first, "last": [(end + state[1], 0.0)]},
            "carries": "it goes by what was found" * bool(state[0]),
        }


class Hands:
    """Workers, as a pool."""

    def __init__(self, world, count):
        self.world, self.runs, self.size = world, 0, count
        self.members = [Hand(world) for _ in range(count)]
        self.asked = 0

    def wait(self, seconds):
        self.asked += 1
        assert self.asked < 100_000, "nobody does what is left"
        member = self.world.draw.choice(self.members)
        said = member.next()
        return [] if said == () else [(member, said)]

    def replace(self, member):
        self.members[self.members.index(member)] = Hand(self.world)


@pytest.mark.parametrize("seed", range(150))
def test_what_is_dealt_out_is_what_one_process_finds(seed, monkeypatch):
    monkeypatch.setattr("lightning_lca.replay.parallel._DEATHS", 100)
    world = World(seed)
    count = world.draw.randint(1, 4)
    checkpoints = [Checkpoint(None, step) for step in range(world.segments + 1)]
    cuts, kept = list(range(world.segments + 1)), {}
    parts = SimpleNamespace(add=lambda begin, found: kept.setdefault(begin, found))
    blocks = blocks_of(world.segments, count)
    rows, ticked, said = [], 0, []
    with Dealer(Hands(world, count), {}, checkpoints, parts) as dealer:
        for event in dealer.events():
            if isinstance(event, Ticked):
                assert event.count > ticked, "no segment counts twice"
                ticked = event.count
            elif isinstance(event, Block):
                rows += event.found["at"]
            elif isinstance(event, str):
                said.append(event)
            elif event is not None:
                dealer.deal(Plan(cuts, blocks, {}, []))
    assert rows == world.alone()
    assert all(row[1] == 0 for found in kept.values() for row in found["at"][:1])
    alone = [text for text in said if "one worker measures alone" in text]
    assert len(alone) <= 2, "it is said once, and why"


def found_of(steps):
    """What a worker finds in a block, as far as it matters where it is kept."""
    rows = torch.tensor([[float(step)] for step in steps])
    return {
        **{"at": [(step, step) for step in steps], "warned": [[] for _ in steps]},
        "probes": {"": {"row": rows, "step": list(steps), "fine": {"parameters": rows}}},
    }


def test_kept_blocks_count_where_they_fit_and_from_where_the_state_ends(tmp_path):
    parts = Parts(tmp_path, {"seed": 0})
    parts.add(0, found_of([1, 2, 3]))
    parts.add(3, found_of([4, 5, 6]))
    parts.add(8, found_of([9, 10]))
    assert [(b, e) for b, e, _ in parts.found(range(11))] == [(0, 3), (3, 6), (8, 10)]
    ((begin, end, found), rest) = parts.found(range(4, 11))
    assert (begin, end, rest[:2]) == (0, 2, (4, 6))
    assert found["at"] == [(5, 5), (6, 6)]
    assert found["probes"][""]["row"].tolist() == [[5.0], [6.0]]
    assert found["probes"][""]["fine"]["parameters"].tolist() == [[5.0], [6.0]]
    assert not list(Parts(tmp_path, {"seed": 1}).found(range(11))), "measured in another way"
    assert [(b, e) for b, e, _ in parts.found([0, 2, 3, 8, 9, 10])] == [(3, 5)], "other checkpoints"
    (cut,) = (tmp_path / "replay.parts").glob("8-*")
    cut.write_bytes(cut.read_bytes()[:-40])
    assert [(b, e) for b, e, _ in parts.found(range(11))] == [(0, 3), (3, 6)]
    parts.drop(5)
    assert [(b, e) for b, e, _ in parts.found(range(11))] == [(3, 6)]
    parts.drop()
    assert not list(tmp_path.iterdir())
