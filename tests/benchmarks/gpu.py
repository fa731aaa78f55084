"""All that a card has to show, in at most ten minutes and in one table.

    python tests/benchmarks/gpu.py [--device cuda|cpu] [--quick] [--only NAME ...] [--networks ...]

1. correct: in each precision, credits of layers against Simpson's rule in float64 on the processor,
   along the very path that training took.
2. harmless: in each precision, weights of a training with and without the callback, to the bit,
   with deterministic kernels.
3. cost: ResNet-50 and a transformer of 100M weights: what a measured step adds, beside two bare
   gradients of the probe, by Simpson's rule and by the closed trapezoid; kernels launched, waits
   for the device, memory at the peak in copies of the weights.
4. recording: one evaluation of the recorded loss and gradient, beside the user's code and
   ``autograd.grad``: as it is run, compiled, and as a CUDA graph; from a network that only launches
   to one that only computes.
5. largest: the widest transformer that fits with the copies that measuring holds.

``--device cpu --quick`` tries the script itself, on networks of a few thousand weights.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import logging
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any
from unittest import mock

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from overhead import TakeTurns, fit, machine, milliseconds, minus, over, peak_bytes, ratio, table
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.profiler import ProfilerActivity, profile
from workloads import WORKLOADS, Model, Transformer, Workload, cross_entropy, without_dropout

from lightning_lca import LCACallback
from lightning_lca.measure.captured import Captured
from lightning_lca.probe.recording import Recorder, Recording

PRECISIONS = ["32-true", "64-true", "bf16-mixed", "16-mixed", "bf16-true"]
# How far credits of layers may be off, by what the precision computes in.
NOISE = {"32-true": 1e-4, "64-true": 1e-9, "bf16-mixed": 0.1, "16-mixed": 0.02, "bf16-true": 0.5}
STEPS = 12


def small() -> nn.Module:
    """Makes a network of every kind of layer that has kernels of its own."""
    return nn.Sequential(
        *(nn.Unflatten(1, (1, 28, 28)), nn.Conv2d(1, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(8 * 14 * 14, 64), nn.LayerNorm(64), nn.GELU()),
        nn.Linear(64, 10),
    )


SMALL = dataclasses.replace(
    WORKLOADS["mlp"],
    net=small,
    optimizer=partial(torch.optim.SGD, lr=0.02, momentum=0.9),
    batch_on={"cpu": 64, "cuda": 64},
)


class Trail(pl.Callback):
    """Keeps the weights before and after every step, in float64 on the host."""

    def __init__(self) -> None:
        """Starts with nothing."""
        self.points: list[dict[str, Tensor]] = []

    def keep(self, trainer: Any, module: Any, *args: Any) -> None:
        """Keeps the weights as they are now."""
        self.points.append(
            {n: p.detach().cpu().double().clone() for n, p in module.net.named_parameters()}
        )

    on_train_start = keep
    on_train_batch_end = keep


def truth(points: list[dict[str, Tensor]], probe: list[Tensor]) -> Tensor:
    """Returns credits of layers in every step [steps, layers] by Simpson's rule in float64."""
    net = small().double()
    x, y = probe[0].cpu().double(), probe[1].cpu()

    def gradient(weights: dict[str, Tensor]) -> tuple[Tensor, ...]:
        leaves = {n: w.clone().requires_grad_() for n, w in weights.items()}
        loss = F.cross_entropy(functional_call(net, leaves, (x,)), y)
        return torch.autograd.grad(loss, list(leaves.values()))

    rows = []
    for start, stop in pairwise(points):
        middle = {n: (start[n] + stop[n]) / 2 for n in start}
        sums: dict[str, Tensor] = {}
        for name, a, b, c in zip(start, *map(gradient, (start, middle, stop)), strict=True):
            layer = name.rpartition(".")[0]
            credit = ((stop[name] - start[name]) * (a + 4 * b + c) / 6).sum()
            sums[layer] = sums.get(layer, torch.zeros(())) + credit
        rows.append(torch.stack(list(sums.values())))
    return torch.stack(rows)


