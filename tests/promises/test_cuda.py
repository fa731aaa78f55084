"""What only a GPU can show: the same promises there, and that nothing waits for it."""

import warnings
from contextlib import contextmanager

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from support.models import Classifier, mlp, toy_loader
from support.training import Guarded, Trail, fit
from torch import nn

from lightning_lca import LCACallback
from lightning_lca.measure import captured
from lightning_lca.probe import recording

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
PRECISIONS = ["32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "64-true"]


def convnet():
    """A network of every kind of layer that has kernels of its own."""
    return nn.Sequential(
        nn.Unflatten(1, (3, 4)),
        nn.Conv1d(3, 8, 3, padding=1),
        nn.BatchNorm1d(8),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Flatten(),
        nn.Linear(32, 32),
        nn.LayerNorm(32),
        nn.GELU(),
        nn.Linear(32, 4),
    )


class Steady(Classifier):
    """Steps that half precision can take, too."""

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01, eps=1e-3)


@pytest.fixture(autouse=True)
def _deterministic(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def train(
    path, *callbacks, net=convnet, steps=12, samples=96, dtype=torch.float32, kind=Steady, **trainer
):
    data = toy_loader(samples=samples, dtype=dtype)
    on_gpu = {"accelerator": "gpu", "devices": 1} | trainer
    run = {"data": data, "steps": steps, "run_seed": 11, "measured": False, "trainer": on_gpu}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fit(path, *callbacks, model=lambda: kind(net()), **run).module


@pytest.mark.parametrize("precision", PRECISIONS)
def test_training_on_a_gpu_is_bitwise_the_same(tmp_path, precision):
    dtype = torch.float64 if precision == "64-true" else torch.float32
    paths, models, randoms = [], [], []
    lca = LCACallback(figures=False, neurons=True, track_parameters=True)
    for callbacks in ([], [lca]):
        path = Trail()
        models.append(train(tmp_path, *callbacks, path, precision=precision, dtype=dtype))
        paths.append(path.points)
        randoms.append((torch.cuda.get_rng_state(), torch.get_rng_state()))
    for a, b in zip(*paths, strict=True):
        assert all(map(torch.equal, a.values(), b.values()))
    for a, b in zip(*(list(m.parameters()) + list(m.buffers()) for m in models), strict=True):
        assert torch.equal(a, b)
        assert a.grad is None or torch.equal(a.grad, b.grad)
    assert all(map(torch.equal, *randoms))
    history = lca.history
    assert len(history) == 12
    assert np.isfinite(history.allocated).all()
    change = history.loss_after - history.loss_before
    assert np.allclose(history.allocated.sum(1) + history.residual, change, rtol=0, atol=1e-12)


class Counts(captured.Captured):
    """Counts what is launched as one."""

    launches = 0

    def launch(self):
        Counts.launches += 1
        return super().launch()


@pytest.fixture
def launches(monkeypatch):
    monkeypatch.setattr(captured, "Captured", Counts)
    monkeypatch.setattr(Counts, "launches", 0)
    return Counts


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "64-true"])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"quadrature": "closed_trapezoid", "neurons": True},
        {"track_parameters": True, "breakdown": "order", "oscillation": True},
    ],
    ids=str,
)
def test_one_launch_finds_what_many_do(tmp_path, monkeypatch, launches, precision, arguments):
    dtype = torch.float64 if precision == "64-true" else torch.float32
    histories = []
    for way in ("one", "many"):
        lca = LCACallback(figures=False, **arguments)
        train(tmp_path / way, lca, steps=24, precision=precision, dtype=dtype)
        histories.append(lca.history)
        if way == "one":
            assert launches.launches >= 12
            monkeypatch.setattr(Counts, "free", staticmethod(lambda device: 0))
            launches.launches = 0
    assert launches.launches == 0
    one, many = (h.rows.arrays for h in histories)
    for name in one:
        if name != "seconds":
            assert np.array_equal(one[name], many[name], equal_nan=True), name


class Masks(Steady):
    def training_step(self, batch, batch_idx):
        x, y = batch
        mask = y > 0  # How many there are, the host asks the device.
        return nn.functional.cross_entropy(self.net(x)[mask], y[mask])


