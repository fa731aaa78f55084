"""Train against validation, layer by layer: which layers part the two, and since when.

A layer overfits since a step if from there on its motion lowered the loss on the training data and
raised it on validation data. One rule for summary, figure and tab.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from lightning_lca.record.layers import MOST
from lightning_lca.record.tables import Floats, Ints

if TYPE_CHECKING:
    from lightning_lca.record.history import History

_TELLING = 10  # Layers that have a row where there are more than `MOST`.
_FEWEST = 50  # Steps; with fewer no layer is called to overfit.
_SURE = 2.0  # Standard deviations of a walk without direction.
_MAD = 1.4826  # Of a normal variable: its standard deviation by its median absolute deviation.


@dataclass(frozen=True)
class Overfitting:
    """What layers did for two probes of a run, on the steps that both have.

    Attributes:
        layers: Names (L,), in network order.
        steps: The first entry is where the first step started [T + 1].
        train: Credit on the training data since then [T + 1, L], in loss units; negative = helped.
        val: The same on validation data.
        turn: Place in ``steps`` at which ``val`` was lowest [L].
        overfits: Whether what followed there is overfitting [L].
    """

    layers: tuple[str, ...]
    steps: Ints
    train: Floats
    val: Floats
    turn: Ints
    overfits: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, train: History, val: History) -> Overfitting:
        """Compares the probes "train" and "val" of a run.

        Raises:
            ValueError: They have no layer or no step in common.
        """
        ours, theirs = train.shown, val.shown
        names = tuple(name for name in ours.names if name in theirs.names)
        credits = [
            (
                history.steps,
                np.where(history.finite[:, None], history.shown.sums(history.allocated), 0.0)[
                    :, [history.shown.names.index(name) for name in names]
                ],
            )
            for history in (train, val)
        ]
        found = cls.between(names, *credits[0], *credits[1])
        if not names or len(found.steps) < 2:
            raise ValueError(
                "The two histories have no layer or no measured step in common. Give two probes of "
                'one run, as lca.histories["train"] and lca.histories["val"].'
            )
        return found

    @classmethod
    def between(
        cls,
        layers: tuple[str, ...],
        train_steps: Ints,
        train: Floats,
        val_steps: Ints,
        val: Floats,
    ) -> Overfitting:
        """Compares credits per step of the same layers [T, L] and [U, L].

        That a layer's validation credit rises after its lowest point is no finding: any line that
        wanders does. A walk without direction ends above its lowest point by |N(0, T sd²)|, where
        sd is that of its T steps. Twice that, and credit below 0 on training data since then, is
        called overfitting. The sd is taken from the differences of neighbouring blocks of √T steps,
        by their median, so that neither a trend nor a few large first steps count, and swings from
        one step to the next do not either. It is a sign, for one run and one probe, and no test: of
        layers without direction about one in fifteen is called so.
        """
        both = np.intersect1d(train_steps, val_steps, assume_unique=True)
        lines = []
        for steps, credit in ((train_steps, train), (val_steps, val)):
            running = np.cumsum(np.nan_to_num(credit, posinf=0, neginf=0), 0, dtype=np.float64)
            known = running[np.searchsorted(steps, both)]
            lines.append(np.concatenate([np.zeros((1, len(layers))), known]))
        spacing = int(np.median(np.diff(both))) if len(both) > 1 else 1
        start = max(0, int(both[0]) - spacing) if len(both) else 0
        helped, checked = lines
        turn = checked.argmin(0)
        here = np.arange(len(layers))
        rise = checked[-1] - checked[turn, here]
        since = helped[-1] - helped[turn, here]
        overfits = (since < 0) & (rise > _SURE * _wander(checked))
        if len(both) < _FEWEST:
            overfits[:] = False
        return cls(tuple(layers), np.append(start, both), helped, checked, turn, overfits)

    @property
    def since(self) -> Ints:
        """The optimizer step from which each layer overfits [L]; it counts where it does."""
        return self.steps[self.turn]

    @property
    def given_back(self) -> Floats:
        """By how much each layer raised the validation loss since its turn [L], in loss units."""
        rise: Floats = self.val[-1] - self.val[self.turn, np.arange(len(self.layers))]
        return rise

    @property
    def verdicts(self) -> tuple[str, ...]:
        """What each layer did over all these steps, in words (L,).

        "overfits" comes first: such a layer may well have helped both before it turned.
        """
        train, val = np.sign(self.train[-1]), np.sign(self.val[-1])
        words = {
            (-1, -1): "helps both",
            (-1, 0): "helps train only",
            (-1, 1): "helps train only",
            (0, -1): "helps val only",
            (1, -1): "helps val only",
            (0, 0): "does nothing",
        }
        return tuple(
            "overfits" if self.overfits[i] else words.get((train[i], val[i]), "hurts both")
            for i in range(len(self.layers))
        )

    @property
    def most_telling(self) -> Ints:
        """Places of the layers [L]: first those that overfit most, then those that did most."""
        reach: Floats = np.abs(self.train[-1]) + np.abs(self.val[-1])
        return np.lexsort([-reach, -np.where(self.overfits, self.given_back, 0.0)])


def text(histories: Mapping[str | None, History], *, everything: bool = False) -> str:
    """Draws a short table of "train" against "val" for a terminal; nothing without these probes.

    Args:
        histories: By probe.
        everything: A row for every layer; else of more than forty the ten most telling.
    """
    train, val = histories.get("train"), histories.get("val")
    if train is None or val is None or not (len(train) and len(val) and train.groups):
        return ""
    found = Overfitting.of(train, val)
    names = [n if n.isprintable() else n.encode("unicode_escape").decode() for n in found.layers]
    folds = len(names) > MOST and not everything
    told = sorted(found.most_telling[:_TELLING].tolist()) if folds else range(len(names))
    width = max(5, *(len(names[i]) for i in told if len(names[i]) <= 200), 0)
    lines = [f"{'LCA':<{width}}  {'train':>10}  {'val':>10}"]
    for i in told:
        train_lca, val_lca = _short(found.train[-1, i]), _short(found.val[-1, i])
        line = f"{names[i]:<{width}}  {train_lca:>10}  {val_lca:>10}"
        if found.overfits[i]:
            line += f"  overfits since step {found.since[i]:,}: val {_short(found.given_back[i])}"
        lines.append(line)
    if folds:
        more = int(found.overfits.sum() - found.overfits[list(told)].sum())
        lines.append(
            f"The {_TELLING} most telling of {len(names)} layers"
            + (f"; {more} more overfit." if more else "; no other one overfits.")
        )
    return "\n".join(lines)


def _wander(lines: Floats) -> Floats:
    """Estimates how far lines would wander without direction: [T + 1, L] -> sd of the end [L]."""
    steps = len(lines) - 1
    block = max(1, round(steps**0.5))
    sums = np.diff(lines[::block], axis=0)
    if len(sums) < 2:
        return np.full(lines.shape[1], np.inf)
    change = np.abs(np.diff(sums, axis=0))
    sd: Floats = _MAD * np.median(change, 0) / 2**0.5 * (steps / block) ** 0.5
    return sd


def _short(value: float) -> str:
    return f"{value:+.4f}" if 1e-4 <= abs(value) < 1e5 or not value else f"{value:+.3e}"