@contextmanager
def deterministic() -> Iterator[None]:
    """Uses kernels that add in a fixed order."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def correct(device: str, precision: str) -> list[str]:
    """Compares credits with those of float64."""
    probe, trail = SMALL.probe(device), Trail()
    lca = LCACallback(probe=[probe], figures=False)
    fit(SMALL, device, [lca, trail], STEPS, precision)
    want = truth(trail.points, probe)
    found = torch.from_numpy(lca.history.allocated)
    off = float((found - want).abs().sum() / want.abs().sum())
    history = lca.history
    change = history.loss_after[-1] - history.loss_before[0]
    booked = sum(float(getattr(history, c).sum()) for c in ("allocated", "residual", "drift"))
    passed = off <= NOISE[precision] and abs(change - booked) < 1e-6
    return [
        f"correct, {precision}",
        f"{off:.1e} off float64",
        f"at most {NOISE[precision]:g}",
        _word(passed),
    ]


def harmless(device: str, precision: str) -> list[str]:
    """Compares a training with and without the callback."""
    with deterministic():
        ends = [
            list(fit(SMALL, device, callbacks, STEPS, precision).state_dict().values())
            for callbacks in ([], [LCACallback(figures=False, breakdown=True, oscillation=True)])
        ]
    same = sum(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    told = f"{same} of {len(ends[0])} tensors to the bit"
    return [f"harmless, {precision}", told, "all", _word(same == len(ends[0]))]


def _word(passed: bool) -> str:
    return "passed" if passed else "FAILED"


class Counted(LCACallback):
    """Counts the kernels that one measured step launches, and whether it waits for the device."""

    launches, waits = 0, "none"

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        """Measures; once with the profiler on, once where a wait is an error."""
        step = trainer.global_step
        if step == 18:
            with profile(activities=[ProfilerActivity.CPU]) as profiler:
                super().on_train_batch_end(trainer, *args)
            names = (
                "cudaLaunchKernel",
                "cudaLaunchKernelExC",
                "cuLaunchKernel",
                "cuLaunchKernelEx",
                "cudaGraphLaunch",
            )
            self.launches = sum(e.count for e in profiler.key_averages() if e.key in names)
        elif step == 19 and torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("error")
            try:
                super().on_train_batch_end(trainer, *args)
            except RuntimeError as error:
                self.waits = str(error).partition("\n")[0]
                raise
            finally:
                torch.cuda.set_sync_debug_mode("default")
        else:
            super().on_train_batch_end(trainer, *args)


class OneByOne(LCACallback):
    """Launches kernels one by one, also where a measured step could be one launch."""

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        """Measures while nothing can be captured."""
        with mock.patch.object(Captured, "free", staticmethod(lambda device: 0)):
            super().on_train_batch_end(trainer, *args)


def cost(
    name: str, workload: Workload, device: str, seconds: float, *, quick: bool
) -> list[list[str]]:
    """Times, counts and weighs a measured step."""
    probe = workload.probe(device)
    on_device = [x.to(device) for x in probe]

    def floor(module: Model, repeats: int) -> None:
        weights = list(module.parameters())
        with without_dropout(module):
            for _ in range(2 * repeats):
                with module.trainer.precision_plugin.train_step_context():
                    loss = module.training_step(on_device, 0)
                torch.autograd.grad(loss, weights)

    contestants = {
        "plain": None,
        "simpson": LCACallback(probe=[probe], figures=False),
        "closed": LCACallback(probe=[probe], figures=False, quadrature="closed_trapezoid"),
        "one by one": OneByOne(probe=[probe], figures=False),
    }
    turns = TakeTurns(contestants, floor, 3 if device == "cpu" else 8, seconds)
    model = fit(workload, device, [turns])
    count = min(map(len, turns.seconds.values()))
    times = {n: s[:count] for n, s in turns.seconds.items()}
    weights = sum(w.numel() for w in model.parameters())
    del model
    rows = [
        [f"{name}, {weights / 1e6:.3g}M", f"plain step {milliseconds(times['plain'])} ms", "", ""],
        [f"{name}, two bare gradients", f"{milliseconds(times['floor'])} ms", "", ""],
    ]
    for rule in list(contestants)[1:]:
        adds = minus(times[rule], times["plain"])
        told = f"adds {milliseconds(adds)} ms, {ratio(over(adds, times['floor']))} of these"
        rows.append([f"{name}, {rule}", told, "", ""])
    counted = Counted(probe=[probe], figures=False, log_every_n_steps=1000)
    fit(workload, device, [counted], 20)
    rows.append([f"{name}, launches of a measured step", f"{counted.launches:,}", "", ""])
    waits = counted.waits if device == "cuda" else "-"
    rows.append([f"{name}, waits for the device", waits, "none", _word(waits in ("none", "-"))])
    peaks = []
    for callbacks in ([], [LCACallback(probe=[probe], figures=False)]):
        peak, model = peak_bytes(device, partial(fit, workload, device, callbacks, 4))
        size = sum(w.numel() * w.element_size() for w in model.parameters())
        peaks.append(peak / size)
        del model
    # The probe's batch is held, too; kernels ask for more or less room for their own work.
    batch = sum(x.numel() * x.element_size() for x in probe) / size
    adds = peaks[1] - peaks[0] - batch
    told = f"{adds:.2f} copies and the probe above {peaks[0]:.2f} without it"
    # Beside weights of a few thousand, activations are what takes memory.
    wanted = ["", ""] if quick else ["about 4", _word(adds < 4.6)]
    rows.append([f"{name}, memory at the peak", told, *wanted])
    return rows


def narrow() -> nn.Module:
    """Makes 784-32-32-10: next to nothing to compute."""
    sizes = [nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10)]
    return nn.Sequential(*sizes)


NARROW = dataclasses.replace(SMALL, net=narrow)
NETWORKS = {"narrow": NARROW, "small": SMALL} | {
    name: WORKLOADS[name] for name in ("transformer", "resnet50", "transformer100m")
}


def recorded(name: str, workload: Workload, device: str) -> list[list[str]]:
    """Times one evaluation of a loss and its gradient, four ways."""
    net = workload.net().to(device)
    batch = [x.to(device) for x in workload.probe(device)]
    weights = list(net.parameters())

    def bare() -> tuple[Tensor, ...]:
        loss = cross_entropy(net, batch)
        return (loss, *torch.autograd.grad(loss, weights))

    with without_dropout(net):
        bare()
        with (recorder := Recorder(weights, net.buffers())):
            loss, *gradients = bare()
        recording = recorder.finish(loss, gradients)
        numbers = [w.detach() for w in weights]
        ways: dict[str, Callable[[], Any]] = {
            "autograd.grad": bare,
            "recorded": lambda: recording(numbers),
        }
        rows = []
        kept = _flat(recording(numbers)[1])
        more = {"CUDA graph": _graph}
        if sum(w.numel() for w in weights) < 10**7:  # Others take minutes to compile.
            more["compiled"] = _compiled
        for way, make in more.items():
            try:
                ways[way], results = make(recording, numbers)
                off = float((_flat(results()) - kept).norm() / kept.norm())
                rows.append([f"{name}, {way}", f"{off:.1e} from as it is run", "", ""])
            except Exception as error:
                why = f"{type(error).__name__}: {str(error).strip()[:200]}"
                rows.append([f"{name}, {way}", why, "", ""])
        for way, seconds in _in_turns(ways, device).items():
            told = f"{1e3 * seconds[0]:.3f} ms, the host {1e3 * seconds[1]:.3f}"
            rows.append([f"{name}, {way}", told, "", ""])
    return rows


def _flat(gradients: list[Tensor]) -> Tensor:
    return torch.cat([g.double().flatten() for g in gradients])


_Way = tuple[Callable[[], Any], Callable[[], list[Tensor]]]


def _graph(recording: Recording, numbers: list[Tensor]) -> _Way:
    """Captures a recording; what it gives lies where it lay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            recording(numbers)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _, gradients = recording(numbers)

    def results() -> list[Tensor]:
        graph.replay()
        return gradients

    return graph.replay, results


