"""What a measured step asks of the host, in counts that are exact: times are for benchmarks."""

import gc
import json
import sys
from contextlib import contextmanager
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from support.accelerator import take_the_cpu_for_one
from support.models import Classifier, pl, toy_loader, unrecorded
from support.training import fit, make_trainer
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_lca import LCACallback
from lightning_lca.measure.captured import Repeated
from lightning_lca.measure.tensors import CHUNK
from lightning_lca.probe.isolation import _Memory
from lightning_lca.probe.probe import Probe

FROM, TO = 24, 44  # Steps that are counted: none of them is audited, logged or told of.


class Ops(TorchDispatchMode):
    """Counts what torch is asked to compute."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


class Calls:
    """Counts calls of Python functions."""

    def __init__(self):
        self.count = 0

    def __enter__(self):
        sys.setprofile(lambda frame, event, arg: self._note(event))
        return self

    def __exit__(self, *error):
        sys.setprofile(None)

    def _note(self, event):
        self.count += event == "call"


class Bare(pl.Callback):
    """Two gradients of the loss on one batch, and nothing else."""

    def on_train_start(self, trainer, module):
        self.batch = next(iter(toy_loader(shuffle=False)))

    def on_train_batch_end(self, trainer, module, *args):
        for _ in range(2):
            loss = F.cross_entropy(module.net(self.batch[0]), self.batch[1])
            torch.autograd.grad(loss, list(module.parameters()))


@contextmanager
def counting(kind):
    counter = kind()
    with counter:
        yield counter


class Counted(pl.Callback):
    """Counts from the end of one batch to the end of another, in front of all other callbacks."""

    def __init__(self, kind):
        self.counter, self.before = kind(), 0

    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step == FROM:
            self.counter.__enter__()
        if trainer.global_step == TO:
            self.counter.__exit__(None, None, None)


def deep(layers):
    hidden = [layer for _ in range(layers - 1) for layer in (nn.Linear(12, 12), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(12, 4))


def count(path, kind, layers, *callbacks):
    """Counts what one step asks for."""
    pl.seed_everything(3, verbose=False)
    counted = Counted(kind)
    trainer = make_trainer(
        path,
        counted,
        *callbacks,
        max_steps=TO + 2,
        log_every_n_steps=1000,
        enable_checkpointing=False,
    )
    trainer.fit(Classifier(deep(layers)), toy_loader(samples=16 * (TO + 4)))
    return counted.counter.count / (TO - FROM)


@pytest.mark.parametrize(("kind", "least", "per_layer"), [(Calls, 1500, 60), (Ops, 80, 10)])
def test_beyond_two_bare_gradients_a_measured_step_asks_little_of_the_host(
    tmp_path, kind, least, per_layer
):
    few, many = 4, 24
    extra = {}
    for layers in (few, many):
        bare = count(tmp_path / f"bare{layers}", kind, layers, Bare())
        lca = LCACallback(figures=False)
        extra[layers] = count(tmp_path / f"lca{layers}", kind, layers, lca) - bare
        assert lca.history.settings["evaluated"] == "recorded"
    slope = (extra[many] - extra[few]) / (many - few)
    print(kind.__name__, extra, slope)
    assert slope <= per_layer
    assert extra[few] - few * slope <= least


class Restless(Classifier):
    """Every evaluation of its loss changes it."""

    def __init__(self):
        super().__init__(deep(2))
        self.count, self.seen = 0, []

    def training_step(self, batch, batch_idx):
        self.count += 1
        self.seen.append(self.count)
        pytest.counts_seen.append(self.count)  # Kept at another's module, which is not put back.
        return unrecorded(super().training_step(batch, batch_idx))


@pytest.mark.parametrize("batches", [1, 3])
def test_the_fence_looks_around_once_for_all_evaluations_of_a_step(tmp_path, batches, monkeypatch):
    looked = []
    walk = _Memory.walk
    monkeypatch.setattr(_Memory, "walk", lambda self: (looked.append(1), walk(self))[1])
    monkeypatch.setattr(pytest, "counts_seen", [], raising=False)
    marks = {}

    class Note(pl.Callback):
        def on_train_batch_start(self, trainer, *args):
            marks[trainer.global_step] = len(looked), len(pytest.counts_seen)

    module, lca = Restless(), LCACallback(figures=False, probe_batches=batches)
    fit(tmp_path, Note(), lca, model=module)
    assert lca.history.settings["evaluated"] != "recorded"
    # Of the third step on: the first ones look at the loss, and compare.
    for (step, (looks, at)), (_, (then, to)) in pairwise(sorted(marks.items())[3:]):
        assert then - looks == 1
        own, *evaluations = pytest.counts_seen[at:to]
        assert own == step + 1
        assert evaluations == [step + 2] * 2 * batches
    assert module.seen == list(range(1, 13))


class Held(pl.Callback):
    """Notes the bytes of all tensors that are alive at the end of a batch, each memory once."""

    def on_train_batch_end(self, *args):
        gc.collect()
        kinds = (torch.Tensor, nn.Parameter)
        tensors = [o for o in gc.get_objects() if type(o) in kinds and o.layout == torch.strided]
        tensors += [p.grad for p in tensors if p.is_leaf and p.grad is not None]
        memories = {s.data_ptr(): s.nbytes() for s in map(torch.Tensor.untyped_storage, tensors)}
        self.bytes = sum(memories.values())


def memory(path, *callbacks):
    """Gives what is held between steps, the peak and four pieces, in copies of the weights."""
    torch.manual_seed(3)
    held = Held()
    net = nn.Sequential(nn.Linear(12, 1500), nn.ReLU(), nn.Linear(1500, 1500), nn.Linear(1500, 4))
    size = sum(p.nbytes for p in net.parameters())
    gc.collect()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        trainer = make_trainer(path, *callbacks, held, max_steps=4, enable_checkpointing=False)
        trainer.fit(Classifier(net), toy_loader(4))
    path.mkdir(exist_ok=True)
    profiler.export_chrome_trace(str(path / "trace.json"))
    events = json.loads((path / "trace.json").read_text())["traceEvents"]
    notes = sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"])
    peak = total = 0
    for note in notes:
        total += note["args"]["Bytes"]
        peak = max(peak, total)
    return held.bytes / size, peak / size, 4 * 4 * CHUNK / size


def squared(module, batch):
    loss = F.cross_entropy(module.net(batch[0]), batch[1])
    return {"loss": loss, "decay": 1e-3 * sum(p.square().sum() for p in module.parameters())}


SHARES = {  # And how many more copies of the weights they hold.
    "both": ({"breakdown": ["part", "order"]}, 1),
    "oscillation": ({"oscillation": True}, 1.25),
    "all": ({"breakdown": True, "oscillation": True}, 1.25),
    "parts of chords": ({"breakdown": "part", "every_n_steps": 2}, 6),
    "two terms": ({"breakdown": "term", "loss_fn": squared}, 1),
    "two batches": ({"probe_batches": 2}, 0),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARES)
def test_shares_hold_as_many_copies_as_they_say(tmp_path, name):
    arguments, more = SHARES[name]
    without = {k: v for k, v in arguments.items() if k in ("loss_fn", "every_n_steps")}
    held, _, _ = memory(tmp_path / "without", LCACallback(figures=False, **without))
    held_with, _, _ = memory(tmp_path / "with", LCACallback(figures=False, **arguments))
    assert held_with - held == pytest.approx(more, abs=0.1)


@pytest.mark.parametrize("name", SHARES)
def test_shares_take_no_further_evaluation_of_the_probe(tmp_path, name, monkeypatch):
    evaluations, evaluate = [], Probe.__call__
    monkeypatch.setattr(
        Probe, "__call__", lambda *a, **k: evaluations.append(1) or evaluate(*a, **k)
    )

    def spent(**arguments):
        evaluations.clear()
        fit(tmp_path / str(len(arguments)), figures=False, **arguments)
        return len(evaluations)

    # Where no Python takes part, nobody calls it.
    monkeypatch.setattr(Repeated, "__call__", lambda self, function, *_, **__: function())
    arguments, _ = SHARES[name]
    shares = ("breakdown", "oscillation", "probe_batches")
    without = {k: v for k, v in arguments.items() if k not in shares}
    assert spent(**arguments) == spent(**without)


@pytest.mark.slow
@pytest.mark.parametrize("on", ["the CPU", "an accelerator"])
def test_three_copies_of_the_weights_are_held_between_steps_and_four_at_the_peak(
    tmp_path, monkeypatch, on
):
    if on == "an accelerator":
        take_the_cpu_for_one(monkeypatch)
        for room in ("tensors", "sums"):
            monkeypatch.setattr(f"lightning_lca.measure.{room}.BUSY", CHUNK)
    held, peak, _ = memory(tmp_path / "plain")
    lca = LCACallback(figures=False)
    held_with, peak_with, pieces = memory(tmp_path / "lca", lca)
    assert lca.history.settings["evaluated"] == "recorded"
    small = 0.1  # The batch, activations, sums.
    assert 2.9 < held_with - held < 3 + small
    assert peak_with - peak < 4 + pieces + small
