"""What hurts is frozen or slowed, noise is not, and training goes on as a plain one would."""

import itertools
from functools import partial

import numpy as np
import pytest
import torch
from support.models import Classifier, Resumable, mlp, pl, toy_loader
from support.training import Trail, fit, make_trainer

from lightning_lca import LCACallback, LCAFreeze
from lightning_lca.runtime.lightnings import MisconfigurationException

STEPS = 140


class Climbing(Classifier):
    """Ascends on its middle layer, or descends on it just as slowly; Adam has state to drop."""

    def __init__(self, up=True, kind=torch.optim.Adam):
        super().__init__(mlp())
        self.up, self.kind = up, kind

    def configure_optimizers(self):
        climbing = list(self.net[2].parameters())
        rest = [p for p in self.parameters() if all(p is not c for c in climbing)]
        slow = {"params": climbing, "maximize": self.up, "lr": 0.0005}
        return self.kind([{"params": rest}, slow], lr=0.003)


def train(path, freeze, *others, model=Climbing, steps=STEPS, **options):
    loader = options.pop("data", partial(toy_loader, batch_size=48))
    lca = LCACallback(figures=False, probe_batches=2, **options.pop("lca", {}))
    return fit(path, lca, freeze, *others, model=model, data=loader, steps=steps, **options)


def weights(module):
    return [p.detach().clone() for p in module.net[2].parameters()]


def test_a_layer_that_hurts_is_frozen_and_leaves_no_momentum_behind(tmp_path, caplog):
    freeze, trail = LCAFreeze(window=50), Trail()
    with caplog.at_level("INFO"):
        run = train(tmp_path, freeze, trail)
    ((layer, step),) = freeze.acted.items()
    assert layer == "net.2"
    assert step % 50 < 5
    (told,) = [r.message for r in caplog.records if "is frozen from step" in r.message]
    assert f"net.2 is frozen from step {step} on: it hurt by" in told
    frozen = list(run.module.net[2].parameters())
    assert not any(p.requires_grad for p in frozen)
    assert all(p.grad is None for p in frozen)
    state = run.trainer.optimizers[0].state
    assert not any(p in state for p in frozen)
    assert len(state) == 4, "the other layers go on"
    path = trail.points
    name = next(n for n in path[0] if n.endswith("2.weight"))
    moved = [not torch.equal(a[name], b[name]) for a, b in itertools.pairwise(path)]
    assert all(moved[: step - 1])
    assert not any(moved[step:])
    credit = run.lca.history.allocated[:, run.lca.history.groups.index("net.2")]
    assert (credit[:step] > 0).mean() > 0.9
    assert (credit[step + 1 :] == 0).all()


