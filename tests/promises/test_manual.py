"""Manual optimization: the numbers of automatic, several optimizers, steps on bare optimizers."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.models import Classifier, Gan, pl, toy_loader
from support.training import fit

from lightning_lca import History


def cross_entropy(module, batch):
    return F.cross_entropy(module.net(batch[0]), batch[1])


class ByHand(Classifier):
    """Steps its optimizer itself, through Lightning, with a closure, or bare."""

    def __init__(self, how):
        super().__init__()
        self.automatic_optimization = False
        self.how = how

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers(use_pl_optimizer=self.how != "bare")

        def closure():
            optimizer.zero_grad()
            loss = cross_entropy(self, batch)
            self.manual_backward(loss)
            return loss

        if self.how == "closure":
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()


def train(path, model, *others, **options):
    """Trains for two epochs of six batches."""
    data, epochs = toy_loader(samples=96, shuffle=False), {"max_epochs": 2, "max_steps": -1}
    return fit(path, *others, model=model, data=data, trainer=epochs, run_seed=2, **options)


@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("how", ["lightning", "closure", "bare"])
def test_by_hand_gives_the_history_of_automatic_optimization(tmp_path, how, every):
    options = {"loss_fn": cross_entropy, "every_n_steps": every}
    automatic, trained, _ = train(tmp_path, Classifier, **options)
    by_hand, module, _ = train(tmp_path, lambda: ByHand(how), **options)
    for mine, theirs in zip(module.parameters(), trained.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    for column in ("steps", "allocated", "helping", "hurting", "loss_after", "residual", "drift"):
        mine, theirs = (getattr(lca.history, column) for lca in (by_hand, automatic))
        assert np.array_equal(mine, theirs), column
    assert len(by_hand.history) == 12 // every


@pytest.mark.parametrize("bare_critic", [False, True])
@pytest.mark.parametrize("part", ["generator", "critic"])
def test_a_gan_is_measured_batch_by_batch_and_trains_as_it_would(tmp_path, part, bare_critic):
    def loss(module, batch):
        return getattr(module, f"{part}_loss")(batch[0])

    plain = train(tmp_path, lambda: Gan(bare_critic), measured=False).module
    lca, module, _ = train(tmp_path, lambda: Gan(bare_critic), loss_fn=loss, probe_batches=2)
    for mine, theirs in zip(module.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    history = lca.history
    assert history.steps.tolist() == list(range(2, 25, 2)), "two optimizers a batch"
    change = history.loss_after - history.loss_before
    assert np.abs(history.residual).max() < 2e-3 * np.abs(change).sum()
    assert (history.drift == 0).all()
    own = [g.startswith(part) for g in history.groups]
    assert history.allocated[:, own].sum() < 0, "each descends its own loss"
    assert (history.allocated != 0).any(0).all(), "and both parts move it"
    assert all(not o._optimizer_step_pre_hooks for o in module.trainer.optimizers)


def test_bare_steps_resume_at_their_own_count(tmp_path):
    class Save(pl.Callback):  # ModelCheckpoint waits for Lightning's count, which stays at 0.
        def on_train_epoch_end(self, trainer, module):
            trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}.ckpt")

    options = {"loss_fn": cross_entropy}
    whole, *_ = train(tmp_path, lambda: ByHand("bare"), Save(), **options)
    resumed, *_ = train(tmp_path, lambda: ByHand("bare"), resume=tmp_path / "0.ckpt", **options)
    assert resumed.history.steps.tolist() == whole.history.steps.tolist() == list(range(1, 13))
    assert np.array_equal(
        History.load(resumed.log_dir).loss_after, History.load(whole.log_dir).loss_after
    )


def test_an_error_lets_go_of_the_optimizers(tmp_path):
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            self.optimizers = trainer.optimizers
            assert all(o._optimizer_step_pre_hooks for o in trainer.optimizers)
            raise KeyError("mine")

    stop = Stop()
    with pytest.raises(KeyError, match="mine"):
        train(tmp_path, lambda: ByHand("bare"), stop, loss_fn=cross_entropy)
    assert all(not o._optimizer_step_pre_hooks for o in stop.optimizers)
