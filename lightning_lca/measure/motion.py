"""What a step of an optimizer was made of: signal, noise, momentum and weight decay.

A step of the optimizers here has the form

    motion = − (a g + m) / d(g) − decay,

where g is the gradient that it took, with coupled weight decay in it, m comes from the state and d
may depend on g through a second moment. Put the gradient of the probe in the place of g, and the
same state gives the step that the probe's gradient alone would have made; what is left is noise:

    signal        − a g_probe / d(g_probe)
    momentum      − m / d(g_probe)
    weight_decay  − a λ w / d(g_probe), or − η λ w where decay is decoupled
    noise         what the step's own gradient (mini-batch, clipping) changed against these three
    other         motion that none of these explains, by other code

With the step's own d(g) in place of d(g_probe), weights whose mini-batch gradient is zero would
make signal and noise blow up and cancel.

The state before the step is not needed: it follows from that after it and g. Formulas are those of
torch.optim's documentation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

PARTS = ("signal", "momentum", "weight_decay", "noise", "other")
Number = Tensor | float
Divisor = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class _Form:
    """The numbers of one step in the form above, with m = b · before.

    Attributes:
        a: What the gradient is multiplied with.
        b: What the term of the state is multiplied with.
        before: The term of the state before the step [elements]; None: there is none.
        divides: Whether d divides it, too.
        divisor: d as a function of the gradient [elements]; None: 1.
        own: d of the gradient that the step took [elements].
    """

    a: Number
    b: Number = 0.0
    before: Tensor | None = None
    divides: bool = True
    divisor: Divisor | None = None
    own: Tensor | None = None


@dataclass
class Step:
    """What is noted of a parameter right after an optimizer's step; tensors are not copied.

    Attributes:
        kind: Name of the optimizer's class, as far as it is known here.
        settings: Those of its group: learning rate, betas, ... as they were in the step.
        state: Its state after the step {name: [*shape] or []}.
        gradient: The gradient that was taken [*shape].
        count: Steps since it was noted first; more than one cannot be told apart.
    """

    kind: str
    settings: Mapping[str, Any]
    state: Mapping[str, Any]
    gradient: Tensor
    count: int = 1
    _version: int = field(default=0, repr=False)

    def __post_init__(self) -> None:
        """Notes the version of the gradient, which somebody may write to before it is read."""
        self._version = self.gradient._version

    @property
    def has_form(self) -> bool:
        """Whether steps of this optimizer can be split at all."""
        return self.kind in _FORMS

    @property
    def is_known(self) -> bool:
        """Whether its parts can be told: one step, by a gradient that is still there."""
        is_there = self.gradient._version == self._version
        return self.has_form and self.count == 1 and is_there

    @property
    def key(self) -> tuple[Any, ...]:
        """Tells parameters apart that do not share a form: those of other groups or counts."""
        numbers = (self.state.get("step"), self.state.get("mu_product"))
        same = tuple(n if isinstance(n, Tensor) and on_device(n) else _number(n) for n in numbers)
        settings = self.settings
        kept = (self.state.get("first"), *self.moments)
        return (self.kind, id(settings), *kept, *map(_hashable, same))

    @property
    def moments(self) -> list[str]:
        """Names the tensors of the state that the form reads."""
        return [name for name in _MOMENTS if isinstance(self.state.get(name), Tensor)]


def on_device(number: Tensor) -> bool:
    """Whether reading a number would make the host wait."""
    return number.device.type != "cpu"


class Steps:
    """Notes what optimizers did, by their own hooks, until it is read.

    Attributes:
        unknown: Names of optimizers whose steps have no form here.
    """

    def __init__(self, optimizers: Iterable[Optimizer]) -> None:
        """Watches optimizers; nothing is copied but AMSGrad's maximum, which a step overwrites."""
        self._noted: dict[int, Step] = {}
        self._maxima: dict[int, Tensor] = {}
        self._first: set[int] = set()
        self.unknown: list[str] = []
        self._handles: list[Any] = []
        for optimizer in optimizers:
            if kind_of(optimizer) not in _FORMS:
                self.unknown.append(type(optimizer).__name__)
            self._handles.append(optimizer.register_step_pre_hook(self._before))
            self._handles.append(optimizer.register_step_post_hook(self._after))

    def leave(self) -> None:
        """Lets go of the optimizers."""
        for handle in self._handles:
            handle.remove()

    def clear(self) -> None:
        """Forgets what was noted: a segment begins."""
        self._noted = {}

    def of(self, parameter: Tensor | None) -> Step | None:
        """Finds what was noted of a parameter; None if no optimizer stepped it."""
        return self._noted.get(id(parameter))

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """Shows nothing within: what was noted belongs to a later segment."""
        noted, self._noted = self._noted, {}
        try:
            yield
        finally:
            self._noted = noted

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            for p in group["params"] if group.get("dampening") else ():
                is_first = optimizer.state.get(p, {}).get("momentum_buffer") is None
                (self._first.add if is_first else self._first.discard)(id(p))
            for p in group["params"] if group.get("amsgrad") else ():
                maximum = optimizer.state.get(p, {}).get("max_exp_avg_sq")
                if maximum is not None:
                    old = self._maxima.setdefault(id(p), torch.empty_like(maximum))
                    old.copy_(maximum)

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        kind = kind_of(optimizer)
        for group in optimizer.param_groups:
            settings = {
                name: value.clone() if isinstance(value, Tensor) else value
                for name, value in group.items()
                if name != "params"
            }
            for p in group["params"]:
                if p.grad is None:
                    continue
                before = self._noted.get(id(p))
                state = dict(optimizer.state.get(p, {}))
                if id(p) in self._maxima:
                    state["old_maximum"] = self._maxima[id(p)]
                elif "max_exp_avg_sq" in state:  # Its first step.
                    state["old_maximum"] = torch.zeros_like(state["max_exp_avg_sq"])
                state["first"] = id(p) in self._first
                self._noted[id(p)] = Step(
                    kind, settings, state, p.grad, 1 if before is None else before.count + 1
                )


