"""Random small trainings against the float64 twin: 200 of them, each from its seed.

Does one fail? ``pytest tests/promises/test_fuzz.py -k seed17x`` runs it alone, and prints it.
"""

import numpy as np
import pytest
import torch
from support.assertions import differences
from support.drawn_trainings import case
from support.marks import matrix
from support.models import pl
from support.training import make_trainer
from support.twin import RULES, PathRecorder, Twin, groups_of, simpson, sum_of_groups
from torch.utils.data import DataLoader, TensorDataset

from lightning_lca import LCACallback

SEEDS = {f"seed{i}x": i for i in range(200)}
QUICK = list(SEEDS)[:8]


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
    trained = [n for n, p in fresh.named_parameters() if p.requires_grad]
    groups = groups_of(fresh, asked["group_by"])
    one = {n: np.ones(p.shape) for n, p in fresh.named_parameters()}
    sizes = sum_of_groups(groups, one)
    assert dict(zip(history.groups, history.sizes)) == sizes
    chords = list(recorder.chords(asked["every_n_steps"]))
    assert len(history) == len(credits.allocations) == len(chords)
    previous = None
    for t, (start, stop, buffers) in enumerate(chords):
        rule = RULES[asked["quadrature"]]
        if asked["tolerance"] is not None:
            rule = simpson(history.splits[t])
        want = twin.measure(start, stop, buffers, rule, trained)
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
        previous = want
        if asked["tolerance"] is not None:
            check_refinement(history, t, asked, twin, (start, stop, buffers), everything)
    booked = history.allocated.sum() + history.residual.sum() + history.drift.sum()
    near(booked, history.loss_after[-1] - history.loss_before[0], 1e-14 * len(chords))


def near(got, want, slack):
    assert abs(got - want) <= slack, (
        f"{got!r} is {abs(got - want):.3g} off {want!r}, not {slack:.3g}"
    )


def count_signs(history, t, groups, sizes, want):
    """Compares counts where rounding cannot turn a sign; a weight at rest is neither."""
    sure_help = {n: c < -want.slack[n] for n, c in want.credit.items()}
    sure_hurt = {n: c > want.slack[n] for n, c in want.credit.items()}
    unsure = {n: want.moved[n] & ~sure_help[n] & ~sure_hurt[n] for n in want.credit}
    helped, hurt, open_ = (sum_of_groups(groups, a) for a in (sure_help, sure_hurt, unsure))
    for g, name in enumerate(history.groups):
        helping, hurting = (
            round(c[t, g] * sizes[name]) for c in (history.helping, history.hurting)
        )
        assert helped[name] <= helping <= helped[name] + open_[name], name
        assert hurt[name] <= hurting <= hurt[name] + open_[name], name
        assert helping + hurting <= helped[name] + hurt[name] + open_[name], name


def check_refinement(history, t, asked, twin, segment, slack):
    """The tolerance is met, or every split was used; half the panels would not have done."""
    panels, residual = history.splits[t], abs(history.residual[t])
    assert panels & (panels - 1) == 0
    assert panels <= asked["max_splits"]
    if history.converged[t]:
        assert residual <= asked["tolerance"] + slack
    else:
        assert residual >= asked["tolerance"] - slack
        assert 2 * panels > asked["max_splits"]
    if panels > 1:
        coarser = twin.residual(*segment, simpson(panels // 2))
        assert abs(coarser) >= asked["tolerance"] - slack
