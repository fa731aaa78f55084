"""The measure once more, written differently: float64, functional_call, NumPy, and no callback.

The path of the weights comes from `PathRecorder`; `Twin.measure` credits its segments, and says how
far rounding in the run's own arithmetic can take a credit from the true one. `Twin.parts` splits a
step by taking it again, in float64, with the gradient of the probe.

Rounding is measured, not guessed: the gradient of the run's arithmetic is compared with that of
float64 at the nodes of the rule, where the run's weights are rounded themselves, and at a point
beside the segment, tensor by tensor. Eight times the largest of these errors (never less than one
unit in the last place of the largest gradient) bounds the error of a gradient; rounding errors are
linear in the unit roundoff, so that of float64 is that of float32 times 2**-29.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn
from torch.func import functional_call

from support.models import pl

RULES = {
    "euler": ([0], [1]),
    "midpoint": ([1 / 2], [1]),
    "trapezoid": ([0, 1], [1 / 2, 1 / 2]),
    "simpson": ([0, 1 / 2, 1], [1 / 6, 4 / 6, 1 / 6]),
    "boole": ([0, 1 / 4, 1 / 2, 3 / 4, 1], [7 / 90, 32 / 90, 12 / 90, 32 / 90, 7 / 90]),
    "gauss2": ([1 / 2 - 12**-0.5, 1 / 2 + 12**-0.5], [1 / 2, 1 / 2]),
    "gauss3": ([1 / 2 - 0.15**0.5, 1 / 2, 1 / 2 + 0.15**0.5], [5 / 18, 8 / 18, 5 / 18]),
}
CLOSED = ("closed_trapezoid", "adaptive")  # They begin as the trapezoid does.
UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}


def simpson(panels):
    """Composite Simpson: nodes and weights."""
    weights = np.ones(2 * panels + 1)
    weights[1:-1:2], weights[2:-1:2] = 4, 2
    return np.linspace(0, 1, 2 * panels + 1), weights / (6 * panels)


@dataclass
class Update:
    """All that an optimizer's step follows from.

    ``groups`` holds pairs of settings and the names of parameters; a gradient or a state of a
    parameter that has none is missing.
    """

    kind: type
    groups: list
    states: dict
    gradients: dict


class PathRecorder(pl.Callback):
    """Keeps where every optimizer step began and ended, the buffers then, and the steps' `Update`.

    Args:
        weights: Gives {name: tensor} of a LightningModule; by default its parameters by name.
    """

    def __init__(self, weights=None):
        self.weights = weights or (lambda module: dict(module.named_parameters()))
        self.starts, self.stops, self.buffers, self.open = [], [], [], False
        self.updates = []

    def copy_of(self, tensors):
        return {name: t.detach().clone() for name, t in tensors.items()}

    def on_train_start(self, trainer, pl_module):
        for optimizer in trainer.optimizers:
            optimizer.register_step_post_hook(lambda o, *_: self.note_gradients(pl_module))

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if not self.open:
            self.starts.append(self.copy_of(self.weights(pl_module)))
            names = {p: n for n, p in pl_module.named_parameters()}
            states = {names[p]: copy.deepcopy(state) for p, state in optimizer.state.items()}
            groups = [
                ({k: v for k, v in g.items() if k != "params"}, [names[p] for p in g["params"]])
                for g in optimizer.param_groups
            ]
            self.updates.append(Update(type(optimizer), groups, states, {}))
        self.open = True

    def note_gradients(self, pl_module):
        """Keeps what was stepped by: only now it is clipped."""
        gradients = {n: p.grad for n, p in pl_module.named_parameters() if p.grad is not None}
        self.updates[-1].gradients = {n: g.detach().to_dense() for n, g in gradients.items()}
        self.updates[-1].gradients = self.copy_of(self.updates[-1].gradients)

    def on_train_batch_end(self, trainer, pl_module, *args):
        if self.open:
            self.stops.append(self.copy_of(self.weights(pl_module)))
            self.buffers.append(self.copy_of(dict(pl_module.named_buffers())))
        self.open = False

    def chords(self, every=1):
        """Cuts the path into stretches of so many steps: starts, stops, buffers at their ends."""
        last = len(self.stops) - 1
        for i in range(0, last + 1, every):
            end = min(i + every - 1, last)
            yield self.starts[i], self.stops[end], self.buffers[end]


@dataclass
class Measured:
    """What a segment did, and how far rounding can take each number.

    Of every parameter {name: array}: credit, and the motion and the mean gradient that it is the
    product of; the gradients at both ends, ``errors`` is how far each of these may be off.
    """

    credit: dict
    slack: dict
    motion: dict
    mean: dict
    mean_slack: dict
    first: dict
    last: dict
    errors: dict
    before: float
    after: float
    loss_slack: float

    @property
    def residual(self):
        return self.after - self.before - sum(c.sum() for c in self.credit.values())

    def closed(self):
        """Shares out what the trapezoid leaves, by |motion x change of the gradient|."""
        left = self.residual
        off = sum(s.sum() for s in self.slack.values()) + 2 * self.loss_slack
        change = {n: np.abs(self.last[n] - self.first[n]) for n in self.motion}
        bent = {n: np.abs(self.motion[n]) * change[n] for n in self.motion}
        bent_off = {n: 2 * np.abs(self.motion[n]) * self.errors[n] for n in self.motion}
        total, total_off = (sum(a.sum() for a in b.values()) for b in (bent, bent_off))
        if total <= 0:
            return self
        credit, slack, mean, mean_slack = {}, {}, {}, {}
        # What remains where the sum of all is off by as much as rounding may do.
        least = max(total - total_off, 0.0)
        for n, motion in self.motion.items():
            credit[n] = self.credit[n] + left * bent[n] / total
            mean[n] = self.mean[n] + np.sign(motion) * left * change[n] / total
            with np.errstate(divide="ignore", invalid="ignore"):
                share = (bent[n] + bent_off[n]) / least
                doubt = off * share + abs(left) * (bent_off[n] + share * total_off) / least
                slack[n] = self.slack[n] + np.where(motion != 0, doubt, 0)
                moves = motion != 0
                mean_slack[n] = np.where(moves, slack[n] / np.abs(motion), self.mean_slack[n])
        return replace(self, credit=credit, slack=slack, mean=mean, mean_slack=mean_slack)


class Twin:
    """The mean loss over fixed batches as a function of weights, in float64.

    Args:
        module: A LightningModule that was never trained, with ``loss(x, y)``.
        batches: (x, y) pairs.
        mode: As `LCACallback` has it.
        seed: Batch j runs on torch's random stream from seed + j.
        dtype: Of the run's weights. autocast: what its forward computes in.
    """

    def __init__(
        self, module, batches, mode="no_dropout", seed=0, dtype=torch.float32, autocast=None
    ):
        self.module = copy.deepcopy(module).train(mode != "eval")
        if mode == "no_dropout":
            for m in self.module.modules():
                if isinstance(m, nn.Dropout):
                    m.p = 0.0
                elif hasattr(m, "dropout") and isinstance(m.dropout, float):
                    m.dropout = 0.0
        self.batches, self.seed, self.dtype, self.autocast = batches, seed, dtype, autocast
        # What rounds: the coarser of what holds the weights and what computes.
        self.unit = max(UNIT[dtype], UNIT[autocast or dtype])
        self.random = np.random.default_rng(0)

    def loss_and_gradient(self, weights, buffers, exact=True):
        """Gives the loss and {name: gradient}, in float64 or in the run's own arithmetic."""
        dtype = torch.float64 if exact else torch.float32
        if not exact and self.dtype == torch.bfloat16:
            dtype = torch.bfloat16
        wide = {n: w.detach().to(dtype).requires_grad_() for n, w in weights.items()}
        held = {n: b.to(dtype) if b.is_floating_point() else b for n, b in buffers.items()}
        rounds = not exact and self.autocast is not None
        context = torch.autocast("cpu", self.autocast) if rounds else contextlib.nullcontext()
        total, sums = 0.0, {n: 0.0 for n in weights}
        samples = sum(len(x) for x, _ in self.batches)
        for j, (x, y) in enumerate(self.batches):
            state = {**wide, **{n: b.clone() for n, b in held.items()}}
            x, y = (t.to(dtype) if t.is_floating_point() else t for t in (x, y))
            torch.manual_seed(self.seed + j)
            with context:
                loss = functional_call(self.module, state, (x, y), tie_weights=True)
            gradients = torch.autograd.grad(loss, list(wide.values()), allow_unused=True)
            share = len(x) / samples
            total += share * loss.item()
            for name, g in zip(wide, gradients):
                if g is not None:
                    sums[name] = sums[name] + share * g.to_dense().double().numpy()
        return total, {n: np.broadcast_to(s, weights[n].shape) for n, s in sums.items()}

    def residual(self, start, stop, buffers, rule):
        """Gives what a rule leaves unexplained of the segment."""
        wide = {n: (start[n].double(), stop[n].double()) for n in start}
        with torch.random.fork_rng(devices=[]):
            samples = {
                s: self.loss_and_gradient(_between(wide, s), buffers)
                for s in sorted({0.0, 1.0, *rule[0]})
            }
        explained = sum(
            weight * sum((samples[s][1][n] * (b - a).numpy()).sum() for n, (a, b) in wide.items())
            for s, weight in zip(*rule)
        )
        return samples[1.0][0] - samples[0.0][0] - explained

    def measure(self, start, stop, buffers, rule, trained):
        """Credits the segment by a rule: (nodes, weights)."""
        with torch.random.fork_rng(devices=[]):
            return self._measure(start, stop, buffers, rule, set(trained))

    def _measure(self, start, stop, buffers, rule, trained):
        wide = {n: (start[n].double(), stop[n].double()) for n in start}
        errors, largest = dict.fromkeys(start, 0.0), dict.fromkeys(start, 0.0)
        sums, sizes = ({n: np.zeros(w.shape) for n, w in start.items()} for _ in range(2))
        samples, loss_error = {}, 0.0
        for s in sorted({0.0, 1.0, *rule[0]}):
            samples[s] = self.loss_and_gradient(_between(wide, s), buffers)
        for s, weight in zip(*rule):
            for name, g in samples[s][1].items():
                sums[name] += weight * g
                sizes[name] += abs(weight * g)

        middle = _between(wide, 0.5)
        for n, w in middle.items():
            middle[n] = w * torch.from_numpy(1 + 1e-3 * self.random.normal(size=w.shape))
        # Where the run's dtype can be: beside the segment the errors of its arithmetic alone, and
        # at the nodes of the rule those of its weights, too.
        narrow = {
            n: torch.float32 if w.dtype == torch.float64 else w.dtype for n, w in start.items()
        }
        beside = {n: w.to(start[n].dtype).double() for n, w in middle.items()}
        compared = [
            ({n: w.to(narrow[n]).double() for n, w in _between(wide, s).items()}, sample)
            for s, sample in samples.items()
        ]
        for place, exact in [*compared, (beside, self.loss_and_gradient(beside, buffers))]:
            low_loss, low = self.loss_and_gradient(place, buffers, exact=False)
            loss_error = max(loss_error, abs(low_loss - exact[0]))
            for name, g in exact[1].items():
                errors[name] = max(errors[name], np.abs(low[name] - g).max(initial=0.0))
                largest[name] = max(largest[name], np.abs(g).max(initial=0.0))
        losses = samples[0.0][0], samples[1.0][0]

        # Errors are linear in the unit roundoff; the low arithmetic of `compare` is float32's.
        finer = 2.0**-28 if self.dtype == torch.float64 else 1.0  # 2**-29, for run and twin.
        low = self.unit if finer == 1.0 else UNIT[torch.float32]
        span = sum(abs(w) for w in rule[1])
        credit, slack, motion, mean_slack, ends_slack = {}, {}, {}, {}, {}
        for n, (a, b) in wide.items():
            motion[n] = (b - a).numpy() if n in trained else np.zeros(a.shape)
            error = 8 * max(errors[n], low * largest[n])
            # Besides: products, sums and the motion are rounded, each by one unit.
            credit[n] = motion[n] * sums[n]
            mean_slack[n] = finer * (span * error + 8 * low * sizes[n])
            slack[n] = np.abs(motion[n]) * mean_slack[n]
            ends_slack[n] = np.full(a.shape, finer * error)
        loss_slack = finer * 8 * max(loss_error, low * max(map(abs, losses)))
        ends = (samples[s][1] for s in (0.0, 1.0))
        return Measured(
            credit, slack, motion, sums, mean_slack, *ends, ends_slack, *losses, loss_slack
        )

    def parts(self, start, update, want):
        """Splits a step by taking it again with the probe's gradient, and with its own.

        Args:
            start: The weights before it.
            update: What it follows from.
            want: What `measure` gives for it.

        Returns:
            Of every parameter that was stepped, the motion by the probe's gradient and by its own,
            and how far each may be off, {name: array} four times.

        How far: the largest change of the motion where the gradient and each tensor of the state
        are off by what rounding may do to them, up or down, all combinations of it.
        """
        own = {n: g.double().numpy() for n, g in update.gradients.items()}
        probe = {n: want.first[n] for n in own}
        states = {n: _begun(update, n, start[n]) for n in own}
        after = _stepped(update, start, own, states)[1]
        unit = 8 * UNIT[self.dtype]
        off = {
            n: {
                k: unit * (abs(v) + abs(after[n][k].double()))
                for k, v in state.items()
                if torch.is_tensor(v) and v.shape == start[n].shape
            }
            for n, state in states.items()
        }
        found = []
        for gradient, error in (
            (probe, want.errors),
            (own, {n: unit * np.abs(g) for n, g in own.items()}),
        ):
            exact = _stepped(update, start, gradient, states)[0]
            worst = {n: np.zeros(g.shape) for n, g in gradient.items()}
            keys = sorted({k for tensors in off.values() for k in tensors})
            for sign, *signs in itertools.product((-1, 1), repeat=1 + len(keys)):
                pushed = {n: g + sign * error[n] for n, g in gradient.items()}
                shifts = dict(zip(keys, signs, strict=True))
                moved = _stepped(update, start, pushed, _shifted(states, off, shifts))[0]
                for n, there in moved.items():
                    change = np.nan_to_num(np.abs(there - exact[n]), nan=np.inf)
                    worst[n] = np.maximum(worst[n], change)
            found += [exact, worst]
        return found


