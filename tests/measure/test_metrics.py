import numpy as np
import pytest
import torch
from torchmetrics import MetricCollection

from lightning_lca import GroupCredit, HelpingFraction, HurtingFraction

SIZES = [7, 0, 1000]


def rows(steps=9):
    generator = np.random.default_rng(0)
    helping = generator.integers(0, np.array(SIZES) // 2 + 1, (steps, 3))
    return generator.normal(size=(steps, 3)), helping


def filled(update_in_one):
    credit, helping = rows()
    metrics = GroupCredit(3), HelpingFraction(SIZES), HurtingFraction(SIZES)
    for metric, table in zip(metrics, (credit, helping, helping)):
        for part in [table] if update_in_one else table:
            metric.update(torch.from_numpy(part))
    return metrics


@pytest.mark.parametrize("update_in_one", [True, False])
def test_accumulators_agree_with_numpy(update_in_one):
    credit, helping = rows()
    summed, helped, hurt = filled(update_in_one)
    assert summed.compute().numpy() == pytest.approx(credit.sum(0), abs=1e-12)
    fraction = helping.mean(0) / np.maximum(SIZES, 1)
    assert helped.compute().numpy() == pytest.approx(fraction)
    assert hurt.compute().numpy() == pytest.approx(fraction)


def test_states_survive_a_checkpoint_and_go_on():
    for old, new in zip(
        filled(True), (GroupCredit(3), HelpingFraction(SIZES), HurtingFraction(SIZES))
    ):
        new.load_state_dict(old.state_dict())
        more = torch.ones(3, dtype=torch.float64)
        old.update(more)
        new.update(more)
        assert torch.equal(new.compute(), old.compute())
        old.reset()
        assert not any(getattr(old, name).any() for name in old._defaults)


def test_processes_that_hold_the_same_rows_agree_with_one():
    """What torchmetrics does between processes: gather the states, reduce each as declared."""
    for metric in filled(True):
        expected = metric.compute().clone()
        states = {name: getattr(metric, name) for name in metric._defaults}
        for name, reduction in metric._reductions.items():
            setattr(metric, name, reduction(torch.stack([states[name]] * 4)))
        metric._computed = None
        assert torch.allclose(metric.compute(), expected)


def test_they_work_in_a_collection():
    metrics = MetricCollection({"help": HelpingFraction(SIZES), "hurt": HurtingFraction(SIZES)})
    metrics.update(torch.tensor([7, 0, 500]))
    assert {k: v.tolist() for k, v in metrics.compute().items()} == {
        "help": [1.0, 0.0, 0.5],
        "hurt": [1.0, 0.0, 0.5],
    }
