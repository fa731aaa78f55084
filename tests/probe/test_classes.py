"""One probe per class: balanced, seeded, read without a trace; it tells for whom layers learn."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from support.models import Classifier, mlp, toy_data
from support.training import fit
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
)

from lightning_lca import per_class

X, Y = toy_data(200).tensors
DATA = TensorDataset(X, Y, torch.arange(200), Y)  # The third is each sample's number.
EXAMPLES = 10


def numbers(probes):
    return {
        name: [i for batch in batches for i in batch[2].tolist()]
        for name, batches in probes.items()
    }


class Counting(Dataset):
    """Labels that nobody knows before; it counts, draws and notes what is read."""

    def __init__(self, data=DATA, pack=tuple):
        self.data, self.pack, self.reads, self.order = data, pack, 0, []
        self.generator = torch.Generator().manual_seed(5)

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        self.reads += 1
        self.order.append(i)
        torch.rand(1), np.random.rand(), random.random()
        torch.rand(1, generator=self.generator)
        return self.pack(self.data[i])


@pytest.mark.parametrize("data", [DATA, Counting()], ids=["known labels", "read"])
def test_every_class_has_its_examples_and_no_other(data):
    probes = per_class(data, EXAMPLES)
    assert list(probes) == [f"class_{c}" for c in range(4)]
    for c, (name, [batch]) in enumerate(probes.items()):
        assert batch[1].tolist() == [c] * EXAMPLES
        drawn = numbers(probes)[name]
        assert len(set(drawn)) == EXAMPLES
        assert torch.equal(batch[0], X[drawn])
        assert drawn != sorted(drawn), "drawn, not the first ones"


def test_the_draw_follows_the_seed_and_the_way_of_reading_does_not_matter():
    first = numbers(per_class(DATA, EXAMPLES))
    assert numbers(per_class(DATA, EXAMPLES)) == first
    assert numbers(per_class(Counting(), EXAMPLES)) == first
    assert numbers(per_class(Counting(), EXAMPLES, classes=range(4))) == first
    assert numbers(per_class(DATA, EXAMPLES, seed=1)) != first


@pytest.mark.parametrize("aside", [True, False], ids=["aside", "here"])
def test_reading_leaves_no_stream_moved_and_no_iterator_used(monkeypatch, aside):
    if not aside:
        monkeypatch.setattr("lightning_lca.probe.batches._context", lambda loaders: None)
    data = Counting()
    loader = DataLoader(data, 16, shuffle=True)
    passing = iter(loader)
    next(passing)
    reads = data.reads

    def streams():
        states = torch.get_rng_state(), data.generator.get_state()
        return [s.tolist() for s in states], np.random.get_state()[1].tolist(), random.getstate()

    before = streams()
    per_class(loader, EXAMPLES)
    assert streams() == before
    assert (data.reads == reads) == aside, "here, what the dataset counts is its own affair"
    assert len(list(passing)) == len(loader) - 1


def test_reading_stops_once_the_named_classes_have_enough(monkeypatch):
    monkeypatch.setattr("lightning_lca.probe.batches._context", lambda loaders: None)
    data = Counting()
    probes = per_class(data, 3, classes=[2, 0])
    assert list(probes) == ["class_2", "class_0"]
    assert data.reads < 100
    labels = Y[data.order].tolist()
    assert min(labels.count(2), labels.count(0)) == 3


def test_a_dataset_that_knows_its_labels_is_read_for_the_examples_alone(monkeypatch):
    monkeypatch.setattr("lightning_lca.probe.batches._context", lambda loaders: None)
    data = Counting()
    data.targets = Y.tolist()
    assert numbers(per_class(data, EXAMPLES)) == numbers(per_class(DATA, EXAMPLES))
    assert data.reads == 4 * EXAMPLES
    data.targets = Y.roll(1).tolist()  # It says other labels than it gives: read them all.
    assert numbers(per_class(data, EXAMPLES)) == numbers(per_class(DATA, EXAMPLES))


def test_parts_of_datasets_and_samplers_narrow_the_choice():
    odd = list(range(1, 200, 2))
    for data in (Subset(DATA, odd), DataLoader(DATA, 8, sampler=SubsetRandomSampler(odd))):
        drawn = numbers(per_class(data, 5))
        assert all(i % 2 for some in drawn.values() for i in some)
    both = ConcatDataset([Subset(DATA, odd), Subset(DATA, odd)])
    assert {len(some) for some in numbers(per_class(both, 5)).values()} == {5}


def test_the_loaders_own_collate_makes_batches_of_the_asked_size():
    def collate(samples):
        return {
            "x": torch.stack([s[0] for s in samples]),
            "y": torch.stack([s[1] for s in samples]),
        }

    probes = per_class(DataLoader(DATA, 16, collate_fn=collate), EXAMPLES, batch_size=4)
    for c, batches in enumerate(probes.values()):
        assert [len(b["x"]) for b in batches] == [4, 4, 2]
        assert all((b["y"] == c).all() for b in batches)


@pytest.mark.parametrize("key", ["label", "labels", "target"])
def test_a_dict_is_asked_for_its_label(key):
    data = Counting(pack=lambda s: {"x": s[0], key: int(s[1]), "more": 0})
    assert list(per_class(data, 3)) == [f"class_{c}" for c in range(4)]


def test_any_function_of_a_sample_makes_classes_and_names_name_them():
    probes = per_class(DATA, 5, label=lambda s: "up" if s[0][0] > 0 else "down")
    assert list(probes) == ["down", "up"]
    assert (probes["up"][0][0][:, 0] > 0).all()
    animals = {0: "cat", 1: "dog", 2: "fox", 3: "owl"}
    assert list(per_class(DATA, 5, names=animals)) == list(animals.values())
    assert list(per_class(DATA, 5, classes=[1], names=lambda c: f"no {c}")) == ["no 1"]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(DATA)


@pytest.mark.parametrize(
    ("data", "arguments", "error", "says"),
    [
        (DATA, {"examples": 500}, ValueError, r"examples=500; class 0 has \d+, 1 has"),
        (DATA, {"classes": [1, 7], "examples": 3}, ValueError, "class 7 has 0"),
        (DATA, {"examples": 0}, ValueError, "at least 1, got 0"),
        (DATA, {"examples": 2.5}, TypeError, "whole number, got 2.5"),
        (DATA, {"classes": []}, ValueError, "at least one class"),
        (DATA, {"classes": [1, 1.0]}, ValueError, "each once"),
        (DATA, {"label": lambda s: s[2], "examples": 1}, ValueError, "more than 100 classes"),
        (DATA, {"label": lambda s: s[0]}, TypeError, r"sample \d+ is a Tensor of shape \(12,\)"),
        (DATA, {"label": lambda s: None}, TypeError, "is a NoneType"),
        (DATA, {"names": lambda c: "one"}, ValueError, "same name"),
        (DATA, {"names": {0: "cat"}}, ValueError, "none for class 1"),
        (Stream(), {}, TypeError, "by index.*got Stream"),
        (DataLoader(Stream()), {}, TypeError, "got Stream"),
        ([], {}, ValueError, "found 0 samples"),
        ([X[0]], {"examples": 1}, TypeError, "sample is a Tensor"),
        ([{"x": 1}], {"examples": 1}, TypeError, "none of the keys label"),
        (DataLoader(DATA, batch_size=None), {}, ValueError, "batch_size=None"),
    ],
)
def test_what_cannot_be_drawn_is_refused_by_name(data, arguments, error, says):
    with pytest.raises(error, match=says):
        per_class(data, **({"examples": EXAMPLES} | arguments))


def blobs(samples, noisy, seed):
    """Four classes apart in space; ``noisy``: all labels of class 3 are drawn by lot."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(samples) % 4
    x = 3 * torch.eye(4, 12)[y] + torch.randn(samples, 12, generator=generator)
    if noisy:
        other = torch.randint(0, 3, (samples,), generator=generator)
        return TensorDataset(x, torch.where(y == 3, other, y))
    return TensorDataset(x, y)


@pytest.mark.slow
@pytest.mark.parametrize("noisy", [True, False], ids=["planted", "sham"])
def test_label_noise_in_a_class_shows_as_harm_on_its_clean_examples(tmp_path, noisy):
    probes = per_class(blobs(400, False, seed=1), 50)
    result = fit(
        tmp_path,
        model=lambda: Classifier(mlp(), lambda p: torch.optim.Adam(p, 0.01)),
        data=lambda: DataLoader(blobs(400, noisy, seed=0), 32, shuffle=True),
        steps=80,
        probe=probes,
    )
    change = {name: h.allocated.sum() for name, h in result.lca.histories.items()}
    assert list(change) == [f"class_{c}" for c in range(4)]
    for name, history in result.lca.histories.items():
        true = history.loss_after[-1] - history.loss_before[0]
        assert change[name] == pytest.approx(true, abs=0.05)
    assert max(change[f"class_{c}"] for c in range(3)) < -0.3, "the others are learned"
    assert (change["class_3"] > 0.3) == noisy
    assert (change["class_3"] < -0.3) == (not noisy)
