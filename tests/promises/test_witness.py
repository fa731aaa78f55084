"""An outside witness: credits of single weights, as the original LCA code computed them.

Where the figures come from is in tests/data/README.md; what agreement was seen, in
lightning_lca/docs/witness.md. Run with -s, the tests print it.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from support.models import pl
from support.training import make_trainer
from torch import nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

from lightning_lca import LCACallback, Sample, Segment, allocate, refine
from lightning_lca.measure.quadrature import EULER, RULES, SIMPSON

FILE = Path(__file__).parents[1] / "data" / "witness.npz"
LAYERS = {"0": (64, 100), "2": (100, 50), "4": (50, 10)}
TOLERANCE = 1e-3  # The original's, in loss units, on the training and on the test loss.
STEPS = 2

# Two programs in float32 (unit roundoff 6e-8) on the same weights; 1e-7 was seen.
CLOSE = 1e-6  # Of credits, relative L1; of losses, relative.
FEW = 5e-4  # Of the weights, six: their credit is so small that rounding decides on its sign.


@pytest.fixture(scope="module")
def witness():
    with np.load(FILE) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays}


@pytest.fixture(scope="module")
def digits():
    """The images and labels that either loss is the mean over: {name: (x, y)}."""
    images, labels = load_digits(return_X_y=True)
    x, y = torch.from_numpy(images / 16).float(), torch.from_numpy(labels)
    return {"train": (x[:1500], y[:1500]), "test": (x[1500:], y[1500:])}


def network():
    first, second, third = (nn.Linear(*shape) for shape in LAYERS.values())
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third)


def as_weights(row):
    """Cuts a row of the witness into torch's tensors, {name: [*shape]}."""
    weights, at = {}, 0
    for layer, (wide, high) in LAYERS.items():
        kernel, bias, at = at + wide * high, at + wide * high + high, at
        weights[f"{layer}.weight"] = row[at:kernel].reshape(wide, high).T.contiguous()
        weights[f"{layer}.bias"], at = row[kernel:bias].clone(), bias
    assert at == len(row)
    return weights


def as_row(weights):
    """The inverse of `as_weights`."""
    return torch.cat([w.T.reshape(-1) if w.dim() == 2 else w for w in weights.values()])


def field_of(data):
    model, (x, y) = network(), data

    def field(at):
        weights = at.weights()
        loss = F.cross_entropy(functional_call(model, weights, (x,)), y)
        gradients = torch.autograd.grad(loss, list(weights.values()))
        return Sample(loss.detach().double(), dict(zip(weights, gradients)))

    return field


def segment_of(witness, step):
    return Segment(*(as_weights(witness["weights"][i]) for i in (step, step + 1)))


def distance(credit, theirs):
    """Relative L1 distance of two rows of credits."""
    return ((credit.double() - theirs).abs().sum() / theirs.double().abs().sum()).item()


def assert_agrees(values, theirs, what):
    """Compares credits weight by weight, per layer, and how many helped and hurt."""
    credit = as_row(values)
    fractions = [((row < 0).double().mean(), (row > 0).double().mean()) for row in (credit, theirs)]
    apart = max(abs(a - b).item() for a, b in zip(*fractions))
    layers = [
        {n: w.double().sum().item() for n, w in as_weights(row).items()} for row in (credit, theirs)
    ]
    moved = theirs.double().abs().sum().item()
    off = max(abs(layers[0][n] - layers[1][n]) for n in layers[0]) / moved
    print(f"{what}: credits {distance(credit, theirs):.1e}, sums {off:.1e}, fractions {apart:.1e}")
    assert distance(credit, theirs) < CLOSE
    assert off < CLOSE
    assert apart < FEW


def losses(witness, name, step):
    return [witness[f"{name}loss"][i].item() for i in (step, step + 1)]


