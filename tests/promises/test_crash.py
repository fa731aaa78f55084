"""Real processes that die at random moments, and trainings that go on where they ended.

Every run is drawn from its seed: where it dies (at a moment of the clock, or at a random line of
Python within a phase), and whether a TensorBoardLogger is there. Seeds are printed; to repeat some,
LCA_SEEDS="3 7".
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest
import torch
from scripts.train_and_crash import CHUNK, PHASES, STEPS, Pulse
from support import TESTS
from support.models import Resumable
from support.processes import PATIENCE, environment, wait_for
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_lca import History
from lightning_lca.record import eventfile as record

pytestmark = pytest.mark.slow

SCRIPT = TESTS / "scripts" / "train_and_crash.py"
TIMES = {  # At least.
    **{"probe": STEPS - 1, "record": 8, "checkpoint": 4},
    **{"snapshot": STEPS - 1, "transfer": STEPS - 1},
}
EXACT = ("steps", "helping", "hurting", "loss_before", "loss_after", "residual", "drift", "splits")
SEEDS = [int(seed) for seed in os.environ.get("LCA_SEEDS", "").split()] or range(20)


class Server:
    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", SCRIPT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(),
        )

    def _ask(self, line):
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def start(self, directory, *, resume=None, aim=None, logger=False, **more):
        directory.mkdir(exist_ok=True)
        (directory / "pulse").unlink(missing_ok=True)
        run = {"directory": str(directory), "resume": resume, "aim": aim, "logger": logger}
        run |= more
        return self._ask(json.dumps(run))

    def wait(self):
        return self._ask("")

    def run(self, directory, **how):
        self.start(directory, **how)
        status = self.wait()
        assert status == 0, (directory / "output").read_text()[-3000:]
        return torch.load(directory / "final.pt", weights_only=False)


@pytest.fixture(scope="module")
def server():
    server = Server()
    yield server
    server.process.stdin.close()
    assert server.process.wait(PATIENCE) == 0
    server.process.stdout.close()


@pytest.fixture(scope="module")
def unbroken(server, tmp_path_factory):
    directory = tmp_path_factory.mktemp("unbroken")
    return server.run(directory) | {"record": load(directory)}


def log_dir(directory):
    """The latest directory with a record; None if there is none."""
    if (directory / "logs").exists():
        return directory / "logs"
    versions = sorted(directory.glob("lca_logs/version_*"), key=lambda p: int(p.name[8:]))
    return versions[-1] if versions else None


def load(directory):
    where = log_dir(directory)
    try:
        return None if where is None else History.load(where)
    except FileNotFoundError:
        return None


def assert_prefix(found, whole):
    """A record holds the first rows of the unbroken one, exactly: no gap, no double."""
    assert found.steps.tolist() == list(range(1, len(found) + 1))
    for column in EXACT:
        expected = getattr(whole, column)[: len(found)]
        assert np.array_equal(getattr(found, column), expected), column
    assert np.array_equal(found.allocated, whole.allocated[: len(found)])
    for name, windows in found.windows.items():
        assert windows.measured.sum() <= len(found), name
        assert (np.diff(windows.steps) > 0).all(), name


def assert_tensorboard_reads(directory, history):
    events = EventAccumulator(str(log_dir(directory)), size_guidance={"tensors": 0, "scalars": 0})
    events.Reload()
    tags = [tag for tag in events.Tags()["tensors"] if record.Tag.parse(tag)]
    steps = [record.Tag.parse(t) for t in tags]
    assert {t.first_step for t in steps if t.table == "chunk"} >= {
        int(s) for s in history.steps[:1]
    }


def on_a_boundary(checkpoint):
    """Whether a checkpoint was saved between two batches.

    Lightning cannot go on in the middle of one: the loader has given it, and it is trained twice or
    not at all. Between a batch that was given and the count of it lie two hooks.
    """
    state = torch.load(checkpoint, weights_only=False)
    loop = state["loops"]["fit_loop"]
    total = loop["epoch_loop.batch_progress"]["total"]
    (loader,) = loop["state_dict"]["combined_loader"]
    length = len(Resumable())
    given = loader["served"] % length == total["ready"] % length
    whole = total["ready"] == total["started"] == total["processed"] == state["global_step"]
    return given and whole and total["completed"] >= total["processed"] - 1


def checkpoint_of(directory):
    """The last checkpoint to go on from, that of the exception first; None to start afresh."""
    last = directory / "saved" / "exception.ckpt"
    if last.exists():
        if on_a_boundary(last):
            return last
        last.unlink()  # Lightning would take it without being asked.
    steps = sorted(directory.glob("saved/step=*.ckpt"), key=lambda p: int(p.stem[5:]))
    return steps[-1] if steps else None


def crash(server, directory, draw, phase, seconds, number, shots):
    """Runs a training that gets a signal; gives the phase that it was in, and its pulse."""
    aim = None
    if phase is not None:
        aim = {"phase": phase, "nth": draw.randrange(1, TIMES[phase]), "seed": draw.random()}
        aim |= {"number": int(number), "shots": shots}
    pid = server.start(directory, aim=aim, logger=draw.random() < 0.5)
    pulse = directory / "pulse"
    if aim is None:
        wait_for(
            lambda: pulse.exists() and Pulse(pulse).phase != PHASES.index("start"),
            "the start of training",
            pause=0.002,
        )
        time.sleep(draw.uniform(0, seconds))
        phase = PHASES[Pulse(pulse).phase]
        for _ in range(shots):
            os.kill(pid, number)
            time.sleep(draw.uniform(0, 0.01))
    server.wait()
    assert aim is None or Pulse(pulse).fired, "the sniper never met its aim"
    return phase, Pulse(pulse)


def assert_ends_as(unbroken, server, directory, checkpoint):
    """Resumes a training to its end, which is that of the unbroken one to the bit."""
    logger = (directory / "logs").exists()
    final = server.run(directory, resume=checkpoint and str(checkpoint), logger=logger)
    for part in ("weights", "totals"):
        for name, value in unbroken[part].items():
            assert torch.equal(final[part][name], value), (part, name)
    for i, state in unbroken["optimizer"]["state"].items():
        momentum = final["optimizer"]["state"][i]["momentum_buffer"]
        assert torch.equal(momentum, state["momentum_buffer"]), i
    for column in ("steps", "residual"):
        assert np.array_equal(final["history"][column], unbroken["history"][column]), column
    allocated = final["history"]["allocated"]
    assert np.allclose(allocated, unbroken["history"]["allocated"], rtol=1e-6, atol=1e-9)
    found = load(directory)
    assert_prefix(found, unbroken["record"])
    assert len(found) == STEPS
    for name, windows in found.windows.items():
        assert windows.measured.sum() == STEPS, name


@pytest.mark.parametrize("kind", ["SIGKILL", "SIGTERM", "SIGINT"])
def test_whenever_a_process_dies_its_record_reads_and_training_goes_on_as_if_unbroken(
    server, unbroken, tmp_path, kind
):
    phases, resumed = Counter(), Counter()
    for seed in SEEDS:
        draw = random.Random(f"{kind} {seed}")
        shots = 1 + (kind == "SIGINT" and seed % 2)  # An impatient user presses twice.
        directory = tmp_path / str(seed)
        number = getattr(signal, kind)
        aims = (*TIMES, "probe", *[None] * 4)
        phase = aims[seed // 2 % len(aims)]
        seconds = unbroken["seconds"]
        phase, pulse = crash(server, directory, draw, phase, seconds, number, shots)
        phases[phase] += 1
        found = load(directory)
        rows = 0 if found is None else len(found)
        missing = pulse.measured - rows
        print(f"seed {seed}: {kind} x {shots} in {phase}, {missing} of {pulse.measured} missing")
        if found is not None:
            assert_prefix(found, unbroken["record"])
            assert_tensorboard_reads(directory, found)
        # A second Ctrl-C may come before Lightning ignores it, and then no hook of ours is called.
        assert missing < CHUNK if kind == "SIGKILL" or shots > 1 else missing <= 0
        checkpoint = checkpoint_of(directory)
        if rows < STEPS:
            resumed[checkpoint and checkpoint.stem.partition("=")[0]] += 1
            assert_ends_as(unbroken, server, directory, checkpoint)
    print(phases, resumed)
    if len(SEEDS) == 20:
        assert phases.keys() >= TIMES.keys()
        assert resumed["step" if kind == "SIGKILL" else "exception"] >= 5


def test_on_a_full_disk_training_goes_on_and_the_record_reads_up_to_there(
    server, unbroken, tmp_path
):
    final = server.run(tmp_path, full=(10, STEPS + 1))
    assert final["error"] is None
    for name, weight in unbroken["weights"].items():
        assert torch.equal(final["weights"][name], weight), name
    assert final["history"]["steps"].tolist() == list(range(1, STEPS + 1)), "memory has all"
    found = load(tmp_path)
    assert found.lost == 0
    assert len(found) == 10
    assert_prefix(found, unbroken["record"])
    assert_tensorboard_reads(tmp_path, found)
    first, last = final["warned"]
    assert "could not be written: [Errno 27] File too large. Training goes on" in first
    assert last.startswith(f"LCA: {STEPS - len(found)} measured steps are missing in the record")


def test_when_a_disk_has_room_again_the_record_becomes_whole(server, unbroken, tmp_path):
    final = server.run(tmp_path, full=(10, 18))
    (warned,) = final["warned"]
    assert "Training goes on" in warned
    found = load(tmp_path)
    assert found.lost == 0
    assert len(found) == STEPS
    assert_prefix(found, unbroken["record"])
    for windows in found.windows.values():
        assert windows.measured.sum() == STEPS


def test_the_error_of_a_tensorboard_logger_on_a_full_disk_is_its_own(server, tmp_path):
    errors = {}
    for measured in (True, False):
        directory = tmp_path / str(measured)
        final = server.run(directory, full=(10, STEPS + 1), logger=True, measured=measured)
        errors[measured] = final["error"]
        print(final["error"], final["step"], final["warned"])
    assert "File too large" in errors[True]
    assert "File too large" in errors[False]
    found = load(tmp_path / "True")
    assert_prefix(found, found)
    assert 8 <= len(found) <= 10
