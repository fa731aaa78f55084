"""The probe's batches are training's own, and having them leaves no trace in it."""

from __future__ import annotations

import importlib
import io
import multiprocessing
import os
import random
import signal
import time
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from support.models import Classifier, Validated, pl, toy_data
from support.training import fit
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
    get_worker_info,
)

from lightning_lca.probe import batches as module_under_test
from lightning_lca.probe.batches import ProbeBatches
from lightning_lca.runtime.lightnings import MisconfigurationException
from lightning_lca.runtime.processes import Ranks

SAMPLES, SIZE = 48, 8
X, Y = toy_data(SAMPLES).tensors
I = torch.arange(SAMPLES)  # noqa: E741
PLAIN = TensorDataset(X, Y, I)  # The number of each item travels along.


class Learner(Classifier):
    """Keeps every batch that it is given, as training sees it."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def training_step(self, batch, batch_idx, dataloader_idx=0):
        self.seen.append(cloned(batch))
        parts = cloned(parts_of(batch))
        for part in parts_of(batch):
            part[0].zero_()  # A step may write into its batch.
        return sum(super(Learner, self).training_step(p[:2], 0) for p in parts)


class Watch(pl.Callback):
    """Drives the probe's batches as the callback does."""

    def __init__(self, source="train", count=2, state=None):
        self.probe = ProbeBatches(source, count, 5, Ranks())
        self.state, self.taken = state, None

    def on_train_start(self, trainer, module):
        if self.state is not None:
            self.probe.resume(self.state)
        self.probe.begin(trainer)

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if self.taken is None:
            self.probe.pass_by(batch)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if self.taken is None and self.probe.is_ready:
            self.taken = list(self.probe.take().values())


class Outcome(NamedTuple):
    weights: Any
    seen: Any
    streams: Any
    trace: Any
    watch: Any


class Case(NamedTuple):
    """A kind of data.

    Attributes:
        make: Makes the loader and a function that tells the state of what it reads from.
        kept: Whether batches are kept as they pass.
        trainer: Keywords of the Trainer.
        model: Makes the module.
        noisy: Items differ from one reading to the next.
        steps: After so many, all items were seen.
    """

    make: Callable[[], Any]
    kept: bool = True
    trainer: Any = {}  # noqa: RUF012
    model: Any = Learner
    noisy: bool = False
    steps: int = 12


def loader_of(dataset=PLAIN, size=SIZE, **arguments):
    if not {"sampler", "batch_sampler"} & set(arguments):
        arguments.setdefault("shuffle", not isinstance(dataset, IterableDataset))
    sizes = {} if "batch_sampler" in arguments else {"batch_size": size}
    return DataLoader(dataset, **sizes, **arguments)


def parts_of(batch):
    """The (x, y, i) of a batch, or of each loader's part of it."""
    if isinstance(batch, dict):
        return [part for part in batch.values() if part is not None]
    return [batch]


def cloned(value):
    return torch.utils._pytree.tree_map(
        lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, value
    )


