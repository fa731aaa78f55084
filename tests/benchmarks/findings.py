"""How often noise has a finding, and how often what is planted is found.

    PYTHONPATH=tests python tests/benchmarks/findings.py

A run is 6 layers whose credit per step is noise that keeps phi of the step before. The level is 5 %
of runs, over all tests of a run.
"""

from __future__ import annotations

import argparse

import numpy as np
from support.noise import noisy

from lightning_lca.record.findings import find

LAYERS = 6


def rate(kind: str | None, runs: int, steps: int, phi: float, size: float = 0.0) -> float:
    """Share of runs with a finding of a kind (None: any); `size` plants it, in standard errors."""
    # Of the mean of such noise.
    unit = size * np.sqrt((1 + phi) / (1 - phi) / steps)
    one = np.arange(LAYERS) == 2
    found = 0
    for seed in range(runs):
        planted = unit * one if kind in ("hurts", "overfits") else 0.0
        share = 0.5 + 0.02 * unit if kind == "helping" else 0.5
        run = noisy(2 * seed, steps, phi, LAYERS, planted, share)
        if kind == "overfits":
            train = noisy(2 * seed + 1, steps, phi, LAYERS, -planted)
            findings = find({"train": train, "val": run})
        else:
            findings = run.findings()
        found += any(f.p is not None if kind is None else f.kind == kind for f in findings)
    return found / runs


def main() -> None:
    parser = argparse.ArgumentParser(description="False and true findings in noise.")
    parser.add_argument("--runs", type=int, default=200)
    runs = parser.parse_args().runs
    spread = 100 * np.sqrt(0.05 * 0.95 / runs)
    print(f"Runs with a finding, % of {runs} (level 5 %, standard error {spread:.1f})")
    columns = ["noise", "hurts, 4 se", "hurts, 6 se", "helping, 5 se", "overfits, 6 se"]
    print(f"{'steps':>6} {'phi':>5}" + "".join(f"{column:>16}" for column in columns))
    for steps in (50, 200, 1000):
        for phi in (0.0, 0.5, 0.8):
            asked = [(None, 0), ("hurts", 4), ("hurts", 6), ("helping", 5), ("overfits", 6)]
            rates = [rate(kind, runs, steps, phi, size) for kind, size in asked]
            told = "".join(f"{100 * value:16.1f}" for value in rates)
            print(f"{steps:6} {phi:5.1f}{told}", flush=True)


if __name__ == "__main__":
    main()
