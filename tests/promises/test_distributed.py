"""Two real processes: the history of one with the whole probe, and training as without us."""

import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scripts.train_on_two import STEPS, TIMEOUT, probe_batches
from support import TESTS
from support.assertions import assert_same
from support.models import mlp, toy_data
from support.processes import PATIENCE, environment
from torch.distributed.constants import default_pg_timeout

from lightning_lca import History

pytestmark = pytest.mark.slow

SCRIPT = TESTS / "scripts" / "train_on_two.py"
FLAVOURS = ("ddp", "static", "buckets", "unused")
OPTIONS = (
    "ddp+double",
    "ddp+halved",
    "ddp+three",
    "ddp+tolerance",
    "ddp+single",
    "ddp+drawn",
    "ddp+budget",
    "ddp+split",
    "ddp+parts",
    "ddp+closed",
    "ddp+adaptive",
)
CUT = (
    *(
        "fsdp+double",
        "fsdp+halved",
        "fsdp+single",
        "fsdp+tolerance",
        "fsdp+drawn",
        "fsdp+neuron",
        "fsdp+mixed",
        "fsdp+budget",
        "fsdp+closed",
    ),
    *("tensor+double", "tensor+tolerance", "tensor+neuron"),
    *("both+double", "both+tolerance"),
)