@pytest.mark.parametrize("step", range(STEPS))
@pytest.mark.parametrize(("name", "key"), [("train", "helped"), ("test", "helped_test")])
def test_credits_are_those_of_the_original_code(witness, digits, name, key, step):
    field, segment = field_of(digits[name]), segment_of(witness, step)
    panels = int(witness["panels"][step])
    at_its_panels = allocate(field, segment, SIMPSON.composite(panels))
    refined = refine(field, segment, TOLERANCE)
    assert (refined.splits, refined.converged) == (panels, True)
    for how, allocation in (("allocate", at_its_panels), ("refine", refined)):
        assert_agrees(allocation.values, witness[key][step], f"{how}, {name} loss, step {step}")
        ends = [allocation.loss_before.item(), allocation.loss_after.item()]
        assert ends == pytest.approx(losses(witness, name, step), rel=CLOSE)


@pytest.mark.parametrize("step", range(STEPS))
def test_first_order_credits_are_those_of_the_original_code(witness, digits, step):
    allocation = allocate(field_of(digits["train"]), segment_of(witness, step), EULER)
    assert_agrees(allocation.values, witness["first_order"][step], f"first order, step {step}")


def test_the_witness_has_a_step_of_one_panel_and_a_finer_one(witness):
    assert sorted(witness["panels"].tolist()) == [1, 4]
    assert all((witness[name] != 0).any(1).all() for name in ("helped", "helped_test"))


@pytest.mark.parametrize("step", range(STEPS))
def test_the_witness_tells_rules_and_panels_apart(witness, digits, step):
    """Any other rule than the original's is a thousand times farther from it than rounding."""
    field, segment = field_of(digits["train"]), segment_of(witness, step)
    panels = int(witness["panels"][step])
    others = [RULES[name].composite(panels) for name in RULES if name != "simpson"]
    others += [SIMPSON.composite(2 * panels), SIMPSON.composite(panels + 1)]
    for rule in others:
        credit = as_row(allocate(field, segment, rule).values)
        assert distance(credit, witness["helped"][step]) > 1000 * CLOSE, rule.name


class Along(torch.optim.Optimizer):
    """Goes where the witness went, whatever the gradients say."""

    def __init__(self, named, path):
        self.named, self.path = dict(named), iter(path)
        super().__init__(self.named.values(), {})

    @torch.no_grad()
    def step(self, closure):
        with torch.enable_grad():
            closure()
        for name, weight in next(self.path).items():
            self.named[name].copy_(weight)


class Net(pl.LightningModule):
    """The witness's network, in training."""

    def __init__(self, path):
        super().__init__()
        start, *self.path = path
        self.net = network()
        self.net.load_state_dict(start)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        return Along(self.net.named_parameters(), self.path)


class Keep(pl.Callback):
    """Keeps what each step's allocation is."""

    def __init__(self, lca):
        self.lca, self.values = lca, []

    def on_train_batch_end(self, *args):
        self.values.append({n: v.clone() for n, v in self.lca.last.values.items()})


@pytest.mark.parametrize(("name", "key"), [("train", "helped"), ("test", "helped_test")])
def test_the_callback_credits_a_training_along_that_path_as_the_original_code(
    witness, digits, tmp_path, name, key
):
    lca = LCACallback(
        probe=[digits[name]], tolerance=TOLERANCE, track_parameters=True, figures=False
    )
    keep = Keep(lca)
    trainer = make_trainer(tmp_path, lca, keep, max_steps=STEPS)
    batches = DataLoader(TensorDataset(*digits["train"]), batch_size=64)
    trainer.fit(Net([as_weights(row) for row in witness["weights"]]), batches)
    assert lca.history.splits.tolist() == witness["panels"].tolist()
    assert len(keep.values) == STEPS
    for step, values in enumerate(keep.values):
        assert_agrees(values, witness[key][step], f"callback, {name} loss, step {step}")
        ends = [lca.history.loss_before[step], lca.history.loss_after[step]]
        assert ends == pytest.approx(losses(witness, name, step), rel=CLOSE)
    assert_agrees(lca.totals, witness[key].sum(0), f"callback, {name} loss, both steps")
    helping = (witness[key] < 0).double().mean(1).numpy()
    assert lca.history.helping @ lca.history.sizes / sum(lca.history.sizes) == pytest.approx(
        helping, abs=FEW
    )
