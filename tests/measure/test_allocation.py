import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call

from lightning_lca.measure.allocation import (
    Sample,
    Segment,
    allocate,
    closed_gradient,
    halve,
    mean_gradient,
    refine,
)
from lightning_lca.measure.quadrature import BOOLE, RULES, SIMPSON, Quadrature
from lightning_lca.measure.tensors import total

EACH = {name: rule for name, rule in RULES.items() if not rule.adapts}


class SmoothField:
    """L(w) = Σ exp(a w) + (Σ b w)², by hand, with every call noted."""

    def __init__(self, size=6):
        generator = torch.Generator().manual_seed(3)
        self.a, self.b = torch.randn(2, size, generator=generator, dtype=torch.float64)
        self.asked = []

    def loss(self, w):
        return (self.a * w).exp().sum() + (self.b @ w) ** 2

    def __call__(self, at):
        self.asked.append((at.s, at.needs_gradient))
        w = at.weights()["w"].detach()
        gradient = self.a * (self.a * w).exp() + 2 * (self.b @ w) * self.b
        return Sample(self.loss(w), {"w": gradient} if at.needs_gradient else None)

    def exact(self, start, stop):
        """The path integral in closed form, weight by weight [size]."""
        d = stop - start
        rise = torch.where(d == 0, 0, (self.a * stop).exp() - (self.a * start).exp())
        return rise + 2 * self.b * d * (self.b @ (start + stop)) / 2


def segment_of(step, size=6):
    generator = torch.Generator().manual_seed(11)
    start, direction = torch.randn(2, size, generator=generator, dtype=torch.float64)
    return Segment({"w": start}, {"w": start + step * direction})


@pytest.mark.parametrize("rule", EACH.values(), ids=EACH)
def test_credits_converge_to_the_closed_form_at_the_order_of_the_rule(rule):
    field = SmoothField()

    def worst(step):
        segment = segment_of(step)
        exact = field.exact(segment.start["w"], segment.stop["w"])
        allocation = allocate(field, segment, rule)
        left = allocation.residual if allocation.shared is None else allocation.shared
        return (allocation.values["w"] - exact).abs().max().item(), abs(left.item())

    (credit, residual), (credit_half, residual_half) = worst(0.4), worst(0.2)
    # A rule of degree d is wrong by step^(d+2): d+1 for the integral, 1 for the motion.
    order = dict.fromkeys(("midpoint", "trapezoid", "closed_trapezoid"), 3)
    order |= {"simpson": 5, "gauss2": 5, "boole": 7, "gauss3": 7}
    expected = order.get(rule.name, 2)
    assert math.log2(credit / credit_half) > expected - 0.35
    assert math.log2(residual / residual_half) > expected - 0.35


def test_the_residual_is_what_the_credits_leave_of_the_loss_change():
    field, segment = SmoothField(), segment_of(0.8)
    allocation = allocate(field, segment, RULES["trapezoid"])
    change = field.loss(segment.stop["w"]) - field.loss(segment.start["w"])
    left = (change - allocation.values["w"].sum()).item()
    assert allocation.residual.item() == pytest.approx(left, abs=1e-13)
    assert abs(allocation.residual) > 1e-3, "the trapezoid cannot be exact here"


@pytest.mark.parametrize("rule", EACH.values(), ids=EACH)
def test_a_chain_pays_the_stated_gradients_and_gives_what_fresh_starts_give(rule):
    field = SmoothField()
    a, b = segment_of(0.3), segment_of(0.3)
    b = Segment(a.stop, {"w": a.stop["w"] - 0.1})
    previous = allocate(field, a, rule)
    field.asked.clear()
    chained = allocate(field, b, rule, first=previous.last)
    assert sum(needs for _, needs in field.asked) == rule.gradients_per_step
    fresh = allocate(field, b, rule)
    assert torch.equal(chained.values["w"], fresh.values["w"])
    assert torch.equal(chained.residual, fresh.residual)


def test_a_closed_rule_shares_its_residual_by_how_much_gradients_change():
    field, segment = SmoothField(), segment_of(0.8)
    segment.stop["w"][2] = segment.start["w"][2]  # A weight at rest takes no share.
    plain, closed = (allocate(field, segment, EACH[n]) for n in ("trapezoid", "closed_trapezoid"))
    change = (field(segment.at(1.0)).gradient["w"] - field(segment.at(0.0)).gradient["w"]).numpy()
    bent = np.abs((segment.stop["w"] - segment.start["w"]).numpy() * change)
    want = plain.values["w"].numpy() + plain.residual.item() * bent / bent.sum()
    assert np.allclose(closed.values["w"], want, rtol=1e-13, atol=1e-15)
    assert abs(plain.residual) > 1e-3
    assert closed.shared.item() == pytest.approx(plain.residual.item(), rel=1e-12)
    assert abs(closed.residual) < 1e-14
    assert plain.shared is None


