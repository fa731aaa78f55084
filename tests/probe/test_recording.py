"""A recording against the code that it was made of: run by hand, without probe and fence."""

import copy
import random
import re
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from support.assertions import assert_ledger_closes, assert_same
from support.drawn_trainings import case as drawn_case
from support.harmless import Case, twins
from support.marks import matrix
from support.models import ByFunction, Classifier, Gan, mlp, pl, toy_loader
from support.training import fit
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils import parametrizations, rnn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_lca.measure.allocation import Segment
from lightning_lca.measure.parameters import live_weights
from lightning_lca.probe.probe import Probe
from lightning_lca.probe.recording import NotRecordableError, Recorder

MixedPrecision = pl.plugins.MixedPrecision
SEED = 5
HALF = (torch.float16, torch.bfloat16)

# -- recorded, and by hand ------------------------------------------------------------------------


class Compare(pl.Callback):
    """Records the loss in the first batch, and compares it with the user's code far from there.

    Attributes:
        probe: What was recorded.
        pairs: Loss and gradients of the recording, and of the code run by hand, twice.
    """

    def __init__(self, mode="no_dropout", loss_fn=None, batches=None):
        self.mode, self.loss_fn, self.batches = mode, loss_fn, batches
        self.pairs = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        live, generator = live_weights(module), torch.Generator().manual_seed(SEED)
        batches = self.batches or {0: batch}
        self.probe = Probe(trainer, module, mode=self.mode, loss_fn=self.loss_fn, seed=SEED)
        before = copied(live)
        near = displaced(before, generator, 0.01)
        self.probe.prepare(batches, Segment(near, copied(live)), moved=self.batches is None)
        for _ in range(2):
            move(live, displaced(before, generator, 0.3))
            segment = Segment(displaced(before, generator, 0.3), copied(live))
            for s in (0.0, 0.37, 1.0):
                got = self.probe(segment.at(s))
                with by_hand(trainer, module):
                    there = Segment(segment.start, copied(live)).at(s)
                    first, again = (self.evaluate(trainer, module, batches, there) for _ in "ab")
                self.pairs.append(([got.loss, *got.gradient.values()], first, again))
        move(live, before)

    def evaluate(self, trainer, module, batches, there):
        live = live_weights(module)
        held = copied(dict(module.named_buffers()))
        samples = {j: len(first_tensor(batch)) for j, batch in batches.items()}
        scale = self.probe._scale.value if self.probe._scale else 1.0
        loss, sums = 0.0, [0.0] * len(live)
        for j, batch in batches.items():
            share = samples[j] / sum(samples.values())
            there.write(live)
            move(dict(module.named_buffers()), held)
            module.zero_grad()
            torch.manual_seed(SEED + j)
            np.random.seed(SEED + j)
            random.seed(SEED + j)
            for own in getattr(module, "generators", ()):
                own.manual_seed(SEED + j)
            rest(module, self.mode)
            step = self.loss_fn or (lambda m, b, j=j: m.training_step(b, j))
            with trainer.precision_plugin.train_step_context(), uncompiled(module):
                part = step(module, trainer.precision_plugin.convert_input(copy.deepcopy(batch)))
            part = sum(part.values()) if isinstance(part, dict) else part
            ((part.float() if part.dtype in HALF else part) * share * scale).backward()
            loss += part.detach().double() * share
            gradients = [torch.zeros_like(w) if w.grad is None else w.grad for w in live.values()]
            sums = [s + numbers(g) / scale for s, g in zip(sums, gradients)]
        return [loss, *sums]


@contextmanager
def by_hand(trainer, module):
    """Puts back what running the user's code by hand changes in the cases of this file."""
    live, parameters = live_weights(module), list(module.parameters())
    weights, gradients = copied(live), [p.grad for p in parameters]
    held = copied(dict(module.named_buffers()))
    flags = {
        m: {k: v for k, v in vars(m).items() if k in ("training", "dropout")}
        for m in module.modules()
    }
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    yield
    torch.set_rng_state(states[0])
    np.random.set_state(states[1])
    random.setstate(states[2])
    for m, known in flags.items():
        vars(m).update(known)
    move(live, weights)
    move(dict(module.named_buffers()), held)
    for parameter, gradient in zip(parameters, gradients):
        parameter.grad = gradient


def rest(module, mode):
    """Puts dropout to rest as the mode says, where torch's own layers have it."""
    if mode == "eval":
        module.eval()
    for m in module.modules() if mode == "no_dropout" else ():
        if isinstance(m, nn.modules.dropout._DropoutNd):
            m.training = False
        elif isinstance(m, nn.RNNBase | nn.MultiheadAttention):
            m.dropout = 0.0


def uncompiled(module):
    compiled = any(hasattr(m, "_orig_mod") for m in module.modules())
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


def numbers(gradient):
    gradient = gradient if gradient.layout == torch.strided else gradient.to_dense()
    return gradient.float() if gradient.dtype in HALF else gradient


def first_tensor(batch):
    while not isinstance(batch, torch.Tensor):
        batch = next(iter(batch.values() if isinstance(batch, dict) else batch))
    return batch