def _compiled(recording: Recording, numbers: list[Tensor]) -> _Way:
    """Compiles what a recording runs."""
    with torch.no_grad():
        traced = make_fx(lambda *w: recording.run(w))(*numbers)
    run = torch.compile(traced, fullgraph=True)

    def go() -> tuple[Tensor, ...]:
        with torch.no_grad():
            found: tuple[Tensor, ...] = run(*numbers)
            return found

    go()
    return go, lambda: list(go()[1:])


def _in_turns(ways: dict[str, Callable[[], Any]], device: str) -> dict[str, tuple[float, float]]:
    """Times ways in turns: medians of {way: (seconds, of these the host's)}."""
    wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    found: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for _ in range(9):
        for way, go in ways.items():
            for _ in range(2):
                go()
            wait()
            began = time.perf_counter()
            for _ in range(10):
                go()
            queued = time.perf_counter() - began
            wait()
            found[way].append(((time.perf_counter() - began) / 10, queued / 10))
    return {
        way: (statistics.median(a for a, _ in f), statistics.median(b for _, b in f))
        for way, f in found.items()
    }


def largest(device: str, *, quick: bool) -> list[list[str]]:
    """Trains and measures the widest transformer that fits; narrower ones where it does not."""
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else 2**27
    # Weights, gradient, SGD without momentum; three copies and a gradient of the probe's.
    most = 0.8 * free / (4 * 6)
    layers = 2 if quick else 24
    width = int((most / (12 * layers)) ** 0.5) // 64 * 64
    while width >= 64:
        workload = dataclasses.replace(
            WORKLOADS["transformer"],
            net=partial(Transformer, width=width, layers=layers, heads=width // 64),
            optimizer=partial(torch.optim.SGD, lr=1e-3),
            batch_on={device: 4},
        )
        lca = LCACallback(probe=[workload.probe(device)], figures=False)
        try:
            with torch.device(device):  # The host would take minutes to draw so many numbers.
                model = workload.model()
            began = time.perf_counter()
            peak, model = peak_bytes(device, partial(fit, workload, device, [lca], 4, model=model))
        except torch.cuda.OutOfMemoryError:
            model = None
            width -= 256
            gc.collect()
            torch.cuda.empty_cache()
            continue
        weights = sum(w.numel() for w in model.parameters())
        each = (time.perf_counter() - began) / 4
        size = sum(w.numel() * w.element_size() for w in model.parameters())
        ends = [
            f"largest that fits, {weights / 1e9:.3g} 10^9 weights",
            f"four steps measured, {each:.2g} s each, {peak / size:.2f} copies above the weights",
        ]
        return [[*ends, "", _word(len(lca.history) == 4)]]
    return [["largest that fits", "none", "", "FAILED"]]


def run(
    device: str, only: list[str], names: list[str], seconds: float, *, quick: bool
) -> list[list[str]]:
    """Makes the rows of the table; what fails in the middle is a row, too."""
    rows: list[list[str]] = []

    def take(what: str, make: Callable[[], list[list[str]]]) -> None:
        before = len(rows)
        try:
            rows.extend(make())
        except Exception as error:
            rows.append([what, f"{type(error).__name__}: {str(error)[:90]}", "", "FAILED"])
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
        print(*(f"  {row}" for row in rows[before:]), sep="\n", flush=True)

    precisions = PRECISIONS if device == "cuda" else ["32-true", "64-true", "bf16-mixed"]
    for precision in precisions:
        if "correct" in only:
            take(f"correct, {precision}", lambda p=precision: [correct(device, p)])
        if "harmless" in only:
            take(f"harmless, {precision}", lambda p=precision: [harmless(device, p)])
    workloads = {n: w for n, w in NETWORKS.items() if n in names}
    if "recording" in only:
        for name, workload in workloads.items():
            take(name, lambda n=name, w=workload: recorded(n, w, device))
    if "cost" in only:
        for name, workload in workloads.items():
            is_small = name in ("narrow", "small")
            take(name, lambda n=name, w=workload, q=is_small: cost(n, w, device, seconds, quick=q))
    if "largest" in only:
        take("largest that fits", lambda: largest(device, quick=quick))
    return rows


def main() -> None:
    """Reads the command line."""
    parts = ["correct", "harmless", "recording", "cost", "largest"]
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="a network of a few thousand weights")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    parser.add_argument("--seconds", type=float, help="of each network of the table of costs")
    parser.add_argument("--networks", nargs="+", choices=[*NETWORKS], help="of costs")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("No card is there: torch.cuda.is_available() is False. Try --device cpu.")
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    began = time.perf_counter()
    seconds = arguments.seconds or (3.0 if arguments.quick else 20.0)
    names = arguments.networks or list(NETWORKS)[: 2 if arguments.quick else None]
    rows = run(arguments.device, arguments.only, names, seconds, quick=arguments.quick)
    title = f"{machine(arguments.device)}; {time.perf_counter() - began:.0f} s"
    print(table(title, ["what", "found", "wanted", ""], rows))
    if any(row[-1] == "FAILED" for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
