"""Two callbacks in one Trainer, or two processes on one directory: each has its own record."""

import subprocess
import sys

import numpy as np
import pytest
from support.models import Validated, pl, toy_loader
from support.processes import PATIENCE, environment
from support.training import fit, make_trainer

from lightning_lca import History, LCACallback
from lightning_lca.record.writer import claim

PAIRS = {
    "train and val": ({"probe": "train"}, {"probe": "val"}),
    "steps and chords": ({}, {"every_n_steps": 5}),
    "two quadratures": ({}, {"quadrature": "midpoint"}),
    "two tolerances": ({"tolerance": 1e-3}, {"tolerance": 1e-5}),
    "two loss functions": (
        {"loss_fn": lambda module, batch: module.training_step(batch, 0)},
        {},
    ),
    "two groupings": ({"group_by": "parameter"}, {"neurons": True}),
}


def data():
    return toy_loader(), toy_loader(32, shuffle=False)


def two(pair):
    return [LCACallback(figures=False, **arguments) for arguments in PAIRS[pair]]


def logger(path):
    return pl.loggers.TensorBoardLogger(path, version="one")


def same(history, other):
    return np.array_equal(history.steps, other.steps) and np.allclose(
        history.allocated, other.allocated, rtol=1e-6, atol=1e-9
    )


@pytest.mark.slow
@pytest.mark.parametrize("pair", PAIRS)
def test_two_callbacks_of_a_trainer_have_a_record_each(tmp_path, pair):
    a, b = two(pair)
    fit(tmp_path, a, b, model=Validated, data=data, trainer={"logger": logger(tmp_path)})
    alone = two(pair)
    for i, lca in enumerate(alone):
        fit(tmp_path / str(i), lca, model=Validated, data=data)
    assert b.log_dir == a.log_dir / "lca2"
    for lca, other in zip((a, b), alone, strict=True):
        loaded = History.load(lca.log_dir)
        assert same(loaded, lca.history)
        assert same(lca.history, other.history), "it is what it would be alone"


@pytest.mark.slow
@pytest.mark.parametrize("turned", [False, True], ids=["in order", "the other way round"])
@pytest.mark.parametrize("into", ["the same directory", "another"])
def test_a_resume_takes_its_own_history(tmp_path, turned, into):
    pair = "train and val"

    def save():
        return pl.callbacks.ModelCheckpoint(tmp_path / "saved", "x", every_n_train_steps=6)

    options = {"model": Validated, "data": lambda: (toy_loader(shuffle=False), data()[1])}
    first = two(pair)
    trainer = {"logger": logger(tmp_path), "enable_checkpointing": True}
    fit(tmp_path, *first, save(), steps=6, trainer=trainer, **options)
    again = two(pair)
    order = again[::-1] if turned else again
    into = tmp_path if into == "the same directory" else tmp_path / "new"
    trainer = {"logger": logger(into), "enable_checkpointing": True}
    resume = tmp_path / "saved" / "x.ckpt"
    fit(into, *order, save(), steps=11, trainer=trainer, resume=resume, **options)
    whole = two(pair)
    fit(tmp_path / "whole", *whole, steps=11, **options)
    for before, lca, unbroken in zip(first, again, whole, strict=True):
        assert same(History.load(lca.log_dir), lca.history)
        assert same(lca.history, unbroken.history)
        assert np.allclose(lca.history.allocated[:6], before.history.allocated, atol=1e-9)
    assert not same(again[0].history, again[1].history)


def test_scalars_of_the_second_have_keys_of_their_own(tmp_path):
    csv = pl.loggers.CSVLogger(tmp_path)
    a, b = two("train and val")
    fit(tmp_path, a, b, model=Validated, data=data, trainer={"logger": csv})
    rows = np.genfromtxt(f"{csv.log_dir}/metrics.csv", delimiter=",", names=True, deletechars="")
    for lca, key in ((a, "lca/total_cum"), (b, "lca2/total_cum")):
        values = rows[key][np.isfinite(rows[key])]
        assert values[-1] == pytest.approx(lca.history.allocated.sum(), rel=1e-5)


