"""The cost of a measured step, foretold and measured: T = g · t + p · W / B.

    python tests/benchmarks/cost_model.py [--rounds N]

For networks of several sizes and probes: t is the time of one gradient of the probe, B the bytes
that a copy of all weights moves per second from memory that is in no cache, p what passes per
weight (26 and 40 reads or writes of four bytes), as in ``lightning_lca/docs/scale.md``. Beside it
stands what a training step takes longer with the callback. One thread, the processor's time,
medians.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import statistics
import time
import warnings
from collections.abc import Callable

import pytorch_lightning as pl
import simplest
import torch
import torch.nn.functional as F

from lightning_lca import LCACallback

SIZES = [(width, batch) for width in (512, 1024, 2048) for batch in (8, 64, 256)]
COLD = 2**24  # Elements that no cache holds.
RULES = {"simpson": (2, 26), "closed_trapezoid": (1, 40)}  # Gradients, and passes.


def median(work: Callable[[], object], times: int = 9) -> float:
    """Runs something some times, and returns the median of the processor's time."""
    found = []
    for _ in range(times):
        began = time.process_time()
        work()
        found.append(time.process_time() - began)
    return statistics.median(found[1:])


def foretold(width: int, batch: int, gradients: int, passes: int) -> tuple[float, int]:
    """Returns what the formula says, in seconds, and the number of weights."""
    net = simplest.mlp(64, width, width, width, 10)
    weights = list(net.parameters())
    count = sum(w.numel() for w in weights)
    x, y = torch.randn(batch, 64), torch.randint(0, 10, (batch,))
    gradient = median(lambda: torch.autograd.grad(F.cross_entropy(net(x), y), weights))
    pairs = [(torch.randn(count), torch.empty(count)) for _ in range(2 + COLD // count)]
    turns = itertools.cycle(pairs)

    def copied() -> None:
        a, b = next(turns)
        b.copy_(a)  # One pass that reads, one that writes.

    copy = median(copied, 4 * len(pairs))
    return gradients * gradient + passes * copy / 2, count


def measured(width: int, batch: int, rule: str) -> float:
    """Returns by how much a training step is longer with the callback, in seconds."""
    name = f"{width} x {batch}"
    simplest.NETWORKS[name] = (
        lambda: simplest.mlp(64, width, width, width, 10),
        lambda n: torch.randn(n, 64),
    )
    probe = [torch.randn(batch, 64), torch.randint(0, 10, (batch,))]
    lca = LCACallback(probe=[probe], quadrature=rule, figures=False)
    plain = simplest.seconds(name)
    return simplest.seconds(name, lca) - plain


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    pl.seed_everything(0, verbose=False)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print("weights    probe  rule               foretold   measured   ratio")
    for width, batch in SIZES:
        for rule, (gradients, passes) in RULES.items():
            rounds = []
            for _ in range(options.rounds):
                seconds, count = foretold(width, batch, gradients, passes)
                rounds.append((seconds, measured(width, batch, rule)))
            said, seen = (1e3 * statistics.median(column) for column in zip(*rounds, strict=True))
            ratio = statistics.median(b / a for a, b in rounds)
            print(
                f"{count:9,d}  {batch:5d}  {rule:17s}  {said:6.1f} ms  {seen:6.1f} ms {ratio:6.2f}",
                flush=True,
            )


if __name__ == "__main__":
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    main()
