"""Copies and pickles of the callback: what they keep, what they leave behind, and their use."""

import copy
import gc
import pickle

import pytest
import torch
from support.assertions import assert_same_history
from support.models import pl, toy_loader
from support.training import fit
from torch.utils.data import DataLoader

from lightning_lca import History, LCACallback

WAYS = {"pickle": lambda lca: pickle.loads(pickle.dumps(lca)), "deepcopy": copy.deepcopy}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name, history in a.items():
        assert_same_history(history, b[name])


def held_by(value):
    """Finds everything that a value keeps alive, down to modules and functions."""
    seen, look = {}, [value]
    while look:
        it = look.pop()
        if id(it) in seen or isinstance(it, type | type(torch) | type(held_by)):
            continue
        seen[id(it)] = it
        look += gc.get_referents(it)
    return list(seen.values())


class InTheMiddle(pl.Callback):
    """Copies another callback in mid-chord, before its own hook and after."""

    def __init__(self, lca, way):
        self.lca, self.way, self.copies = lca, way, {}

    def take(self, when):
        self.copies[when] = self.way(self.lca)
        self.copies[when].had = copy.deepcopy(self.lca.histories)

    def on_before_optimizer_step(self, trainer, module, optimizer):
        if trainer.global_step == 3:
            self.take("in mid-step")

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == 5:
            self.take("after a step")


@pytest.mark.parametrize("way", WAYS)
def test_a_copy_made_before_training_trains_as_the_original(tmp_path, way):
    lca = LCACallback(probe={"a": "train", "b": [next(iter(toy_loader()))]}, every_n_steps=2)
    twin = WAYS[way](lca)
    assert twin.summary() == "LCA: training has not started."
    for path, callback in (("original", lca), ("copy", twin)):
        fit(tmp_path / path, callback, steps=6)
    assert len(lca.history) == 3
    assert_same(lca.histories, twin.histories)


@pytest.mark.parametrize("way", WAYS)
def test_a_copy_made_after_training_keeps_the_results_and_nothing_else(tmp_path, way):
    lca = LCACallback(track_parameters=True, neurons=True, probe={"a": "train", "b": "train"})
    trainer = fit(tmp_path, lca, steps=6).trainer
    twin = WAYS[way](lca)
    assert_same(lca.histories, twin.histories)
    assert twin.history.windows.keys() == {"parameters", "neurons", "weights"}
    assert (twin.summary(), twin.log_dir) == (lca.summary(), lca.log_dir)
    assert twin.last is None
    for name, total in lca.totals.items():
        assert torch.equal(twin.totals[name], total)
        assert twin.totals[name] is not total
    held = held_by(vars(twin))
    assert not [v for v in held if isinstance(v, pl.Trainer | torch.nn.Module | DataLoader)]
    weights = sum(p.numel() for p in trainer.lightning_module.parameters())
    floats = sum(v.numel() for v in held if isinstance(v, torch.Tensor))
    assert floats == 2 * weights, "the totals of two probes, and no other tensor"


@pytest.mark.parametrize("way", WAYS)
def test_a_copy_made_in_the_middle_has_the_steps_so_far_and_disturbs_nothing(tmp_path, way):
    alone = LCACallback(every_n_steps=2)
    fit(tmp_path / "alone", alone, steps=6)
    lca = LCACallback(every_n_steps=2)
    watcher = InTheMiddle(lca, WAYS[way])
    trainer = fit(tmp_path / "watched", lca, watcher, steps=6).trainer
    assert_same(alone.histories, lca.histories)
    recorded = [History.load(c.log_dir) for c in (alone, lca)]
    assert_same({None: recorded[0]}, {None: recorded[1]})
    assert {when: c.history.steps.tolist() for when, c in watcher.copies.items()} == {
        "in mid-step": [2],
        "after a step": [2, 4],
    }
    for when, twin in watcher.copies.items():
        assert_same(twin.had, twin.histories)
        del twin.had
        held = held_by(vars(twin))
        assert not [v for v in held if v is trainer or isinstance(v, torch.nn.Module)]
        fit(tmp_path / when, twin, steps=6)
        assert_same(alone.histories, twin.histories)


def test_one_instance_serves_two_trainings_after_each_other(tmp_path):
    lca = LCACallback(every_n_steps=2, track_parameters=True)
    fit(tmp_path, lca, steps=5)
    first, totals, where = lca.history, lca.totals, lca.log_dir
    assert first.steps.tolist() == [2, 4, 5]
    kept = {n: t.clone() for n, t in totals.items()}
    fit(tmp_path, lca, steps=5)
    assert lca.history is not first
    assert lca.log_dir != where
    assert_same({None: first}, {None: lca.history})
    assert_same({None: History.load(where)}, {None: History.load(lca.log_dir)})
    assert all(torch.equal(lca.totals[n], t) and torch.equal(totals[n], t) for n, t in kept.items())


def test_a_deep_copy_shares_the_probes_data_and_copies_what_a_subclass_adds():
    class Own(LCACallback):
        def __init__(self, **arguments):
            super().__init__(**arguments)
            self.notes = []

    loader = toy_loader()
    lca = Own(probe=loader, loss_fn=lambda module, batch: None)
    twin = copy.deepcopy(lca)
    assert type(twin) is Own
    assert twin.notes is not lca.notes
    assert twin._settings is lca._settings
    both = copy.deepcopy([lca, lca])
    assert both[0] is both[1]


def test_a_pickle_holds_the_batches_that_were_given_as_probe(tmp_path):
    batch = next(iter(toy_loader()))
    small, large = (len(pickle.dumps(LCACallback(probe=p))) for p in ("train", [batch]))
    assert small < 2000
    assert large - small > batch[0].nbytes
    with pytest.raises((pickle.PicklingError, AttributeError), match="lambda"):
        pickle.dumps(LCACallback(loss_fn=lambda module, batch: None))


def test_a_pickle_from_before_the_folders_says_that_it_cannot_be_loaded():
    before = b"clightning_lca.callback\nLCACallback\n."
    with pytest.raises(ModuleNotFoundError, match=r"A pickle of LCACallback from before .*History"):
        pickle.loads(before)
    with pytest.raises(ModuleNotFoundError, match="No module named"):
        pickle.loads(b"clightning_lca.nothing\nNothing\n.")
