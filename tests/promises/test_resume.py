"""A training that was interrupted and resumed is, to the callback too, the unbroken one."""

import numpy as np
import pytest
import torch
from support.assertions import assert_same_history, scalars
from support.models import Classifier, Resumable, mlp, pl, toy_loader
from support.training import fit
from torch import nn

from lightning_lca import History

ModelCheckpoint = pl.callbacks.ModelCheckpoint
TensorBoardLogger = pl.loggers.TensorBoardLogger

pytestmark = [
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need"),
]
OLD = tuple(map(int, pl.__version__.split(".")[:2])) < (2, 5)
STEPS = 26  # Of batches of 16 in 96 samples: epochs of 6 steps.
EXACT = ("steps", "helping", "hurting", "loss_before", "loss_after", "residual", "drift", "splits")


class Clamp(pl.Callback):
    """Changes weights between steps, so that there is drift."""

    def on_train_batch_end(self, trainer, module, *args):
        with torch.no_grad():
            for p in module.parameters():
                p.clamp_(-0.3, 0.3)


def train(path, version, steps, resume=None, save_at=(), **options):
    arguments = {"probe": list(toy_loader(shuffle=False))[:2]} | options
    saves = [
        ModelCheckpoint(str(path / version), f"{k}-{{step}}", every_n_train_steps=k, save_top_k=-1)
        for k in save_at
    ]
    for k, save in zip(save_at, saves):
        save.CHECKPOINT_NAME_LAST = f"last{k}"
    logger = TensorBoardLogger(path, name="logs", version=version)
    return fit(
        path,
        Clamp(),
        *saves,
        model=lambda: Classifier(nn.Sequential(nn.BatchNorm1d(12), mlp())),
        data=Resumable,
        steps=steps,
        run_seed=5,
        resume=resume,
        trainer={"logger": logger, "enable_checkpointing": bool(saves)},
        **arguments,
    )


