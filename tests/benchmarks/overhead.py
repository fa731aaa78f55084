"""What measuring LCA costs in time and memory, and what each quadrature rule gives for it.

    python tests/benchmarks/overhead.py [--quick] [--device cpu|cuda] [--threads N]
                                        [--only mlp|cnn|transformer|...]
                                        [--precision 32-true|bf16-mixed|...]

Contestants take turns within one training run, so that a drifting machine slows all of them alike.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # The profiler announces itself otherwise.

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from workloads import WORKLOADS, Model, NaiveLCA, Workload, without_dropout

from lightning_lca import LCACallback

NEVER = 10**6  # More steps than any run here has.
PRECISION: Any = "32-true"  # Of every training here; --precision sets it.
LEAD = 1  # Untimed steps of a block: a measured block evaluates its start afresh on the first.
NO_LIMIT = 10**5
LEAST_ROUNDS = 3
Timings = Mapping[str, list[float]]  # {contestant: seconds per step of every round}


# -- time -----------------------------------------------------------------------------------------


class TakeTurns(pl.Callback):
    """Lets callbacks take turns within one run, a block of steps each, and times every block.

    Only the callback whose turn it is sees the hooks of a step. Two probe gradients, the floor, are
    timed in blocks of their own. Every other round runs backwards, so that a steady drift cancels.

    Attributes:
        seconds: Seconds per step of every round, per contestant; per two gradients for "floor".
    """

    def __init__(
        self,
        contestants: Mapping[str, pl.Callback | None],
        floor: Callable[[Model, int], None],
        block: int,
        budget: float,
    ) -> None:
        """Takes rounds until the budget, in seconds, is spent, and at least `LEAST_ROUNDS`."""
        self.contestants = contestants
        self.floor = floor
        self.block = block
        self.seconds: dict[str, list[float]] = {name: [] for name in [*contestants, "floor"]}
        self._budget = budget
        self._order = list(self.seconds)
        self._turns = list(self._order)  # What is left of this round.
        self._warm = False
        self._steps = 0

    @property
    def _active(self) -> Any:
        return self.contestants[self._turns[0]] or pl.Callback()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        for contestant in filter(None, self.contestants.values()):
            contestant.on_train_start(trainer, pl_module)
        self._ends = time.perf_counter() + self._budget

    def on_train_batch_start(self, *args: Any) -> None:
        self._active.on_train_batch_start(*args)

    def on_before_optimizer_step(self, *args: Any) -> None:
        self._active.on_before_optimizer_step(*args)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self._active.on_train_batch_end(trainer, pl_module, *args)
        self._steps += 1
        if self._steps == LEAD:
            self._began = now(pl_module.device)
        elif self._steps == LEAD + self.block:
            self._next_turn(now(pl_module.device) - self._began, trainer)
            while self._turns[0] == "floor":
                self.floor(pl_module, LEAD)
                began = now(pl_module.device)
                self.floor(pl_module, self.block)
                self._next_turn(now(pl_module.device) - began, trainer)
            self._steps = 0

    def _next_turn(self, seconds: float, trainer: Any) -> None:
        name = self._turns.pop(0)
        if self._warm:
            self.seconds[name].append(seconds / self.block)
        if self._turns:
            return
        self._warm = True  # The first round was for warming up.
        self._order.reverse()
        self._turns = list(self._order)
        rounds = len(self.seconds["floor"])
        trainer.should_stop = rounds >= LEAST_ROUNDS and time.perf_counter() > self._ends

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        for contestant in filter(None, self.contestants.values()):
            contestant.on_train_end(trainer, pl_module)


def now(device: torch.device) -> float:
    """Reads the clock once the device has caught up."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def time_turns(workload: Workload, device: str, block: int, budget: float) -> Timings:
    """Times plain, measured, not measured and naively measured steps, and the floor, in one run."""
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
        "idle": LCACallback(probe=[probe], every_n_steps=NEVER),
        "lca": LCACallback(probe=[probe]),
        "naive": NaiveLCA(probe),
    }
    turns = TakeTurns(contestants, floor, block, budget)
    fit(workload, device, [turns])
    rounds = min(map(len, turns.seconds.values()))
    return {name: seconds[:rounds] for name, seconds in turns.seconds.items()}