@pytest.mark.parametrize("tries", [False, True])
def test_what_cannot_be_captured_is_measured_as_before(tmp_path, monkeypatch, launches, tries):
    if tries:  # Of what is not foreseen, too, nothing must be left behind.
        monkeypatch.setattr(recording, "_waits", lambda *_: False)
    failed = []
    capture = Counts.__init__

    def counted(self, *args):
        try:
            capture(self, *args)
        except captured.NotCapturableError as error:
            failed.append(str(error))
            raise

    monkeypatch.setattr(Counts, "__init__", counted)
    paths, lca, reserved = [], LCACallback(figures=False), []
    for callbacks in ([], [lca]):
        trail = Trail()
        train(tmp_path, *callbacks, trail, steps=30, kind=Masks)
        paths.append(trail.points)
        reserved.append(torch.cuda.memory_reserved())
    assert launches.launches == 0
    assert len(failed) == tries, failed
    assert len(lca.history) == 30
    for a, b in zip(*paths, strict=True):
        assert all(map(torch.equal, a.values(), b.values()))
    stream = torch.cuda.current_stream()
    assert stream == torch.cuda.default_stream()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= max(reserved[0], 2**26)
    monkeypatch.undo()
    monkeypatch.setattr(captured, "Captured", Counts)
    Counts.launches = 0
    train(tmp_path, LCACallback(figures=False), steps=24)  # And captures go on.
    assert Counts.launches >= 12


@pytest.mark.parametrize("rule", ["simpson", "midpoint", "trapezoid"])
def test_a_gpu_gives_the_history_of_the_cpu(tmp_path, rule):
    batch = [next(iter(toy_loader(64, shuffle=False, dtype=torch.float64)))]
    histories = []
    for device in ("gpu", "cpu"):
        lca = LCACallback(probe=batch, quadrature=rule, figures=False, neurons=True)
        trainer = {"precision": "64-true", "accelerator": device, "dtype": torch.float64}
        train(tmp_path / device, lca, net=mlp, **trainer)
        histories.append(lca.history)
    gpu, cpu = histories
    largest = np.abs(cpu.allocated).max()
    assert np.allclose(gpu.allocated, cpu.allocated, rtol=0, atol=1e-10 * largest)
    assert np.allclose(gpu.neurons.allocated, cpu.neurons.allocated, rtol=0, atol=1e-10 * largest)
    assert np.array_equal(gpu.helping, cpu.helping)
    assert np.array_equal(gpu.hurting, cpu.hurting)
    assert np.allclose(gpu.residual, cpu.residual, rtol=0, atol=1e-10)


def test_refinement_converges_on_a_gpu(tmp_path):
    lca = LCACallback(tolerance=1e-7, figures=False, every_n_steps=4)
    train(tmp_path, lca, net=mlp, precision="64-true", dtype=torch.float64)
    assert lca.history.converged.all()
    assert np.abs(lca.history.residual).max() <= 1e-7


@contextmanager
def no_waiting():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"neurons": True, "track_parameters": True},
        {"quadrature": "closed_trapezoid"},
        {"breakdown": True, "oscillation": True, "probe_batches": 4},
    ],
    ids=str,
)
def test_nothing_waits_for_the_device_between_logs(tmp_path, arguments):
    lca = Guarded(no_waiting, log_every_n_steps=30, figures=False, **arguments)
    # In one epoch: at the start of each the user's code runs to audit the recording.
    train(tmp_path, lca, steps=30, samples=16 * 30)
    assert len(lca.history) == 30
    with pytest.raises(RuntimeError, match="synchronizing"), no_waiting():
        torch.ones(1, device="cuda").item()  # The mode is able to see it.


def test_weights_changed_between_steps_are_seen_on_a_gpu(tmp_path):
    class Clamp(pl.Callback):
        def on_train_batch_start(self, trainer, module, *args):
            if trainer.global_step == 5:
                module.net[0].weight.data.mul_(0.5)

    lca = LCACallback(figures=False)
    train(tmp_path, lca, Clamp(), net=mlp)
    assert np.flatnonzero(lca.history.drift).tolist() == [5]


def test_memory_beyond_three_copies_is_a_gradient_and_small_change(tmp_path):
    def wide():
        return nn.Sequential(nn.Linear(12, 4096), nn.ReLU(), *layers(), nn.Linear(4096, 4))

    def layers():
        return [layer for _ in range(4) for layer in (nn.Linear(4096, 4096), nn.ReLU())]

    weights = 4 * sum(p.numel() for p in wide().parameters())
    peaks = []
    for callbacks in ([], [LCACallback(figures=False)]):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model = train(tmp_path, *callbacks, net=wide, steps=4)
        peaks.append((torch.cuda.max_memory_allocated() - before) / weights)
        del model
    added = peaks[1] - peaks[0]
    assert added < 4.6, f"{peaks[0]:.2f} copies plain, {peaks[1]:.2f} measured"