@pytest.mark.parametrize(
    "into", ["the same directory", pytest.param("a new directory", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
    ("every", "stop"),
    [
        *(pytest.param(1, stop, marks=pytest.mark.slow) for stop in (1, 4, 9)),
        pytest.param(3, 6, marks=pytest.mark.slow),
        *((3, 7), (5, 22)),
    ],
    ids=str,
)
def test_a_resumed_training_has_the_history_of_the_unbroken_one(tmp_path, every, stop, into):
    options = {
        "every_n_steps": every,
        "track_parameters": True,
        "neurons": True,
        "probe": {
            name: list(toy_loader(shuffle=False))[:n] for n, name in ((1, "one"), (2, "two"))
        },
    }
    unbroken, _, whole = train(tmp_path, "unbroken", STEPS, save_at=[stop], **options)
    first, *_ = train(tmp_path, "broken", stop + 2, save_at=[stop], **options)
    assert len(first.history) > 0 or stop < every
    (checkpoint,) = (tmp_path / "broken").glob(f"{stop}-*step={stop}.ckpt")
    version = "broken" if into == "the same directory" else "resumed"
    resumed, _, trainer = train(tmp_path, version, STEPS, checkpoint, save_at=[stop], **options)
    assert trainer.global_step == whole.global_step == STEPS
    ends = [t.lightning_module.parameters() for t in (trainer, whole)]
    if OLD and not all(torch.equal(a, b) for a, b in zip(*ends)):
        pytest.skip("Lightning below 2.5 does not resume as if unbroken: it repeats batches")
    for probe in ("one", "two"):
        mine, theirs = resumed.histories[probe], unbroken.histories[probe]
        assert np.array_equal(mine.steps, theirs.steps)
        assert np.array_equal(mine.residual, theirs.residual)
        assert np.array_equal(mine.drift, theirs.drift)
        assert np.abs(theirs.drift).max() > 0, "the clamping is seen"
        assert np.allclose(mine.allocated, theirs.allocated, rtol=1e-6, atol=1e-9)
        read = [History.load(lca.log_dir, probe) for lca in (resumed, unbroken)]
        assert_same_history(*read, rows_alone=OLD)
    for name, total in unbroken.totals.items():
        assert torch.equal(resumed.totals[name], total)
    if OLD:  # Its count of batches is one behind after resuming, and so are the loggers' x.
        return
    expected, found = scalars(unbroken.log_dir), scalars(resumed.log_dir)
    assert expected.keys() == found.keys()
    for tag, values in found.items():
        late = {k: v for k, v in values if k >= stop + 2}
        wanted = {k: v for k, v in expected[tag] if k >= stop + 2}
        assert late == pytest.approx(wanted, rel=1e-5, abs=1e-7), tag


def test_an_adaptive_rule_goes_on_from_what_it_compares_with(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_lca.training.meter._MUCH", 0.005)
    options = {"quadrature": "adaptive", "probe": list(toy_loader(shuffle=False))[:1]}
    unbroken, *_ = train(tmp_path, "unbroken", STEPS, save_at=[9], **options)
    train(tmp_path, "broken", 11, save_at=[9], **options)
    (checkpoint,) = (tmp_path / "broken").glob("9-*step=9.ckpt")
    resumed, *_ = train(tmp_path, "broken", STEPS, checkpoint, save_at=[9], **options)
    mine, theirs = resumed.history, unbroken.history
    middles = theirs.raw_residual == theirs.residual
    assert 1 < middles.sum() < STEPS - 1
    for column in ("steps", "residual", "raw_residual", "drift"):
        assert np.array_equal(getattr(mine, column), getattr(theirs, column)), column


def test_a_training_that_ended_in_mid_chord_goes_on_as_if_it_had_not(tmp_path):
    options = {"every_n_steps": 3, "track_parameters": True}
    unbroken, *_ = train(tmp_path, "unbroken", 14, save_at=[7], **options)
    ended, *_ = train(tmp_path, "ended", 7, save_at=[7], **options)
    assert ended.history.steps.tolist() == [3, 6, 7]
    (checkpoint,) = (tmp_path / "ended").glob("*.ckpt")
    resumed, *_ = train(tmp_path, "ended", 14, checkpoint, **options)
    assert resumed.history.steps.tolist() == [3, 6, 9, 12, 14]
    assert np.array_equal(resumed.history.residual, unbroken.history.residual)
    assert np.array_equal(resumed.history.drift, unbroken.history.drift)
    read = History.load(resumed.log_dir), History.load(unbroken.log_dir)
    assert_same_history(*read, rows_alone=OLD)


def test_the_state_is_small_and_loads_without_trust(tmp_path):
    train(tmp_path, "v", 12, save_at=[12])
    (file,) = (tmp_path / "v").glob("*.ckpt")
    checkpoint = torch.load(file, weights_only=True)
    (state,) = [s for name, s in checkpoint["callbacks"].items() if "LCACallback" in name]
    torch.save(state, tmp_path / "state")
    assert (tmp_path / "state").stat().st_size < 3000
    assert state["open"] is None


def test_without_its_record_a_resumed_history_starts_at_the_checkpoint_and_says_so(tmp_path):
    first, *_ = train(tmp_path, "gone", 12, save_at=[8])
    (checkpoint,) = (tmp_path / "gone").glob("*.ckpt")
    for file in first.log_dir.glob("*tfevents*"):
        file.unlink()
    with pytest.warns(UserWarning, match="goes on without what was measured before step 8"):
        resumed, *_ = train(tmp_path, "new", 16, checkpoint)
    assert resumed.history.steps.tolist() == list(range(9, 17))
    totals = scalars(resumed.log_dir)["lca/total_cum"]
    change = resumed.history.allocated.sum() + first.history.allocated[:8].sum()
    assert dict(totals)[max(dict(totals))] == pytest.approx(change, rel=1e-5)


def test_a_checkpoint_of_other_layers_is_not_mixed_in(tmp_path):
    train(tmp_path, "old", 8, save_at=[8], neurons=True)
    (checkpoint,) = (tmp_path / "old").glob("*.ckpt")
    with pytest.warns(UserWarning, match="that was of other layers, or with other settings"):
        resumed, *_ = train(tmp_path, "new", 12, checkpoint)
    assert resumed.history.steps.tolist() == [9, 10, 11, 12]
    assert History.load(resumed.log_dir).steps.tolist() == [9, 10, 11, 12]