def test_a_closed_rule_shares_nothing_where_no_gradient_changes():
    def kink(at):  # A jump that no gradient shows.
        w = at.weights()["w"].detach()
        return Sample(w.sum() + (w[0] > 0).double(), {"w": torch.ones_like(w)})

    segment = Segment({"w": torch.tensor([-1.0, 2.0])}, {"w": torch.tensor([1.0, 1.0])})
    allocation = allocate(kink, segment, EACH["closed_trapezoid"])
    assert allocation.values["w"].tolist() == [2.0, -1.0]
    assert allocation.residual.item() == allocation.shared.item() == 1.0


def test_where_much_is_left_the_middle_is_taken_too():
    field, segment = SmoothField(), segment_of(0.8)
    asked = []
    gradient, ends = closed_gradient(field, segment, is_much=lambda r: asked.append(r) or True)
    simpson = mean_gradient(field, segment, SIMPSON)[0]
    assert torch.allclose(gradient["w"], simpson["w"], rtol=1e-14, atol=1e-15)
    assert ends.shared is None
    assert asked[0].item() == allocate(field, segment, EACH["trapezoid"]).residual.item()
    assert sum(needs for _, needs in field.asked[:3]) == 3, "start, end and middle"


def test_one_segment_cannot_adapt():
    with pytest.raises(ValueError, match="compares a step with the steps before it"):
        allocate(SmoothField(), segment_of(0.8), RULES["adaptive"])


def test_buffers_may_be_those_of_the_first_sample():
    field, segment = SmoothField(), segment_of(0.3)
    expected = allocate(field, segment)
    first = field(segment.at(0.0))
    allocation = allocate(field, segment, first=first, out=first.gradient)
    assert allocation.values is first.gradient
    assert torch.equal(allocation.values["w"], expected.values["w"])


def test_arguments_are_not_written_to():
    field, segment = SmoothField(), segment_of(0.3)
    first = field(segment.at(0.0))
    kept = [t.clone() for t in (first.gradient["w"], segment.start["w"], segment.stop["w"])]
    for result in (
        allocate(field, segment, first=first),
        refine(field, segment, 1e-9, first=first),
    ):
        last = result.last.gradient["w"]
        assert torch.equal(last, field(segment.at(1.0)).gradient["w"])
    now = (first.gradient["w"], segment.start["w"], segment.stop["w"])
    assert all(torch.equal(a, b) for a, b in zip(kept, now))


def test_gradients_that_share_memory_are_summed_right():
    """Autograd may hand out one tensor for two inputs, or expanded ones."""

    def field(at):
        w = at.weights()
        loss = (w["a"] + w["b"]).pow(2).sum() + w["c"].sum()
        return Sample(loss.detach(), dict(zip(w, torch.autograd.grad(loss, list(w.values())))))

    start = {n: torch.arange(3.0).double() for n in "abc"}
    stop = {"a": start["a"] + 1, "b": start["b"] - 2, "c": start["c"] + 0.5}
    values = allocate(field, Segment(start, stop)).values
    middle = start["a"] + start["b"] - 0.5  # Of a + b along the segment; the integrand is linear.
    assert torch.allclose(values["a"], 2 * middle * 1.0)
    assert torch.allclose(values["b"], 2 * middle * -2.0)
    assert torch.allclose(values["c"], torch.full((3,), 0.5).double())


