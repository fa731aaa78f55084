"""Trains in processes of their own that start fast: a server imports once, and forks for each.

    python train_and_crash.py

Every line on its input is a run as JSON (see `train`); for each it answers with the process id,
and with the exit status when asked by an empty line. What a run does at every moment is in its
file ``pulse``: the steps that were done and measured, and the phase it is in. `test_crash` talks
to it.
"""

import json
import mmap
import os
import random
import resource
import signal
import struct
import sys
import time
import traceback
import warnings
from pathlib import Path

import numpy as np
import tensorboard.summary.writer.event_file_writer  # noqa: F401 - before there are children.
import torch
import torch.utils.tensorboard
from tensorboard.compat.proto import event_pb2  # noqa: F401
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))
from support.models import Classifier, Resumable, mlp, pl, toy_loader
from support.training import make_trainer

import lightning_lca.record.writer as board
from lightning_lca import LCACallback
from lightning_lca.reporting.figures import Gallery
from lightning_lca.training.meter import Meter
from lightning_lca.training.snapshots import Snapshots as WeightPath

STEPS = 24  # Of batches of 16 in 96 samples: epochs of 6 steps.
CHUNK = 4
SAVE_EVERY = 6
PHASES = ("start", "training", "transfer", "snapshot", "probe", "record", "checkpoint", "end")


class Pulse:
    """Tells other processes what this one does, by a piece of memory that outlives it."""

    def __init__(self, path, create=False):
        if create:
            path.with_suffix(".new").write_bytes(bytes(32))
            path.with_suffix(".new").rename(path)
        # Kept at another's module: what callbacks hold is put back after an evaluation.
        self._key = f"pulse of {path}"
        with path.open("r+b") as file:
            setattr(mmap, self._key, mmap.mmap(file.fileno(), 32))

    def __getattr__(self, name):
        memory = vars(mmap)[self.__dict__["_key"]]
        return dict(zip(("phase", "measured", "fired"), struct.unpack("<qqq", memory[:24])))[name]

    def beat(self, **changed):
        memory = vars(mmap)[self._key]
        for i, name in enumerate(("phase", "measured", "fired")):
            if name in changed:
                memory[8 * i : 8 * i + 8] = struct.pack("<q", changed[name])


class Sniper:
    """Sends a signal to its own process at a random line of Python within a phase.

    In the n-th time in the phase it counts the lines; in the next it fires at one of them, and,
    if there is a second shot, a few lines later again. Where the next time is too short, it aims
    anew in the one after that.
    """

    def __init__(self, pulse, phase, nth, seed, number, shots):
        self.pulse, self.phase, self.nth = pulse, phase, nth
        self.random, self.number, self.shots = random.Random(seed), number, shots
        self.entered, self.lines, self.at = 0, 0, None
        self.has_fired = False

    def enter(self):
        self.entered += 1
        if self.entered >= self.nth and not self.has_fired:
            if self.entered > self.nth:
                self.at = self.random.randint(1, max(1, self.lines))
            self.lines = 0
            sys.settrace(self.trace)

    def leave(self):
        if self.shots <= 0 or not self.has_fired:
            sys.settrace(None)

    def trace(self, frame, event, _):
        if event == "line" and frame.f_globals.get("__name__") != __name__:
            self.lines += 1
            if self.at is not None and self.lines >= self.at and self.shots > 0:
                self.shots -= 1
                self.has_fired = True
                self.at = self.lines + self.random.randint(1, 60)
                self.pulse.beat(fired=1)
                os.kill(os.getpid(), self.number)
        return self.trace


class Watch(pl.Callback):
    """Comes after LCACallback: notes how many steps are measured."""

    def __init__(self, pulse):
        self.pulse = pulse

    def on_train_start(self, *args):
        self.pulse.beat(phase=PHASES.index("training"))

    def on_train_batch_end(self, trainer, *args):
        self.pulse.beat(measured=trainer.global_step)

    def on_train_end(self, *args):
        self.pulse.beat(phase=PHASES.index("end"))


class FullDisk(pl.Callback):
    """From one step to another no file can grow, as on a full disk; comes after LCACallback."""

    def __init__(self, directory, begin, end):
        self.directory, self.begin, self.end = directory, begin, end
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def on_train_batch_end(self, trainer, *args):
        events = [file.stat().st_size for file in self.directory.glob("*/**/*tfevents*")]
        if trainer.global_step == self.begin:
            self.allow(max(events) + 100)  # Half an event still fits.
        if trainer.global_step == self.begin + 1:
            self.allow(0)
        if trainer.global_step == self.end:
            self.free()

    def allow(self, size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, self.before[1]))

    def free(self):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