def kind_of(optimizer: Optimizer) -> str:
    """Names the first class of an optimizer that a form is known of, or its own.

    A class of the user's that overrides ``step`` is another optimizer, whatever it descends from.
    """
    for cls in type(optimizer).__mro__:
        if cls.__name__ in _FORMS and (
            cls.__module__.startswith("torch.optim") or cls.__name__ == "Lion"
        ):
            return cls.__name__
        if "step" in vars(cls):
            return type(optimizer).__name__
    return type(optimizer).__name__


@torch.no_grad()
def parts(
    step: Step,
    moments: Mapping[str, Tensor],
    gradient: Tensor,
    probe: Tensor,
    weight: Tensor,
    motion: Tensor,
) -> list[Tensor]:
    """Splits a motion over `PARTS`: [elements] each, which add up to it.

    Args:
        step: Whose form and settings hold for all elements.
        moments: Tensors of the state, as the step left them {name: [elements]}.
        gradient: What the step took [elements].
        probe: The gradient of the probe at the start [elements].
        weight: The weights at the start [elements].
        motion: How far they moved [elements].

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([1.0]))
        >>> sgd = torch.optim.SGD([w], lr=0.5, weight_decay=0.2)
        >>> steps = Steps([sgd])
        >>> w.grad = torch.tensor([3.0])
        >>> sgd.step()
        >>> args = w.grad, torch.tensor([2.0]), torch.tensor([1.0]), w.detach() - 1
        >>> split = parts(steps.of(w), {}, *args)
        >>> [(name, round(part.item(), 4)) for name, part in zip(PARTS, split)][:4]
        [('signal', -1.0), ('momentum', 0.0), ('weight_decay', -0.1), ('noise', -0.5)]
    """
    ones = torch.ones_like(motion)
    signal, momentum, decay, whole = (
        torch.zeros_like(motion) if term is None else term[0] * term[1]
        for term in terms(step, moments, gradient, probe, weight, lambda: motion, ones)
    )
    return [signal, momentum, decay, whole - signal - momentum - decay, motion - whole]