def _begun(update, name, weight):
    """The state that a parameter's step began from, as zeros where the step makes it first."""
    if update.states.get(name):
        return update.states[name]
    if issubclass(update.kind, torch.optim.SGD):
        return {}
    fresh = _stepped(update, {name: weight}, {name: np.zeros(weight.shape)}, {name: {}})[1][name]
    numbers = {"step": torch.tensor(0.0), "mu_product": torch.tensor(1.0)}
    return {k: numbers[k] if k in numbers else torch.zeros_like(v) for k, v in fresh.items()}


def _shifted(states, off, signs):
    """States whose tensors are off, each to the side that its key has."""
    return {
        n: {
            k: v if k not in off[n] else _squares(k, v.double() + signs[k] * off[n][k])
            for k, v in state.items()
        }
        for n, state in states.items()
    }


def _squares(key, value):
    return value.clamp(min=0) if "sq" in key or key in ("sum", "square_avg") else value


def _stepped(update, start, gradients, states):
    """Takes a step in float64, tensor by tensor: motions and states {name: ...} after it."""
    weights = {n: nn.Parameter(start[n].double().clone()) for n in gradients}
    groups = [
        {**settings, "params": [weights[n] for n in names if n in weights]}
        for settings, names in update.groups
    ]
    ways = {"foreach": False, "fused": False, "capturable": False}
    for group in groups:
        group.update({k: v for k, v in ways.items() if k in group})
    optimizer = update.kind(groups, lr=1.0)
    for name, state in states.items():
        optimizer.state[weights[name]] = {
            k: v.detach().clone().to(torch.float64 if v.shape == start[name].shape else v.dtype)
            if torch.is_tensor(v)
            else v
            for k, v in state.items()
        }
    for name, gradient in gradients.items():
        weights[name].grad = torch.from_numpy(np.array(gradient, float))
    optimizer.step()
    motions = {n: (w.detach() - start[n].double()).numpy() for n, w in weights.items()}
    return motions, {n: optimizer.state[w] for n, w in weights.items()}