def launch(directory, *cases):
    return subprocess.run(
        [sys.executable, SCRIPT, directory, *cases],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env=environment(TORCH_CPP_LOG_LEVEL="ERROR"),
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Everything that is launched by Lightning as a second command."""
    directory = tmp_path_factory.mktemp("ddp")
    done = launch(directory, *FLAVOURS, *OPTIONS)
    assert done.returncode == 0, done.stderr[-3000:]
    return directory


@pytest.fixture(scope="module")
def cut(tmp_path_factory):
    """Weights cut over processes: by FSDP2, by tensor parallelism, and (in four) by both."""
    directory = tmp_path_factory.mktemp("cut")
    for in_four in (False, True):
        cases = [case for case in CUT if case.startswith("both") == in_four]
        done = launch(directory, *cases)
        assert done.returncode == 0, done.stderr[-3000:]
    return directory


@pytest.fixture(scope="module")
def spawned(tmp_path_factory):
    """What is started from within this process: by spawn, and by fork as in notebooks."""
    directory = tmp_path_factory.mktemp("spawn")
    for case in ("spawn", "fork"):
        done = launch(directory, case)
        assert done.returncode == 0, done.stderr[-3000:]
    return directory


def load(directory, case, kind, rank):
    return torch.load(directory / f"{case}-{kind}-{rank}.pt", weights_only=False)


def assert_unchanged(directory, case):
    ranks = []
    for rank in range(len(list(directory.glob(f"{case}-plain-*.pt")))):
        plain, measured = (load(directory, case, k, rank) for k in ("plain", "measured"))
        for part in ("weights", "optimizer", "gradients", "metrics", "random", "points"):
            assert_same(plain[part], measured[part])
        ranks.append(measured["rows"])
    assert not torch.equal(
        measured["points"][0]["net.0.weight"], measured["points"][-1]["net.0.weight"]
    )
    for name, shares in ranks[0]["shares"].items():
        assert np.array_equal(shares, ranks[1]["shares"][name], equal_nan=True), name
    for column in set(ranks[0]) - {"seconds", "shares"}:
        assert np.array_equal(ranks[0][column], ranks[1][column]), f"{column} differs over ranks"


@pytest.mark.parametrize("case", [*FLAVOURS, *OPTIONS])
def test_every_rank_trains_bitwise_as_without_the_callback(trained, case):
    assert_unchanged(trained, case)


@pytest.mark.parametrize("case", CUT)
def test_weights_that_are_cut_train_bitwise_as_without_the_callback(cut, case):
    assert_unchanged(cut, case)


@pytest.mark.parametrize("case", ["spawn", "fork"])
def test_ranks_started_from_within_do_so_too_and_the_record_is_left(spawned, case):
    assert_unchanged(spawned, case)
    measured = load(spawned, case, "measured", 0)
    history = History.load(measured["log_dir"])
    assert len(history) == STEPS
    assert np.array_equal(history.residual, measured["rows"]["residual"])
    assert "History.load" in (spawned / f"{case}-error").read_text()


def on_the_whole_probe(batches):
    """Returns what gives loss and gradients at some weights, in plain torch in float64."""
    net = mlp().double()
    x, y = (torch.cat(part) for part in zip(*batches))

    def at(weights):
        weights = {n.removeprefix("net."): w.double().requires_grad_() for n, w in weights.items()}
        loss = F.cross_entropy(torch.func.functional_call(net, weights, (x.double(),)), y)
        return loss.item(), torch.autograd.grad(loss, list(weights.values()))

    return at


def ends_of_steps(points, batches):
    """Losses before and after every step along a path, motion, and gradients at both ends."""
    at = on_the_whole_probe(batches)
    for start, stop in pairwise(points):
        (before, first), (after, last) = at(start), at(stop)
        yield before, after, [(stop[n] - start[n]).double() for n in start], (first, last)


def simpson(points, batches, panels=1):
    """Credits of every step along a path, on the whole probe."""
    at = on_the_whole_probe(batches)
    for start, stop in pairwise(points):
        ends = [
            {n: torch.lerp(start[n], stop[n], i / panels) for n in start} for i in range(panels)
        ]
        credit = [0.0] * len(start)
        for a, b in pairwise([*ends, stop]):
            middle = {n: (a[n] + b[n]) / 2 for n in a}
            moved = [(b[n] - a[n]).double() for n in a]
            slopes = zip(*(at(weights)[1] for weights in (a, middle, b)), strict=True)
            parts = (m * (p + 4 * q + r) / 6 for m, (p, q, r) in zip(moved, slopes, strict=True))
            credit = [c + part for c, part in zip(credit, parts, strict=True)]
        yield at(start)[0], at(stop)[0], credit


@pytest.mark.parametrize(
    ("case", "batches", "exact"),
    [
        ("ddp+double", probe_batches(torch.float64), True),
        ("ddp+three", probe_batches(torch.float64)[:3], True),
        ("ddp+single", probe_batches(torch.float32), False),
    ],
)
def test_the_shared_probe_gives_the_history_of_the_whole_one(trained, case, batches, exact):
    assert_history_of_the_whole_probe(load(trained, case, "measured", 0), batches, exact)


@pytest.mark.parametrize("case", ["ddp+closed", "fsdp+closed", "ddp+adaptive"])
def test_what_a_rule_shares_out_is_that_of_the_whole_probe(request, case):
    """Trapezoid, and its residual by |motion x change of the gradient|, on the whole probe."""
    directory = request.getfixturevalue("trained" if case.startswith("ddp") else "cut")
    measured = load(directory, case, "measured", 0)
    rows, batches = measured["rows"], probe_batches(torch.float64)
    middles = 0
    for t, (before, after, moved, ends) in enumerate(ends_of_steps(measured["points"], batches)):
        plain = [m * (a + b) / 2 for m, a, b in zip(moved, *ends, strict=True)]
        left = after - before - sum(c.sum().item() for c in plain)
        bent = [(m * (b - a)).abs() for m, a, b in zip(moved, *ends, strict=True)]
        total = sum(b.sum().item() for b in bent)
        credit = [c + left * b / total for c, b in zip(plain, bent, strict=True)]
        if case == "ddp+adaptive" and rows["raw_residual"][t] == rows["residual"][t]:
            middles += 1
            _, _, credit = next(simpson(measured["points"][t : t + 2], batches))
        else:
            assert rows["raw_residual"][t] == pytest.approx(left, rel=1e-6, abs=1e-12)
            assert abs(rows["residual"][t]) < 1e-12
        layers = [sum(c.sum().item() for c in credit[i : i + 2]) for i in (0, 2, 4)]
        np.testing.assert_allclose(rows["allocated"][t], layers, rtol=1e-9, atol=1e-12)
    assert bool(middles) == (case == "ddp+adaptive")


@pytest.mark.parametrize(
    ("case", "large", "small"), [("ddp+double", 1, 4), ("ddp+closed", 1, 3), ("ddp+split", 3, 5)]
)
def test_a_measured_step_reduces_one_gradient_and_a_few_numbers(trained, case, large, small):
    """Flags, losses, what each batch is credited; in the first ten steps whether halves help."""
    measured = load(trained, case, "measured", 0)
    weights = sum(w.numel() for w in measured["points"][0].values())
    for reduced in measured["reduced"][2:]:  # The first has no start yet, the second is audited.
        assert sum(n >= weights for n in reduced) == large
        few = [n for n in reduced if n < weights]
        assert len(few) == small
        assert sum(few) <= 48


def test_shares_are_those_of_the_whole_probe(trained):
    """Replayed on the whole probe: SGD with momentum 0.9, whose first step has none."""
    measured = load(trained, "ddp+split", "measured", 0)
    batches, shares = probe_batches(torch.float64), measured["rows"]["shares"]
    assert_history_of_the_whole_probe(measured, batches, True)
    x, y = (torch.cat(part) for part in zip(*batches))
    net, allocated = mlp().double(), measured["rows"]["allocated"]

    def gradient(weights, x=x, y=y):
        weights = {n[4:]: w.detach().clone().requires_grad_() for n, w in weights.items()}
        loss = F.cross_entropy(torch.func.functional_call(net, weights, (x,)), y)
        return torch.autograd.grad(loss, list(weights.values()))

    def by_layer(parts):
        return [sum(float(p.sum()) for p in parts[i : i + 2]) for i in (0, 2, 4)]

    momentum = 0.0  # What is left of the steps before: 0.9 times the last motion, at one rate.
    for t, (start, stop) in enumerate(pairwise(measured["points"])):
        motion = [(stop[n] - start[n]).detach() for n in start]
        middle = {n: (start[n] + stop[n]) / 2 for n in start}
        g0, g1, g2 = (gradient(dict(w)) for w in (start, middle, stop))
        mean = [(a + 4 * b + c) / 6 for a, b, c in zip(g0, g1, g2)]
        signal = by_layer([-0.1 * a * m for a, m in zip(g0, mean)])
        tight = {"rtol": 1e-9, "atol": 1e-12}
        np.testing.assert_allclose(shares["part"][t, :, 0], signal, **tight)
        if t:
            carried = by_layer([m * b for m, b in zip(mean, momentum)])
            np.testing.assert_allclose(shares["part"][t, :, 1], carried, **tight)
        assert np.abs(shares["part"][t, :, 4]).max() < 1e-12
        first = by_layer([a * d for a, d in zip(g0, motion)])
        np.testing.assert_allclose(shares["order"][t, :, 0], first, **tight)
        for column, slope in ((2, g0), (3, g2)):
            dots = zip(
                by_layer([s * d for s, d in zip(slope, motion)]),
                by_layer([s * s for s in slope]),
                by_layer([d * d for d in motion]),
            )
            cosines = [-dot / (a * b) ** 0.5 for dot, a, b in dots]
            np.testing.assert_allclose(shares["oscillation"][t, :, column], cosines, **tight)
        alone = [gradient(middle, *batch) for batch in batches]
        inner = np.array([by_layer([g * d for g, d in zip(gs, motion)]) for gs in alone]).T
        sizes = np.array([len(y) for _, y in batches])
        rest = allocated[t] - inner @ sizes / sizes.sum()
        np.testing.assert_allclose(shares["batch"][t], inner + rest[:, None], **tight)
        momentum = [0.9 * d for d in motion]
    np.testing.assert_allclose(shares["part"].sum(2), allocated, rtol=1e-9, atol=1e-12)


def test_what_is_left_out_is_a_constant_on_the_whole_probe(trained):
    """Left out are net.2 and all biases, which lie where they are at the end of each step."""
    measured = load(trained, "ddp+parts", "measured", 0)
    rows, net = measured["rows"], mlp().double()
    x, y = (torch.cat(part) for part in zip(*probe_batches(torch.float64)))
    kept = ["net.0.weight", "net.4.weight"]
    tight = {"rtol": 1e-9, "atol": 1e-12}
    for t, (start, stop) in enumerate(pairwise(measured["points"])):
        credit, losses = np.zeros(2), []
        for s, weight in ((0.0, 1 / 6), (0.5, 4 / 6), (1.0, 1 / 6)):
            at = {n[4:]: w.detach().clone() for n, w in stop.items()}
            places = [(start[n] + s * (stop[n] - start[n])).detach() for n in kept]
            places = [w.requires_grad_() for w in places]
            at |= {n[4:]: w for n, w in zip(kept, places)}
            loss = F.cross_entropy(torch.func.functional_call(net, at, (x,)), y)
            losses.append(loss.item())
            for i, (n, g) in enumerate(zip(kept, torch.autograd.grad(loss, places))):
                credit[i] += weight * float((g * (stop[n] - start[n])).sum())
        np.testing.assert_allclose(rows["allocated"][t], credit, **tight)
        found = rows["loss_before"][t], rows["loss_after"][t]
        np.testing.assert_allclose(found, (losses[0], losses[-1]), **tight)


@pytest.mark.parametrize(("fixture", "case"), [("trained", "ddp"), ("cut", "fsdp")])
def test_steps_that_are_halved_have_the_credits_of_both_halves(request, fixture, case):
    measured = load(request.getfixturevalue(fixture), f"{case}+halved", "measured", 0)
    assert (measured["rows"]["splits"] == 2).all()
    assert_history_of_the_whole_probe(measured, probe_batches(torch.float64), True, panels=2)


@pytest.mark.parametrize("case", ["fsdp+double", "tensor+double", "both+double", "fsdp+single"])
def test_so_it_does_when_the_weights_are_cut(cut, case):
    exact = case.endswith("double")
    batches = probe_batches(torch.float64 if exact else torch.float32)
    assert_history_of_the_whole_probe(load(cut, case, "measured", 0), batches, exact)


def test_no_process_holds_more_than_its_part(cut):
    for case in ("fsdp+double", "tensor+double", "both+double"):
        ranks = [torch.load(f, weights_only=False) for f in cut.glob(f"{case}-measured-*.pt")]
        weights = sum(w.numel() for w in ranks[0]["points"][0].values())
        held = [rank["held"] for rank in ranks]
        assert max(held) < weights
        assert sum(held) >= weights, "what tensor parallelism does not cut, all hold"


@pytest.mark.parametrize("case", ["fsdp+neuron", "tensor+neuron"])
def test_neurons_find_their_credits_in_weights_that_are_cut(cut, case):
    measured = load(cut, case, "measured", 0)
    rows, groups = measured["rows"], measured["groups"]
    batches = probe_batches(torch.float64)
    for t, (_, _, credit) in enumerate(simpson(measured["points"], batches)):
        neurons = [(w.sum(1) + b).tolist() for w, b in zip(credit[::2], credit[1::2])]
        expected = {
            f"net.{layer}/{i}": c for layer, n in zip((0, 2, 4), neurons) for i, c in enumerate(n)
        }
        assert rows["allocated"][t] == pytest.approx([expected[g] for g in groups], rel=1e-9)


def assert_history_of_the_whole_probe(measured, batches, exact, panels=1):
    rows = measured["rows"]
    credits = []
    for t, (before, after, credit) in enumerate(simpson(measured["points"], batches, panels)):
        assert rows["loss_before"][t] == pytest.approx(before, rel=1e-12 if exact else 1e-6)
        assert rows["loss_after"][t] == pytest.approx(after, rel=1e-12 if exact else 1e-6)
        layers = [torch.cat([c.reshape(-1) for c in credit[i : i + 2]]) for i in (0, 2, 4)]
        credits.append([layer.sum().item() for layer in layers])
        if exact:
            assert rows["helping"][t].tolist() == [int((x < 0).sum()) for x in layers]
            assert rows["hurting"][t].tolist() == [int((x > 0).sum()) for x in layers]
    scale = np.abs(credits).max()
    assert np.allclose(rows["allocated"], credits, rtol=0, atol=scale * (1e-12 if exact else 1e-6))


@pytest.mark.parametrize("name", ["ddp", "fsdp", "tensor", "both"])
def test_refinement_comes_to_the_same_end_on_all_ranks(trained, cut, name):
    directory = trained if name == "ddp" else cut
    rows = load(directory, f"{name}+tolerance", "measured", 0)["rows"]
    assert rows["converged"].all()
    assert rows["splits"].max() > 1
    assert np.abs(rows["residual"]).max() <= 1e-9


@pytest.mark.parametrize(("fixture", "case"), [("trained", "ddp"), ("cut", "fsdp")])
def test_ranks_whose_clocks_disagree_choose_the_same_chord(request, fixture, case):
    directory = request.getfixturevalue(fixture)
    for rank in (0, 1):
        rows = load(directory, f"{case}+budget", "measured", rank)["rows"]
        assert rows["steps"].tolist() == [STEPS], "rank zero alone would choose 5"


def test_a_drawn_probe_has_its_batches_from_every_rank(trained):
    measured = load(trained, "ddp+drawn", "measured", 0)
    data = toy_data(96)
    order = torch.randperm(96, generator=torch.Generator().manual_seed(0))[:16]
    assert measured["rows"]["loss_before"][0] == pytest.approx(
        loss_in_batches(measured["points"][0], data, order), rel=1e-6
    )


def loss_in_batches(weights, data, order):
    """Mean loss of the Talkative model over two batches of 8, each normalized by itself."""
    w = {n.removeprefix("net."): p for n, p in weights.items()}
    total = 0.0
    for indices in order.split(8):
        x, y = data.tensors[0][indices], data.tensors[1][indices]
        x = F.linear(x, w["0.weight"], w["0.bias"])
        x = F.batch_norm(x, None, None, w["1.weight"], w["1.bias"], training=True)
        total += F.cross_entropy(F.linear(x.tanh(), w["3.weight"], w["3.bias"]), y).item() / 2
    return total


def test_a_rank_that_dies_does_not_hang_the_other_beyond_its_own_timeout(tmp_path):
    # The group's timeout is shorter than the patience here, which is shorter than torch's own.
    assert TIMEOUT.total_seconds() < PATIENCE < default_pg_timeout.total_seconds()
    done = launch(tmp_path, "ddp+die")
    assert done.returncode != 0
    (log_dir,) = (tmp_path / "ddp+die-measured").glob("lca_logs/*")
    assert History.load(log_dir).steps.tolist()[:2] == [1, 2], "what was measured is there"
