"""Random small trainings against the float64 twin: 200 of them, each from its seed.

Does one fail? ``pytest tests/promises/test_fuzz.py -k seed17x`` runs it alone, and prints it.
"""

from itertools import pairwise

import numpy as np
import pytest
import torch
from support.assertions import differences
from support.drawn_trainings import case, selected
from support.marks import matrix
from support.models import pl
from support.training import make_trainer
from support.twin import CLOSED, RULES, PathRecorder, Twin, groups_of, simpson, sum_of_groups
from torch.utils.data import DataLoader, TensorDataset

from lightning_lca import LCACallback

SEEDS = {f"seed{i}x": i for i in range(200)}
QUICK = [*list(SEEDS)[:8], "seed179x"]  # The last: Nesterov's momentum in tensors with gaps.


def train(path, drawn, *callbacks):
    torch.manual_seed(drawn["seed"])
    recorder = PathRecorder()
    trainer = make_trainer(path, *callbacks, recorder, **drawn["trainer"])
    loader = DataLoader(TensorDataset(*drawn["data"]), batch_size=8, shuffle=True)
    trainer.fit(drawn["model"], loader)
    state = [o.state_dict() for o in trainer.optimizers]
    everything = {
        "path": [recorder.starts, recorder.stops, recorder.buffers],
        "optimizers": state,
        "metrics": {k: v for k, v in trainer.callback_metrics.items() if k == "train_loss"},
        "random": torch.random.get_rng_state(),
        "gradients": [p.grad for p in drawn["model"].parameters()],
    }
    return everything, recorder


class Credits(pl.Callback):
    """Keeps the credit of every weight after each measured step."""

    def __init__(self, lca):
        self.lca, self.credits, self.allocations = lca, [], []

    def note(self):
        last = self.lca.last
        if last is not None and (not self.allocations or last is not self.allocations[-1]):
            self.allocations.append(last)

    def on_train_batch_end(self, *args):
        self.note()

    def on_train_end(self, *args):
        self.note()


@pytest.mark.filterwarnings("ignore:LCA. .*round")  # Half-precision weights are warned of.
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # Once in a process, by Adagrad.
@pytest.mark.parametrize("seed", matrix(SEEDS, QUICK))
def test_a_random_training_is_credited_as_by_the_twin(tmp_path, seed):
    plain, recorder = train(tmp_path, case(seed))
    drawn = case(seed)
    print({k: v for k, v in drawn.items() if k not in ("data", "lca")}, drawn["lca"])
    lca = LCACallback(**drawn["lca"], track_parameters=True)
    credits = Credits(lca)
    measured, _ = train(tmp_path, drawn, lca, credits)
    assert not list(differences(plain, measured)), "measuring changed training"

    asked, history = drawn["lca"], lca.history
    fresh = case(seed)["model"]
    precision = drawn["trainer"]["precision"]
    dtypes = {"64-true": torch.float64, "bf16-true": torch.bfloat16}
    dtype = dtypes.get(precision, torch.float32)
    autocast = torch.bfloat16 if precision == "bf16-mixed" else None
    twin = Twin(fresh, asked["probe"], asked["probe_mode"], asked["seed"], dtype, autocast)
    parameters = {n: p for n, p in fresh.named_parameters()}
    chosen = selected(asked, list(parameters))
    trained = [n for n in chosen if parameters[n].requires_grad]
    groups = {n: g for n, g in groups_of(fresh, asked["group_by"]).items() if n in chosen}
    one = {n: np.ones(parameters[n].shape) for n in chosen}
    sizes = sum_of_groups(groups, one)
    assert dict(zip(history.groups, history.sizes)) == sizes
    chords = list(recorder.chords(asked["every_n_steps"]))
    assert len(history) == len(credits.allocations) == len(chords)
    previous = None
    for t, (start, stop, buffers) in enumerate(chords):
        # What is left out is a constant.
        start = {n: w if n in chosen else stop[n] for n, w in start.items()}
        want = wanted(history, t, asked, twin, (start, stop, buffers), trained)
        everything = sum(s.sum() for s in want.slack.values()) + 2 * want.loss_slack

        got = credits.allocations[t].values
        assert set(got) == set(trained)
        for name in trained:
            off = np.abs(got[name].double().numpy() - want.credit[name])
            assert (off <= want.slack[name]).all(), (t, name, off.max())
        near(history.loss_before[t], want.before, want.loss_slack)
        near(history.loss_after[t], want.after, want.loss_slack)
        near(history.residual[t], want.residual, everything)

        credit, slack = (sum_of_groups(groups, a) for a in (want.credit, want.slack))
        for g, name in enumerate(history.groups):
            near(history.allocated[t, g], credit[name], slack[name] + 1e-15)
        count_signs(history, t, groups, sizes, want)

        drift = 0.0 if previous is None else want.before - previous.after
        both = want.loss_slack + (previous or want).loss_slack
        near(history.drift[t], drift, both)
        if "order" in history.breakdowns:
            check_orders(history, t, groups, want)
        if "part" in history.breakdowns:
            check_parts(history, t, groups, twin, start, recorder.updates[t], want)
        if history.oscillation is not None:
            # The gradient at the end of a step that is halved without a tolerance is let go of.
            has_end = asked["tolerance"] is not None or history.splits[t] == 1
            check_turns(history, t, groups, trained, previous, want, has_end)
        previous = want
        if asked["tolerance"] is not None:
            check_refinement(history, t, asked, twin, (start, stop, buffers), everything)
    booked = history.allocated.sum() + history.residual.sum() + history.drift.sum()
    size = max(1.0, np.abs(history.loss_after).max())
    near(booked, history.loss_after[-1] - history.loss_before[0], 1e-14 * len(chords) * size)