def same(a, b):
    """Bitwise, through containers."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def streams():
    return torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()


def train(path, case, watch=None, run_seed=3, steps=None):
    data, trace = None, None

    def made():
        nonlocal data, trace
        data, trace = case.make()
        return data

    run = fit(
        path,
        *([] if watch is None else [watch]),
        measured=False,
        model=case.model,
        data=made,
        steps=steps or case.steps,
        run_seed=run_seed,
        trainer=case.trainer,
    )
    return Outcome(dict(run.module.state_dict()), run.module.seen, streams(), trace(), watch)


def untraced(data):
    return data, lambda: None


# -- kinds of data --------------------------------------------------------------------------------


class Scaled(DataLoader):
    """Transforms what it loads."""

    def __iter__(self):
        for x, y, i in super().__iter__():
            yield x / 100, y, i


class Named(DataLoader):
    """Makes other containers of what it loads."""

    def __iter__(self):
        for batch in super().__iter__():
            yield {"only": batch}


class Own:
    """An iterable that is no loader, and counts how often it was begun."""

    def __init__(self):
        self.begun = 0

    def __iter__(self):
        self.begun += 1
        return iter([tuple(b) for b in loader_of(shuffle=False)])

    def __len__(self):
        return SAMPLES // SIZE


class Stream(IterableDataset):
    """Goes on where it was, in an order of its own."""

    def __init__(self):
        self.served = 0

    def __iter__(self):
        while True:
            self.served += 1
            yield PLAIN[int(torch.randint(SAMPLES, ()))]


class Keyed(Dataset):
    """Its items have names."""

    def __getitem__(self, key):
        return PLAIN[int(key[1:])]

    def __len__(self):
        return SAMPLES


class Names(Sampler):
    def __iter__(self):
        return iter([f"k{i}" for i in torch.randperm(SAMPLES // 2).tolist()])

    def __len__(self):
        return SAMPLES // 2


class Scales:
    """A batch sampler that gives tuples."""

    batch_size = SIZE

    def __iter__(self):
        return iter([[(j, i) for j in range(i, i + SIZE)] for i in range(0, SAMPLES, SIZE)])

    def __len__(self):
        return SAMPLES // SIZE


class AtScale(Dataset):
    def __getitem__(self, key):
        return PLAIN[key[0]]

    def __len__(self):
        return SAMPLES


class Buckets:
    """A batch sampler without batch_size."""

    def __iter__(self):
        return iter([list(range(i, i + SIZE)) for i in range(0, SAMPLES // 2, SIZE)])

    def __len__(self):
        return SAMPLES // 2 // SIZE


class Counting(Dataset):
    """Each reading changes what the next ones give."""

    def __init__(self):
        self.read, self.cache = 0, {}

    def __len__(self):
        return SAMPLES

    def __getitem__(self, i):
        self.read += 1
        self.cache[i] = self.read
        return X[i] + 0.01 * self.read, Y[i], I[i]


class InWorkers(Dataset):
    """Its data are there once worker_init_fn ran."""

    def __len__(self):
        return SAMPLES

    def __getitem__(self, i):
        return self.handle[i]


def give_handle(worker):
    get_worker_info().dataset.handle = PLAIN


GENERATOR = None


class Noisy(Dataset):
    """Draws from a global generator, and from every stream."""

    def __len__(self):
        return SAMPLES

    def __getitem__(self, i):
        noise = GENERATOR.normal() + np.random.normal() + random.random() + torch.rand(()).item()
        return X[i] + float(noise), Y[i], I[i]


class FromFile(Dataset):
    """Reads on in a file that stays open."""

    def __init__(self):
        self.file = os.memfd_create("items")
        os.write(self.file, bytes(range(256)) * 10)
        self.file = os.open(f"/proc/self/fd/{self.file}", os.O_RDONLY)

    def __len__(self):
        return SAMPLES

    def __getitem__(self, i):
        return X[i] + os.read(self.file, 1)[0] / 256, Y[i], I[i]


def counting():
    dataset = Counting()
    return loader_of(dataset), lambda: (dataset.read, dataset.cache)


def from_file():
    dataset = FromFile()
    return loader_of(dataset), lambda: os.lseek(dataset.file, 0, os.SEEK_CUR)


def noisy():
    global GENERATOR
    GENERATOR = np.random.default_rng(0)
    return loader_of(Noisy()), lambda: str(GENERATOR.bit_generator.state)


def closed_over():
    generator, calls = np.random.default_rng(0), []

    def collate(items):
        calls.append(len(items))
        x, y, i = default_collate(items)
        return x + float(generator.normal()) * 0.1, y, i

    return loader_of(collate_fn=collate), lambda: (calls, str(generator.bit_generator.state))


def skipping():
    calls = []

    def collate(items):
        calls.append(len(items))
        return None if len(calls) % 3 == 1 else default_collate(items)

    return loader_of(collate_fn=collate), lambda: calls


def shared_counter():
    class Shared(Counting):
        def __init__(self):
            super().__init__()
            self.count = multiprocessing.Value("i", 0)

        def __getitem__(self, i):
            self.count.value += 1
            return PLAIN[i]

    dataset = Shared()
    return loader_of(dataset), lambda: dataset.count.value


def stream():
    dataset = Stream()
    return loader_of(dataset), lambda: dataset.served


def own():
    data = Own()
    return data, lambda: data.begun


def sampled():
    generator = torch.Generator().manual_seed(1)
    data = loader_of(sampler=RandomSampler(PLAIN, replacement=True, generator=generator))
    return data, lambda: generator.get_state().tolist()


def combined(mode, *sizes, data=loader_of):
    def make():
        loaders = {f"loader{i}": data(size=size) for i, size in enumerate(sizes)}
        return untraced(pl.utilities.combined_loader.CombinedLoader(loaders, mode))

    return make


HALF = range(SAMPLES // 2)
RARE = torch.where(I < SAMPLES // 2, 1.0, 0.0)

CASES = {
    # Drawn.
    "plain": Case(lambda: untraced(loader_of()), kept=False),
    "subset": Case(lambda: untraced(loader_of(Subset(PLAIN, list(HALF)))), kept=False),
    "with replacement": Case(sampled, kept=False, steps=40),
    "limited": Case(
        lambda: untraced(loader_of(shuffle=False)), kept=False, trainer={"limit_train_batches": 2}
    ),
    "overfit": Case(lambda: untraced(loader_of()), kept=False, trainer={"overfit_batches": 3}),
    "reloaded": Case(
        lambda: untraced(loader_of()),
        kept=False,
        trainer={"reload_dataloaders_every_n_epochs": 1},
    ),
    "own batch sampler of torch's": Case(
        lambda: untraced(
            loader_of(batch_sampler=BatchSampler(RandomSampler(HALF), SIZE, drop_last=False))
        ),
        kept=False,
    ),
    "counting": Case(counting, kept=False, noisy=True),
    "global generator": Case(noisy, kept=False, noisy=True),
    "generator closed over": Case(closed_over, kept=False, noisy=True),
    "None from collate": Case(skipping, kept=False, steps=30),
    "open file": Case(from_file, kept=False, noisy=True),
    "worker_init_fn": Case(
        lambda: untraced(
            loader_of(
                InWorkers(), num_workers=1, persistent_workers=True, worker_init_fn=give_handle
            )
        ),
        kept=False,
    ),
    "structured": Case(lambda: untraced({"a": loader_of(), "b": loader_of(size=4)}), kept=False),
    "min_size": Case(combined("min_size", 8, 16), kept=False),
    # Kept as they pass.
    "transforming loader": Case(lambda: untraced(Scaled(PLAIN, SIZE, shuffle=True))),
    "loader of dicts": Case(lambda: untraced(Named(PLAIN, SIZE, shuffle=True))),
    "own iterable": Case(own),
    "stream": Case(stream),
    "SubsetRandomSampler": Case(lambda: untraced(loader_of(sampler=SubsetRandomSampler(HALF)))),
    "WeightedRandomSampler": Case(
        lambda: untraced(loader_of(sampler=WeightedRandomSampler(RARE, SAMPLES)))
    ),
    "keyed": Case(lambda: untraced(loader_of(Keyed(), sampler=Names()))),
    "tuples as keys": Case(lambda: untraced(loader_of(AtScale(), batch_sampler=Scales()))),
    "buckets": Case(lambda: untraced(loader_of(batch_sampler=Buckets()))),
    "max_size": Case(combined("max_size", 8, 16)),
    "one of two transforms": Case(
        lambda: untraced({"a": loader_of(), "b": Scaled(PLAIN, SIZE, shuffle=True)})
    ),
    "shared memory": Case(shared_counter),
}


@pytest.mark.filterwarnings("ignore:.*overfit.*", "ignore:.*yielded None.*")
@pytest.mark.parametrize("name", CASES)
def test_every_loader_that_trains_gives_a_probe_of_what_training_sees_and_trains_alike(
    tmp_path, name
):
    case = CASES[name]
    without = train(tmp_path, case)
    measured = train(tmp_path, case, Watch())
    for what in ("weights", "seen", "streams", "trace"):
        assert same(getattr(without, what), getattr(measured, what)), what

    probe, taken = measured.watch.probe, measured.watch.taken
    assert (probe.moved, probe.why is not None) == (case.kept, case.kept), probe.why
    assert len(taken) == 2
    seen = {
        (p, int(i)): x
        for batch in measured.seen
        for p, (xs, _, items) in enumerate(parts_of(batch))
        for x, i in zip(xs, items)
    }
    for batch in taken:
        for p, (xs, ys, items) in enumerate(parts_of(batch)):
            assert {(p, int(i)) for i in items} <= set(seen)
            assert torch.equal(ys, Y[items])
            assert case.noisy or all(torch.equal(x, seen[p, int(i)]) for x, i in zip(xs, items))

    state = through_a_file(probe.state())
    resumed = train(tmp_path, case, Watch(state=state), run_seed=4, steps=6).watch
    assert same(resumed.taken, taken)
    assert not resumed.probe.is_another
    assert multiprocessing.active_children() == []


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# -- what is read aside ---------------------------------------------------------------------------


def trainer_of(data, epoch=SAMPLES // SIZE, val=None):
    """All that is asked of a Trainer."""
    return SimpleNamespace(
        train_dataloader=data,
        val_dataloaders=val,
        num_training_batches=epoch,
        fit_loop=SimpleNamespace(),
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
        lightning_module=SimpleNamespace(training_step=Learner.training_step),
    )


def begun(data, source="train", count=2, ranks=Ranks(), **more):  # noqa: B008 (it is frozen)
    probe = ProbeBatches(source, count, 5, ranks)
    probe.begin(trainer_of(data, **more))
    return probe


class Failing(Counting):
    """Cannot be read anywhere but in the process that trains."""

    how = "raises"

    def __getitem__(self, i):
        if multiprocessing.parent_process() is not None:
            if self.how == "raises":
                raise KeyError("not here")
            if self.how == "dies":
                os._exit(7)
            if self.how == "hangs":
                time.sleep(60)
            return *PLAIN[i], lambda: None  # Cannot be pickled.
        return PLAIN[i]


def items_of(items):
    return [*default_collate([item[:3] for item in items]), items[0][3:]]


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("raises", "KeyError: 'not here'"),
        ("dies", "ended with code 7"),
        ("hangs", "no batch came within 0.5 seconds"),
        ("cannot be sent", "pickle"),
    ],
)
def test_where_reading_aside_fails_the_first_batches_are_kept_instead(
    tmp_path, monkeypatch, how, why
):
    monkeypatch.setattr(Failing, "how", how)
    monkeypatch.setattr(module_under_test, "_PATIENCE", 0.5 if how == "hangs" else 30.0)
    case = Case(lambda: untraced(loader_of(Failing(), collate_fn=items_of)))
    without = train(tmp_path, case, steps=3)
    measured = train(tmp_path, case, Watch(), steps=3)
    assert same(without[:3], measured[:3])
    assert why in measured.watch.probe.why
    assert same([b[:3] for b in measured.watch.taken], [b[:3] for b in measured.seen[:2]])
    assert multiprocessing.active_children() == []


def test_reading_aside_leaves_signals_and_the_files_of_others_as_they_were(tmp_path):
    path = tmp_path / "text"
    path.write_text("abcdefgh" * 10_000)
    handlers = [signal.getsignal(s) for s in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT)]

    class Reading(Counting):
        def __getitem__(self, i):
            self.file.read(3_000)  # Through a buffer, too.
            return super().__getitem__(i)

    dataset = Reading()
    with open(path) as dataset.file, open(path, "ab") as log:
        assert dataset.file.read(1) == "a"
        position = os.lseek(dataset.file.fileno(), 0, os.SEEK_CUR)
        log.write(b"i")
        begun(loader_of(dataset)).take()
        assert os.lseek(dataset.file.fileno(), 0, os.SEEK_CUR) == position
        assert dataset.file.read(79_999) == ("abcdefgh" * 10_000)[1:]
    assert path.read_text() == "abcdefgh" * 10_000 + "i"
    assert handlers == [
        signal.getsignal(s) for s in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT)
    ]


@pytest.mark.parametrize("kind", [DeprecationWarning, RuntimeWarning])
def test_warnings_of_forks_are_not_the_users_business(monkeypatch, kind):
    fork = os.fork

    def warning_fork():  # As Python 3.12 and JAX do.
        warnings.warn(
            "This process is multi-threaded, use of fork() may lead to", kind, stacklevel=2
        )
        return fork()

    monkeypatch.setattr(os, "fork", warning_fork)
    filters = list(warnings.filters)
    assert begun(loader_of(Counting())).take()
    assert warnings.filters == filters


@pytest.mark.slow
def test_a_loader_that_spawns_its_workers_is_read_in_a_spawned_process():
    start = {"num_workers": 1, "multiprocessing_context": "spawn"}
    data = toy_data(SAMPLES)  # To spawn is to put tensors into memory that is shared.
    probe = begun(loader_of(data, **start, worker_init_fn=abs))
    assert same(probe.take(), begun(loader_of(toy_data(SAMPLES))).take())
    assert probe.why is None
    # What both processes now hold is read in neither.
    assert "Tensor, which processes share" in begun(loader_of(Subset(data, Names()))).why


def test_the_draw_is_seeded_without_repeats_and_shared_among_ranks():
    whole = begun(loader_of(), count=4).take()
    order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(5))
    for number, (x, _, items) in whole.items():
        assert torch.equal(items, order[number * SIZE : (number + 1) * SIZE])
        assert torch.equal(x, X[items])
    shares = [begun(loader_of(), ranks=Ranks(rank, world=2)).take() for rank in (0, 1)]
    assert [list(share) for share in shares] == [[0, 2], [1, 3]]
    assert same({**shares[0], **shares[1]}, {n: whole[n] for n in (0, 2, 1, 3)})
    # More than there is: all that there is.
    assert sum(len(i) for *_, i in begun(loader_of(), count=99).take().values()) == SAMPLES


def test_items_of_a_loader_without_batches_are_drawn_and_do_not_share_memory():
    probe = begun(loader_of(size=None, shuffle=True), epoch=SAMPLES)
    for x, _, i in probe.take().values():
        assert torch.equal(x, X[i])
        assert x.data_ptr() != X[i].data_ptr()
        assert x.untyped_storage().nbytes() == x.nbytes


def test_a_sampler_of_part_of_the_dataset_is_drawn_from_that_part():
    sampler = BatchSampler(RandomSampler(range(12)), SIZE, drop_last=True)
    taken = begun(DataLoader(PLAIN, batch_sampler=sampler), count=9).take()
    assert sorted(int(i) for *_, items in taken.values() for i in items) == list(range(12))


def test_ranks_that_do_not_shuffle_see_what_all_of_them_see():
    split = DistributedSampler(PLAIN, num_replicas=2, rank=1, shuffle=False)
    taken = begun(DataLoader(PLAIN, 4, sampler=split), count=9, epoch=2).take()
    assert sorted(int(i) for *_, items in taken.values() for i in items) == list(range(16))
    # Lightning's wrapper of a sampler that it does not know.
    own = connectors().DistributedSamplerWrapper(Names(), num_replicas=2, rank=0)
    assert "chooses the items" in begun(DataLoader(Keyed(), 4, sampler=own)).why


def connectors():
    return importlib.import_module(f"{pl.__name__}.trainer.connectors.data_connector")


def test_what_a_sequential_loader_drops_is_never_drawn():
    data = DataLoader(Subset(PLAIN, range(SIZE + 3)), SIZE, drop_last=True)
    ((*_, items),) = begun(data, count=9, epoch=1).take().values()
    assert sorted(items.tolist()) == list(range(SIZE))


# -- what is kept ---------------------------------------------------------------------------------


def kept(*batches, count=None, ranks=Ranks(), **more):  # noqa: B008 (it is frozen)
    probe = begun([], count=count or len(batches), ranks=ranks, **more)
    for batch in batches:
        probe.pass_by(batch)
    return probe


class Graph:
    """A batch that is no container, with slots and an attribute that cannot be copied."""

    __slots__ = ("edges", "nodes", "opened")

    def __init__(self, nodes, edges):
        self.nodes, self.edges = nodes, edges


class Handle:
    """Refuses deepcopy."""

    def __init__(self, x):
        self.x = x

    def __deepcopy__(self, memo):
        raise TypeError


def test_copies_share_no_memory_and_hold_no_more_than_they_show():
    view, twice = torch.arange(1000.0)[3:6], torch.ones(2)
    graph, handle = Graph(view, [twice]), Handle(view)
    probe = kept({"a": view, "b": (twice, twice), "graph": graph, "handle": handle, "n": None})
    view.zero_(), twice.zero_()
    (copy,) = probe.take().values()
    for x in (copy["a"], copy["graph"].nodes, copy["handle"].x):
        assert x.tolist() == [3, 4, 5]
        assert x.untyped_storage().nbytes() == x.nbytes
    assert copy["b"][0] is copy["b"][1] is copy["graph"].edges[0]
    assert copy["b"][0].tolist() == [1, 1]
    assert copy["n"] is None


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"x": [x]}, lambda x: Graph(x, None)])
def test_a_batch_that_depends_on_weights_is_refused(wrap):
    encoder = torch.nn.Linear(2, 2)
    for computed in (encoder(torch.ones(1, 2)), encoder.weight):
        with pytest.raises(MisconfigurationException, match=r"on_after_batch_transfer\. Run that"):
            kept(wrap(computed))
    # A point that the loss is differentiated by is no such thing.
    point = torch.ones(2, requires_grad=True)
    (copy,) = kept([point]).take().values()
    assert copy[0].requires_grad
    assert copy[0].is_leaf


def test_kept_batches_are_counted_per_rank_and_none_is_passed_over():
    probe = kept(torch.ones(1), None, count=2, ranks=Ranks(1, world=2))
    assert not probe.is_ready
    with pytest.raises(MisconfigurationException, match="too few batches have passed"):
        probe.take()
    for number in (2, 3):
        probe.pass_by(torch.full((1,), float(number)))
    assert probe.is_ready
    assert {n: b.item() for n, b in probe.take().items()} == {1: 1.0, 3: 2.0}


def test_no_more_is_kept_than_an_epoch_has():
    probe = begun([], count=5, epoch=2)
    assert [probe.pass_by(torch.ones(1)) or probe.is_ready for _ in range(3)] == [False, True, True]


def test_a_batch_that_is_more_than_plain_containers_is_not_stored_and_a_resume_says_so():
    state = through_a_file(kept(Graph(X, Y)).state())
    assert state["kept"] is None
    probe = begun([], count=1)
    probe.resume(state)
    probe.pass_by(X)
    assert probe.is_another
    assert same(probe.take(), {0: X})


def test_a_draw_that_comes_out_otherwise_after_a_resume_says_so():
    state = begun(loader_of())
    state.take()
    for data, is_another in ((PLAIN, False), (TensorDataset(X + 1, Y, I), True)):
        probe = begun(loader_of(data))
        probe.resume(through_a_file(state.state()))
        probe.take()
        assert probe.is_another is is_another


def test_a_checkpoint_of_before_the_first_batch_changes_nothing():
    probe = kept(count=2)
    assert probe.state() == {}
    again = begun([], count=1)
    again.resume(through_a_file(probe.state()))
    again.pass_by(X)
    assert same(again.take(), {0: X})
    assert not again.is_another


def _one_of_two(rank, path, results):
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    ranks = Ranks(rank, 2, rank, 2)
    batches = [torch.full((2,), float(10 * rank + i)) for i in range(2)]
    probe = kept(*batches, ranks=ranks)
    probe.take()
    failing = begun(loader_of(Failing() if rank else Counting()), ranks=ranks)
    failing.pass_by(batches[0])
    stored = through_a_file(probe.state())["kept"]["batches"]
    results.put((rank, {n: batch.tolist() for n, batch in stored.items()}, failing.why))
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_ranks_store_the_whole_probe_and_read_or_keep_alike(tmp_path):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    both = [
        context.Process(target=_one_of_two, args=(r, tmp_path / "meet", results)) for r in (0, 1)
    ]
    for process in both:
        process.start()
    told = {rank: (stored, why) for rank, stored, why in (results.get(timeout=60) for _ in both)}
    for process in both:
        process.join(60)
    wanted = {n: torch.full((2,), v) for n, v in enumerate((0.0, 10.0, 1.0, 11.0))}
    assert told[0][0] == told[1][0] == {n: batch.tolist() for n, batch in wanted.items()}
    assert "another rank" in told[0][1]
    assert "not here" in told[1][1]
    # On one process now: all four.
    alone = begun([], count=2)
    flags = {n: [True] for n in wanted}
    alone.resume({"tries": 0, "kept": {"batches": wanted, "on_host": flags}, "checksum": None})
    assert same(alone.take(), wanted)


# -- others ---------------------------------------------------------------------------------------


def test_others_are_the_next_batches_or_the_next_draw_and_the_search_ends():
    probe = kept(torch.tensor([0.0]))
    for number in range(1, 20):
        probe.another()
        assert not probe.is_ready
        probe.pass_by(torch.tensor([float(number)]))
        assert probe.take()[0].item() == number
    with pytest.raises(MisconfigurationException, match="No loss was found on 20 batches"):
        probe.another()

    drawn = begun(loader_of())
    first = drawn.take()
    drawn.another()
    assert drawn.is_ready
    assert not same(first, drawn.take())
    again = begun(loader_of())
    again.resume(through_a_file(drawn.state()))
    assert same(again.take(), drawn.take())

    with pytest.raises(MisconfigurationException, match="No loss was found on 1 batch of"):
        begun([], source=[X]).another()


# -- val and own ----------------------------------------------------------------------------------


def keyed_val():
    dataset = Keyed()
    return DataLoader(dataset, SIZE, sampler=Names()), dataset


def stream_val():
    dataset = Stream()
    return DataLoader(dataset, SIZE), dataset


def counting_val():
    dataset = Counting()
    return DataLoader(dataset, SIZE), dataset


@pytest.mark.parametrize("make", [keyed_val, stream_val, counting_val])
def test_validation_data_of_any_kind_are_read_aside(tmp_path, make):
    def run(*callbacks):
        val, dataset = make()
        limits = {"limit_val_batches": 2, "val_check_interval": 3, "num_sanity_val_steps": 0}
        run = fit(
            tmp_path,
            *callbacks,
            measured=False,
            model=ValidatedLearner,
            data=lambda: (loader_of(), val),
            trainer=limits,
        )
        return dict(run.module.state_dict()), run.module.seen, streams(), vars(dataset)

    watch = Watch("val")
    assert same(run(), run(watch))
    assert len(watch.taken) == 2
    assert not watch.probe.moved
    numbers = [int(i) for *_, items in watch.taken for i in items]
    if make is keyed_val:
        assert max(numbers) < SAMPLES // 2
    again = Watch("val", state=through_a_file(watch.probe.state()))
    run(again)
    assert same(again.taken, watch.taken)
    assert not again.probe.is_another


def test_a_loader_that_starts_workers_of_its_own_is_read_aside_too():
    class Wrapping:
        def __iter__(self):
            return iter(DataLoader(PLAIN, SIZE, num_workers=1))

    before = streams()
    assert same(begun([], "val", val=Wrapping()).take(), dict(enumerate(batches_in_order()[:2])))
    assert same(before, streams())


def batches_in_order():
    return [[x, y, i] for x, y, i in zip(X.split(SIZE), Y.split(SIZE), I.split(SIZE))]


class ValidatedLearner(Learner):
    def validation_step(self, batch, batch_idx):
        Validated.validation_step(self, batch[:2], batch_idx)


def test_validation_data_that_cannot_be_read_aside_are_refused_with_a_remedy(monkeypatch):
    monkeypatch.setattr(Failing, "how", "raises")
    with pytest.raises(MisconfigurationException, match=r"'not here'\. Pass .*generator"):
        begun(loader_of(), source="val", val=loader_of(Failing()))


def test_a_loader_of_the_users_own_is_read_whole_in_its_order_and_aside():
    dataset = Counting()
    loader = Scaled(dataset, SIZE)
    taken = begun(loader_of(dataset), source=loader).take()
    assert (dataset.read, dataset.cache) == (0, {})
    assert same(list(taken.values()), list(Scaled(Counting(), SIZE)))


def test_a_loader_of_the_users_own_that_cannot_be_read_aside_is_read_here(monkeypatch):
    monkeypatch.setattr(Failing, "how", "raises")
    before = streams()
    taken = begun(loader_of(), source=loader_of(Failing(), shuffle=True)).take()
    assert same(before, streams())
    assert sorted(int(i) for *_, items in taken.values() for i in items) == list(range(SAMPLES))


def test_the_remedy_of_the_messages_moves_no_random_stream():
    before = streams()
    namespace = {"torch": torch, "next": next, "DataLoader": DataLoader, "dataset": PLAIN}
    remedy = module_under_test._REMEDY.partition("probe=")[2].partition(": a loader")[0]
    (batch,) = eval(remedy, namespace)
    assert same(before, streams())
    assert torch.equal(batch[0], X[batch[2]])
    assert len(batch[0]) == SAMPLES
    next(iter(loader_of()))  # Without a generator of its own it does.
    assert not same(before, streams())


def test_a_step_that_takes_dataloader_iter_moves_its_batches_itself():
    class Iterating(Learner):
        def training_step(self, dataloader_iter):
            pass

    trainer = trainer_of([])
    trainer.lightning_module = Iterating()
    probe = ProbeBatches("train", 1, 5, Ranks())
    probe.begin(trainer)
    probe.pass_by(X)
    assert probe.is_ready
    assert not probe.moved