def copied(tensors):
    return {name: t.detach().clone() for name, t in tensors.items()}


def displaced(weights, generator, by):
    drawn = {
        n: torch.randn(w.shape, generator=generator, dtype=w.dtype) for n, w in weights.items()
    }
    return {name: w + by * drawn[name] for name, w in weights.items()}


@torch.no_grad()
def move(live, to):
    for name, tensor in live.items():
        tensor.data.copy_(to[name])


def compared(path, model, data=toy_loader, trainer=None, **options):
    """Trains a batch, and gives what was seen of the recording then."""
    compare = Compare(**options)
    fit(path, compare, model=model, data=data, measured=False, steps=1, trainer=trainer)
    return compare


def assert_the_same(compare):
    """Loss and gradients are those by hand, no further apart than two runs of the same kernels."""
    assert len({pair[0][0].item() for pair in compare.pairs}) == 6, "weights do not move the loss"
    for recorded, eager, again in compare.pairs:
        for a, b, c in zip(recorded, eager, again, strict=True):
            noise = (b - c).abs().max()
            assert (a - b).abs().max() <= noise, (a, b, noise)


# -- random networks ------------------------------------------------------------------------------

SEEDS = {f"seed{i}x": i for i in range(60)}


@pytest.mark.parametrize("seed", matrix(SEEDS, list(SEEDS)[:8]))
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # Once in a process, by Adagrad.
def test_a_random_network_recorded_is_the_network(tmp_path, seed):
    drawn = drawn_case(seed)
    compare = compared(
        tmp_path,
        drawn["model"],
        DataLoader(TensorDataset(*drawn["data"]), batch_size=8),
        {"precision": drawn["trainer"]["precision"]},
        mode=drawn["lca"]["probe_mode"],
        batches=dict(enumerate(drawn["lca"]["probe"])),
    )
    assert compare.probe.way == "recorded"
    assert_the_same(compare)


# -- set-ups --------------------------------------------------------------------------------------


def net(forward, **modules):
    """Makes what makes a classifier whose network is a function of itself and x."""
    return lambda: Classifier(ByFunction(forward, **{n: make() for n, make in modules.items()}))


def linear(features=12, classes=4):
    return lambda: nn.Linear(features, classes)


def through(*layers):
    """Makes what makes a classifier of layers, with a linear one before and after."""

    def make():
        made = [layer() for layer in layers]
        return Classifier(nn.Sequential(nn.Linear(12, 12), *made, nn.Linear(12, 4)))

    return make


def loss(function, **modules):
    """Makes what makes a classifier whose loss is a function of itself, x and y."""

    class WithLoss(Classifier):
        def __init__(self):
            super().__init__()
            for name, make in modules.items():
                value = make()
                if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
                    self.register_buffer(name, value)
                else:
                    setattr(self, name, value)

        def training_step(self, batch, batch_idx):
            return function(self, *batch)

    return WithLoss


def entropy(m, x, y):
    return F.cross_entropy(m.net(x), y)


def tied():
    made = ByFunction(
        lambda m, x: m.c(m.b(m.a(x).tanh())), a=linear(12, 12)(), b=linear(12, 12)(), c=mlp()
    )
    made.b.weight = made.a.weight
    return Classifier(made)


def packed(m, x):
    words = rnn.pack_padded_sequence(x.view(-1, 4, 3), [4] * 3 + [2] * (len(x) - 3), True)
    out, _ = rnn.pad_packed_sequence(m.body(words)[0], True)
    return m.head(out.sum(1))


def checkpointed(reentrant):
    return lambda m, x: m.last(checkpoint(m.body, m.first(x), use_reentrant=reentrant))


def recurrent(kind, **options):
    hidden = options.pop("hidden", 8)
    body = lambda: getattr(nn, kind)(3, hidden, 2, batch_first=True, dropout=0.3, **options)  # noqa: E731
    width = 16 if options.get("bidirectional") else 8
    return {"body": body, "head": linear(width)}


def last_of(m, x):
    return m.head(m.body(x.view(-1, 4, 3))[0].sum(1))


def translate(m, x):
    x = x.view(-1, 3, 4)
    return m.head(m.body(x, x, tgt_is_causal=True, tgt_mask=MASK).flatten(1))


def attends(m, x):
    x = x.view(-1, 3, 4)
    found, weights = m.body(x, x, x, attn_mask=MASK)
    return m.head((found + weights @ x).flatten(1))


