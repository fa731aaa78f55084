"""What splitting credit into shares adds to a measured step.

    python tests/benchmarks/breakdowns.py [--rounds N] [--only NAME ...]

Trains with and without ``breakdown``, one after the other in one process; the table has the time of
a training step that is measured, and ratios to it, medians of rounds.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import warnings

import pytorch_lightning as pl
import torch
from simplest import Clock
from workloads import WORKLOADS

from lightning_lca import LCACallback

WARM, STEPS = 4, 8
ON_CPU = [name for name, work in WORKLOADS.items() if "cpu" in work.batch_on]


def seconds(name: str, device: str, **arguments: object) -> float:
    """Trains, and returns the median time of a step."""
    work, clock = WORKLOADS[name], Clock()
    lca = LCACallback(probe=[work.probe(device)], figures=False, **arguments)
    with tempfile.TemporaryDirectory() as path:
        trainer = pl.Trainer(
            default_root_dir=path,
            callbacks=[clock, lca],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            max_epochs=1,
            accelerator=device,
            devices=1,
        )
        trainer.fit(work.model(), work.loader(device, WARM + STEPS))
    steps = [b - a for a, b in zip(clock.times[:-1], clock.times[1:], strict=True)]
    return statistics.median(steps[WARM:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", nargs="*", default=ON_CPU, choices=list(WORKLOADS))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    print("model         measured step     order    part and order")
    for name in options.only:
        rounds = [
            (
                seconds(name, options.device),
                seconds(name, options.device, breakdown="order"),
                seconds(name, options.device, breakdown=True),
            )
            for _ in range(options.rounds)
        ]
        plain = statistics.median(p for p, _, _ in rounds)
        order, both = (statistics.median(r[i] / r[0] for r in rounds) for i in (1, 2))
        print(f"{name:12s} {1e3 * plain:11.0f} ms  {order:7.2f}x  {both:12.2f}x", flush=True)


if __name__ == "__main__":
    import logging

    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    main()
