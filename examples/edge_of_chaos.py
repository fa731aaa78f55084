"""Which part of a step learns, from slow to chaotic? SGD with momentum over rate and weight decay.

    python examples/edge_of_chaos.py
    python examples/edge_of_chaos.py --quick

A net of 784-100-50-10 learns Fashion-MNIST where ``fashion_mnist.py`` finds it (else scikit-learn's
digits) once per cell of a grid, learning rate by weight decay, and seed. What appears:

1. A row per cell: the loss of the probe at the end, and the credit of every part of the steps as a
   share of the gross credit, Σ over steps and layers of the part / Σ over parts of its size.
   Negative helped, positive hurt; mean over seeds ± spread (standard deviation).
   *signal* is the step that the probe's own gradient would have made, *noise* what the mini-batch
   changed against it, *momentum* and *weight decay* what they added, *other* what none explains.
2. A picture of the same in ``--out``.

A run has blown up where its loss is beyond ten times that of its start at any step, or not finite.
It has no share, since one such step outweighs all learning: its cell is crossed out, and the row
says after how many steps.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from fashion_mnist import PLACES
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from observations import MLP, load
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lca import LCACallback
from lightning_lca.figures.style import diverging

PARTS = ("signal", "momentum", "noise", "weight_decay", "other")
BLOWN = 10  # Times the loss at the start.
LITTLE = 0.05  # Of the loss: less off it is no gain. Of credit: parts with less are not counted.


class Learner(pl.LightningModule):
    def __init__(self, net: nn.Module, rate: float, decay: float, momentum: float) -> None:
        super().__init__()
        self.net, self.rate, self.decay, self.momentum = net, rate, decay, momentum

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            self.parameters(), self.rate, momentum=self.momentum, weight_decay=self.decay
        )


class Seen(NamedTuple):
    """What one run shows.

    ``before``, ``after``: loss of the probe; ``parts``: credit of PARTS over the run; ``sound``:
    steps before it blew up; None: it did not.
    """

    before: float
    after: float
    parts: np.ndarray
    sound: int | None

    @property
    def shares(self) -> np.ndarray:
        """Credit of PARTS as a share of the gross credit, in [-1, 1]; NaN of a run that blew up."""
        if self.sound is not None:
            return np.full(len(PARTS), np.nan)
        return self.parts / np.abs(self.parts).sum()


def observe(
    data: TensorDataset, rate: float, decay: float, seed: int, args: argparse.Namespace
) -> Seen:
    pl.seed_everything(seed, verbose=False)
    net = MLP(data.tensors[0].shape[-1], 0)
    lca = LCACallback(breakdown="part", probe_batches=args.probe_batches, seed=seed, figures=False)
    quiet = {f"enable_{x}": False for x in ("checkpointing", "model_summary", "progress_bar")}
    trainer = pl.Trainer(
        max_steps=args.steps, callbacks=[lca], logger=False, accelerator="cpu", **quiet
    )
    learner = Learner(net, rate, decay, args.momentum)
    trainer.fit(learner, DataLoader(data, args.batch, shuffle=True))
    history, split = lca.history, lca.history.breakdowns["part"]
    parts = split.allocated[history.finite].sum((0, 1))
    is_sound = history.finite & (history.loss_after < BLOWN * history.loss_before[0])
    return Seen(
        before=float(history.loss_before[0]),
        after=float(history.loss_after[-1]),
        parts=parts[[split.names.index(part) for part in PARTS]],
        sound=None if is_sound.all() else int(is_sound.argmin()),
    )


def tell(rate: float, decay: float, seen: list[Seen]) -> str:
    """Writes the row of a cell."""
    left = [s for s in seen if s.sound is None]
    blown = [s.sound for s in seen if s.sound is not None]
    row = f"{rate:>8.2g} {decay:>8.2g}"
    if left:
        row += f" {np.mean([s.after for s in left]):>9.3f} "
        for share in 100 * np.array([s.shares for s in left]).T:
            row += f"{share.mean():+7.1f} ± {share.std(ddof=len(left) > 1):<4.1f}"
    else:
        row += f" {'-':>9} " + f"{'-':>7}{'':7}" * len(PARTS)
    if blown:
        row += f" blew up: {len(blown)} of {len(seen)}, after {min(blown)} steps or more"
    elif is_stuck(left):
        row += f" no gain: less than {LITTLE:.0%} off the loss"
    return row.rstrip()


def is_stuck(seen: list[Seen]) -> bool:
    before, after = (np.mean([s[i] for s in seen]) for i in (0, 1))
    return bool(after > (1 - LITTLE) * before)


def borders(values: np.ndarray) -> np.ndarray:
    """Puts the borders of cells between values [n], on a logarithmic scale: [n + 1]."""
    logs = np.log(values)
    steps = np.diff(logs) if len(logs) > 1 else np.ones(1)
    return np.exp(
        np.concatenate([[logs[0] - steps[0] / 2], logs[1:] - steps / 2, [logs[-1] + steps[-1] / 2]])
    )


def percent(share: float) -> str:
    return f"{share:+.0%}".replace("-", "\N{MINUS SIGN}").replace("+0%", "0")


def headline(rates: list[float], momentum: np.ndarray) -> str:
    """Says where momentum turns from help to harm, from its shares [decays, rates]."""
    there = [j for j in range(len(rates)) if np.isfinite(momentum[:, j]).any()]
    hurts = [bool(np.nanmean(momentum[:, j]) > 0) for j in there]
    turn = hurts.index(True) if True in hurts else len(hurts)
    if 0 < turn < len(hurts) and all(hurts[turn:]):
        below, above = (f"{rates[there[j]]:.2g}" for j in (turn - 1, turn))
        return f"momentum helps up to a rate of {below} and hurts from {above} on"
    told = [f"{sum(h is does for h in hurts)}" for does in (False, True)]
    return f"momentum helps at {told[0]} of the rates, hurts at {told[1]}"


def draw(
    found: dict[tuple[float, float], list[Seen]],
    rates: list[float],
    decays: list[float],
    what: str,
    path: Path,
) -> None:
    shape = len(decays), len(rates)
    loss, shares = np.full(shape, np.nan), np.full((len(PARTS), *shape), np.nan)
    crosses, triangles = [], []
    for j, rate in enumerate(rates):
        for i, decay in enumerate(decays):
            left = [s for s in found[rate, decay] if s.sound is None]
            if left:
                loss[i, j] = np.mean([s.after for s in left])
                shares[:, i, j] = np.mean([s.shares for s in left], 0)
            if len(left) < len(found[rate, decay]):
                crosses.append((rate, decay))
            elif is_stuck(left):
                triangles.append((rate, decay))
    start = next(iter(found.values()))[0].before

    figure = Figure(figsize=(9.4, 6), dpi=80, layout="constrained")
    panels = figure.subplots(2, 3, sharex=True, sharey=True)
    edges = borders(np.array(rates)), borders(np.array(decays))
    # So far beyond the largest that marks stay visible on it.
    scale = LogNorm(np.nanmin(loss, initial=start), 4 * np.nanmax(loss, initial=start))
    drawn = panels[0, 0].pcolormesh(*edges, loss, cmap="Greys", norm=scale)
    panels[0, 0].set_title("loss at the end", fontsize=10)
    bar = figure.colorbar(drawn, ax=panels[0, 0], format="{x:g}", ticks=[0.5, 1, 2, 5, 10])
    bar.minorticks_off()
    for axes, part, share in zip(panels.flat[1:], PARTS, shares, strict=True):
        drawn = axes.pcolormesh(*edges, share, cmap=diverging(), vmin=-1, vmax=1)
        count = [int((sign * share > LITTLE).sum()) for sign in (-1, 1)]
        axes.set_title(f"{part.replace('_', ' ')}: {count[0]} help, {count[1]} hurt", fontsize=10)
    bar = figure.colorbar(drawn, ax=panels[:, 2], format=lambda x, _: percent(x))
    bar.set_label("share of gross credit; − helped, + hurt")
    for axes in panels.flat:
        axes.set(xscale="log", yscale="log", facecolor="0.85")
        for cells, mark in ((crosses, "x"), (triangles, "^")):
            axes.plot(
                *np.array(cells or [(np.nan, np.nan)]).T,
                mark,
                color="0.3",
                markersize=5,
                fillstyle="none",
                linestyle="",
            )
    for axes in panels[-1]:
        axes.set_xlabel("learning rate")
    for axes in panels[:, 0]:
        axes.set_ylabel("weight decay")
    marks = f"×: a seed blew up     △: less than {LITTLE:.0%} off the loss"
    counted = f"     titles count cells where a part has over {LITTLE:.0%}"
    title = f"{what}: {headline(rates, shares[PARTS.index('momentum')])}"
    figure.suptitle(f"{title}\n{marks}{counted}", x=0.01, ha="left", fontsize=11)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description="Credit by part of the step over rate and decay.")
    parser.add_argument("--rates", type=float, nargs="+", default=np.logspace(-3, 1, 9).tolist())
    parser.add_argument("--decays", type=float, nargs="+", default=np.logspace(-5, 0, 6).tolist())
    parser.add_argument("--momentum", type=float, default=0.9)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--probe-batches", type=int, default=4)
    parser.add_argument("--data", type=Path, nargs="+", default=PLACES, help="of Fashion-MNIST")
    parser.add_argument("--out", type=Path, default=Path("edge_of_chaos.png"), help="the picture")
    parser.add_argument("--quick", action="store_true", help="4 x 3 cells, one seed, 40 steps")
    args = parser.parse_args()
    if args.quick:
        args.rates, args.decays = np.logspace(-2, 1, 4).tolist(), np.logspace(-4, 0, 3).tolist()
        args.seeds, args.steps = 1, 40
    for hint in ("does not have many workers", "GPU available", "treespec", "smaller than the log"):
        warnings.filterwarnings("ignore", f".*{hint}")
    # Of runs that blow up, which the table tells.
    warnings.filterwarnings("ignore", ".*finer panels explained no more of the loss change")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    torch.set_num_threads(1)

    data, what = load(args.data)
    how = f"{args.seeds} seeds, {args.steps} steps of {args.batch}, momentum {args.momentum}"
    print(f"{what}: {how}; shares of gross credit in %, mean ± spread")
    print(f"{'rate':>8} {'decay':>8} {'loss':>9} " + "".join(f"{p:>13} " for p in PARTS))
    found: dict[tuple[float, float], list[Seen]] = {}
    for rate in sorted(args.rates):
        for decay in sorted(args.decays):
            seeds = range(args.seeds)
            found[rate, decay] = [observe(data, rate, decay, seed, args) for seed in seeds]
            print(tell(rate, decay, found[rate, decay]), flush=True)
    draw(found, sorted(args.rates), sorted(args.decays), what, args.out)
    print(f"The picture is {args.out}.")


if __name__ == "__main__":
    main()
