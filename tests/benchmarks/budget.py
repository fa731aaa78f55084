"""What max_overhead=0.1 comes to: training with the callback over plain training, in one run.

    python tests/benchmarks/budget.py [--device cpu|cuda] [--threads N] [--most 0.1] [--rounds N]
                                      [--only mlp|cnn|transformer]

Once every_n_steps is chosen, stretches of training with and without the callback take turns, so
that a drifting machine slows both alike. Each is so many whole chords long.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import warnings
from typing import Any

import pytorch_lightning as pl
import torch
from overhead import NO_LIMIT, fit, machine, milliseconds, now, over, ratio, table
from workloads import WORKLOADS, Workload

from lightning_lca import LCACallback

CHORDS = 2  # Timed ones of a stretch; one more goes before, whose start is evaluated afresh.


class Switch(pl.Callback):
    """Lets the callback choose, and then has it watch every other stretch of training.

    Attributes:
        seconds: Seconds per step of every round, "plain" and "measured".
    """

    def __init__(self, lca: LCACallback, rounds: int) -> None:
        self.lca = lca
        self.seconds: dict[str, list[float]] = {"measured": [], "plain": []}
        self._rounds = rounds
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
        if every is None or self.lca._cost is not None:
            return
        self._steps += 1
        if self._steps == every:
            self._began = now(pl_module.device)
        elif self._steps == every * (1 + CHORDS):
            seconds = (now(pl_module.device) - self._began) / (every * CHORDS)
            self.seconds["measured" if self._on else "plain"].append(seconds)
            trainer.should_stop = len(self.seconds["plain"]) > self._rounds
            self._on, self._steps = not self._on, 0

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.lca.on_train_end(trainer, pl_module)


def compare(workload: Workload, device: str, most: float, rounds: int) -> tuple[int, Switch]:
    """Trains, and gives what was chosen and the times of the rounds."""
    lca = LCACallback(probe=[workload.probe(device)], max_overhead=most, figures=False)
    switch = Switch(lca, rounds)
    fit(workload, device, [switch], steps=NO_LIMIT)
    assert lca.every_n_steps is not None
    for seconds in switch.seconds.values():
        del seconds[0]  # The first round was for warming up.
    return lca.every_n_steps, switch


def main() -> None:
    """Parses the command line, runs, prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, help="of the CPU; few, where it is shared")
    parser.add_argument("--most", type=float, default=0.1, help="the budget")
    parser.add_argument("--rounds", type=int, default=5)
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
        every, switch = compare(WORKLOADS[name], device, arguments.most, arguments.rounds)
        plain, measured = switch.seconds["plain"], switch.seconds["measured"]
        rounds = min(len(plain), len(measured))
        shares = over(measured[:rounds], plain[:rounds])
        best = statistics.median(sorted(measured)[:2]) / statistics.median(sorted(plain)[:2])
        rows.append(
            [name, str(every), milliseconds(plain), ratio(shares), f"{best:.3f}", str(rounds)]
        )
    header = ["model", "every_n_steps", "plain step, ms", "times plain", "fastest two", "rounds"]
    print(table(f"training with max_overhead={arguments.most:g} over plain training", header, rows))


if __name__ == "__main__":
    main()