@pytest.mark.parametrize("probe", ["train", "own"])
def test_the_same_twice_is_an_error_with_the_cure(tmp_path, probe):
    probe = [next(iter(toy_loader()))] if probe == "own" else probe
    twice = [LCACallback(probe=probe), LCACallback(probe=probe, figures=False)]
    with pytest.raises(Exception, match=r'measure the same.*LCACallback\(probe=\{"a": \.\.\.\}\)'):
        make_trainer(tmp_path, *twice).fit(Validated(), *data())
    named = [LCACallback(probe={name: [next(iter(toy_loader()))]}) for name in "ab"]
    fit(tmp_path, *named)
    assert len(named[0].history) == len(named[1].history) == 12


SCRIPT = """
import subprocess, sys
from support.models import Classifier, pl, toy_loader
from support.training import fit
from lightning_lca import LCACallback

path, role = sys.argv[1:]

class Other(pl.Callback):
    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == 4:
            subprocess.run([sys.executable, __file__, path, "inner"], check=True)

lca = LCACallback(figures=False, quadrature="simpson" if role == "outer" else "midpoint")
logger = pl.loggers.TensorBoardLogger(path, version="one")
others = [Other()] if role == "outer" else []
fit(path, lca, *others, steps=12 if role == "outer" else 7, trainer={"logger": logger})
print(role, lca.log_dir, len(lca.history), lca.history.allocated.sum())
"""


@pytest.mark.slow
def test_two_processes_on_one_directory_have_a_record_each(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    run = subprocess.run(
        [sys.executable, "-W", "default", script, tmp_path, "outer"],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env=environment(),
        check=False,
    )
    assert run.returncode == 0, run.stderr
    told = [x.split() for x in run.stdout.splitlines() if x.startswith(("inner", "outer"))]
    assert [role for role, *_ in told] == ["inner", "outer"]
    assert "another training or callback writes its record" in run.stderr
    assert told[0][1] != told[1][1]
    for _, log_dir, steps, credit in told:
        history = History.load(log_dir)
        assert len(history) == int(steps)
        assert history.allocated.sum() == pytest.approx(float(credit), rel=1e-5)


HOLD = """
import sys, time
from pathlib import Path
from lightning_lca.record.writer import claim
held = claim(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(0.5)
"""


def test_a_process_that_is_ending_is_waited_for(tmp_path):
    command = [sys.executable, "-c", HOLD, tmp_path]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    mine = claim(tmp_path)
    assert (mine.directory, mine.is_elsewhere) == (tmp_path, False)
    mine.release()
    assert process.wait(PATIENCE) == 0
    process.stdout.close()


def test_a_directory_is_free_again_when_its_writer_is_done(tmp_path):
    first = claim(tmp_path)
    assert (first.directory, first.name, first.is_elsewhere) == (tmp_path, "lca", False)
    second = claim(tmp_path)
    assert (second.directory, second.name, second.is_elsewhere) == (tmp_path / "lca2", "lca2", True)
    assert claim(tmp_path, record=tmp_path / "lca3").directory == tmp_path / "lca3"
    first.release()
    assert claim(tmp_path).directory == tmp_path
    second.release()
    assert claim(tmp_path, place=1).directory == tmp_path / "lca2"


class Wrapper(pl.Callback):
    """Hands on hooks to a callback that the Trainer does not know."""

    def __init__(self, inner):
        self.inner = inner

    def on_train_start(self, *args):
        self.inner.on_train_start(*args)

    def on_train_batch_start(self, *args):
        self.inner.on_train_batch_start(*args)

    def on_before_optimizer_step(self, *args):
        self.inner.on_before_optimizer_step(*args)

    def on_train_batch_end(self, *args):
        self.inner.on_train_batch_end(*args)

    def on_train_end(self, *args):
        self.inner.on_train_end(*args)


def test_a_callback_within_another_has_a_record_too(tmp_path):
    inner, outer = LCACallback(figures=False), LCACallback(quadrature="midpoint", figures=False)
    fit(tmp_path, outer, Wrapper(inner), trainer={"logger": logger(tmp_path)})
    assert inner.log_dir == outer.log_dir / "lca2"
    for lca in (inner, outer):
        assert same(History.load(lca.log_dir), lca.history)