Term = tuple[Tensor, Number] | None


@torch.no_grad()
def terms(
    step: Step,
    moments: Mapping[str, Tensor],
    gradient: Tensor,
    probe: Tensor,
    weight: Tensor,
    motion: Callable[[], Tensor],
    times: Tensor,
) -> list[Term]:
    """Returns signal, momentum, weight decay, and the whole step, each times something.

    In as few passes as there can be: noise is what the first three leave of the fourth. Nothing is
    written to: the state is that of the optimizer.

    Args:
        step: As for `parts`.
        moments: As for `parts`.
        gradient: As for `parts`.
        probe: As for `parts`.
        weight: As for `parts`.
        motion: Gives what `parts` gets; few optimizers need it.
        times: What all are multiplied with [elements].

    Returns:
        Of each, numbers [elements] and one that they are to be multiplied with; None: zero.
    """
    settings = step.settings
    sign = -1.0 if settings.get("maximize") else 1.0
    rate, fades = settings["lr"], settings.get("weight_decay", 0.0)
    decoupled = bool(settings.get("decoupled_weight_decay")) or step.kind in ("AdamW", "Lion")
    if step.kind == "SGD" and settings["nesterov"]:
        gradient = _before_nesterov(gradient, moments, motion(), step)
    own, other = (-gradient, -probe) if sign < 0 else (gradient, probe)
    is_coupled = bool(fades) and not decoupled
    if is_coupled:
        own, other = torch.add(own, weight, alpha=fades), torch.add(other, weight, alpha=fades)
    form = _FORMS[step.kind](settings, step.state, moments, own)
    by_probe = times if form.divisor is None else times / form.divisor(other)
    by_own = times if form.own is None else times / form.own
    signal = probe * by_probe, -sign * form.a
    decay = None
    if fades:
        decay = (
            (weight * by_probe, -form.a * fades) if is_coupled else (weight * times, -rate * fades)
        )
    whole = own * -form.a
    momentum = None
    if form.before is None:
        whole.mul_(by_own)
    elif form.divides:
        momentum = form.before * by_probe, -form.b
        _add(whole, form.before, -form.b).mul_(by_own)
    else:
        momentum = form.before * times, -form.b
        _add(whole.mul_(by_own), momentum[0], -form.b)
    if decay is not None and not is_coupled:
        whole.add_(decay[0] * decay[1])
    return [signal, momentum, decay, (whole, 1.0)]


def _add(into: Tensor, values: Tensor, scale: Number) -> Tensor:
    """Adds scale · values in place, in one pass; a scale on an accelerator is not read."""
    if isinstance(scale, Tensor):
        return into.addcmul_(values, scale)
    return into.add_(values, alpha=scale)


def _before_nesterov(
    gradient: Tensor, moments: Mapping[str, Tensor], motion: Tensor, step: Step
) -> Tensor:
    """Undoes what SGD with nesterov may do to ``p.grad``: it adds the momentum to it in place.

    It does so over many tensors at once and without decay. Whether it did shows in the motion, of
    what has moved: in the gaps between tensors nothing did.
    """
    settings = step.settings
    buffer = moments.get("momentum_buffer")
    if buffer is None or settings["weight_decay"] or settings["maximize"]:
        return gradient
    pushed = settings["momentum"] * buffer
    moved = motion != 0
    untouched = (motion + settings["lr"] * (gradient + pushed)).abs().mul_(moved).sum()
    touched = (motion + settings["lr"] * gradient).abs().mul_(moved).sum()
    return torch.where(touched < untouched, gradient - pushed, gradient)


# -- the forms ------------------------------------------------------------------------------------

