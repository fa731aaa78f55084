"""Signals wait for the end of what must not be interrupted, and none is lost."""

import os
import signal
import threading

import pytest
import torch
from support.models import Classifier, pl, toy_loader, unrecorded
from support.training import make_trainer

from lightning_lca import LCACallback
from lightning_lca.runtime import signals
from lightning_lca.runtime.signals import defer_signals


@pytest.fixture
def heard(monkeypatch):
    """Notes the two signals of users, and puts all handlers back afterwards."""
    numbers = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in numbers}
    came = []
    for number in numbers[:2]:
        signal.signal(number, lambda n, frame: came.append(n))
    yield came
    for number, handler in before.items():
        signal.signal(number, handler)


def send(*numbers):
    for number in numbers:
        os.kill(os.getpid(), number)


def test_a_signal_is_heard_once_and_after_the_body(heard):
    with defer_signals():
        send(signal.SIGUSR1, signal.SIGUSR1)
        assert heard == []
    assert heard == [signal.SIGUSR1]
    send(signal.SIGUSR1)
    assert heard == [signal.SIGUSR1] * 2


def test_ctrl_c_comes_out_of_the_body_and_keeps_no_other_from_being_heard(heard):
    finished = []

    @defer_signals()
    def body():
        send(signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
        finished.append(True)

    with pytest.raises(KeyboardInterrupt):
        body()
    assert finished
    assert heard == [signal.SIGUSR1, signal.SIGUSR2]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_error_of_the_body_stays_visible_below_a_ctrl_c(heard):
    @defer_signals()
    def body():
        send(signal.SIGINT)
        raise ValueError("of the body")

    with pytest.raises(KeyboardInterrupt) as caught:
        body()
    assert isinstance(caught.value.__context__, ValueError)


def test_a_signal_that_comes_again_is_let_through_where_the_body_hangs(heard, monkeypatch):
    monkeypatch.setattr(signals, "PATIENCE", 0.0)

    @defer_signals()
    def body():
        for _ in range(10**5):
            send(signal.SIGINT)
        pytest.fail("The body went on.")

    with pytest.raises(KeyboardInterrupt):
        body()


def test_a_handler_that_the_body_sets_stays(heard):
    with defer_signals():
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN


def test_nothing_is_touched_outside_the_main_thread(heard):
    seen = []

    def body():
        before = signal.getsignal(signal.SIGINT)
        with defer_signals():
            seen.append(signal.getsignal(signal.SIGINT) is before)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [True]


def test_a_checkpoint_that_a_signal_saves_while_the_probe_runs_has_the_weights_of_training(
    tmp_path, heard
):
    """As Lightning's handler does on SLURM, shortly before a job ends."""
    saved, trained = {}, {}

    def loss_fn(module, batch):
        send(signal.SIGUSR1)  # While weights are displaced, say.
        return unrecorded(module.training_step(batch, 0))

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, module, *args):
            trained[trainer.global_step] = module.net[0].weight.detach().clone()

    lca = LCACallback(loss_fn=loss_fn)
    trainer = make_trainer(tmp_path, Watch(), lca, max_steps=5)

    def save(number, frame):
        trainer.save_checkpoint(tmp_path / "signal.ckpt")
        state = torch.load(tmp_path / "signal.ckpt", weights_only=False)
        saved.setdefault(trainer.global_step, []).append(state["state_dict"]["net.0.weight"])

    signal.signal(signal.SIGUSR1, save)
    trainer.fit(Classifier(), toy_loader())
    assert saved.keys() >= set(range(1, 6))
    for step, weight in trained.items():
        assert all(torch.equal(s, weight) for s in saved[step]), step
