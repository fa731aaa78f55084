"""Credit split into shares: what a step was made of, and first order against curvature.

Credit is linear in the motion and in the gradient, so that whatever adds up to one of them gives
shares that add up to the credit of every weight, and of every group.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_lca.measure.allocation import Segment, Weights
from lightning_lca.measure.groups import Grouping
from lightning_lca.measure.motion import PARTS, Number, Steps, terms
from lightning_lca.measure.parameters import alike
from lightning_lca.measure.stretches import GroupBlocks, Stretch, stretches
from lightning_lca.measure.tensors import Flat, times_motion

ORDERS = ("first_order", "curvature")
TURNS = ("reversed", "flipped", "cosine_start", "cosine_end")
STEP = "step"  # The whole motion by an optimizer whose steps have no known form.


class Shares:
    """Splits the credit of one segment after the other over named shares, per group.

    Holds one copy of the weights, for the gradient at the start, and pieces of a few hundred
    thousand elements. Parts of chords take four more: the motion by each.

    Attributes:
        names: By breakdown, the names of its shares.
        needs_start: Whether the gradient at the start is needed.
        needs_whole: Whether it must be that of the whole probe, and not of one process's share of
            it: what is not linear in it does not add up over processes.
        in_chord: Whether parts of steps were added up since a chord began.
    """

    def __init__(self, breakdowns: Sequence[str], grouping: Grouping, steps: Steps) -> None:
        """Splits nothing yet.

        Args:
            breakdowns: "part", "order", "term", "oscillation".
            grouping: The groups.
            steps: What optimizers did.
        """
        self.needs_start = bool({"part", "order", "oscillation"} & {*breakdowns})
        self.needs_whole = bool({"part", "oscillation"} & {*breakdowns})
        unknown = (STEP,) if steps.unknown else ()
        names = {
            "part": (*PARTS[:-1], *unknown, PARTS[-1]),
            "order": ORDERS,
            "oscillation": TURNS,
        }
        self.names = {name: names[name] for name in breakdowns if name in names}
        self._takes_terms = "term" in breakdowns
        self.start = Flat({})
        self._steps = steps
        self._grouping = grouping
        self._moved: list[Flat] = []  # By each part but the last, since a chord began.
        self.in_chord = False
        self._blocks = GroupBlocks(grouping)
        self._turns: list[Tensor] = []  # The sign of the motion before [elements], as int8.
        self._turns_of: object = None  # The layout that they are of.

    def learn(self, terms: Sequence[str]) -> None:
        """Takes the names of the terms of the loss, which its first evaluation tells."""
        if self._takes_terms and terms:
            self.names["term"] = tuple(terms)

    def begin(self, gradient: Weights, weights: Weights) -> None:
        """Copies the gradient at the start of a segment {name: [*shape]}, as the weights lie."""
        flat = isinstance(weights, Flat)
        if not (self.start.goes_with(weights) if flat else alike(self.start, weights)):
            self.start = Flat(weights, sums=True)
        torch._foreach_copy_(list(self.start.values()), [gradient[n] for n in self.start])

    def add_step(self, step: Segment, live: Weights) -> None:
        """Adds what one step of a chord was made of to its motion; `begin` took the gradient.

        Args:
            step: Where the weights were before that step, and after it.
            live: The parameters {name: [*shape]}.
        """
        count = len(self.names["part"]) - 1
        is_made = len(self._moved) == count and self.start.goes_with(*self._moved)
        if not self.in_chord and not is_made:
            self._moved = [Flat(self.start) for _ in range(count)]
        elif not self.in_chord:
            for whole in (w for moved in self._moved for w in moved.wholes):
                whole.zero_()
        self.in_chord = True
        places = self.names["part"]
        for at in self._stretches(live):
            one = torch.ones_like(at.of(self.start))
            for name, values, scale in self._terms(one, at, step, live):
                into = at.of(self._moved[places.index(name)])
                if isinstance(scale, Tensor):
                    into.addcmul_(values, scale)
                else:
                    into.add_(values, alpha=scale)

    def state(self) -> dict[str, Any]:
        """Returns what a checkpoint needs.

        That is the gradient and the motion by parts of a chord, and the signs of the latest motion
        [elements].
        """
        flats = [self.start, *self._moved] if self.in_chord else []
        return {
            "chord": [{n: w.cpu().clone() for n, w in flat.items()} for flat in flats],
            "turns": [signs.cpu().clone() for signs in self._turns],
        }

    def resume(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Goes on with what `state` returned, as far as it was noted then."""
        self._turns = [signs.to(device) for signs in state.get("turns", ())]
        self._turns_of = None
        chord = state.get("chord", ())
        if not chord or len(chord) != len(self.names.get("part", ())):
            return
        flats = [Flat({n: w.to(device) for n, w in weights.items()}) for weights in chord]
        for flat, weights in zip(flats, chord, strict=True):
            torch._foreach_copy_(list(flat.values()), [weights[n] for n in flat])
        self.start, *self._moved = flats
        self.in_chord = True

    def recall(self, segment: Segment) -> None:
        """Takes which way weights moved in the segment before the next, for what turns round."""
        if "oscillation" in self.names:
            if not self.start.goes_with(segment.start):
                self.start = Flat(segment.start, sums=True)
            self.oscillation(None, segment)

    def parts(self, gradient: Weights, segment: Segment, live: Weights) -> Tensor:
        """Sums what the parts of a step were credited, all but the last: [parts - 1, groups].

        Those of a chord were noted by `add_step`.

        Args:
            gradient: The mean gradient along the segment {name: [*shape]}.
            segment: The segment; `begin` took the gradient at its start.
            live: The parameters that moved {name: [*shape]}.
        """
        total = self._blocks.zeros(len(self.names["part"]) - 1, self.start)
        for stretch in self._stretches(live):
            self._add(total, stretch, gradient, segment, live)
        # In the place of noise the whole steps were summed.
        total[3] -= total[0] + total[1] + total[2]
        return total[:, :-1].contiguous()

    def terms(self, gradients: Sequence[Weights], segment: Segment) -> Tensor:
        """Sums what terms are credited: [terms - 1, groups]; their mean gradients are used up.

        Args:
            gradients: Of every term but the last {name: [*shape]}.
            segment: The segment.
        """
        found = []
        for gradient in gradients:
            times_motion(gradient, segment.start, segment.stop)
            found.append(self._grouping.sums(gradient).credit)
        return torch.stack(found)

    def first_order(self, segment: Segment) -> Tensor:
        """Sums the gradient at the start times the motion: [groups]."""
        return self._blocks.products(self.start, segment)

    def oscillation(self, end: Flat | None, segment: Segment) -> Tensor:
        """Tells how weights turn round, by group: [4, groups]; NaN where nothing can be said.

        The share of weights that reversed direction, of those that moved in this segment and in the
        one before; the share whose gradient changed sign within it; the cosine of the motion and
        the downhill direction (minus the gradient), at the start and at the end.

        Args:
            end: The gradient at the end; None where it is not known.
            segment: The segment; `begin` took the gradient at its start.
        """
        if self._turns_of is not self.start.form:
            wholes = self.start.wholes
            if self._turns_of is not None or list(map(len, self._turns)) != list(map(len, wholes)):
                self._turns = [torch.zeros_like(w, dtype=torch.int8) for w in wholes]
            self._turns_of = self.start.form
        total = self._blocks.zeros(9, self.start)
        for at in stretches(self.start):
            self._add_turns(total, at, end, segment)
        total = total[:, :-1]
        turned, moved, flipped, steep = total[:4]
        found = [(moved - turned) / 2 / moved, (steep - flipped) / 2 / steep]
        for slope, length in ((total[4], total[7]), (total[5], total[8])):
            found.append(-slope / (total[6] * length).sqrt())
        return torch.stack(found)

    # -- inside -----------------------------------------------------------------------------------

    def _stretches(self, live: Weights) -> list[Stretch]:
        """Cuts memory where the form of a step changes, too."""

        def kind(name: str) -> Hashable:
            step = self._steps.of(live.get(name))
            return None if step is None else (step.is_known, step.key)

        return stretches(self.start, kind)

    def _add(
        self,
        total: Tensor,
        at: Stretch,
        gradient: Weights,
        segment: Segment,
        live: Weights,
    ) -> None:
        """Adds what the parts of a stretch were credited to [parts - 1, groups + 1]."""
        names = self.names["part"][:-1]
        mean = at.show(gradient, self.start, at.of(self.start))
        found: Iterable[tuple[str, Tensor, Number]]
        if self.in_chord:
            moved = (at.show(part, self.start, mean) for part in self._moved)
            found = ((name, mean * part, 1.0) for name, part in zip(names, moved, strict=True))
        else:
            found = self._terms(mean, at, segment, live)
        for name, values, scale in found:
            self._blocks.add(total[names.index(name)], at, values, scale)

    def _terms(
        self, times: Tensor, at: Stretch, segment: Segment, live: Weights
    ) -> list[tuple[str, Tensor, Number]]:
        """Returns the parts of a step over a stretch, but the last two, times something.

        Args:
            times: What all are multiplied with [elements].
            at: The stretch.
            segment: The step.
            live: The parameters {name: [*shape]}.
        """
        probe = at.of(self.start)
        start, stop = (at.show(w, self.start, probe) for w in (segment.start, segment.stop))
        step = self._steps.of(live.get(at.names[0]))
        names = self.names["part"][:-1]
        if step is not None and step.is_known:
            steps = [s for n in at.names if (s := self._steps.of(live.get(n))) is not None]
            moments = {
                m: at.gather([s.state[m] for s in steps], self.start, probe) for m in step.moments
            }
            own = at.gather([s.gradient for s in steps], self.start, probe)
            split = terms(step, moments, own, probe, start, lambda: stop - start, times)
            return [(n, *t) for n, t in zip(names, split, strict=False) if t is not None]
        if step is not None and STEP in names and not step.has_form:
            return [(STEP, (stop - start) * times, 1.0)]
        return []

    def _add_turns(self, total: Tensor, at: Stretch, end: Flat | None, segment: Segment) -> None:
        """Adds the sums over a stretch that turns and cosines follow from to [9, groups + 1]."""
        slope = at.of(self.start)
        start, stop = (at.show(w, self.start, slope) for w in (segment.start, segment.stop))
        motion = stop - start
        before = self._turns[at.memory][at.begin : at.end]
        turns = torch.sign(motion)
        products = [turns * before, None, None, None, motion * slope, None, motion.square()]
        before.copy_(turns)
        products += [slope.square(), None]
        if end is not None:
            last = at.of(end)
            products[2], products[5] = torch.sign(slope) * torch.sign(last), motion * last
            products[8] = last.square()
        for i in (0, 2):
            signs = products[i]
            products[i + 1] = None if signs is None else signs.abs()
        for row, product in enumerate(products):
            if product is not None:
                self._blocks.add(total[row], at, product)