def ctc(m, x, y):
    spoken = m.net(x).log_softmax(-1).view(len(x) // 4, 4, 4).transpose(0, 1)
    words = 1 + y[: len(x) // 4].remainder(3).view(-1, 1)
    return F.ctc_loss(spoken, words, torch.full((len(words),), 4), torch.ones(len(words)).long())


class Scaled(torch.autograd.Function):
    """Has a backward of its own that is not that of its forward."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sign() * x.abs().sqrt()

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient / (0.1 + x.abs())


def own_backward(m, x, y):
    return F.cross_entropy(Scaled.apply(m.net(x)), y)


def penalized(m, x, y):
    x = x.clone().requires_grad_()
    logits = m.net(x)
    (gradient,) = torch.autograd.grad(logits.square().sum(), x, create_graph=True)
    return F.cross_entropy(logits, y) + 0.1 * gradient.square().mean()


def adversarial(m, x, y):
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(entropy(m, x, y), x)
    return entropy(m, (x + 0.1 * gradient.sign()).detach(), y)


def variational(m, x, y):
    mean, width = m.net(x).chunk(2, 1)
    drawn = mean + width.exp() * torch.randn_like(width)
    return F.mse_loss(drawn, x[:, :2]) + 0.1 * (mean.square() + width.exp() - width).mean()


def noisy(m, x, y):
    own = torch.randn(x.shape, generator=m.generators[0]) + np.random.normal() + random.random()
    return entropy(m, x + 0.1 * own + 0.1 * torch.rand(1), y)


def quantizes(m, x, y):
    h = m.net[:3](x)
    nearest = torch.cdist(h, m.code).argmin(1)
    with torch.no_grad():
        members = F.one_hot(nearest, 8).to(h.dtype)
        m.code.mul_(0.9).add_(members.T @ h / (members.sum(0)[:, None] + 1), alpha=0.1)
    chosen = m.code[nearest]
    straight = h + (chosen - h).detach()
    return F.cross_entropy(m.net[3:](straight), y) + 0.25 * F.mse_loss(h, chosen)


def masked(m, x, y):
    each = F.cross_entropy(m.net(x), y, reduction="none")
    return torch.where(each > each.mean(), each, 0.1 * each).mean() + each.topk(3).values.mean()


def sorts(m, x, y):
    each = F.cross_entropy(m.net(x), y, reduction="none").sort(descending=True)
    scattered = torch.zeros_like(each.values).scatter_add(0, each.indices % 4, each.values)
    return scattered.cumsum(0).square().mean() + each.values.unfold(0, 3, 2).sum(1).square().sum()


def writes_in_place(m, x, y):
    h = m.net[0](x)
    h[:, :4] = h[:, 4:8].tanh()
    h[y == 0] *= 2
    h.t_().mul_(0.5).t_()
    scale = h.detach().clone()
    torch._foreach_mul_([scale, scale[:1]], 0.5)
    h = h * (1 + scale)
    return F.cross_entropy(m.net[1:](F.relu(h, inplace=True)), y)


def reads_numbers(m, x, y):
    """Does with numbers of data and weights what most do: weigh by some, log others."""
    weight = (
        1 + 0.1 * x.mean().item() + 0.1 * len(y.unique()) + 0.1 * float(y.float().numpy().sum())
    )
    value = weight * entropy(m, x[x[:, 0] > -1], y[x[:, 0] > -1])
    m.log("value", float(value.detach()))
    m.notes.append(value.item())
    return value


def solves(m, x, y):
    square = m.net[2].weight @ m.net[2].weight.T + torch.eye(16)
    values = (
        torch.linalg.eigvalsh(square).log().mean()
        + torch.linalg.solve(square, x.new_ones(16)).sum()
    )
    return entropy(m, x, y) + 0.01 * values


def waves(m, x):
    return m.head(torch.fft.irfft(torch.fft.rfft(x) * torch.complex(*m.filter().chunk(2)), n=12))


def per_sample(m, x, y):
    parts = torch.func.vmap(lambda one, k: F.cross_entropy(m.net(one[None]), k[None]))(x, y)
    return parts.square().mean()


def encoder():
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, 0.3, batch_first=True), 2)


class Free(nn.Module):
    """Holds weights of no layer."""

    def __init__(self):
        super().__init__()
        self.weights = nn.Parameter(torch.randn(14))

    def forward(self):
        return self.weights


def images(m, x, y):
    x = F.grid_sample(x.view(-1, 3, 2, 2), m.grid.expand(len(x), -1, -1, -1), align_corners=False)
    return F.cross_entropy(m.body(x).flatten(1), y)


def convolutional():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.MaxPool2d(2),
        nn.PReLU(),
        nn.Upsample(scale_factor=2, mode="bilinear"),
        nn.ConvTranspose2d(8, 4, 2, groups=2),
        nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
        nn.AdaptiveAvgPool2d(1),
    )


def frozen():
    made = Classifier()
    made.net[0].requires_grad_(False)
    return made


def teacher(m, x, y):
    with torch.no_grad():
        for theirs, ours in zip(m.teacher.parameters(), m.net.parameters()):
            theirs.lerp_(ours, 0.1)
        wanted = m.teacher(x).softmax(-1)
    return F.cross_entropy(m.net(x), wanted)


def words(**options):
    """Makes a module that looks its input up."""
    return lambda: nn.Embedding(10, 12, **options)


def looked_up(m, x):
    return m.head(m.words((3 * x).long().clamp(-5, 4) + 5).mean(1))


def bagged(m, x):
    return m.head(m.words((3 * x).long().clamp(-5, 4) + 5))


class ByHand(Gan):
    """Optimizes by hand; its loss is one of its own."""

    def training_step(self, batch, batch_idx):
        super().training_step(batch, batch_idx)


def terms(m, batch):
    return {"a": entropy(m, *batch), "b": 0.01 * sum(p.square().sum() for p in m.parameters())}


def both_losses(m, batch):
    return {"generator": m.generator_loss(batch[0]), "critic": m.critic_loss(batch[0])}


MASK = torch.ones(3, 3).tril().log()
BATCHES = dict(enumerate(toy_loader(batch_size=10, samples=24, shuffle=False)))
DROPPING = lambda: nn.Sequential(nn.Linear(12, 12), nn.Dropout(0.3), nn.Tanh())  # noqa: E731
DROPOUT = through(lambda: nn.Dropout(0.3), nn.Tanh, lambda: nn.AlphaDropout(0.2))


def precise(precision, dtype=torch.float32):
    data = lambda: toy_loader(dtype=dtype)  # noqa: E731
    trainer = {"precision": precision}
    if precision == "16-mixed":  # By itself Lightning turns to bfloat16 on a CPU.
        trainer = {"plugins": MixedPrecision(precision, "cpu")}
    return through(nn.Tanh, lambda: nn.LayerNorm(12)), {"trainer": trainer, "data": data}


SETUPS = {
    **{p: precise(p) for p in ("32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true")},
    "64-true": precise("64-true", torch.float64),
    "compiled": (lambda: Classifier(torch.compile(mlp(), backend="eager")), {}),
    "several batches": (Classifier, {"batches": BATCHES}),
    "mode eval": (through(lambda: nn.BatchNorm1d(12), lambda: nn.Dropout(0.3)), {"mode": "eval"}),
    "dropout": (DROPOUT, {"mode": "train", "batches": BATCHES}),
    "dropout at rest": (DROPOUT, {}),
    "batch statistics": (through(lambda: nn.BatchNorm1d(12), nn.Tanh), {"batches": BATCHES}),
    "batch statistics without a mean over time": (
        through(lambda: nn.BatchNorm1d(12, track_running_stats=False)),
        {},
    ),
    "weight norm": (through(lambda: parametrizations.weight_norm(linear(12, 12)())), {}),
    "spectral norm": (through(lambda: parametrizations.spectral_norm(linear(12, 12)())), {}),
    "orthogonal": (through(lambda: parametrizations.orthogonal(linear(12, 12)())), {}),
    "the old spectral norm": (through(lambda: nn.utils.spectral_norm(linear(12, 12)())), {}),
    "tied": (tied, {}),
    "frozen": (frozen, {}),
    "reentrant checkpointing": (
        net(checkpointed(True), first=linear(12, 12), body=DROPPING, last=linear()),
        {},
    ),
    "checkpointing": (
        net(checkpointed(False), first=linear(12, 12), body=DROPPING, last=linear()),
        {},
    ),
    "LSTM": (net(last_of, **recurrent("LSTM")), {"mode": "train"}),
    "LSTM at rest": (net(last_of, **recurrent("LSTM", bidirectional=True)), {}),
    "LSTM with projections": (net(last_of, **recurrent("LSTM", proj_size=8, hidden=9)), {}),
    "GRU": (net(last_of, **recurrent("GRU")), {"batches": BATCHES}),
    "RNN": (net(last_of, **recurrent("RNN")), {"mode": "eval"}),
    "packed sequences": (net(packed, **recurrent("LSTM")), {}),
    "packed sequences of a GRU": (net(packed, **recurrent("GRU")), {}),
    "an encoder": (
        net(lambda m, x: m.head(m.body(x.view(-1, 3, 4)).flatten(1)), body=encoder, head=linear()),
        {"mode": "train"},
    ),
    "encoder and decoder": (
        net(
            translate,
            body=lambda: nn.Transformer(4, 2, 1, 1, 8, 0.3, batch_first=True),
            head=linear(),
        ),
        {},
    ),
    "attention": (
        net(
            attends, body=lambda: nn.MultiheadAttention(4, 2, 0.3, batch_first=True), head=linear()
        ),
        {"mode": "train"},
    ),
    "embedding": (net(looked_up, words=words(padding_idx=0), head=linear()), {}),
    "sparse embedding": (net(looked_up, words=words(sparse=True), head=linear()), {}),
    "counted embedding": (net(looked_up, words=words(scale_grad_by_freq=True), head=linear()), {}),
    "bags": (net(bagged, words=lambda: nn.EmbeddingBag(10, 12), head=linear()), {}),
    "sparse bags": (
        net(bagged, words=lambda: nn.EmbeddingBag(10, 12, sparse=True), head=linear()),
        {},
    ),
    "images": (loss(images, body=convolutional, grid=lambda: torch.rand(1, 6, 6, 2) - 0.5), {}),
    "waves": (net(waves, head=linear(), filter=Free), {}),
    "CTC": (loss(ctc), {"data": lambda: toy_loader(batch_size=16)}),
    "a backward of one's own": (loss(own_backward), {}),
    "a gradient penalty": (loss(penalized), {}),
    "an attack on the input": (loss(adversarial), {}),
    "noise from the global stream": (loss(variational), {"batches": BATCHES}),
    "noise from every stream": (
        loss(noisy, generators=lambda: [torch.Generator().manual_seed(3)]),
        {"batches": BATCHES},
    ),
    "a codebook": (loss(quantizes, code=lambda: torch.randn(8, 16)), {}),
    "masks and the largest": (loss(masked), {}),
    "sorting": (loss(sorts), {}),
    "writing in place": (loss(writes_in_place), {}),
    "numbers": (loss(reads_numbers, notes=list), {}),
    "linear algebra": (loss(solves), {}),
    "sample by sample": (loss(per_sample), {}),
    "a teacher": (loss(teacher, teacher=lambda: mlp().requires_grad_(False)), {}),
    "terms": (Classifier, {"loss_fn": terms, "batches": BATCHES}),
    "optimization by hand": (ByHand, {"loss_fn": both_losses}),
}


TYPICAL = ["bf16-mixed", "16-mixed", "64-true", "several batches", "dropout", "batch statistics"]
TYPICAL += ["spectral norm", "tied", "checkpointing", "LSTM", "packed sequences", "an encoder"]
TYPICAL += ["sparse embedding", "CTC", "a gradient penalty", "noise from every stream"]
TYPICAL += ["a codebook", "writing in place", "numbers", "terms", "optimization by hand"]


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize(("model", "options"), matrix(SETUPS, TYPICAL))
def test_a_recording_is_the_loss_also_far_from_where_it_was_made(tmp_path, model, options):
    compare = compared(tmp_path, model, **options)
    assert compare.probe.way == "recorded"
    assert_the_same(compare)


# -- what is not recorded -------------------------------------------------------------------------


class ByNumpy(torch.autograd.Function):
    """Computes where torch does not see it."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.from_numpy(np.tanh(x.detach().numpy()))

    @staticmethod
    def backward(ctx, gradient):
        return gradient * (1 - ctx.saved_tensors[0].tanh().square())


def each_of(m, x, y):
    return F.cross_entropy(m.net(x), y, reduction="none")


def shrinks(m, x, y):
    with torch.no_grad():
        m.net[0].weight.mul_(0.95)
    return entropy(m, x, y)


def resizes(m, x, y):
    return entropy(m, x, y) + torch.zeros(4).resize_(2).sum()


def jagged(m, x, y):
    x = torch.nested.nested_tensor_from_jagged(x, torch.tensor([0, 4, len(x)]))
    return F.cross_entropy(m.net(x).values(), y)


def reaches_numbers(m, x, y):
    return entropy(m, x, y) + torch.from_numpy(m.net[2].weight.detach().numpy()[:4]).mean()


def renormed(m, x):
    return m.words((3 * x).long().clamp(-5, 4) + 5).mean(1)


SHAPE = r"a shape follows from the weights \(aten\."
ANOTHER = "the recorded operations give another loss or gradient than its code"
WRITES = "it writes to trained weights"
NOT_RECORDED = {
    "a boolean index": (lambda m, x, y: each_of(m, x, y)[each_of(m, x, y) > 1].sum(), SHAPE),
    "masked_select": (
        lambda m, x, y: (e := each_of(m, x, y)).masked_select(e > e.mean()).mean(),
        SHAPE,
    ),
    "nonzero": (lambda m, x, y: (e := each_of(m, x, y))[(e > 1).nonzero()[:, 0]].sum(), SHAPE),
    "unique": (lambda m, x, y: entropy(m, x, y) * len(m.net(x).argmax(1).unique()), SHAPE),
    "writing to weights": (shrinks, WRITES),
    "an embedding that renormalises itself": (
        net(renormed, words=lambda: nn.Embedding(10, 4, max_norm=0.5)),
        WRITES,
    ),
    "resize_": (resizes, r"it calls aten\.resize_"),
    "nested tensors": (jagged, "it computes with a NestedTensor"),
    "the numbers of weights": (reaches_numbers, ANOTHER),
    "numpy": (lambda m, x, y: F.cross_entropy(ByNumpy.apply(m.net(x)), y), ANOTHER),
    "dropout in what is recomputed": (
        net(checkpointed(False), first=linear(12, 12), body=DROPPING, last=linear()),
        ANOTHER,
    ),
    "dropout in what is recomputed by reentrant checkpointing": (
        net(checkpointed(True), first=linear(12, 12), body=DROPPING, last=linear()),
        ANOTHER,
    ),
}


@pytest.mark.parametrize(("model", "why"), NOT_RECORDED.values(), ids=NOT_RECORDED)
def test_what_would_be_another_function_runs_by_the_users_code_and_says_why(tmp_path, model, why):
    model = loss(model) if model.__code__.co_argcount == 3 else model
    compare = compared(tmp_path, model, mode="train")
    assert re.search(why, compare.probe.why_not)
    assert (
        compare.probe.way
        == f"by the user's code, since it cannot be recorded: {compare.probe.why_not}"
    )
    assert_the_same(compare)


# -- single operations ----------------------------------------------------------------------------

W = torch.linspace(-1, 1, 12).reshape(3, 4)
X = torch.linspace(0, 2, 20).reshape(5, 4)


def record(function, weight=W, live=()):
    """Records a function of one weight."""
    weight = weight.clone().requires_grad_()
    with Recorder([weight], live) as recorder:
        value = function(weight)
        gradients = torch.autograd.grad(value, weight)
    return recorder.finish(value, gradients)


def eager(function, weight):
    weight = weight.clone().requires_grad_()
    value = function(weight)
    return value, *torch.autograd.grad(value, weight)


def assert_equal(function, recording, seeds=range(4)):
    """A recording gives what the function does, to the bit, at random weights."""
    for seed in seeds:
        weight = torch.randn(W.shape, generator=torch.Generator().manual_seed(seed))
        torch.manual_seed(seed)
        loss, (gradient,) = recording([weight])
        after = torch.get_rng_state()
        torch.manual_seed(seed)
        wanted = eager(function, weight)
        assert torch.equal(torch.get_rng_state(), after)
        assert torch.equal(loss, wanted[0])
        assert torch.equal(gradient, wanted[1])


class Subclass(torch.Tensor):
    """Sees every operation itself."""

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype)

    def __init__(self, held):
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args = [a.held if isinstance(a, cls) else a for a in args]
        return func(*args, **(kwargs or {}))


@contextmanager
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def gathers(w):
    value = (X @ w.T).square().mean()
    dist.all_reduce(value.detach().clone())
    return value


def sets(w):
    return (X @ w.T).square().mean() + torch.empty(0).set_(X[0].clone()).sum()


def test_what_is_out_of_sight_or_of_another_kind_is_refused():
    held, given, w = Subclass(X), X.clone(), W.clone().requires_grad_()
    view, value = w.data[:2], w.square().sum()
    with one_process(), pytest.raises(NotRecordableError, match="it talks to other processes"):
        record(gathers)
    with pytest.raises(NotRecordableError, match="it computes with a Subclass"):
        record(lambda w: (held @ w.T).square().mean())
    with pytest.raises(NotRecordableError, match=r"it calls aten\.set_"):
        record(sets)
    with pytest.raises(NotRecordableError, match=r"it calls aten\.t_.* on what it was given"):
        record(lambda w: (given.t_() * w[:1].T).square().mean())
    with Recorder([w]) as recorder:
        other = w.sum() + view.sum()
    with pytest.raises(NotRecordableError, match="its own numbers by a way that is out of sight"):
        recorder.finish(other, [w])
    with Recorder([w]) as recorder:
        pass
    with pytest.raises(NotRecordableError, match="was computed out of sight"):
        recorder.finish(value, [w])
    for weight in (Subclass(W), W.to_sparse()):
        with pytest.raises(NotRecordableError, match=f"a weight is a {type(weight).__name__}"):
            Recorder([weight])


def test_random_numbers_are_those_of_the_stream_and_of_generators_as_they_were():
    dropout = nn.Dropout(0.4)

    def function(w):
        torch.randn(7)  # Nobody needs it, but the stream moves.
        return (dropout(X) @ w.T + torch.randn(3)).square().mean()

    recording = record(function)
    assert recording.is_random
    assert_equal(function, recording)
    assert recording([W])[0] != recording([W])[0], "drawn anew each time"

    own = torch.Generator().manual_seed(2)
    held = own.get_state()
    recording = record(lambda w: (w + torch.randn(w.shape, generator=own)).square().mean())
    own.set_state(held)
    wanted = eager(lambda w: (w + torch.randn(w.shape, generator=own)).square().mean(), 2 * W)
    after = own.manual_seed(9).get_state()
    for _ in range(2):
        value, (gradient,) = recording([2 * W])
        assert torch.equal(value, wanted[0])
        assert torch.equal(gradient, wanted[1])
    assert torch.equal(own.get_state(), after), "its owner's stream goes on as if nothing had been"


def test_live_tensors_are_read_as_they_are_and_others_as_they_were():
    live, other = X.clone(), X.clone()
    recording = record(lambda w: (live @ w.T).tanh().mean() + (w * other[:3]).sum(), live=[live])
    assert [t is live for t in recording.live] == [True]
    live.mul_(1.5)
    other.mul_(2)
    assert_equal(lambda w: (live @ w.T).tanh().mean() + (w * X[:3]).sum(), recording)


@pytest.mark.parametrize("through", [lambda t: t, lambda t: t[:], lambda t: t.view(-1)[2:]])
def test_what_is_written_to_is_the_same_each_time_and_the_users_stays_as_it_is(through):
    """Before it is read, after it is read, and of a part of it alone."""
    first, then = torch.ones(5, 4), torch.ones(5, 4)

    def function(w):
        through(first).mul_(0.5)
        value = ((X + first * then) @ w.T).square().mean()
        through(then).add_(1)
        return value

    recording = record(function)
    there = first.clone(), then.clone()
    first.fill_(1)
    then.fill_(1)
    loss, gradient = eager(function, 2 * W)
    for moved in (0, 1, 2):
        first.copy_(there[0] + moved)
        then.copy_(there[1] + moved)
        recorded, (slope,) = recording([2 * W])
        assert torch.equal(recorded, loss)
        assert torch.equal(slope, gradient)
        assert torch.equal(first, there[0] + moved)
        assert torch.equal(then, there[1] + moved)


def test_running_statistics_stay_as_they_are_and_move_no_recorded_loss():
    norm = nn.BatchNorm1d(3)
    function = lambda w: norm(X @ w.T).tanh().square().mean()  # noqa: E731
    recording = record(function, live=norm.buffers())
    held = copied(dict(norm.named_buffers()))
    assert recording.live == []
    first = recording([2 * W])[0]
    assert all(torch.equal(b, held[n]) for n, b in norm.named_buffers())
    norm.running_mean += 5
    assert torch.equal(recording([2 * W])[0], first)
    assert_equal(function, recording)

    norm.eval()
    recording = record(function, live=norm.buffers())
    assert len(recording.live) == 2
    assert_equal(function, recording)
    norm.running_mean -= 2
    norm.running_var *= 3
    assert_equal(function, recording)


NUMBERS = {
    "item": lambda t: t.sum().item(),
    "if": lambda t: 2 if t[0, 0] > 0 else 1,
    "equal": lambda t: 2 if torch.equal(t, -t) else 1,
    "allclose": lambda t: 2 if torch.allclose(t, -t) else 1,
    "an index": lambda t: [3, 2, 1, 0][t.sum(0).argmax()],
    "tolist": lambda t: t.detach().tolist()[0][0],
    "numpy": lambda t: float(np.mean(np.asarray(t.detach()))),
}


@pytest.mark.parametrize("read", NUMBERS.values(), ids=NUMBERS)
def test_numbers_are_fixed_and_it_is_known_where_they_may_change(read):
    recording = record(lambda w: w.square().sum() * (number := read(w)) + 0 * number)
    assert recording.reads_numbers
    live = X[:3].clone()
    assert record(lambda w: w.square().sum() * read(live), live=[live]).reads_numbers
    assert not record(lambda w: w.square().sum() * read(X[:3])).reads_numbers
    fixed = read(W)
    assert_equal(lambda w: w.square().sum() * fixed + 0 * fixed, recording)


def test_a_twin_of_what_is_turned_in_place_keeps_its_shape():
    def function(w):
        h = X @ w.T
        twin = h.detach()
        h.t_()
        return (twin @ (2 * h)).tanh().mean()

    assert_equal(function, record(function))


class Alive(TorchDispatchMode):
    """Notes the largest number of bytes that results had at one time."""

    def __init__(self):
        super().__init__()
        self.memories, self.most = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.memories[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.memories = {k: v for k, v in self.memories.items() if not v[0].expired()}
        self.most = max(self.most, sum(size for _, size in self.memories.values()))
        return result


@pytest.mark.parametrize("depth", [10, 40])
def test_results_are_let_go_of_after_their_last_use(depth):
    def function(w):
        x = X.repeat(50, 1)
        with torch.no_grad():
            for _ in range(depth):
                x = (x @ w.T @ w).tanh()
        for _ in range(depth // 5):
            x = (x @ w.T @ w).tanh()
        return x.square().mean()

    recording, weight = record(function), W.clone().requires_grad_()
    with Alive() as by_recording:
        recording([weight.detach()])
    with Alive() as by_code:
        torch.autograd.grad(function(weight), weight)
    assert by_recording.most <= by_code.most


# -- recordings that come to be wrong -------------------------------------------------------------


class Turns(Classifier):
    """Its loss is another function from some step on."""

    def __init__(self):
        super().__init__()
        self.center = torch.ones(4)

    def factor(self):
        return 1.0

    def training_step(self, batch, batch_idx):
        return self.factor() * super().training_step(batch, batch_idx)


class ByEpoch(Turns):
    def factor(self):
        return 1 + 0.3 * self.current_epoch


class ByStep(Turns):
    def factor(self):
        return 1 + (self.global_step >= 30)


class ByNumberOfWeights(Turns):
    """Takes a branch that flips as the weights grow."""

    def factor(self):
        return 2 if self.net[0].weight.square().sum().item() > 6.5 else 1


class ByShape(Turns):
    """Takes a mean over so many parts as the weights say."""

    def factor(self):
        parts = 1 + int(self.net[0].weight.square().sum() > 6.5)
        return torch.ones(6).view(parts, -1).sum(0).mean()


class ByTensor(Turns):
    """Reads a tensor that is no buffer, and is written to at the end of an epoch."""

    def factor(self):
        return self.center.mean()

    def on_train_epoch_end(self):
        self.center.add_(0.3)


# The model, batches per epoch, steps with a drift if they are known, and what the loss grows by.
TURNS = {
    "the epoch": (ByEpoch, 6, [6, 12, 18], [1.3, 1.6 / 1.3, 1.9 / 1.6]),
    "the step": (ByStep, 60, [49], [2.0]),
    "a branch": (ByNumberOfWeights, 60, None, [2.0]),
    "a shape": (ByShape, 60, None, [2.0]),
    "a tensor": (ByTensor, 6, [6, 12, 18], [1.3, 1.6 / 1.3, 1.9 / 1.6]),
}


@pytest.mark.parametrize(("model", "batches", "steps", "factors"), matrix(TURNS, ["the epoch"]))
def test_a_loss_that_turns_into_another_is_drift_and_is_recorded_anew(
    tmp_path, capsys, model, batches, steps, factors
):
    data = lambda: (toy_loader(samples=16 * batches),)  # noqa: E731
    steps_in_all = min(4 * batches, 60) - 1
    case = Case(model, data, trainer={"max_steps": steps_in_all}, lca={"probe_batches": 1})
    with pytest.warns(UserWarning, match="It is recorded anew") as seen:
        plain, measured, lca = twins(case, tmp_path, capsys)
    assert_same(plain, measured)
    assert sum("LCA" in str(w.message) for w in seen) == 1
    history = lca.history
    assert history.settings["evaluated"] == "recorded"
    drifts = np.flatnonzero(history.drift)
    assert drifts.tolist() == (drifts.tolist()[:1] if steps is None else steps)
    grown = history.loss_before[drifts] / history.loss_after[drifts - 1]
    assert grown == pytest.approx(factors, rel=1e-6)
    assert np.abs(history.residual).sum() < 0.02 * np.abs(history.allocated).sum()
    assert_ledger_closes(history, 1e-6)


class EveryTime(Turns):
    def factor(self):
        return 1 + 0.05 * self.global_step


class Centered(Turns):
    """Moves a tensor that is no buffer as it goes, after it was read."""

    def factor(self):
        factor = self.center.mean()
        self.center.mul_(1.02)
        return factor


@pytest.mark.slow
@pytest.mark.parametrize(("model", "factor"), [(EveryTime, None), (Centered, 1.02)])
def test_a_loss_that_is_another_every_time_runs_by_the_users_code(tmp_path, capsys, model, factor):
    case = Case(model, trainer={"max_steps": 15}, lca={"probe_batches": 1})
    with pytest.warns(UserWarning, match="every step's start is evaluated afresh") as seen:
        plain, measured, lca = twins(case, tmp_path, capsys)
    assert_same(plain, measured)
    assert sum("LCA" in str(w.message) for w in seen) == 1
    history = lca.history
    assert "it is another function every time" in history.settings["evaluated"]
    assert (history.drift[4:] != 0).all()
    grown = history.loss_before[5:] / history.loss_after[4:-1]
    factors = 1 + 0.05 / (1 + 0.05 * np.arange(5, 15)) if factor is None else factor
    assert grown == pytest.approx(factors, rel=1e-6)
    assert np.abs(history.residual).sum() < 0.02 * np.abs(history.allocated).sum()
    assert_ledger_closes(history, 1e-6)


# -- what a device runs without its host ----------------------------------------------------------


SOME = torch.tensor([True, False, True, True])
CHOSEN = torch.tensor([0, 2])
WAITING = {
    "a mask": lambda w: w[SOME].square().sum(),
    "a mask of what is computed": lambda w: w[CHOSEN.bincount(minlength=4) > 0].square().sum(),
    "a system": lambda w: torch.linalg.solve(torch.eye(4) + w.outer(w), w).square().sum(),
    "a dice": lambda w: torch.nn.functional.dropout(w, 0.5).square().sum(),
}
ALONE = {
    "products": lambda w: (w.outer(w) @ w).square().sum(),
    "chosen rows": lambda w: w[CHOSEN].square().sum(),
    "in place": lambda w: (w * 2).relu_().square().sum(),
    "norms": lambda w: torch.nn.functional.layer_norm(w, (4,)).exp().sum(),
}


@pytest.mark.parametrize("name", [*WAITING, *ALONE])
def test_a_recording_knows_whether_the_host_takes_part(name):
    weight = torch.randn(4, requires_grad=True)
    with (recorder := Recorder([weight])):
        value = (WAITING | ALONE)[name](weight)
        gradients = torch.autograd.grad(value, weight)
    recording = recorder.finish(value, gradients)
    assert recording.stays_on(weight.device) == (name in ALONE)
    assert not recording.stays_on(torch.device("meta"))
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # Others than it was noted under.
    try:
        assert not recording.is_alone
    finally:
        torch.set_default_dtype(default)


def test_what_is_the_same_every_time_is_computed_once():
    weight, batch = torch.randn(4, requires_grad=True), torch.randn(4)
    counter = torch.zeros(4)

    def loss():
        positions = torch.arange(4) * 2.0  # Nothing of these three follows from the weights.
        mask = (batch > 0).float() + positions.softmax(0)
        counter.add_(1.0)
        seen = counter * 0.5  # It is written to: what was seen then is no constant of it.
        room = torch.zeros(4).add_(weight)  # As is what results are added to.
        return ((weight * mask).exp() * seen).sum() + room.sum()

    with (recorder := Recorder([weight])):
        value = loss()
        gradients = torch.autograd.grad(value, weight)
    recording = recorder.finish(value, gradients)
    for _ in range(2):
        other = torch.randn(4)
        found, (gradient,) = recording([other])
        mask = (batch > 0).float() + (torch.arange(4) * 2.0).softmax(0)
        expected = (other * mask).exp() * 0.5
        torch.testing.assert_close(found, expected.sum() + other.sum())
        torch.testing.assert_close(gradient, expected * mask + 1)
    kept = [k for k in recording.run.__code__.co_names if k.startswith("f")]
    assert len(kept) == recording.operations
    assert recording.operations <= 13, "of 28"