def wanted(history, t, asked, twin, segment, trained):
    """Measures a segment by the rule that was asked for, on the panels that were taken."""
    rule = asked["quadrature"]
    refines = asked["tolerance"] is not None or history.splits[t] > 1
    if rule in CLOSED:
        plain = twin.measure(*segment, RULES["trapezoid"], trained)
        off = sum(s.sum() for s in plain.slack.values()) + 2 * plain.loss_slack
        # Where nothing is left, nothing tells.
        is_shared = history.raw_residual[t] != history.residual[t] or plain.residual == 0
        if rule == "closed_trapezoid" or is_shared:
            near(history.raw_residual[t], plain.residual, off)
            assert rule == "closed_trapezoid" or abs(plain.residual) <= much(history, t) + off
            return plain.closed()
        assert abs(plain.residual) >= much(history, t) - off
        rule = "simpson"
    return twin.measure(*segment, simpson(history.splits[t]) if refines else RULES[rule], trained)


def much(history, t):
    """What an adaptive rule does not share out in a step: of the first, nothing is."""
    sizes = np.abs(history.allocated[:t]).sum(1)
    mean = 0.0 if t == 0 else sizes[0]
    for size in sizes[1:]:
        mean = 0.9 * mean + 0.1 * size
    return 0.05 * mean


def near(got, want, slack):
    assert abs(got - want) <= slack, (
        f"{got!r} is {abs(got - want):.3g} off {want!r}, not {slack:.3g}"
    )


def count_signs(history, t, groups, sizes, want):
    """Compares counts where rounding cannot turn a sign; a weight at rest is neither."""
    sure_help = {n: c < -want.slack[n] for n, c in want.credit.items()}
    sure_hurt = {n: c > want.slack[n] for n, c in want.credit.items()}
    unsure = {n: (m != 0) & ~sure_help[n] & ~sure_hurt[n] for n, m in want.motion.items()}
    helped, hurt, open_ = (sum_of_groups(groups, a) for a in (sure_help, sure_hurt, unsure))
    for g, name in enumerate(history.groups):
        helping, hurting = (
            round(c[t, g] * sizes[name]) for c in (history.helping, history.hurting)
        )
        assert helped[name] <= helping <= helped[name] + open_[name], name
        assert hurt[name] <= hurting <= hurt[name] + open_[name], name
        assert helping + hurting <= helped[name] + hurt[name] + open_[name], name


