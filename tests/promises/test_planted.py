"""What is planted in a real training is among its findings, and a sham of it is not."""

from functools import partial

import pytest
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from support.models import Classifier, Validated, mlp
from support.training import fit
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader, TensorDataset

from lightning_lca import History
from lightning_lca.record import summary

pytestmark = pytest.mark.slow

STEPS = 200


class Climbing(Classifier):
    """Ascends on its middle layer, or descends on it just as slowly."""

    def __init__(self, up):
        super().__init__(mlp())
        self.up = up

    def configure_optimizers(self):
        climbing = list(self.net[2].parameters())
        rest = [p for p in self.parameters() if all(p is not c for c in climbing)]
        slow = {"params": climbing, "maximize": self.up, "lr": 0.003}
        return torch.optim.SGD([{"params": rest}, slow], lr=0.05)


def labels_by_chance(seed):
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(32, 12, generator=random)
    return TensorDataset(x, torch.randint(4, (32,), generator=random))


def found(run, kind):
    return {f.where for f in run.lca.findings() if f.kind == kind}


@pytest.mark.parametrize(("up", "hurting"), [(True, {"net.2"}), (False, set())])
def test_a_layer_that_climbs_hurts_and_everybody_is_told(tmp_path, up, hurting):
    logger = {"logger": TensorBoardLogger(tmp_path, name="", version="run")}
    run = fit(tmp_path, model=partial(Climbing, up), steps=STEPS, trainer=logger)
    assert found(run, "hurts") == hurting
    assert run.lca.history.loss_after[-1] < run.lca.history.loss_before[0]
    read = History.load(run.lca.log_dir)
    assert read.summary() == run.lca.summary()
    assert ("net.2 raises the loss" in read.summary()) == up
    events = EventAccumulator(str(run.lca.log_dir), {"tensors": 0}).Reload()
    (text,) = events.Tensors("lca/summary/text_summary")[-1].tensor_proto.string_val
    assert text.decode() == summary.markdown(run.lca.history, run.lca.findings())
    assert ("raises the loss" in text.decode()) == up


@pytest.mark.parametrize(
    ("validation", "overfitting"), [(1, {"net.0", "net.2", "net.4"}), (0, set())]
)
def test_what_is_learned_of_random_labels_overfits(tmp_path, validation, overfitting):
    train, val = labels_by_chance(0), labels_by_chance(validation)
    order = torch.Generator().manual_seed(0)
    run = fit(
        tmp_path,
        model=lambda: Validated(mlp(), partial(torch.optim.SGD, lr=0.05)),
        data=(DataLoader(train, 8, shuffle=True, generator=order), DataLoader(val, 32)),
        steps=STEPS,
        probe={"train": [train[:]], "val": [val[:]]},
    )
    assert found(run, "overfits") == overfitting
    told = run.lca.summary().split("probes 'train' and 'val' together")
    assert len(told) == 1 + bool(overfitting)
    assert all(f"{layer} overfits" in told[-1] for layer in overfitting)