@pytest.mark.parametrize("options", [{}, {"layers": "net.0"}], ids=["no layer hurts", "others"])
def test_what_does_not_hurt_or_is_not_asked_for_is_left_alone(tmp_path, options):
    freeze = LCAFreeze(window=50, **options)
    plain = fit(
        tmp_path / "plain",
        model=partial(Climbing, bool(options)),
        data=partial(toy_loader, batch_size=48),
        steps=STEPS,
        measured=False,
    )
    run = train(tmp_path / "lca", freeze, model=partial(Climbing, bool(options)))
    assert freeze.acted == {}
    for a, b in zip(plain.module.parameters(), run.module.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_slowed_steps_are_that_share_of_what_the_optimizer_did(tmp_path, kind):
    """By hand: the step after the layer is slowed, from the same weights and state."""
    seen = []

    class Twice(pl.Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            if freeze.acted and not seen:
                live = next(iter(module.net[2].parameters()))
                twin = torch.nn.Parameter(live.detach().clone())
                other = kind([{"params": [twin], "maximize": True, "lr": 0.0005}], lr=0.003)
                if live in optimizer.state:
                    other.state[twin] = {
                        k: v.clone() if isinstance(v, torch.Tensor) else v
                        for k, v in optimizer.state[live].items()
                    }
                twin.grad = live.grad.clone()
                other.step()
                seen.extend([live.detach().clone(), twin.detach().clone()])

        def on_train_batch_end(self, trainer, module, *args):
            if len(seen) == 2:
                seen.append(weights(module)[0])

    freeze = LCAFreeze(scale=0.25, window=50)
    run = train(tmp_path, freeze, Twice(), model=partial(Climbing, kind=kind))
    assert list(freeze.acted) == ["net.2"]
    before, full, after = seen
    assert not torch.equal(full, before)
    torch.testing.assert_close(after, torch.lerp(before, full, 0.25), rtol=0, atol=0)
    assert all(p.requires_grad for p in run.module.parameters())
    assert not run.trainer.optimizers[0]._optimizer_step_post_hooks, "hooks are let go of"


def test_a_resumed_training_goes_on_frozen(tmp_path):
    def go(path, steps, resume=None):
        freeze = LCAFreeze(window=50)
        saver = pl.callbacks.ModelCheckpoint(
            tmp_path / "saved", every_n_train_steps=100, save_top_k=-1
        )
        run = train(
            tmp_path / path,
            freeze,
            saver,
            steps=steps,
            data=Resumable,
            resume=resume,
            trainer={"enable_checkpointing": True},
        )
        return run, freeze

    whole, first = go("whole", 120)
    (saved,) = (tmp_path / "saved").glob("*step=100*.ckpt")
    again, second = go("again", 120, saved)
    assert first.acted == second.acted
    assert list(first.acted) == ["net.2"]
    assert max(first.acted.values()) < 100
    assert not any(p.requires_grad for p in again.module.net[2].parameters())
    for a, b in zip(whole.module.parameters(), again.module.parameters(), strict=True):
        assert torch.equal(a, b)


def test_one_layer_at_least_stays(tmp_path):
    class AllClimb(Classifier):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.001, maximize=True)

    freeze = LCAFreeze(window=50)
    run = train(tmp_path, freeze, model=AllClimb)
    assert len(freeze.acted) == 2, "of three"
    assert any(p.requires_grad for p in run.module.parameters())


@pytest.mark.slow
def test_noise_acts_no_more_often_than_the_level(tmp_path):
    """Four looks at six layers of noise that keeps half of the step before, 400 runs."""
    random = np.random.default_rng(0)
    freeze = LCAFreeze(window=100)
    acted = 0
    for _ in range(400):
        noise = random.normal(0, 1, (400, 6))
        for t in range(1, 400):
            noise[t] += 0.5 * noise[t - 1]
        looks = [noise[100 * k : 100 * (k + 1)] for k in range(4)]
        acted += any(
            freeze._chosen(look, 0.05 / ((k + 1) * (k + 2)), 5) for k, look in enumerate(looks)
        )
    error = np.sqrt(0.05 * 0.95 / 400)
    assert acted / 400 < 0.05 + 3 * error


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"scale": 1.0}, "scale must be a number from 0 to below 1"),
        ({"scale": -0.1}, "scale must be a number"),
        ({"level": 0}, "level must be a number from 0 to below 1, above 0; got 0"),
        ({"level": "5 %"}, "level must be a number"),
        ({"window": 49}, "window must be a whole number of at least 50"),
        ({"window": True}, "window must be a whole number"),
    ],
)
def test_what_cannot_be_is_refused(arguments, says):
    with pytest.raises(ValueError, match=says):
        LCAFreeze(**arguments)


def test_without_what_it_needs_it_says_so(tmp_path):
    trainer = make_trainer(tmp_path, LCAFreeze())
    with pytest.raises(MisconfigurationException, match=r"the Trainer has none. Add one"):
        trainer.fit(Classifier(), toy_loader())
    with pytest.raises(MisconfigurationException, match=r"no such probe. LCACallback has None"):
        train(tmp_path, LCAFreeze(window=50, probe="val"))
    labels = {"group_by": lambda name, p: "all"}
    with pytest.raises(MisconfigurationException, match="acts on layers, and group_by='custom'"):
        train(tmp_path, LCAFreeze(window=50), lca=labels)