def _between(ends, s):
    return {n: start + s * (stop - start) for n, (start, stop) in ends.items()}


def groups_of(module, by):
    """Says into which group every element of every parameter belongs: {name: array of names}."""
    modules = dict(module.named_modules())
    groups = {}
    for name, parameter in module.named_parameters():
        path, _, leaf = name.rpartition(".")
        layer = path.split(".parametrizations.")[0]
        label = np.empty(parameter.shape, object)
        attention = modules[path if leaf.startswith("in_proj") else path.rpartition(".")[0]]
        if callable(by):
            label[...] = by(name, parameter)
        elif by == "parameter":
            label[...] = name
        elif by.startswith("module:"):
            label[...] = ".".join(layer.split(".")[: int(by[7:])])
        elif by == "head" and isinstance(attention, nn.MultiheadAttention) and leaf != "bias":
            where = path.removesuffix(".out_proj")
            width = attention.embed_dim // attention.num_heads
            for place in np.ndindex(label.shape):
                i = place[-1] if path.endswith("out_proj") else place[0]
                role = "out" if path.endswith("out_proj") else "qkv"[i // attention.embed_dim]
                label[place] = f"{where}/{role}/head {i % attention.embed_dim // width}"
        elif by in ("layer", "head"):
            label[...] = layer
        else:
            owner = modules[layer]
            stem = layer
            if isinstance(owner, nn.RNNBase):
                stem += "." + leaf.removeprefix("weight_").removeprefix("bias_")[3:]
            axis = 1 if isinstance(owner, nn.ConvTranspose2d) and leaf == "weight" else 0
            for i in range(parameter.shape[axis] if parameter.dim() else 1):
                label[(slice(None),) * axis + (i,)] = f"{stem}/{i}"
        groups[name] = label
    return groups


def sum_of_groups(groups, arrays):
    """Adds up arrays of numbers by group: {group: sum}."""
    sums = {}
    for name, labels in groups.items():
        for label in np.unique(labels.astype(str)):
            here = arrays[name][labels == label].sum(dtype=np.float64)
            sums[label] = sums.get(label, 0.0) + here
    return sums