_Moments = Mapping[str, Any]
_MOMENTS = (
    *("momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "old_maximum"),
    *("square_avg", "grad_avg", "sum"),
)


def _sgd(settings: Mapping[str, Any], state: _Moments, moments: _Moments, own: Tensor) -> _Form:
    rate, momentum = settings["lr"], settings["momentum"]
    buffer = moments.get("momentum_buffer")
    if not momentum or buffer is None:
        return _Form(rate)
    # buffer = momentum · before + damped · own, or own in the first step, which is not damped.
    damped = 1.0 if state.get("first") else 1.0 - settings["dampening"]
    before = torch.sub(buffer, own, alpha=damped)
    if settings["nesterov"]:
        return _Form(rate * (1.0 + momentum * damped), rate * momentum, before)
    return _Form(rate * damped, rate, before)


def _second_moment(moment: Tensor, own: Tensor, beta: float) -> Divisor:
    """Returns the second moment as a function of the gradient that the step took."""
    before = torch.addcmul(moment, own, own, value=beta - 1.0).clamp_(min=0.0)
    return lambda gradient: torch.addcmul(before, gradient, gradient, value=1.0 - beta)


def _root(moment: Tensor, corrected: Number, eps: float) -> Tensor:
    """Returns √(moment / corrected) + eps [elements], times √corrected: one pass less."""
    return moment.sqrt().add_(eps * corrected**0.5)


def _adam(settings: Mapping[str, Any], state: _Moments, moments: _Moments, own: Tensor) -> _Form:
    rate, (beta, beta2), eps = settings["lr"], settings["betas"], settings["eps"]
    step = _number(state["step"])
    corrected, corrected2 = 1.0 - beta**step, 1.0 - beta2**step
    second = _second_moment(moments["exp_avg_sq"], own, beta2)
    maximum = moments.get("old_maximum") if settings["amsgrad"] else None

    def divisor(gradient: Tensor) -> Tensor:
        moment = second(gradient)
        if maximum is not None:
            moment = torch.maximum(moment, maximum)
        return _root(moment, corrected2, eps)

    after = moments["exp_avg_sq"]
    after = after if maximum is None else torch.maximum(after, maximum)
    rate = rate * corrected2**0.5  # As `_root` gives that much more.
    return _Form(
        rate * (1.0 - beta) / corrected,
        rate / corrected,
        torch.sub(moments["exp_avg"], own, alpha=1.0 - beta),
        divisor=divisor,
        own=_root(after, corrected2, eps),
    )


def _nadam(settings: Mapping[str, Any], state: _Moments, moments: _Moments, own: Tensor) -> _Form:
    rate, (beta, beta2), eps = settings["lr"], settings["betas"], settings["eps"]
    step, product = _number(state["step"]), _number(state["mu_product"])
    weight = beta * (1.0 - 0.5 * 0.96 ** (step * settings["momentum_decay"]))
    following = beta * (1.0 - 0.5 * 0.96 ** ((step + 1.0) * settings["momentum_decay"]))
    ahead = rate * following / (1.0 - product * following)
    second = _second_moment(moments["exp_avg_sq"], own, beta2)
    corrected = 1.0 - beta2**step
    more = corrected**0.5  # As `_root` gives that much more.
    return _Form(
        (rate * (1.0 - weight) / (1.0 - product) + ahead * (1.0 - beta)) * more,
        ahead * more,
        torch.sub(moments["exp_avg"], own, alpha=1.0 - beta),
        divisor=lambda gradient: _root(second(gradient), corrected, eps),
        own=_root(moments["exp_avg_sq"], corrected, eps),
    )


def _radam(settings: Mapping[str, Any], state: _Moments, moments: _Moments, own: Tensor) -> _Form:
    rate, (beta, beta2), eps = settings["lr"], settings["betas"], settings["eps"]
    step = _number(state["step"])
    corrected, corrected2 = 1.0 - beta**step, 1.0 - beta2**step
    longest = 2.0 / (1.0 - beta2) - 1.0
    length = longest - 2.0 * step * beta2**step / corrected2
    second = _second_moment(moments["exp_avg_sq"], own, beta2)
    is_adapted = length > 5.0
    if not isinstance(is_adapted, Tensor):  # A fill: the host would wait for a copy.
        is_adapted = torch.full((), is_adapted, device=own.device)
    rise = (length - 4.0) * (length - 2.0) * longest
    fall = (longest - 4.0) * (longest - 2.0) * length
    stretch = abs(rise / fall * corrected2) ** -0.5

    def adapted(moment: Tensor) -> Tensor:
        return torch.where(is_adapted, moment.sqrt_().add_(eps) * stretch, 1.0)

    return _Form(
        rate * (1.0 - beta) / corrected,
        rate / corrected,
        torch.sub(moments["exp_avg"], own, alpha=1.0 - beta),
        divisor=lambda gradient: adapted(second(gradient)),
        own=adapted(moments["exp_avg_sq"].clone()),
    )


def _rmsprop(settings: Mapping[str, Any], state: _Moments, moments: _Moments, own: Tensor) -> _Form:
    rate, alpha, eps = settings["lr"], settings["alpha"], settings["eps"]
    second = _second_moment(moments["square_avg"], own, alpha)
    average = moments.get("grad_avg")
    first = None if average is None else torch.sub(average, own, alpha=1.0 - alpha)

    def divisor(gradient: Tensor) -> Tensor:
        moment = second(gradient)
        if first is not None:
            moment -= torch.add(first, gradient, alpha=1.0 - alpha).square()
        return moment.clamp_(min=0.0).sqrt_().add_(eps)

    taken = divisor(own)
    buffer = moments.get("momentum_buffer")
    if buffer is None or not settings["momentum"]:
        return _Form(rate, divisor=divisor, own=taken)
    before = torch.addcdiv(buffer, own, taken, value=-1.0)
    return _Form(rate, rate, before, divides=False, divisor=divisor, own=taken)


def _adagrad(settings: Mapping[str, Any], state: _Moments, moments: _Moments, own: Tensor) -> _Form:
    step = _number(state["step"])
    rate = settings["lr"] / (1.0 + (step - 1.0) * settings["lr_decay"])
    before = torch.addcmul(moments["sum"], own, own, value=-1.0).clamp_(min=0.0)
    eps = settings["eps"]

    def divisor(gradient: Tensor) -> Tensor:
        return torch.addcmul(before, gradient, gradient).sqrt_().add_(eps)

    return _Form(rate, divisor=divisor, own=divisor(own))


def _lion(settings: Mapping[str, Any], state: _Moments, moments: _Moments, own: Tensor) -> _Form:
    rate, (beta, beta2) = settings["lr"], settings["betas"]
    before = torch.sub(moments["exp_avg"], own, alpha=1.0 - beta2).div_(beta2)

    def divisor(gradient: Tensor) -> Tensor:
        mixed = torch.add(beta * before, gradient, alpha=1.0 - beta).abs_()
        return torch.where(mixed == 0, torch.inf, mixed)  # sign(c) = c / |c|, and 0 at 0.

    return _Form(rate * (1.0 - beta), rate * beta, before, divisor=divisor, own=divisor(own))


_FORMS: dict[str, Callable[[Mapping[str, Any], _Moments, _Moments, Tensor], _Form]] = {
    "SGD": _sgd,
    "Adam": _adam,
    "AdamW": _adam,
    "NAdam": _nadam,
    "RAdam": _radam,
    "RMSprop": _rmsprop,
    "Adagrad": _adagrad,
    "Lion": _lion,
}


def _number(value: Any) -> Any:
    """Reads a number that the host knows; one on an accelerator stays there."""
    if isinstance(value, Tensor) and not on_device(value):
        return float(value)
    return value


def _hashable(value: Any) -> Any:
    return id(value) if isinstance(value, Tensor) else value


def known(kinds: Sequence[str] = tuple(_FORMS)) -> str:
    """Lists the optimizers whose steps can be split, as text."""
    return ", ".join(kinds)