def check_refinement(history, t, asked, twin, segment, slack):
    """The tolerance is met, or every split was used, or the integral has come to rest short of it.

    Half the panels would not have done. At rest, two doublings in a row change what is left by less
    than a tenth of it.
    """
    panels, residual = history.splits[t], abs(history.residual[t])
    assert panels & (panels - 1) == 0
    assert panels <= asked["max_splits"]
    if history.converged[t]:
        assert residual <= asked["tolerance"] + slack
    else:
        assert residual >= asked["tolerance"] - slack
        if 2 * panels <= asked["max_splits"]:
            left = [twin.residual(*segment, simpson(panels // n)) for n in (4, 2, 1)]
            for before, after in pairwise(left):
                assert abs(after - before) < 0.1 * abs(after) + slack
    if panels > 1:
        coarser = twin.residual(*segment, simpson(panels // 2))
        assert abs(coarser) >= asked["tolerance"] - slack


def check_orders(history, t, groups, want):
    """First order is the gradient at the start times the motion, curvature the rest of credit."""
    first = {n: want.first[n] * m for n, m in want.motion.items()}
    slack = {n: want.errors[n] * np.abs(m) + want.slack[n] for n, m in want.motion.items()}
    assert history.breakdowns["order"].names == ("first_order", "curvature")
    found = history.breakdowns["order"].allocated[t]
    first, slack = (sum_of_groups(groups, a) for a in (first, slack))
    credit = sum_of_groups(groups, want.credit)
    for g, name in enumerate(history.groups):
        near(found[g, 0], first[name], slack[name] + 1e-15)
        near(found[g, 1], credit[name] - first[name], 2 * slack[name] + 1e-15)


def check_parts(history, t, groups, twin, start, update, want):
    """Parts are those of the step that the twin takes with the gradient of the probe."""
    part = history.breakdowns["part"]
    # By the probe, noise, by an unknown step, by a decay that is decoupled.
    credits = {n: np.zeros((4, *c.shape)) for n, c in want.credit.items()}
    slacks = {n: np.zeros((2, *c.shape)) for n, c in want.credit.items()}
    (settings, _), *others = update.groups
    assert not others
    decay, is_decoupled = settings.get("weight_decay", 0.0), update.kind is torch.optim.AdamW
    if "step" in part.names:
        for n, credit in want.credit.items():
            credits[n][2], slacks[n][1] = credit, want.slack[n]
    else:
        split = twin.parts(start, update, want)
        for n in groups.keys() & update.gradients.keys():
            by_probe, off_probe, by_own, off_own = (motions[n] for motions in split)
            mean = want.mean[n]
            credits[n][0], credits[n][1] = by_probe * mean, (by_own - by_probe) * mean
            slacks[n][0] = off_probe * (np.abs(mean) + want.mean_slack[n])
            slacks[n][0] += np.abs(by_probe) * want.mean_slack[n]
            slacks[n][1] = off_own * (np.abs(mean) + want.mean_slack[n])
            slacks[n][1] += np.abs(by_own) * want.mean_slack[n]
            credits[n][3] = -settings["lr"] * decay * start[n].double().numpy() * mean
    found = part.allocated[t]
    np.testing.assert_allclose(found.sum(1), history.allocated[t], rtol=1e-12, atol=1e-15)
    of = {
        kind: sum_of_groups(groups, {n: a[i] for n, a in arrays.items()})
        for kind, arrays, i in (
            *(("probe", credits, 0), ("noise", credits, 1), ("step", credits, 2)),
            ("decay", credits, 3),
            *(("off", slacks, 0), ("own", slacks, 1)),
        )
    }
    credit, slack = (sum_of_groups(groups, a) for a in (want.credit, want.slack))
    for g, name in enumerate(history.groups):
        off, own = of["off"][name] + 1e-15, of["own"][name] + 1e-15
        near(found[g, :3].sum(), of["probe"][name], off)
        near(found[g, 3], of["noise"][name], off + own)
        if is_decoupled or not decay:
            near(found[g, 2], of["decay"][name], off if decay else 0)
        if "step" in part.names:
            near(found[g, 4], of["step"][name], own)
        explained = of["probe"][name] + of["noise"][name] + of["step"][name]
        near(found[g, -1], credit[name] - explained, own + slack[name])


def check_turns(history, t, groups, trained, previous, want, has_end):
    """Shares are of the weights whose signs are sure; cosines are off by what gradients are."""
    found = history.oscillation.allocated[t]
    motion, first, last = want.motion, want.first, want.last
    for g, name in enumerate(history.groups):
        at = {n: groups[n] == name for n in trained}

        def of(arrays, at=at):
            return np.concatenate([arrays[n][here].ravel() for n, here in at.items()])

        d, a, b, off = of(motion), of(first), of(last), of(want.errors)
        before = np.zeros_like(d) if previous is None else of(previous.motion)
        moved, turned = (d * before != 0).sum(), (d * before < 0).sum()
        np.testing.assert_allclose(found[g, 0], turned / moved if moved else np.nan, rtol=1e-6)
        sines = []
        if not has_end:
            assert np.isnan(found[g, [1, 3]]).all()
        for slope, cosine in ((a, found[g, 2]), (b, found[g, 3]))[: 1 + has_end]:
            sines.append(2 * np.linalg.norm(off) / np.linalg.norm(slope) if slope.any() else np.inf)
            if sines[-1] < 1 and d.any():
                true = -(d @ slope) / np.linalg.norm(d) / np.linalg.norm(slope)
                near(cosine, true, sines[-1] + 1e-5)
        sure = (np.abs(a) > off) & (np.abs(b) > off)
        steep, flipped = sure.sum(), (sure & (a * b < 0)).sum()
        unsure = (~sure & ((a != 0) | (b != 0))).sum()
        if steep and has_end:
            assert flipped <= found[g, 1] * (steep + unsure) * (1 + 1e-6) + 1e-9, name
            assert found[g, 1] <= (flipped + unsure) / (steep + unsure) + 1e-6, name
