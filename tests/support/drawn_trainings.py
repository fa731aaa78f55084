"""Random networks and trainings: everything follows from a seed."""

import functools
from fnmatch import fnmatchcase as fnmatch

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from support.models import Model
from support.twin import CLOSED, RULES

CLASSES = 3


# -- random networks ------------------------------------------------------------------------------


class Twice(nn.Module):
    """Uses one layer twice, with a skip."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return x + torch.tanh(self.layer(torch.tanh(self.layer(x))))


class Reads(nn.Module):
    """Reads words by a recurrent net, attention or a mean; its head may be its embedding."""

    def __init__(self, kind, width, dropout, sparse, tied):
        super().__init__()
        self.embed = nn.Embedding(6, width, padding_idx=0, sparse=sparse)
        self.kind, self.tied = kind, tied
        if kind in ("LSTM", "GRU", "RNN"):
            self.body = getattr(nn, kind)(width, width, 2, batch_first=True, dropout=dropout)
        elif kind == "attention":
            self.body = nn.TransformerEncoderLayer(width, 2, 5, dropout, "gelu", batch_first=True)
        self.head = nn.Linear(width, 6 if tied else CLASSES)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, x):
        x = self.embed(x)
        if self.kind != "mean":
            x = self.body(x)
        x = x[0] if isinstance(x, tuple) else x
        return self.head(x.mean(1))[:, :CLASSES]


def pick(random, *choices):
    return choices[random.integers(len(choices))]


def activation(random):
    return pick(random, nn.Tanh, nn.ReLU, nn.GELU, nn.SiLU, nn.PReLU, nn.LeakyReLU)()


def dense(random):
    """Layers of a vector of 6."""
    layers, width = [], 6
    for _ in range(random.integers(1, 4)):
        wider = int(random.integers(3, 9))
        linear = nn.Linear(width, wider, bias=random.random() < 0.8)
        wrap = pick(random, None, None, None, "weight_norm", "spectral_norm")
        layers.append(linear if wrap is None else getattr(parametrizations, wrap)(linear))
        width = wider
        layers.append(pick(random, None, nn.BatchNorm1d(width), nn.LayerNorm(width)))
        layers.append(activation(random))
        layers.append(pick(random, None, None, nn.Dropout(0.3)))
        layers.append(pick(random, None, None, Twice(nn.Linear(width, width))))
    layers = [layer for layer in layers if layer is not None]
    return nn.Sequential(*layers, nn.Linear(width, CLASSES)), "vector"


def convolutional(random):
    """Layers of an image of 2 x 5 x 5."""
    channels = 2 * int(random.integers(1, 3))
    layers = [nn.Conv2d(2, channels, 3, stride=int(random.integers(1, 3)), padding=1)]
    norms = nn.BatchNorm2d(channels), nn.GroupNorm(2, channels)
    layers += [pick(random, None, *norms, nn.InstanceNorm2d(channels, affine=True))]
    layers += [activation(random)]
    groups = pick(random, 1, 2)
    more = nn.ConvTranspose2d(channels, 4, 2), nn.Conv2d(channels, 4, 2, groups=groups)
    layers += [pick(random, *more), activation(random)]
    layers = [layer for layer in layers if layer is not None]
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, CLASSES)
    ), "image"


def reading(random):
    kind = pick(random, "LSTM", "GRU", "RNN", "attention", "mean")
    tied = random.random() < 0.3
    sparse = kind == "mean" and not tied and random.random() < 0.6
    return Reads(kind, 4, pick(random, 0.0, 0.3), sparse, tied), "words"


def squared(logits, y):
    return F.mse_loss(torch.tanh(logits), F.one_hot(y, CLASSES).to(logits.dtype))


def optimizers(random, sparse):
    """Chooses an optimizer, and a scheduler of every step or none."""
    speed = float(10 ** random.uniform(-0.5, 0.5))
    plain = functools.partial(torch.optim.SGD, lr=0.1 * speed)
    choices = [
        plain,
        functools.partial(plain, momentum=0.9, nesterov=random.random() < 0.5),
        functools.partial(plain, momentum=0.9, fused=True),
        functools.partial(torch.optim.Adam, lr=0.02 * speed, amsgrad=random.random() < 0.5),
        functools.partial(torch.optim.Adam, lr=0.02 * speed, foreach=True),
        functools.partial(torch.optim.AdamW, lr=0.02 * speed, fused=True),
        functools.partial(torch.optim.RMSprop, lr=0.01 * speed, centered=True),
        functools.partial(torch.optim.Adagrad, lr=0.05 * speed),
        functools.partial(torch.optim.NAdam, lr=0.02 * speed),
        functools.partial(torch.optim.Rprop, lr=0.01),
        functools.partial(torch.optim.LBFGS, lr=0.3, max_iter=3),
    ]
    make = pick(random, plain, functools.partial(torch.optim.Adagrad, lr=0.05)) if sparse else None
    make = make or pick(random, *choices)
    schedule = pick(random, None, "StepLR", "OneCycleLR", "CosineAnnealingLR")

    def build(weights):
        optimizer = make(weights)
        if schedule is None or isinstance(optimizer, torch.optim.LBFGS):
            return optimizer
        if schedule == "StepLR":
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        elif schedule == "CosineAnnealingLR":
            scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)
        else:
            scheduler = torch.optim.lr_scheduler.OneCycleLR(
                optimizer, optimizer.defaults["lr"], total_steps=20, cycle_momentum=False
            )
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    return build, make.func.__name__


# -- random trainings -----------------------------------------------------------------------------


def data_of(kind, count, generator):
    y = torch.randint(CLASSES, (count,), generator=generator)
    shape = {"vector": (6,), "image": (2, 5, 5), "words": (4,)}[kind]
    if kind == "words":
        return torch.randint(6, (count, *shape), generator=generator), y
    x = torch.randn(count, *shape, generator=generator)
    return x + y.view(-1, *[1] * len(shape)) - 1, y


def case(seed):
    """Draws a training and what is asked of the callback: everything follows from the seed."""
    random = np.random.default_rng(seed)
    torch.manual_seed(seed)
    net, kind = pick(random, dense, dense, convolutional, reading)(random)
    sparse = any(isinstance(m, nn.Embedding) and m.sparse for m in net.modules())
    layers = [m for m in net.modules() if list(m.parameters(recurse=False))]
    for layer in layers[:-1]:
        if random.random() < 0.15:
            layer.requires_grad_(False)
    if sparse:
        net.embed.requires_grad_(True)
    build, optimizer = optimizers(random, sparse)
    precisions = ["32-true"] * 5 + ["64-true"] * 4 + ["bf16-mixed", "bf16-true"]
    precision = pick(random, *precisions)
    kinks = any(isinstance(m, nn.ReLU | nn.LeakyReLU | nn.PReLU) for m in net.modules())
    # Where a gradient jumps, coarse rounding lands on the other side: nothing bounds that error.
    if kind == "words" or (kinks and precision.startswith("bf16")):
        precision = pick(random, "32-true", "64-true")
    lbfgs, half = optimizer == "LBFGS", precision.startswith("bf16")
    clip = {"gradient_clip_val": float(random.uniform(0.05, 0.5))}
    clip["gradient_clip_algorithm"] = pick(random, "norm", "value")
    # Lightning clips neither sparse gradients nor, in mixed precision, those of fused optimizers.
    if sparse or half or random.random() < 0.5:
        clip = {}
    rule = pick(random, *RULES, *CLOSED)
    tolerance = None
    if random.random() < 0.25 and not half:
        rule, tolerance = "simpson", float(10 ** random.uniform(-6, -3))
    generator = torch.Generator().manual_seed(seed)
    mode = pick(random, "no_dropout", "no_dropout", "eval", "train")
    # Attention and recurrent nets may draw other masks in float64 than in float32.
    if mode == "train" and (kind == "words" or precision == "bf16-true"):
        mode = "no_dropout"
    if precision == "bf16-true":  # It rounds every node but the ends.
        rule = pick(random, "euler", "trapezoid", "closed_trapezoid")
    sizes = [int(random.integers(3, 9)) for _ in range(random.integers(1, 4))]
    drawn = {
        "seed": seed,
        "model": Model(net, pick(random, F.cross_entropy, squared), build),
        "optimizer": optimizer,
        "data": data_of(kind, 24, generator),
        "trainer": {
            "max_steps": int(random.integers(3, 7)),
            "accumulate_grad_batches": 1 if lbfgs else int(pick(random, 1, 1, 2, 3)),
            "precision": precision,
            **clip,
        },
        "lca": {
            "probe": [data_of(kind, size, generator) for size in sizes],
            "probe_mode": mode,
            "every_n_steps": int(pick(random, 1, 1, 2, 3)),
            "quadrature": rule,
            "tolerance": tolerance,
            "max_splits": int(pick(random, 1, 2, 8)),
            "group_by": pick(random, "parameter", "layer", "neuron"),
            "seed": int(random.integers(1000)),
        },
    }
    drawn["lca"] |= more(np.random.default_rng([seed, 1]), drawn)
    return drawn


def more(random, drawn):
    """Draws what came later: another way to group, what is left out, and shares of credit."""
    model, lca = drawn["model"], {}
    shapes = [by_dimensions, "module:1", "module:2", "module:3"]
    if any(isinstance(m, nn.MultiheadAttention) for m in model.modules()):
        shapes += ["head"] * 8
    if random.random() < 0.5:
        lca["group_by"] = pick(random, *shapes)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    if random.random() < 0.4:
        chosen = pick(random, *trained)
        argument = pick(random, "include", "exclude")
        path = chosen.split(".parametrizations.")[0]
        pattern = pick(random, chosen, path, path.rpartition(".")[0] + ".*", "*" + path[-6:])
        left = set(trained) - {n for n in trained if fits(n, pattern)}
        if argument == "include" or left:
            lca[argument] = pattern if random.random() < 0.5 else [pattern]
    rule, every = drawn["lca"]["quadrature"], drawn["lca"]["every_n_steps"]
    if rule not in ("midpoint", "gauss2", "gauss3") and random.random() < 0.7:
        lca["breakdown"] = pick(random, True, True, "part") if every == 1 else "order"
        lca["oscillation"] = bool(random.random() < 0.6)
    sparse = any(getattr(m, "sparse", False) for m in model.modules())
    if drawn["optimizer"] not in ("LBFGS", "Rprop") and not sparse and random.random() < 0.4:
        model.make_optimizers = decaying(model.make_optimizers, 10 ** random.uniform(-2, 0))
    return lca


def decaying(build, decay):
    """Adds weight decay to the optimizer that is built."""

    def with_decay(weights):
        built = build(weights)
        for group in (built[0][0] if isinstance(built, tuple) else built).param_groups:
            group["weight_decay"] = float(decay)
        return built

    return with_decay


def by_dimensions(name, parameter):
    return f"of {parameter.dim()} dimensions"


def fits(name, pattern):
    """Whether a pattern matches a parameter, or a module around it."""
    parts = name.replace(".parametrizations.", ".").split(".")
    return any(fnmatch(".".join(parts[:i]), pattern) for i in range(1, len(parts) + 1)) or fnmatch(
        name, pattern
    )


def selected(asked, names):
    """Lists the parameters that are measured."""
    for argument, wanted in (("include", True), ("exclude", False)):
        patterns = asked.get(argument, [])
        patterns = [patterns] if isinstance(patterns, str) else patterns
        if patterns:
            names = [n for n in names if any(fits(n, p) for p in patterns) == wanted]
    return names