@pytest.mark.parametrize("tolerance", [1e-3, 1e-6, 1e-9])
def test_refine_stops_at_the_tolerance_and_never_evaluates_a_node_twice(tolerance):
    field, segment = SmoothField(), segment_of(2.0)
    allocation = refine(field, segment, tolerance, max_splits=1024)
    assert allocation.converged
    assert abs(allocation.residual) <= tolerance * (1 + 1e-6)
    nodes = [s for s, _ in field.asked]
    assert len(nodes) == len(set(nodes)) == 2 * allocation.splits + 1
    coarser = allocate(field, segment, SIMPSON.composite(max(1, allocation.splits // 2)))
    assert allocation.splits == 1 or abs(coarser.residual) > tolerance, "it refined without need"
    reference = allocate(field, segment, SIMPSON.composite(allocation.splits))
    assert torch.allclose(allocation.values["w"], reference.values["w"], rtol=1e-12, atol=1e-14)


def test_refine_flags_what_it_could_not_reach():
    field, segment = SmoothField(), segment_of(2.0)
    for most, splits in ((1, 1), (2, 2), (7, 4), (8, 8)):
        allocation = refine(field, segment, 1e-15, max_splits=most)
        assert (allocation.splits, allocation.converged) == (splits, False)
    with pytest.raises(ValueError, match="tolerance must be a positive number"):
        refine(field, segment, 0.0)
    with pytest.raises(ValueError, match="max_splits must be at least 1"):
        refine(field, segment, 1e-3, max_splits=0)


def test_refine_ends_where_the_integral_settles_on_something_else_than_the_loss_change():
    field, segment = SmoothField(), segment_of(2.0)

    def jumping(at):  # A loss with a jump that no gradient shows.
        sample = field(at)
        return Sample(sample.loss + 3.0 * (at.s > 0.6), sample.gradient)

    allocation = refine(jumping, segment, 1e-6, max_splits=1024)
    assert (allocation.converged, allocation.splits < 64) == (False, True)
    assert allocation.residual.item() == pytest.approx(3.0, rel=0.1)
    assert refine(field, segment, 1e-6, max_splits=1024).converged, "without the jump it goes on"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_credits_that_are_halved_are_those_of_the_rule_on_both_halves(dtype):
    field, segment = SmoothField(), segment_of(2.0)
    segment = Segment(*({"w": w["w"].to(dtype)} for w in (segment.start, segment.stop)))

    def wide(at):
        w = at.weights()["w"].detach().double()
        return Sample(
            field.loss(w), {"w": field.a * (field.a * w).exp() + 2 * (field.b @ w) * field.b}
        )

    out = {"w": torch.empty(6, dtype=torch.float64)}
    values = allocate(wide, segment, SIMPSON, out=out).values
    summed = []
    halve(wide, segment, values, summed.append)
    expected = allocate(wide, segment, SIMPSON.composite(2), out={"w": torch.empty(6).double()})
    assert torch.allclose(values["w"], expected.values["w"], rtol=1e-12, atol=1e-13)
    assert len(summed) == 3


def test_a_nan_loss_is_flagged_and_does_not_raise():
    def field(at):
        return Sample(torch.tensor(float("nan")).double(), {"w": torch.full((2,), float("nan"))})

    segment = Segment({"w": torch.zeros(2)}, {"w": torch.ones(2)})
    allocation = refine(field, segment, 1e-3, max_splits=4)
    assert allocation.converged is False
    assert allocation.residual.isnan()


def test_a_field_without_the_gradient_it_was_asked_for_is_an_error():
    segment = Segment({"w": torch.zeros(2)}, {"w": torch.ones(2)})
    with pytest.raises(ValueError, match="The field returned no gradient"):
        allocate(lambda at: Sample(torch.zeros(()), None), segment)


def test_a_rule_of_the_end_alone_leaves_the_last_sample_whole():
    field, segment = SmoothField(), segment_of(0.5)
    backward_euler = Quadrature("backward euler", (1.0,), (1.0,), 0)
    allocation = allocate(field, segment, backward_euler)
    end = field(segment.at(1.0)).gradient["w"]
    assert torch.equal(allocation.last.gradient["w"], end)
    moved = segment.stop["w"] - segment.start["w"]
    assert torch.allclose(allocation.values["w"], end * moved)


def test_half_precision_weights_are_credited_in_float32():
    torch.manual_seed(0)
    model = nn.Linear(5, 3).to(torch.bfloat16)
    x = torch.ones(2, 5, dtype=torch.bfloat16)

    def field(at):
        w = at.weights()
        loss = functional_call(model, w, x).float().pow(2).mean()
        return Sample(
            loss.detach().double(), dict(zip(w, torch.autograd.grad(loss, list(w.values()))))
        )

    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    stop = {n: p * 1.25 for n, p in start.items()}
    for result in (
        allocate(field, Segment(start, stop)),
        refine(field, Segment(start, stop), 1e-2),
    ):
        assert {v.dtype for v in result.values.values()} == {torch.float32}
        # The two losses and the credits are each right to bfloat16's 2⁻⁸.
        assert abs(result.residual) < 3 * 2**-8 * result.loss_after


def test_totals_are_summed_in_float64():
    values = [torch.full((10_000,), 0.1), torch.tensor([-1000.0])]
    assert total(values).item() == pytest.approx(10_000 * float(torch.tensor(0.1)) - 1000, abs=1e-9)


def test_boole_beats_simpson_on_a_smooth_loss():
    field, segment = SmoothField(), segment_of(0.5)
    assert (
        abs(allocate(field, segment, BOOLE).residual) < abs(allocate(field, segment).residual) / 10
    )