def phased(owner, name, phase, pulse, sniper):
    """Makes a function tell that it runs."""
    function = getattr(owner, name)

    def tell(*args, **kwargs):
        before = pulse.phase
        pulse.beat(phase=PHASES.index(phase))
        if sniper is not None and sniper.phase == phase:
            sniper.enter()
        try:
            return function(*args, **kwargs)
        finally:
            if sniper is not None and sniper.phase == phase:
                sniper.leave()
            pulse.beat(phase=before)

    setattr(owner, name, tell)


def train(directory, resume, aim, logger, full=None, measured=True):
    """Trains to the end, or until something happens, and saves what came out.

    Args:
        directory: Of this run.
        resume: A checkpoint, or None.
        aim: {"phase", "nth", "seed", "number", "shots"}: shoots itself; or None.
        logger: Whether there is a TensorBoardLogger.
        full: The steps between which the disk is full; then no checkpoints are saved.
        measured: Whether there is an LCACallback.
    """
    torch.set_num_threads(1)
    directory = Path(directory)
    pulse = Pulse(directory / "pulse", create=True)
    sniper = None if aim is None else Sniper(pulse, **aim)
    for owner, name, phase in (
        (WeightPath, "open", "snapshot"),
        (Meter, "measure", "probe"),
        (board.RecordWriter, "_try", "record"),
        (pl.Trainer, "save_checkpoint", "checkpoint"),
        (pl.LightningModule, "transfer_batch_to_device", "transfer"),  # Given, not counted yet.
    ):
        phased(owner, name, phase, pulse, sniper)
    board.CHUNK_STEPS = CHUNK
    Gallery.draw = lambda *args, **kwargs: None
    pl.seed_everything(5)
    lca = LCACallback(
        probe=list(toy_loader(shuffle=False))[:2], track_parameters=True, neurons=True
    )
    watch, saved = Watch(pulse), directory / "saved"
    callbacks = [lca, watch] if measured else [watch]
    if full:
        board.CHUNK_SECONDS = 0
        callbacks.append(FullDisk(directory, *full))
    else:
        save = pl.callbacks.ModelCheckpoint(
            saved, "{step}", every_n_train_steps=SAVE_EVERY, save_top_k=-1
        )
        callbacks += [save, pl.callbacks.OnExceptionCheckpoint(saved, "exception")]
    trainer = make_trainer(
        directory,
        *callbacks,
        max_steps=STEPS,
        enable_checkpointing=not full,
        logger=logger and pl.loggers.TensorBoardLogger(directory, name="logs", version=""),
    )
    module = Classifier(nn.Sequential(nn.BatchNorm1d(12), mlp()))
    error, began = None, time.monotonic()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            trainer.fit(module, Resumable(), ckpt_path=resume)
        except Exception as raised:
            if not full:
                raise
            error = raised
    final = {"seconds": time.monotonic() - began, "weights": module.state_dict()}
    final |= {"error": error and f"{type(error).__name__}: {error}", "step": trainer.global_step}
    final |= {"warned": [str(w.message) for w in warned if str(w.message).startswith("LCA")]}
    if full:
        callbacks[-1].free()
    if measured:
        history = lca.history
        columns = {n: np.asarray(getattr(history, n)) for n in ("steps", "residual", "allocated")}
        final |= {"totals": lca.totals, "history": columns}
        final |= {"optimizer": trainer.optimizers[0].state_dict()}
    torch.save(final, directory / "final.pt")


def child(run):
    with open(Path(run["directory"]) / "output", "a") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    status = 0
    try:
        warnings.simplefilter("ignore")
        train(**run)
    except SystemExit as leaving:
        status = 0 if leaving.code is None else int(leaving.code)
        print("left by", repr(leaving))
    except BaseException:
        status = 99
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(status)


def serve():
    running = None
    for line in sys.stdin:
        if line.strip():
            running = os.fork()
            if running == 0:
                signal.signal(signal.SIGINT, signal.default_int_handler)
                child(json.loads(line))
            print(running, flush=True)
        else:
            _, status = os.waitpid(running, 0)
            print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # A Ctrl-C at the tests is not meant for it.
    serve()
