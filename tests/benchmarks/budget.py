"""What max_overhead=0.1 comes to: training with the callback over plain training, in one run.

    python tests/benchmarks/budget.py [--device cpu|cuda] [--threads N] [--most 0.1] [--seconds N]
                                      [--only mlp|cnn|transformer] [--batch N]

Once every_n_steps is chosen, stretches of training with and without the callback take turns, so
that a drifting machine slows both alike. Each is so many whole chords long. Where other programs
share the machine, the time that this one had a processor says more than the clock on the wall:
both are printed, with one thread only.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import time
import warnings
from typing import Any

import pytorch_lightning as pl
import torch
from overhead import LEAST_ROUNDS, NO_LIMIT, fit, machine, milliseconds, now, over, ratio, table
from workloads import WORKLOADS, Workload

from lightning_lca import LCACallback

Times = tuple[float, float]
CHORDS = 2  # Timed ones of a stretch; one more goes before, whose start is evaluated afresh.


def both(device: torch.device) -> Times:
    """Reads the clock on the wall and that of the processor."""
    return now(device), time.process_time()


class Switch(pl.Callback):
    """Lets the callback choose, and then has it watch every other stretch of training.

    Attributes:
        seconds: (on the wall, of the processor) per step of every round, "plain" and "measured".
    """

    def __init__(self, lca: LCACallback, seconds: float) -> None:
        self.lca = lca
        self.seconds: dict[str, list[Times]] = {"measured": [], "plain": []}
        self._ends = time.perf_counter() + seconds
        self._on = True
        self._steps = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.lca.on_train_start(trainer, pl_module)

    def on_train_batch_start(self, *args: Any) -> None:
        if self._on:
            self.lca.on_train_batch_start(*args)

    def on_before_optimizer_step(self, *args: Any) -> None:
        if self._on:
            self.lca.on_before_optimizer_step(*args)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if self._on:
            self.lca.on_train_batch_end(trainer, pl_module, *args)
        every = self.lca.every_n_steps
        if every is None:
            return
        # Ten chords of looking on whether it holds would only take time.
        self.lca._training._cost = None
        self._steps += 1
        if self._steps == every:
            self._began = both(pl_module.device)
        elif self._steps == every * (1 + CHORDS):
            times = zip(both(pl_module.device), self._began, strict=True)
            wall, cpu = ((end - began) / (every * CHORDS) for end, began in times)
            self.seconds["measured" if self._on else "plain"].append((wall, cpu))
            rounds = len(self.seconds["plain"])
            trainer.should_stop = rounds > LEAST_ROUNDS and time.perf_counter() > self._ends
            self._on, self._steps = not self._on, 0

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.lca.on_train_end(trainer, pl_module)


def compare(workload: Workload, device: str, most: float, seconds: float) -> tuple[int, Switch]:
    """Trains, and gives what was chosen and the times of the rounds."""
    lca = LCACallback(probe=[workload.probe(device)], max_overhead=most, figures=False)
    switch = Switch(lca, seconds)
    fit(workload, device, [switch], steps=NO_LIMIT)
    assert lca.every_n_steps is not None
    for times in switch.seconds.values():
        del times[0]  # The first round was for warming up.
    return lca.every_n_steps, switch


def main() -> None:
    """Parses the command line, runs, prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, help="of the CPU; few, where it is shared")
    parser.add_argument("--most", type=float, default=0.1, help="the budget")
    parser.add_argument("--seconds", type=float, default=120, help="of each model")
    parser.add_argument("--batch", type=int, help="samples, of training and probe")
    parser.add_argument("--only", choices=[*WORKLOADS])
    arguments = parser.parse_args()
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    print(f"Machine: {machine(device)}.")
    rows = []
    for name in [arguments.only] if arguments.only else ["mlp", "transformer"]:
        workload = WORKLOADS[name]
        if arguments.batch:
            workload = dataclasses.replace(workload, batch_on={device: arguments.batch})
        every, switch = compare(workload, device, arguments.most, arguments.seconds)
        plain, measured = (zip(*switch.seconds[who]) for who in ("plain", "measured"))
        (wall, cpu), (measured_wall, measured_cpu) = map(list, plain), map(list, measured)
        shares = [ratio(over(measured_wall, wall)), ratio(over(measured_cpu, cpu))]
        rows.append([name, str(every), milliseconds(list(wall)), *shares, str(len(wall))])
    header = ["model", "every_n_steps", "plain step, ms", "times plain", "processor", "rounds"]
    print(table(f"training with max_overhead={arguments.most:g} over plain training", header, rows))


if __name__ == "__main__":
    main()