def fit(
    workload: Workload,
    device: str,
    callbacks: list[pl.Callback],
    steps: int = NO_LIMIT,
    precision: Any = None,
    model: Model | None = None,
) -> Model:
    """Trains a model, by default a fresh one, with a TensorBoard logger in a directory that goes
    away.
    """
    model = workload.model() if model is None else model
    with tempfile.TemporaryDirectory() as root:
        trainer = pl.Trainer(
            accelerator="gpu" if device == "cuda" else "cpu",
            devices=1,
            precision=precision or PRECISION,
            max_steps=steps,
            max_epochs=-1,
            logger=TensorBoardLogger(root),
            callbacks=callbacks,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(model, workload.loader(device, NO_LIMIT))
    return model


# -- memory ---------------------------------------------------------------------------------------


class Watch(pl.Callback):
    """Notes after every step what another callback holds; stands behind it in the list."""

    def __init__(self, watched: pl.Callback | None) -> None:
        self.watched = watched
        self.held = 0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        tensors = [] if self.watched is None else _tensors_in(vars(self.watched), set())
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        # The live weights and their gradients are there without it, too.
        own = [t for p in pl_module.parameters() for t in (p, p.grad) if t is not None]
        live = {t.untyped_storage().data_ptr() for t in own}
        self.held = sum(size for place, size in storages.items() if place not in live)


def _tensors_in(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """Finds the tensors reachable from a value through containers, networks and our own objects."""
    if id(value) in seen or isinstance(value, pl.LightningModule | pl.Trainer):
        return
    seen.add(id(value))
    inside: Iterable[Any] = ()
    if isinstance(value, Tensor):
        yield value
        inside = [] if value.grad is None else [value.grad]
    elif isinstance(value, Mapping):
        inside = value.values()
    elif isinstance(value, list | tuple | set):
        inside = value
    elif isinstance(value, nn.Module):
        inside = [*value.parameters(), *value.buffers()]
    elif type(value).__module__.startswith("lightning_lca"):
        inside = getattr(value, "__dict__", {}).values()
    for item in inside:
        yield from _tensors_in(item, seen)


def copies(workload: Workload, device: str, watched: pl.Callback | None) -> tuple[float, float]:
    """Gives what a callback holds and the peak of a short run, in copies of the weights."""
    watch = Watch(watched)
    callbacks = [watch] if watched is None else [watched, watch]
    peak, model = peak_bytes(device, lambda: fit(workload, device, callbacks, steps=3))
    weights = sum(w.numel() * w.element_size() for w in model.parameters() if w.requires_grad)
    return watch.held / weights, peak / weights


def peak_bytes(device: str, run: Callable[[], Model]) -> tuple[int, Model]:
    """Runs, and gives the largest number of bytes that tensors took at one time meanwhile.

    On CUDA the allocator counts them. On the CPU the profiler notes every allocation of torch's
    allocator; memory that kernels take past it is not seen.
    """
    gc.collect()  # What an earlier run left behind must not go away during this one.
    if device == "cuda":
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        model = run()
        return torch.cuda.max_memory_allocated() - before, model
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model = run()
    with tempfile.TemporaryDirectory() as root:
        trace = Path(root) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    notes = [e for e in events if e.get("name") == "[memory]"]
    total = peak = 0
    for note in sorted(notes, key=lambda e: e["ts"]):
        total += note["args"]["Bytes"]
        peak = max(peak, total)
    return peak, model


# -- agreement ------------------------------------------------------------------------------------


class Compare(pl.Callback):
    """Raises unless two callbacks before it in the list gave every tensor the same credit."""

    def __init__(self, ours: LCACallback, naive: NaiveLCA) -> None:
        self.ours = ours
        self.naive = naive
        self.worst = 0.0

    def on_train_batch_end(self, *_: Any) -> None:
        values = self.ours.last.values
        everything = sum(float(v.abs().sum()) for v in values.values())
        for name, (credit, helping, hurting) in self.naive.rows[-1].items():
            value = values[f"net.{name}"]
            # Some credits are rounding noise, like those of an attention's key bias.
            scale = float(value.abs().sum()) + 1e-2 * everything
            error = abs(float(value.sum(dtype=torch.float64)) - credit) / scale
            self.worst = max(self.worst, error)
            if not error <= 1e-6:
                raise AssertionError(
                    f"The credit of {name} differs: {float(value.sum())} here, {credit} naively."
                )
            counted = (int((value < 0).sum()) - helping, int((value > 0).sum()) - hurting)
            if max(map(abs, counted)) > 0.05 * value.numel() + 1:
                raise AssertionError(f"Counts of {name} differ from the naive ones by {counted}.")


def check_agreement(workload: Workload, device: str) -> float:
    """Measures the same steps both ways; gives the largest difference in the credit of a tensor."""
    probe = workload.probe(device)
    ours, naive = LCACallback(probe=[probe], track_parameters=True), NaiveLCA(probe)
    compare = Compare(ours, naive)
    # The first layers of a deep network with BatchNorm magnify the last bit of float32.
    fit(workload, device, [ours, naive, compare], steps=4, precision="64-true")
    return compare.worst


# -- tables ---------------------------------------------------------------------------------------


def table(title: str, header: list[str], rows: list[list[str]]) -> str:
    """Lays out aligned Markdown: text to the left in the first column, numbers to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    rule = ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])]

    def line(cells: list[str]) -> str:
        first, *rest = zip(cells, widths, strict=True)
        return "| " + " | ".join([first[0].ljust(first[1]), *(c.rjust(w) for c, w in rest)]) + " |"

    return "\n".join([f"\n**{title}**\n", line(header), line(rule), *map(line, rows)])


def ratio(values: Iterable[float]) -> str:
    """Words the median over rounds, and between which values half of them lie."""
    lower, middle, upper = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:.2f} ({lower:.2f} to {upper:.2f})"


def milliseconds(values: list[float]) -> str:
    return f"{1e3 * statistics.median(values):.1f}"


def minus(a: list[float], b: list[float]) -> list[float]:
    return [x - y for x, y in zip(a, b, strict=True)]


def over(a: list[float], b: list[float]) -> list[float]:
    return [x / y for x, y in zip(a, b, strict=True)]


def added(seconds: Timings, who: str) -> tuple[list[float], float]:
    """Gives what a callback adds to a plain step: per round, and between the two fastest blocks."""
    return minus(seconds[who], seconds["plain"]), min(seconds[who]) - min(seconds["plain"])


def report_overhead(timings: Mapping[str, Timings]) -> None:
    """Prints table (a)."""
    rows = []
    for name, seconds in timings.items():
        floor = seconds["floor"]
        ours, ours_best = added(seconds, "lca")
        times = [milliseconds(x) for x in (seconds["plain"], floor, ours)]
        best = f"{ours_best / min(floor):.2f}"
        rows.append([name, *times, ratio(over(ours, floor)), best, str(len(floor))])
    title = "(a) a measured step above plain training, over two probe gradients (target 1.15)"
    columns = ["plain step, ms", "floor, ms", "measuring adds, ms", "times the floor"]
    print(table(title, ["model", *columns, "best blocks", "rounds"], rows))
    print(
        "\nMedians over rounds; in brackets, where the middle half of the rounds lies.\n"
        "Best blocks: the same of everyone's fastest blocks, for a machine that others share.\n"
        "The audit of a kept gradient, one in fifty measured steps, falls outside both."
    )


def report_idle(timings: Mapping[str, Timings]) -> None:
    """Prints table (c)."""
    rows = [
        [name, milliseconds(seconds["idle"]), ratio(over(seconds["idle"], seconds["plain"]))]
        for name, seconds in timings.items()
    ]
    title = "(c) a step that is not measured, over plain training"
    print(table(title, ["model", "step, ms", "times plain"], rows))


def report_naive(timings: Mapping[str, Timings]) -> None:
    """Prints the times of (d)."""
    rows = []
    for name, seconds in timings.items():
        ours, ours_best = added(seconds, "lca")
        naive, naive_best = added(seconds, "naive")
        best = f"{naive_best / ours_best:.2f}"
        rows.append([name, milliseconds(naive), ratio(over(naive, ours)), best])
    title = "(d) against a naive callback (target 1.5 times faster)"
    print(table(title, ["model", "naive adds, ms", "times faster", "best blocks"], rows))


def report_memory(names: list[str], device: str) -> None:
    """Prints table (b)."""
    rows = []
    for name in names:
        workload = WORKLOADS[name]
        probe = workload.probe(device)
        _, plain = copies(workload, device, None)
        held, peak = copies(workload, device, LCACallback(probe=[probe]))
        naive_held, naive_peak = copies(workload, device, NaiveLCA(probe))
        numbers = (plain, held, peak - plain, naive_held, naive_peak - plain)
        rows.append([name, *(f"{n:.2f}" for n in numbers)])
    print(
        table(
            "(b) memory in copies of the trainable weights (target 3 held between steps)",
            [
                "model",
                "peak of plain training",
                "held",
                "added to peak",
                "naive held",
                "naive added",
            ],
            rows,
        )
    )
    counter = "torch.cuda.max_memory_allocated" if device == "cuda" else "torch's profiler"
    print(f"\nHeld: tensors reachable from the callback, its probe included. Peaks: by {counter}.")


def report_agreement(names: list[str], device: str) -> None:
    """Prints how far the credits of the two callbacks are apart; raises if too far."""
    worst = {name: check_agreement(WORKLOADS[name], device) for name in names}
    text = ", ".join(f"{name} {difference:.1e}" for name, difference in worst.items())
    print(f"\nCredit per tensor, here and naively, differs by at most this share: {text}.")


def machine(device: str) -> str:
    """Describes what the numbers were taken on."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    parts = [names[0] if names else platform.machine(), f"{torch.get_num_threads()} threads"]
    if device == "cuda":
        parts.insert(0, torch.cuda.get_device_name())
    return ", ".join([*parts, f"torch {torch.__version__}", f"pytorch-lightning {pl.__version__}"])


def main() -> None:
    """Parses the command line, runs, prints."""
    global PRECISION
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds and steps")
    parser.add_argument("--device", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, help="of the CPU; few, where it is shared")
    parser.add_argument("--precision", default=PRECISION, help="as Trainer's")
    parser.add_argument("--only", choices=[*WORKLOADS])
    arguments = parser.parse_args()
    PRECISION = arguments.precision
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)

    print(f"Machine: {machine(device)}, precision {PRECISION}.")
    names = [
        name
        for name, workload in WORKLOADS.items()
        if arguments.only in (None, name) and device in workload.batch_on
    ]
    for name in names:
        weights = sum(w.numel() for w in WORKLOADS[name].net().parameters())
        batch = WORKLOADS[name].batch_on[device]
        print(f"- {name}: {WORKLOADS[name].note}; {weights / 1e6:.1f}M weights, batch {batch}")
    if names:
        block = 3 if device == "cpu" else 20
        budget = 15.0 if arguments.quick else 45.0  # Seconds.
        report_agreement(names, device)
        timings = {n: time_turns(WORKLOADS[n], device, block, budget) for n in names}
        report_overhead(timings)
        report_memory(names, device)
        report_idle(timings)
        report_naive(timings)


if __name__ == "__main__":
    main()
