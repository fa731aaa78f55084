"""The measure itself: the loss change along a straight segment, split over single weights.

    L(stop) − L(start) = Σᵢ Aᵢ,    Aᵢ = (stop − start)ᵢ · ∫₀¹ ∂ᵢL(start + s (stop − start)) ds

(Lan, Liu, Zhou, Yosinski: "LCA: Loss Change Allocation for Neural Network Training", NeurIPS 2019.)
The integral is taken by a quadrature rule; what the rule leaves unexplained is the residual, and
every result carries it. Nothing here knows of modules, Lightning or logging: a `Field` is any
function that gives the loss and its gradient at a position.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from lightning_lca.measure.quadrature import SIMPSON, TRAPEZOID, Quadrature
from lightning_lca.measure.tensors import (
    ALIGNED,
    CHUNK,
    DeferredBool,
    Flat,
    add,
    bundles,
    on_accelerator,
    pieces,
    side_by_side,
    times_motion,
    together,
    total,
    wide,
    without_graph,
)

Weights = Mapping[str, Tensor]  # {name: [*shape]}
_Room = tuple[Tensor, Tensor] | None
_ROUNDING = 1e-6  # Of a loss; single precision leaves less.
_SETTLED = 0.1  # A change of the integral this small beside what is left shows that it converges.


@dataclass(frozen=True)
class Sample:
    """The loss at one position, and its gradient there.

    Attributes:
        loss: Loss [] in float64 where the device has it, detached.
        gradient: {name: [*shape]}, read and never written by this module; None where it was not
            asked for.
        terms: The gradient of each term of the loss but the last, which the others leave of
            ``gradient``; none where the loss is not split.
    """

    loss: Tensor
    gradient: Weights | None
    terms: Sequence[Weights] = ()


@dataclass(frozen=True)
class Segment:
    """One straight stretch of the path of the weights: same names and shapes at both ends.

    Attributes:
        start: The weights where it begins {name: [*shape]}.
        stop: Where it ends.
        continues: Whether it begins exactly where the segment before it in a chain ended.
    """

    start: Weights
    stop: Weights
    continues: DeferredBool | bool = False

    def at(self, s: float, *, needs_gradient: bool = True) -> Position:
        """Names the position start + s (stop − start)."""
        return Position(self, s, needs_gradient)


@dataclass(frozen=True)
class Position:
    """A place on a segment where a field is asked for the loss.

    Attributes:
        segment: The segment.
        s: How far along, in [0, 1].
        needs_gradient: False where only the loss is used; a field may then leave the gradient out.
    """

    segment: Segment
    s: float
    needs_gradient: bool = True

    @without_graph
    def write(self, into: Weights) -> None:
        """Writes the weights at this position into existing tensors {name: [*shape]}."""
        starts, stops, places = together(self.segment.start, self.segment.stop, into)
        # Through .data: a graph that someone keeps alive must not find a changed version.
        live = [w.data for w in places]
        if self.s in (0.0, 1.0):
            torch._foreach_copy_(live, starts if self.s == 0.0 else stops)
        elif on_accelerator(live[0]) and len(live) > 1:
            if self.segment.stop is into:
                torch._foreach_lerp_(live, starts, 1.0 - self.s)
                return
            torch._foreach_copy_(live, starts)
            torch._foreach_lerp_(live, stops, self.s)
        else:
            for start, stop, weight in zip(starts, stops, live, strict=True):
                torch.lerp(start, stop, self.s, out=weight)

    def weights(self) -> dict[str, Tensor]:
        """Returns the weights here as fresh leaves that require grad: {name: [*shape]}."""
        fresh = {name: torch.empty_like(start) for name, start in self.segment.start.items()}
        self.write(fresh)
        return {name: weight.requires_grad_() for name, weight in fresh.items()}


class Field(Protocol):
    """The loss as a function of the weights: one and the same function at every call."""

    def __call__(self, at: Position, /) -> Sample:
        """Evaluates loss and gradient at a position."""
        ...


@dataclass(frozen=True)
class Allocation:
    """What one segment did to the loss, weight by weight.

    Attributes:
        values: Credit per weight {name: [*shape]}, in loss units; negative = helped (its motion
            lowered the loss), positive = hurt, zero = idle.
        loss_before: Loss [] at the start.
        loss_after: Loss [] at the stop.
        splits: Number of equal panels that the rule was applied on.
        converged: |residual| ≤ tolerance where one was asked for, else None.
        last: The sample at the stop: pass it as ``first`` of a segment that begins there.
        shared: What a rule that closes had left unexplained [], and shared out over the weights, in
            loss units; None where nothing is shared out.
    """

    values: Weights
    loss_before: Tensor
    loss_after: Tensor
    splits: int
    converged: bool | None
    last: Sample
    shared: Tensor | None = None

    @property
    def residual(self) -> Tensor:
        """The loss change that the credits leave unexplained [], ΔL − Σ A, in loss units."""
        return self.loss_after - self.loss_before - total(self.values.values())


@dataclass
class Buffer:
    """What a chain of segments hands on from one to the next, so that nothing is made twice.

    Attributes:
        sums: Tensors that receive the mean gradient {name: [*shape]}.
        first: The sample at the start, where it is known; taken out when it is used. Its gradient
            may lie in ``sums``.
        add_up: Sums what single tensors explain: [weights] -> []. Where they are parts of larger
            ones, over all who hold parts, so that all come to the same end.
        terms: Tensors that receive the mean gradient of each term but the last.
        is_cut: Whether the tensors are parts of larger ones, so that ``add_up`` must tell them
            apart.
    """

    sums: Weights
    first: Sample | None = None
    add_up: Callable[[Tensor], Tensor] = torch.sum
    terms: Sequence[Weights] = ()
    is_cut: bool = False
    _spare: Flat | None = None
    _scratch: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, segment: Segment, terms: int = 0) -> Buffer:
        """Makes tensors for a segment: float32 at least.

        Args:
            segment: The segment.
            terms: How many terms of the loss are integrated by themselves, too.
        """
        sums, *others = (Flat(segment.start, sums=True) for _ in range(1 + terms))
        return cls(sums, terms=others)

    def add(self, sample: Sample, weight: float, *, fresh: bool = False) -> None:
        """Adds weight · gradient to the sums, those of terms too; ``fresh`` replaces them."""
        add(self.sums, _gradient(sample), weight, fresh=fresh)
        for into, more in zip(self.terms, sample.terms, strict=True):
            add(into, more, weight, fresh=fresh)

    def keep(self, last: Sample) -> Sample:
        """Copies the gradients of a sample where the sums are."""
        if last.gradient is None:
            return Sample(last.loss, None)
        gradients = zip((self.sums, *self.terms), (last.gradient, *last.terms), strict=True)
        for into, gradient in gradients:
            names = list(into)
            torch._foreach_copy_([into[n] for n in names], [gradient[n] for n in names])
        return Sample(last.loss, self.sums, self.terms)

    def as_sample(self) -> Sample:
        """Shows the sums as gradients; the loss is of no use."""
        return Sample(torch.empty(()), self.sums, self.terms)

    def side_by_side(self, gradient: Weights, segment: Segment) -> Weights:
        """Copies a gradient to lie as the sums do, where all are small: then few operations do."""
        sums = self.sums
        if self.is_cut or not isinstance(sums, Flat) or sum(map(len, sums.wholes)) > CHUNK:
            return gradient
        if not sums.goes_with(segment.start, segment.stop):
            return gradient
        if self._spare is None or not self._spare.goes_with(sums):
            self._spare = Flat(sums)
        torch._foreach_copy_(list(self._spare.values()), [gradient[n] for n in self._spare])
        return self._spare

    def scratch(self) -> _Room:
        """Returns room for work on two pieces [elements]; on accelerators it is not needed."""
        some = next(iter(self.sums.values()))
        if self._scratch is None and not on_accelerator(some):
            self._scratch = some.new_empty(CHUNK), some.new_empty(CHUNK)
        return self._scratch

    def take_first(self) -> Sample | None:
        """Returns the sample at the start away, so that its memory can be freed."""
        first, self.first = self.first, None
        return first


@dataclass(frozen=True)
class Ends:
    """What was found at both ends of a segment on the way to its mean gradient.

    Attributes:
        loss_before: Loss [] at the start.
        last: The sample at the stop; with a gradient where the next segment can use it.
        splits: Number of equal panels that the rule was applied on.
        converged: Whether a tolerance was reached; None where none was asked for.
        settled: Whether the integral came to rest short of the loss change, so that no finer panels
            would explain more.
        shared: What was left unexplained [], and is shared out over the weights; else None.
    """

    loss_before: Tensor
    last: Sample
    splits: int = 1
    converged: bool | None = None
    settled: bool = False
    shared: Tensor | None = None


def mean_gradient(
    field: Field, segment: Segment, rule: Quadrature = SIMPSON, buffer: Buffer | None = None
) -> tuple[Weights, Ends]:
    """Integrates the gradient along a segment: ∫₀¹ ∇L(start + s (stop − start)) ds.

    Args:
        field: Gives loss and gradient at a position of the segment.
        segment: Where the weights were and where they are now.
        rule: The quadrature rule.
        buffer: What a chain of segments hands on; fresh tensors by default.

    Returns:
        {name: [*shape]}, the buffer's tensors; and the ends. The stop has a gradient when ``rule``
        starts with the start, so that a chain pays `Quadrature.gradients_per_step` for each.
    """
    buffer = Buffer.of(segment) if buffer is None else buffer
    first = buffer.take_first()
    if first is None or (rule.first_is_start and first.gradient is None):
        first = field(segment.at(0.0, needs_gradient=rule.first_is_start))
    loss_before = first.loss
    sample: Sample | None
    last: Sample | None = None
    for i, (s, weight) in enumerate(zip(rule.nodes, rule.weights, strict=True)):
        sample = first if s == 0.0 and first is not None else field(segment.at(s))
        buffer.add(sample, weight, fresh=i == 0)
        last = sample if s == 1.0 else None
        sample, first = None, None  # Only one gradient is alive beside the sums.
    if last is None:
        last = field(segment.at(1.0, needs_gradient=rule.first_is_start))
    return buffer.sums, Ends(loss_before, last)


def closed_gradient(
    field: Field,
    segment: Segment,
    buffer: Buffer | None = None,
    is_much: Callable[[Tensor], bool] | None = None,
) -> tuple[Weights, Ends]:
    """Integrates the gradient by the trapezoid rule, and shares out what that leaves unexplained.

    The loss at both ends is known, and so is what the rule misses of its change. The rule misses
    where the gradient changes along the motion d; so every weight takes a share by how much its own
    does, |dᵢ (g₁ − g₀)ᵢ|. The credits add up to the loss change, but for rounding.

    Args:
        field: As for `mean_gradient`.
        segment: As for `mean_gradient`.
        buffer: As for `mean_gradient`.
        is_much: Gets what is left unexplained []; where it returns True, the middle is taken, too,
            and nothing is shared out: Simpson's rule.

    Returns:
        As `mean_gradient`; ``shared`` of the ends is what was shared out.
    """
    buffer = Buffer.of(segment) if buffer is None else buffer
    gradient, ends = mean_gradient(field, segment, TRAPEZOID, buffer)
    last = buffer.side_by_side(_gradient(ends.last), segment)
    room = buffer.scratch()
    explained, bent = (buffer.add_up(s) for s in _explained_and_bent(gradient, last, segment, room))
    left = ends.last.loss - ends.loss_before - explained
    if is_much is not None and is_much(left):
        buffer.add(buffer.as_sample(), 1 / 3, fresh=True)
        buffer.add(field(segment.at(0.5)), 2 / 3)
        return gradient, ends
    # Where no gradient changes, nobody takes a share.
    _share_out(gradient, last, segment, torch.where(bent > 0, left / bent, 0.0), room)
    return gradient, replace(ends, shared=left)


def refined_gradient(
    field: Field,
    segment: Segment,
    tolerance: float,
    max_splits: int = 32,
    buffer: Buffer | None = None,
) -> tuple[Weights, Ends]:
    """Integrates the gradient by composite Simpson, doubling the panels until it explains enough.

    No node is evaluated twice: the nodes of n panels are every second node of 2n. Where two
    doublings in a row change what is explained by less than a tenth of what is left, the integral
    has settled on something else than the loss change, as where the gradient is not the derivative
    of the loss, or the loss has jumps: more panels would explain no more.

    Args:
        field: As for `mean_gradient`.
        segment: As for `mean_gradient`.
        tolerance: Largest |residual| accepted, in loss units.
        max_splits: Panels are doubled from 1 while they stay at or below this.
        buffer: As for `mean_gradient`.
    """
    buffer = Buffer.of(segment) if buffer is None else buffer
    first = buffer.take_first()
    if first is None or first.gradient is None:
        first = field(segment.at(0.0))
    # Over 6 n: panel ends count 2 (the two outermost 1), panel middles 4.
    buffer.add(first, 1.0, fresh=True)
    loss_before, first = first.loss, None
    last = field(segment.at(1.0))
    buffer.add(last, 1.0)
    middles = Buffer.of(segment, len(buffer.terms))
    panels, still, before = 1, 0, math.inf
    while True:
        for panel in range(panels):
            sample = field(segment.at((2 * panel + 1) / (2 * panels)))
            middles.add(sample, 1.0, fresh=panel == 0)
            del sample
        explained = buffer.add_up(_explained(buffer.sums, middles.sums, segment)) / (6 * panels)
        left = float(last.loss - loss_before - explained)
        residual = abs(left)
        still = still + 1 if abs(left - before) < _SETTLED * residual else 0
        before = left
        # More panels do not bring a finite number back.
        if residual <= tolerance or 2 * panels > max_splits or not math.isfinite(residual):
            break
        if still == 2:
            break
        buffer.add(middles.as_sample(), 2.0)
        panels *= 2
    buffer.add(middles.as_sample(), 4.0)
    buffer.add(buffer.as_sample(), 1 / (6 * panels), fresh=True)
    converged = residual <= tolerance
    # Where rounding is all that is left, nothing can be said of the gradient.
    settled = still > 0 and not converged and residual > _ROUNDING * abs(float(last.loss))
    return buffer.sums, Ends(loss_before, last, panels, converged, settled)


@torch.no_grad()
def first_order(gradient: Weights, segment: Segment) -> Tensor:
    """Sums gradient · motion: the loss change [] that a gradient at one place foretells."""
    stop = segment.stop
    return total(
        slope * (stop_ - start_)
        for name, start in segment.start.items()
        for start_, stop_, slope in pieces(start, stop[name], gradient[name])
    )


@torch.no_grad()
def halve(
    field: Field,
    segment: Segment,
    values: Weights,
    add_up: Callable[[Tensor], None],
    also: Callable[[Sample, float], None] | None = None,
) -> None:
    """Turns credits by Simpson's rule into those by the same rule on both halves, in place.

    With g at s: (g₀ + 4 g½ + g₁)/6 becomes (g₀ + 4 g¼ + 2 g½ + 4 g¾ + g₁)/12. Credit is linear in
    the gradient, so that no other gradient needs to be kept.

    Args:
        field: As for `mean_gradient`.
        segment: As for `mean_gradient`.
        values: Credits {name: [*shape]} by `SIMPSON`.
        add_up: Sums products [*shape] over processes that share the field, in place.
        also: Gets every sample with its weight; what it sums is to be halved before, too.
    """
    for value in values.values():
        value.mul_(0.5)
    for s, weight in ((0.25, 4 / 12), (0.5, -2 / 12), (0.75, 4 / 12)):
        sample = field(segment.at(s))
        gradient = _gradient(sample)
        if also is not None:
            also(sample, weight)
        for name, start in segment.start.items():
            stop, slope, value = segment.stop[name], gradient[name], values[name]
            for start_, stop_, slope_, value_ in pieces(start, stop, slope, value):
                # Exact in the wider type: half-precision weights would round their own motion.
                product = (stop_.to(value_.dtype) - start_).mul_(slope_)
                add_up(product)
                value_.add_(product, alpha=weight)
        del gradient, sample


def credit(gradient: Weights, segment: Segment) -> Weights:
    """Multiplies a mean gradient by the motion, in place: {name: [*shape]} in loss units."""
    times_motion(gradient, segment.start, segment.stop)
    return gradient


def allocate(
    field: Field,
    segment: Segment,
    rule: Quadrature = SIMPSON,
    first: Sample | None = None,
    out: Weights | None = None,
) -> Allocation:
    """Splits the loss change along a segment over its weights.

    Args:
        field: Gives loss and gradient at a position of the segment.
        segment: Where the weights were and where they are now.
        rule: The quadrature rule.
        first: The sample at the start, if it is known already, e.g. ``last`` of the allocation
            before; it saves one gradient. For a rule without a node at the start only its loss is
            used.
        out: Tensors that receive the credits, {name: [*shape]}; fresh ones by default. They may be
            those of ``first.gradient``.

    Returns:
        The allocation. Its ``last`` has a gradient when ``rule`` starts with the start, so that a
        chain of segments pays `Quadrature.gradients_per_step` gradients each.

    Example:
        >>> def field(at):  # L(w) = w², by hand
        ...     w = at.weights()["w"].detach()
        ...     return Sample((w**2).sum(), {"w": 2 * w})
        >>> segment = Segment({"w": torch.tensor([3.0, 1.0])}, {"w": torch.tensor([1.0, 2.0])})
        >>> allocation = allocate(field, segment)
        >>> [round(a, 4) for a in allocation.values["w"].tolist()]
        [-8.0, 3.0]
        >>> abs(allocation.residual.item()) < 1e-6
        True
    """
    if rule.adapts:
        raise ValueError(
            f"Quadrature {rule.name!r} compares a step with the steps before it, which one segment "
            "does not have: use it in LCACallback, or choose SIMPSON or CLOSED_TRAPEZOID here."
        )
    buffer = Buffer.of(segment) if out is None else Buffer(out)
    buffer.first = first
    if rule.closes:
        gradient, ends = closed_gradient(field, segment, buffer)
    else:
        gradient, ends = mean_gradient(field, segment, rule, buffer)
    return _allocation(credit(gradient, segment), ends)


def refine(
    field: Field,
    segment: Segment,
    tolerance: float,
    max_splits: int = 32,
    first: Sample | None = None,
    out: Weights | None = None,
    add_up: Callable[[Tensor], Tensor] = torch.sum,
) -> Allocation:
    """Allocates by composite Simpson, doubling the panels until the residual is small enough.

    No node is evaluated twice: the nodes of n panels are every second node of 2n. The result says
    in ``splits`` how many panels it took and in ``converged`` whether |residual| ≤ tolerance was
    reached. A residual that is not finite ends it at once, and so does an integral that settles on
    something else than the loss change: two doublings in a row that change what is explained by
    less than a tenth of what is left.

    Args:
        field: As for `allocate`.
        segment: As for `allocate`.
        tolerance: Largest |residual| accepted, in loss units.
        max_splits: Panels are doubled from 1 while they stay at or below this.
        first: As for `allocate`.
        out: As for `allocate`.
        add_up: Sums what the tensors explain: [weights] -> []. Where they are parts of larger ones,
            over all who hold parts, so that all come to the same end.

    Raises:
        ValueError: A tolerance that is not positive, or max_splits below 1.

    Example:
        >>> def field(at):  # L(w) = w⁶
        ...     w = at.weights()["w"].detach()
        ...     return Sample((w**6).sum(), {"w": 6 * w**5})
        >>> segment = Segment({"w": torch.zeros(1).double()}, {"w": torch.ones(1).double()})
        >>> allocation = refine(field, segment, tolerance=1e-3)
        >>> allocation.splits, allocation.converged
        (4, True)
    """
    if not tolerance > 0:
        raise ValueError(
            f"tolerance must be a positive number in loss units, e.g. 1e-3; got {tolerance}."
        )
    if max_splits < 1:
        raise ValueError(f"max_splits must be at least 1, got {max_splits}.")
    buffer = Buffer.of(segment) if out is None else Buffer(out)
    buffer.first, buffer.add_up = first, add_up
    gradient, ends = refined_gradient(field, segment, tolerance, max_splits, buffer)
    return _allocation(credit(gradient, segment), ends)


def _allocation(values: Weights, ends: Ends) -> Allocation:
    last = ends.last
    return Allocation(
        values, ends.loss_before, last.loss, ends.splits, ends.converged, last, ends.shared
    )


def _gradient(sample: Sample) -> Weights:
    if sample.gradient is None:
        raise ValueError(
            "The field returned no gradient where one is needed (at.needs_gradient is True). "
            "Return Sample(loss, {name: gradient})."
        )
    return sample.gradient


_Tensors = list[Tensor]
_Bend = tuple[slice, _Tensors, _Tensors, _Tensors]  # Which, mean gradient, motion, change.


def _bends(gradient: Weights, last: Weights, segment: Segment, room: _Room) -> Iterator[_Bend]:
    """Yields where gradients change along the motion, of some tensors after the other.

    Which of all tensors, their mean gradient, how far they moved, and the change from the mean
    gradient to that at the stop. In a room it is one tensor, or a piece of it, until the next.
    """
    means, lasts, starts, stops = together(gradient, last, segment.start, segment.stop)
    if room is None:
        for part in bundles(means):
            some = side_by_side(means[part], lasts[part], starts[part], stops[part])
            for of_mean, of_end, of_start, of_stop in some:
                # Exact in the wider type: half-precision weights would round their own motion.
                to = [w.to(m.dtype) for w, m in zip(of_stop, of_mean, strict=True)]
                moved, changed = (
                    torch._foreach_sub(to, of_start),
                    torch._foreach_sub(of_end, of_mean),
                )
                yield part, of_mean, list(moved), list(changed)
        return
    for i, tensors in enumerate(zip(means, lasts, starts, stops, strict=True)):
        for mean, end, start, stop in pieces(*tensors):
            if _fit(room[0], mean, end, start, stop):
                motion, change = (r[: mean.numel()].view(mean.shape) for r in room)
                torch.sub(stop, start, out=motion)
                torch.sub(end, mean, out=change)
            else:
                motion, change = stop.to(mean.dtype) - start, end - mean
            yield slice(i, i + 1), [mean], [motion], [change]


@torch.no_grad()
def _explained_and_bent(
    gradient: Weights, last: Weights, segment: Segment, room: _Room
) -> tuple[Tensor, Tensor]:
    """Sums d · ḡ and Σ |d (g₁ − ḡ)| of every tensor, or of what lies side by side: [tensors] each.

    d is the motion.
    """
    (means,) = together(gradient) if isinstance(last, Flat) else ([*gradient.values()],)
    found: list[Tensor] = []
    pieces_of = [0] * len(means)
    for part, mean, motion, change in _bends(gradient, last, segment, room):
        torch._foreach_mul_(change, motion)
        torch._foreach_abs_(change)
        torch._foreach_mul_(motion, mean)
        found += [t for pair in zip(motion, change, strict=True) for t in map(_summed, pair)]
        for i in range(len(means))[part]:
            pieces_of[i] += 1
    table = torch.stack([f.to(found[0]) for f in found]).view(-1, 2)
    if len(table) > len(means):
        table = torch.stack([some.sum(0) for some in torch.split(table, pieces_of)])
    return table[:, 0], table[:, 1]


def _summed(values: Tensor) -> Tensor:
    """Sums all elements, those of blocks in their own type: exact enough, and much faster."""
    if values.numel() % ALIGNED or not values.is_contiguous():
        return values.sum(dtype=wide(values))
    return values.view(-1, ALIGNED).sum(1).sum(dtype=wide(values))


@torch.no_grad()
def _share_out(
    gradient: Weights, last: Weights, segment: Segment, share: Tensor, room: _Room
) -> None:
    """Adds share · sign(d) |g₁ − ḡ| to a mean gradient {name: [*shape]}, in place."""
    # Where all of it is small, one more product costs less than what a number on the host forbids:
    # to go straight through the operations.
    is_small = sum(g.numel() for g in gradient.values()) <= CHUNK
    known = None if is_small or on_accelerator(share) else float(share)
    for _, mean, motion, change in _bends(gradient, last, segment, room):
        torch._foreach_abs_(change)
        torch._foreach_sign_(motion)
        if known is None:
            torch._foreach_mul_(change, [share.to(m) for m in mean])
        torch._foreach_addcmul_(mean, change, motion, value=1.0 if known is None else known)


def _fit(room: Tensor, *tensors: Tensor) -> bool:
    """Whether tensors of one shape are of the type of some room, and no longer than it."""
    if tensors[0].numel() > len(room):
        return False
    return all([(t.dtype, t.device) == (room.dtype, room.device) for t in tensors])


@torch.no_grad()
def _explained(ends: Weights, middles: Weights, segment: Segment) -> Tensor:
    """Sums (ends + 4 middles) · motion of every tensor [weights], one at a time."""
    sums = [
        torch.add(ends[n], middles[n], alpha=4.0)
        .mul_(segment.stop[n].to(ends[n].dtype) - start)
        .sum(dtype=wide(start))
        for n, start in segment.start.items()
    ]
    return torch.stack(sums)
