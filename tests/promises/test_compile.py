"""torch.compile, in every way that Lightning documents: harmless, true, and no graph more."""

import shutil

import pytest
import torch
import torch.nn.functional as F
from support.assertions import differences
from support.models import Model, toy_loader
from support.training import make_trainer
from support.twin import RULES, PathRecorder, Twin
from torch import nn
from torch._dynamo.utils import counters

from lightning_lca import Grouping, LCACallback

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # Of the compiler's own code.
    pytest.mark.filterwarnings("ignore:.*Logical operators .*"),
]
# Of another size than the batches of training: it must not make the compiler meet a new shape.
BATCH = next(iter(toy_loader(batch_size=24, shuffle=False)))
inductor = pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler")


def net():
    return nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 4))


class Quiet(Model):
    """Logs nothing: Lightning 2.6's ``log``, compiled with the rest, breaks torch 2.13's dynamo."""

    def training_step(self, batch, batch_idx):
        return self(*batch)


class CompilesPart(Quiet):
    """Compiles its network in configure_model, as Lightning recommends."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments)
        self.options, self.compiled = options, False

    def configure_model(self):
        if not self.compiled:
            self.net, self.compiled = torch.compile(self.net, **self.options), True


def made(kind=Model, **options):
    torch.manual_seed(5)
    return kind(net(), F.cross_entropy, lambda p: torch.optim.Adam(p, lr=0.02), **options)


def whole(**options):
    return torch.compile(made(Quiet), **options)


def part(**options):
    return made(CompilesPart, **options)


def in_place(**options):
    model = made()  # Through its own __call__ from training_step; its log stays outside.
    model.compile(**options)
    return model


WAYS = {"torch.compile(module)": whole, "torch.compile(module.net)": part, "compile()": in_place}
EAGER = {"backend": "eager"}, {"backend": "aot_eager", "dynamic": True}
ROWS = [pytest.param(w, o, id=f"{n}-{o['backend']}") for n, w in WAYS.items() for o in EAGER]
ROWS += [
    pytest.param(way, options, id=f"{name}-{options or 'default'}", marks=inductor)
    for name, way in WAYS.items()
    for options in ({}, {"mode": "reduce-overhead"})
]


def fit(path, model, *callbacks):
    torch.manual_seed(6)
    recorder = PathRecorder(lambda m: dict(zip(NAMES, m.parameters())))
    trainer = make_trainer(path, *callbacks, recorder, max_steps=6)
    trainer.fit(model, toy_loader())
    state = [o.state_dict() for o in trainer.optimizers]
    return {
        "path": [recorder.starts, recorder.stops, recorder.buffers],
        "optimizers": state,
        # Graphs, frames, breaks and recompilations; not the compiler's own caches.
        "compiler": {
            k: dict(counters[k]) for k in ("frames", "stats", "graph_break", "recompiles")
        },
        "random": torch.random.get_rng_state(),
    }, recorder


NAMES = [name for name, _ in made().named_parameters()]


@pytest.mark.slow
@pytest.mark.parametrize(("way", "options"), ROWS)
def test_a_compiled_module_trains_bitwise_the_same_and_its_credits_are_the_twins(
    tmp_path, way, options
):
    torch._dynamo.reset()
    counters.clear()
    plain, recorder = fit(tmp_path, way(**options))
    torch._dynamo.reset()
    counters.clear()
    lca = LCACallback(probe=[BATCH], group_by="parameter", track_parameters=True)
    measured, _ = fit(tmp_path, way(**options), lca)
    torch._dynamo.reset()
    assert plain["compiler"]["stats"]["unique_graphs"] >= 1, "nothing was compiled"
    assert not list(differences(plain, measured))

    history = lca.history
    assert history.groups == tuple(NAMES)
    assert lca.totals.keys() == set(NAMES)
    twin = Twin(made(), [BATCH])
    buffers = dict(twin.module.named_buffers())  # Not read: it normalises by the batch.
    assert len(history) == 6
    for t, (start, stop, _) in enumerate(recorder.chords()):
        want = twin.measure(start, stop, buffers, RULES["simpson"], NAMES)
        for g, name in enumerate(NAMES):
            off = abs(history.allocated[t, g] - want.credit[name].sum())
            assert off <= want.slack[name].sum(), (t, name)
        assert abs(history.loss_after[t] - want.after) <= want.loss_slack
    assert not history.drift.any()


@pytest.mark.parametrize("by", ["layer", "neuron"])
def test_groups_of_a_compiled_module_have_the_names_of_the_bare_one(tmp_path, by):
    def groups(model):
        lca = LCACallback(group_by=by, probe=[BATCH], neurons=True)
        fit(tmp_path, model, lca)
        return lca.history.groups, lca.history.sizes.tolist(), lca.history.parameters.kinds

    torch._dynamo.reset()
    assert groups(part(backend="eager")) == groups(made())
    torch._dynamo.reset()


@pytest.mark.parametrize("by", ["layer", "neuron", "parameter"])
def test_a_compiled_layer_is_grouped_as_what_it_is(by):
    """A transposed convolution by its channels, an LSTM by its units, a norm as a norm."""
    layers = nn.ConvTranspose2d(2, 3, 2), nn.LSTM(3, 2), nn.BatchNorm1d(3)
    bare = Grouping(nn.Sequential(*layers), by)
    compiled = Grouping(nn.Sequential(*map(torch.compile, layers)), by)
    assert (compiled.names, compiled.sizes) == (bare.names, bare.sizes)
    assert compiled.kinds == bare.kinds
