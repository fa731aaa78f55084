"""The probe's data: a few fixed batches that training sees, had without leaving a trace in it.

Where it is known which items a loader gives, a seeded draw of them is read in a process of its own:
counters, caches, open files and random generators change there alone. Where it is not known (a
stream, a sampler or loader of the user's own), the first batches that training sees are kept as
they pass.
"""

from __future__ import annotations

import copy
import ctypes
import dataclasses
import functools
import inspect
import math
import multiprocessing
import os
import pickle
import signal
import socket
import sqlite3
import stat
import sys
import types
import warnings
import zlib
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
    default_collate,
    default_convert,
)

from lightning_lca.probe.isolation import GENERATORS, fence
from lightning_lca.runtime.lightnings import MisconfigurationException, Trainer
from lightning_lca.runtime.processes import Ranks

ProbeSource = Any  # "train" | "val" | iterable of batches | DataLoader

_REMEDY = (
    "Pass the batches themselves, e.g. probe=[next(iter(DataLoader(dataset, batch_size=64, "
    "shuffle=True, generator=torch.Generator().manual_seed(0))))]: a loader with a generator of "
    "its own leaves training's random numbers alone."
)
_PATIENCE = 60.0  # Seconds that the reading process may take for a batch.
_TRIES = 20  # Draws without a loss after which the search ends.
_DEEPEST, _MANY = 6, 100  # How far what an object holds is looked at.
_LEAVES = (str, bytes, int, float, complex, type, types.ModuleType, type(None))
_READS = ("__getitem__", "__getitems__", "__iter__", "__call__")


class ProbeBatches:
    """The batches of one probe: how they are had, whether they are there, and others if need be.

    "train" gives ``count`` batches per rank of items that training sees, "val" as many of the
    validation data; a DataLoader or another iterable of batches is read whole, in its own order,
    and shared among the ranks. Nothing that training would see is consumed, and neither random
    streams nor datasets, samplers, collate functions and what they hold change.

    Not held apart: what a dataset shares with other processes without a trace in its attributes,
    e.g. a file that it writes to.

    Example:
        >>> probe = ProbeBatches([torch.ones(2)], 1, 0, Ranks())
        >>> probe.begin(None)
        >>> probe.is_ready, probe.take(), probe.moved
        (True, {0: tensor([1., 1.])}, False)

    Attributes:
        why: Why batches of "train" are kept as they pass, or None where they are drawn.
        is_another: After `resume`: these are not the batches that the checkpoint had.
    """

    def __init__(self, source: ProbeSource, count: int, seed: int, ranks: Ranks) -> None:
        """Reads nothing yet.

        Args:
            source: "train", "val", a DataLoader or an iterable of batches.
            count: How many batches "train" and "val" give, per rank.
            seed: Draws them.
            ranks: The processes that share the probe.
        """
        self.why: str | None = None
        self.is_another = False
        self._source = source
        self._count = count
        self._seed = seed
        self._ranks = ranks
        self._named = repr(source)
        self._device = torch.device("cpu")
        self._has_begun = False
        self._is_bare = False  # A step that takes dataloader_iter moves its batches itself.
        self._reading: Callable[[int], _Reading] | None = None
        self._context: Any = None  # Of multiprocessing; None: read in this process.
        self._keeps = False
        self._batches: dict[int, Any] = {}
        self._numbers: list[int] = []  # Of the batches that are to be kept.
        self._summed: tuple[dict[int, Any], int] | None = None
        self._tries = 0
        self._resumed: dict[str, Any] | None = None
        self._epoch: float = math.inf  # Batches of training's epoch.
        self._stored: Any = None  # What all ranks kept, for a checkpoint.

    # -- how they are had -------------------------------------------------------------------------

    def begin(self, trainer: Trainer) -> None:
        """Settles how the batches are had; reads them now unless they are training's.

        Raises:
            MisconfigurationException: The probe is empty, there are no validation data, or they
                cannot be read a second time.
        """
        source = self._source
        if isinstance(source, str):
            self._device = trainer.strategy.root_device
        if source == "train":
            self._epoch = trainer.num_training_batches
            self._begin_training(trainer)
        elif source == "val":
            self._begin_validation(_val_loader(trainer))
            self._read()
        elif isinstance(source, DataLoader):
            self._own(_read_own(source, self._seed))
        else:
            self._own(list(source))
        self._has_begun = True
        self._take_up()

    def _begin_training(self, trainer: Trainer) -> None:
        step = inspect.signature(trainer.lightning_module.training_step)
        self._is_bare = "dataloader_iter" in step.parameters
        loaders = trainer.train_dataloader
        flat, structure = tree_flatten(loaders)
        self._named = _name(_what(flat[0] if flat else loaders))
        # Private; without it, all that is known is how a single loader's batches look.
        combined = getattr(trainer.fit_loop, "_combined_loader", None)
        mode = getattr(combined, "_mode", None if flat and flat[0] is not loaders else "min_size")
        if mode not in ("min_size", "max_size_cycle"):
            self._keep(f"loaders are combined in mode {mode!r}")
            return
        parts = []
        for loader in flat:
            part = _plain(loader, self._epoch)
            if isinstance(part, str):
                self._keep(part)
                return
            parts.append(part)
        self._draw(flat, structure, parts)
        if self._reading is None:
            self._keep(f"no process can be forked here to read {self._named} in")

    def _begin_validation(self, loaders: Any) -> None:
        flat, structure = tree_flatten(loaders)
        parts = [_plain(loader, math.inf) for loader in flat]
        whys = [part for part in parts if isinstance(part, str)]
        if not whys:
            self._draw(flat, structure, [part for part in parts if isinstance(part, _Items)])
        elif flat[0] is loaders and _shared(_what(loaders)) is None:
            wanted = self._count * self._ranks.world
            self._context = _context([loaders])
            if self._context is not None:
                self._reading = lambda tries: _Passing(
                    loaders, self._seed, tries * wanted, (tries + 1) * wanted
                )
        if self._reading is None:
            raise MisconfigurationException(
                f"The probe cannot read {_name(_what(loaders))} a second time without disturbing "
                f"training{''.join(f': {why}' for why in whys[:1])}. {_REMEDY}"
            )

    def _draw(self, loaders: list[Any], structure: TreeSpec, parts: list[_Items]) -> None:
        """Settles on a seeded draw, if there is a process to read it in or none is needed."""
        needs_process = not all(part.is_pure for part in parts)
        self._context = _context(loaders) if needs_process else None
        if needs_process and self._context is None:
            return
        ranks = self._ranks
        self._reading = lambda tries: _Drawing(
            [part.drawn(self._seed + tries) for part in parts],
            structure,
            self._count,
            self._seed,
            ranks,
        )

    def _own(self, batches: list[Any]) -> None:
        self._batches = {i: batches[i] for i in self._ranks.mine(len(batches))}
        if not self._batches:
            raise MisconfigurationException(
                f"The probe is empty: got 0 batches from {_name(self._source)}. {_REMEDY}"
            )

    def _keep(self, why: str) -> None:
        """Goes over to keeping batches as they pass."""
        self.why = why
        self._keeps, self._reading = True, None
        count = max(1, int(min(self._count, self._epoch)))  # No batch twice.
        self._numbers = [self._ranks.rank + i * self._ranks.world for i in range(count)]
        self._batches = {}

    def _read(self) -> None:
        """Reads what is drawn; if that fails, training's batches are kept from now on."""
        assert self._reading is not None
        reading, trouble = self._reading(self._tries), ""
        read: dict[int, Any] = {}
        try:
            read = dict(reading.read() if self._context is None else _aside(reading, self._context))
            if isinstance(reading, _Passing):
                read = {i: read[i] for i in self._ranks.mine(len(read))}
            trouble = "" if read else "it gives no batch"
        except Exception as error:
            trouble = (str(error) or type(error).__name__).strip().partition("\n")[0]
        if self._ranks.processes > 1 and self._ranks.largest(int(bool(trouble)), self._device):
            trouble = trouble or "another rank could not read its own"
        if not trouble:
            self._batches = read
        elif self._source == "train":
            self._keep(f"reading failed: {trouble}")
        else:
            raise MisconfigurationException(
                f"The probe could not read {_name(self._source)} in a process of its own: "
                f"{trouble}. {_REMEDY}"
            )

    # -- from batch to batch ----------------------------------------------------------------------

    def pass_by(self, batch: Any) -> None:
        """Sees a batch of training, on its device, before the step; keeps a copy if need be.

        Where batches are drawn, they are read at the first call: if that fails, this very batch is
        kept. None, which Lightning skips, is passed over.

        Raises:
            MisconfigurationException: The batch depends on the weights.
        """
        if self._reading is not None and not self._batches:
            self._read()
            self._take_up()
        if self._keeps and batch is not None and len(self._batches) < len(self._numbers):
            self._batches[self._numbers[len(self._batches)]] = copied(batch)

    @property
    def is_ready(self) -> bool:
        """Whether all batches can be had now."""
        return not self._keeps or len(self._batches) == len(self._numbers)

    @property
    def moved(self) -> bool:
        """Whether they went through the module's transfer hooks already, to the device."""
        return self._keeps and not self._is_bare

    def take(self) -> dict[int, Any]:
        """Returns this rank's batches, {number in the whole probe: batch}; not to be written to.

        All ranks must call this together.

        Raises:
            MisconfigurationException: They could not be read, and no batch has passed.
        """
        if self._reading is not None and not self._batches:
            self._read()
            self._take_up()
        if not self.is_ready:
            raise MisconfigurationException(
                f"The probe cannot read {self._named} a second time without disturbing training "
                f"({self.why}), and too few batches have passed to keep. {_REMEDY}"
            )
        if self._keeps and self._stored is None and self._ranks.processes > 1:
            parts: list[Any] = [None] * self._ranks.processes
            dist.all_gather_object(parts, self._storable())
            # Where one rank's cannot be stored, none are: they are one probe.
            self._stored = {
                name: {n: value for part in parts for n, value in part[name].items()}
                for name in ("batches", "on_host")
                if all(parts)
            }
        return dict(self._batches)

    def another(self) -> None:
        """Gives up these batches for others, since no loss was found on them.

        Raises:
            MisconfigurationException: There are no others, or they were given up too often.
        """
        self._tries += 1
        if self._tries >= _TRIES or not (self._keeps or self._reading):
            count = self._tries * (len(self._batches) or self._count)
            raise MisconfigurationException(
                f"No loss was found on {count} {'batch' if count == 1 else 'batches'} of the probe:"
                f" each was None or not finite. {_REMEDY}"
            )
        self._batches, self._stored = {}, None
        if self._reading is not None:
            self._read()

    # -- checkpoints ------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps: plain containers, and tensors on the CPU.

        Kept batches are stored if they are plain containers of tensors and numbers. Others are not,
        since to load them would be to run what the checkpoint says. Drawn ones are drawn again.
        """
        if not self._batches or not self.is_ready:
            return {}
        kept = self._storable() if self._stored is None and self._ranks.processes == 1 else None
        return {
            "tries": self._tries,
            "kept": (kept or self._stored or None) if self._keeps else None,
            "checksum": None if self._keeps else self._checksum,
        }

    def resume(self, state: dict[str, Any]) -> None:
        """Goes on with the batches of a checkpoint, before or after `begin`."""
        self._resumed = state or None  # It may be of a time before the batches were had.
        if self._has_begun:
            self._take_up()

    def _take_up(self) -> None:
        """Turns to the batches of a checkpoint as soon as they can be had or compared."""
        state = self._resumed
        if state is None:
            return
        if self._source == "train" and state["kept"] is not None:
            self._resumed = None
            if not self._keeps:
                self._keep("the checkpoint holds batches that were kept as they passed")
            every = sorted(state["kept"]["batches"])
            self._numbers = [every[i] for i in self._ranks.mine(len(every))]
            self._batches = {n: self._placed(state["kept"], n) for n in self._numbers}
            self._stored = state["kept"] if self._ranks.processes > 1 else None
            self._tries = state["tries"]
            return
        if self._reading is not None and state["tries"] != self._tries:
            self._tries = state["tries"]
            if self._batches:
                self._read()
        if self._batches or self._keeps:
            self._resumed = None
            is_same = not self._keeps and state["checksum"] == self._checksum
            self.is_another = not is_same and self._ranks.process == 0  # Whose the state is.

    @property
    def _checksum(self) -> int:
        """Tells these batches from others; summed up once."""
        if self._summed is None or self._summed[0] is not self._batches:
            self._summed = self._batches, _checksum(self._batches)
        return self._summed[1]

    def _storable(self) -> dict[str, Any]:
        """Returns what is kept, on the CPU; nothing if it is more than plain containers."""
        if not self.is_ready or not _is_storable(self._batches):
            return {}
        on_host = {
            n: [leaf.device.type == "cpu" for leaf in tree_flatten(batch)[0] if _is_tensor(leaf)]
            for n, batch in self._batches.items()
        }
        batches = tree_map(lambda leaf: leaf.cpu() if _is_tensor(leaf) else leaf, self._batches)
        return {"batches": batches, "on_host": on_host}

    def _placed(self, kept: dict[str, Any], number: int) -> Any:
        """Copies a stored batch to where it was: some tensors stay on the host."""
        stays = iter(kept["on_host"][number])

        def place(leaf: Any) -> Any:
            if not _is_tensor(leaf):
                return leaf
            return leaf.to("cpu" if next(stays) else self._device, copy=True)

        return tree_map(place, kept["batches"][number])


def batch_sizes(batches: list[Any]) -> list[int]:
    """Counts the samples of every batch by its first tensor; ones if a batch has none."""
    sizes = []
    for batch in batches:
        leaves = tree_flatten(batch)[0]
        lengths = [len(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.dim()]
        sizes.append(lengths[0] if lengths else 0)
    return sizes if all(sizes) else [1] * len(batches)


# -- which loaders can be drawn from --------------------------------------------------------------


@dataclass(frozen=True)
class _Items:
    """Items that a loader gives, and how it makes batches of them.

    Attributes:
        dataset: Where they are.
        collate: Joins them.
        seen: Training sees the items 0 to ``seen - 1``, sooner or later.
        size: Of a batch; None: each item is one.
        in_worker: Whether the loader reads in workers of its own, started by ``start_worker``.
        start_worker: The loader's worker_init_fn.
        order: Of the draw.
    """

    dataset: Any
    collate: Callable[[Any], Any]
    seen: int
    size: int | None
    in_worker: bool
    start_worker: Callable[[int], None] | None
    order: Tensor | None = None

    @property
    def is_pure(self) -> bool:
        """Whether reading runs no code but torch's own, which leaves no trace."""
        collates = self.collate in (default_collate, default_convert)
        starts = self.in_worker and self.start_worker is not None
        return collates and not starts and _is_of_tensors(self.dataset)

    @property
    def batches(self) -> int:
        """How many batches they make."""
        return math.ceil(self.seen / (self.size or 1))

    def drawn(self, seed: int) -> _Items:
        """Puts them in a seeded order."""
        generator = torch.Generator().manual_seed(seed)
        return dataclasses.replace(self, order=torch.randperm(self.seen, generator=generator))

    def load(self, i: int, seed: int) -> Any:
        """Makes batch i of the draw."""
        assert self.order is not None
        size = self.size or 1
        indices = self.order[i * size : (i + 1) * size].tolist()
        loader: DataLoader[Any] = DataLoader(
            self.dataset,
            batch_sampler=None if self.size is None else [indices],
            sampler=indices if self.size is None else None,
            batch_size=None if self.size is None else 1,
            collate_fn=self.collate,
            generator=torch.Generator().manual_seed(seed),  # Otherwise it takes a global number.
        )
        return next(iter(loader))


def _plain(loader: Any, limit: float) -> _Items | str:
    """Finds the items that training sees in ``limit`` batches of an epoch, or why they are unknown.

    With a sampler that shuffles it sees them all in time; otherwise the same at each epoch's start.
    """
    if not isinstance(loader, DataLoader):
        return f"{_name(loader)} is no DataLoader"
    kind, dataset = type(loader), loader.dataset
    for name in ("__iter__", "_get_iterator", "_index_sampler"):
        if getattr(kind, name, None) is not getattr(DataLoader, name, None):
            return f"{_name(loader)} has its own {name}"
    if isinstance(dataset, IterableDataset) or not isinstance(dataset, Sized):
        return f"{_name(dataset)} is a stream, or has no length"
    length = len(dataset)
    sampler: Any = loader.sampler
    source: Any
    batched, size, drops = loader.batch_sampler, None, False
    if batched is not None:
        if type(batched) is not BatchSampler:
            return f"{_name(batched)} chooses the batches"
        # The loader's own would be a default that is not used, if it was given a batch sampler.
        size, sampler, drops = batched.batch_size, batched.sampler, batched.drop_last
    if type(sampler) is DistributedSampler:
        source, shuffles, processes = sampler.dataset, sampler.shuffle, sampler.num_replicas
    elif type(sampler) is SequentialSampler or type(sampler) is RandomSampler:
        source, shuffles, processes = sampler.data_source, type(sampler) is RandomSampler, 1
    else:
        return f"{_name(sampler)} chooses the items"
    seen = len(source)
    if seen > length:
        return f"{_name(sampler)} is of another dataset"
    if not shuffles:
        batches = seen // ((size or 1) * processes) if drops else math.inf
        most = min(limit, batches) * (size or 1) * processes
        seen = int(min(seen, most))
    items = _Items(
        dataset,
        loader.collate_fn,
        seen,
        size,
        loader.num_workers > 0,
        loader.worker_init_fn if loader.num_workers > 0 else None,
    )
    if not items.is_pure and (what := _shared(dataset, loader.collate_fn)) is not None:
        return f"{_name(dataset)} holds {_name(what)}, which processes share"
    return items


def _is_of_tensors(dataset: Any) -> bool:
    if type(dataset) is Subset:
        return type(dataset.indices) in (list, range, Tensor) and _is_of_tensors(dataset.dataset)
    if type(dataset) is ConcatDataset:
        return all(map(_is_of_tensors, dataset.datasets))
    return type(dataset) is TensorDataset and all(type(t) is Tensor for t in dataset.tensors)


def _shared(*owners: Any) -> Any:
    """Finds something that a forked process would not have for itself."""
    return next((value for value in _held(*owners) if _is_shared(value)), None)


def _is_shared(value: Any) -> bool:
    if type(value) is Tensor:
        # Memory of a GPU is not read in a forked process: that fails, in time.
        return value.device.type == "cpu" and value.layout == torch.strided and value.is_shared()  # type: ignore[no-untyped-call, no-any-return]
    if isinstance(value, socket.socket | sqlite3.Connection | ctypes.Array | ctypes.Structure):
        return True
    return type(value).__module__.partition(".")[0] == "multiprocessing"


def _val_loader(trainer: Trainer) -> Any:
    """Finds the first validation loader, which Lightning may not have loaded yet."""
    loaders = trainer.val_dataloaders
    if loaders is None:
        # Private: calling the user's hook once more, behind the fence, leaves Lightning's own later
        # call as it would have been. Loading through the loop would move it, and random numbers.
        source = getattr(trainer.fit_loop.epoch_loop.val_loop, "_data_source", None)
        if source is not None and source.is_defined():
            with fence(trainer.lightning_module, trainer.datamodule, seed=0):
                loaders = source.dataloader()
    if isinstance(loaders, list | tuple):
        loaders = loaders[0] if loaders else None
    if loaders is None:
        raise MisconfigurationException(
            'probe="val" found no validation data in this Trainer. Pass val_dataloaders to fit, or '
            'choose probe="train". ' + _REMEDY
        )
    return loaders


# -- a process of its own -------------------------------------------------------------------------


@dataclass(frozen=True)
class _Drawing:
    """A seeded draw of batches from one loader or several; None, which Lightning skips, left out.

    Attributes:
        parts: Of each loader.
        structure: How their batches make one.
        count: Batches per rank.
        seed: Batch i is read on random streams seeded with seed + i.
        ranks: Who takes which.
    """

    parts: list[_Items]
    structure: TreeSpec
    count: int
    seed: int
    ranks: Ranks

    def read(self, aside: bool = False) -> Iterator[tuple[int, Any]]:
        """Reads this rank's batches, with their numbers; ``aside``: in a process of its own."""
        world, total = self.ranks.world, min(part.batches for part in self.parts)
        mine = self.ranks.mine(min(self.count * world, total))
        left = len(mine)
        for i in (*mine, *range(self.count * world + self.ranks.rank, total, world)):
            batch = tree_unflatten(
                [self._load(part, i, aside) for part in self.parts], self.structure
            )
            if batch is not None:
                yield i, batch
                left -= 1
            if not left:
                return

    def _load(self, part: _Items, i: int, aside: bool) -> Any:
        if part.is_pure:
            # Not collated, they may be views of the dataset.
            return tree_map(
                lambda t: (
                    t.detach().clone().requires_grad_(t.requires_grad) if _is_tensor(t) else t
                ),
                part.load(i, self.seed + i),
            )
        if aside:
            _be_worker(part.dataset, part.in_worker, part.start_worker, self.seed)
        with fence(_generators_of(part.dataset, part.collate), seed=self.seed + i):
            return part.load(i, self.seed + i)


@dataclass(frozen=True)
class _Passing:
    """Batches ``start`` to ``stop`` of a loader, as it gives them."""

    loader: Any
    seed: int
    start: int = 0
    stop: int | None = None

    def read(self, aside: bool = False) -> Iterator[tuple[int, Any]]:
        """Reads them, with their numbers from 0 on; ``aside``: in a process of its own."""
        loader = self.loader
        if isinstance(loader, DataLoader):
            loader = copy.copy(loader)
            in_worker = loader.num_workers > 0
            start = loader.worker_init_fn if in_worker else None
            loader.num_workers, loader.timeout, loader.pin_memory = 0, 0, False
            loader._iterator = None  # Workers that persist are of another process.
            if aside:
                _be_worker(loader.dataset, in_worker, start, self.seed)
        with fence(_generators_of(loader), seed=self.seed):
            passing = (batch for batch in loader if batch is not None)
            yield from enumerate(islice(passing, self.start, self.stop))


@dataclass(frozen=True)
class _Choosing:
    """What a function makes of a loader's dataset."""

    loader: DataLoader[Any]
    choose: Callable[[], Iterator[Any]]
    seed: int

    def read(self, aside: bool = False) -> Iterator[tuple[int, Any]]:
        """Reads it, with numbers from 0 on; ``aside``: in a process of its own."""
        loader, in_worker = self.loader, self.loader.num_workers > 0
        if aside:
            start = loader.worker_init_fn if in_worker else None
            _be_worker(loader.dataset, in_worker, start, self.seed)
        held = _generators_of(loader.dataset, loader.collate_fn, self.choose)
        with fence(held, seed=self.seed):
            yield from enumerate(self.choose())


_Reading = _Drawing | _Passing | _Choosing


def choose_from(
    loader: DataLoader[Any], choose: Callable[[], Iterator[Any]], seed: int
) -> list[Any]:
    """Reads from a loader's dataset by a function of the caller's, and leaves no trace in training.

    Args:
        loader: Whose dataset, workers' start and collate function count; it is not iterated.
        choose: Reads and gives values that can be pickled, at least one every few seconds.
        seed: Of the random streams on which it runs.

    Returns:
        What it gave.
    """
    return _read_apart(_Choosing(loader, choose, seed), loader)


def _read_own(loader: DataLoader[Any], seed: int) -> list[Any]:
    """Reads a loader given by the user, whole."""
    return _read_apart(_Passing(loader, seed), loader)


def _read_apart(reading: _Reading, loader: DataLoader[Any]) -> list[Any]:
    """Reads for the user's own probe: aside if that works, here behind a fence if not."""
    context = _context([loader])
    if context is not None and _shared(loader.dataset) is None:
        with suppress(_ReadingError):
            return [value for _, value in _aside(reading, context)]
    return [value for _, value in reading.read()]


def _context(loaders: list[Any]) -> Any:
    """Chooses how a process is started, as the loaders start theirs; None if it must not be."""
    for loader in loaders:
        if (given := getattr(loader, "multiprocessing_context", None)) is not None:
            return given
    if "fork" in multiprocessing.get_all_start_methods() and sys.platform != "darwin":
        return multiprocessing.get_context("fork")
    # Any other start runs the user's script again, which only one with workers is prepared for.
    ready = all(getattr(loader, "num_workers", 0) > 0 for loader in loaders)
    return multiprocessing.get_context() if ready else None


class _ReadingError(Exception):
    """What came instead of batches."""


def _aside(reading: _Reading, context: Any) -> list[tuple[int, Any]]:
    """Reads in a process of its own, where all that reading changes is lost with the process.

    Not in a worker of a DataLoader: batches come by value here, so that they need no shared memory
    and one that cannot be pickled is an error, where a worker would be waited for in vain.

    Raises:
        _ReadingError: The process could not start, failed, or took too long.
    """
    receiver, sender = context.Pipe(duplex=False)
    # Not as a daemon, which could not start processes: a dataset or a loader may have its own.
    process = context.Process(target=_serve, args=(sender, reading), daemon=False)
    read: list[tuple[int, Any]] = []
    with _offsets_kept(), receiver:
        try:
            with sender, warnings.catch_warnings():
                # Python 3.12+ warns of threads, JAX of itself: the child calls neither.
                warnings.filterwarnings("ignore", message=r".*fork.*")
                process.start()
            while True:
                if not receiver.poll(_PATIENCE):
                    raise _ReadingError(f"no batch came within {_PATIENCE:g} seconds")
                kind, content = pickle.loads(receiver.recv_bytes())
                if kind == "error":
                    raise _ReadingError(content)
                if kind == "end":
                    process.join(1.0)
                    return read
                read.append(content)
        except EOFError:
            process.join(_PATIENCE)
            raise _ReadingError(f"the process ended with code {process.exitcode}") from None
        except Exception as error:
            if isinstance(error, _ReadingError):
                raise
            raise _ReadingError(f"{type(error).__name__}: {error}") from error
        finally:
            if process.pid is not None:
                process.kill()  # Handlers of signals that it has from here might not end it.
                process.join()


def _serve(sender: Any, reading: _Reading) -> None:
    """Sends batches by value: the body of the reading process."""
    torch.set_num_threads(1)  # Threads do not survive a fork.
    warnings.simplefilter("ignore")  # Training itself shows them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # The parent ends it.
    try:
        for numbered in reading.read(aside=True):
            sender.send_bytes(pickle.dumps(("batch", numbered)))
        sender.send_bytes(pickle.dumps(("end", None)))
    except BaseException as error:
        with suppress(OSError):  # Nobody may listen any more.
            sender.send_bytes(pickle.dumps(("error", f"{type(error).__name__}: {error}")))


def _be_worker(
    dataset: Any, in_worker: bool, start: Callable[[int], None] | None, seed: int
) -> None:
    """Lets a dataset see what it sees in training: a worker of a loader, or none."""
    # Private: torch has no other way to say so.
    worker = torch.utils.data._utils.worker
    if worker._worker_info is not None and worker._worker_info.dataset is dataset:
        return
    info = worker.WorkerInfo(id=0, num_workers=1, seed=seed, dataset=dataset)
    worker._worker_info = info if in_worker else None
    if start is not None:
        start(0)


@contextmanager
def _offsets_kept() -> Iterator[None]:
    """Puts the positions of open files back: a forked process shares them.

    Of those open for reading only: to others a thread of this process may write meanwhile.
    """
    before = dict(_offsets())
    try:
        yield
    finally:
        for descriptor, offset in before.items():
            with suppress(OSError):
                if os.lseek(descriptor, 0, os.SEEK_CUR) != offset:
                    os.lseek(descriptor, offset, os.SEEK_SET)


def _offsets() -> Iterator[tuple[int, int]]:
    try:
        import fcntl

        names = os.listdir("/proc/self/fd")
    except (ImportError, OSError):  # Not Linux, where processes are not forked here.
        return
    for descriptor in map(int, names):
        with suppress(OSError):
            mode = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE
            if mode == os.O_RDONLY and stat.S_ISREG(os.fstat(descriptor).st_mode):
                yield descriptor, os.lseek(descriptor, 0, os.SEEK_CUR)


# -- what objects hold, and copies of it ----------------------------------------------------------


def copied(batch: Any) -> Any:
    """Copies a batch so that nothing written to it, or read from it, reaches the other.

    Tensors are cloned rather than deep-copied, which would copy all of what they are a view of.

    Raises:
        MisconfigurationException: It carries a graph: it was computed from weights.
    """
    memo: dict[int, Any] = {}
    for value in _held(batch, many=10_000):
        if isinstance(value, Tensor):
            memo[id(value)] = _cloned(value)
    return tree_map(lambda leaf: _copied_leaf(leaf, memo), batch)


def _copied_leaf(leaf: Any, memo: dict[int, Any]) -> Any:
    if isinstance(leaf, Tensor):
        return memo[id(leaf)] if id(leaf) in memo else _cloned(leaf)
    try:
        return copy.deepcopy(leaf, memo)
    except Exception:
        pass
    try:
        twin = copy.copy(leaf)
        for name, value in dict(vars(twin)).items():
            if isinstance(value, Tensor):
                setattr(twin, name, memo[id(value)] if id(value) in memo else _cloned(value))
        return twin
    except Exception:
        return leaf


def _cloned(tensor: Tensor) -> Tensor:
    """Clones a tensor; a leaf that asks for its gradient, as some losses want, still does.

    Raises:
        MisconfigurationException: It is a weight, or computed from one.
    """
    if tensor.grad_fn is not None or isinstance(tensor, nn.Parameter):
        raise MisconfigurationException(
            "A batch of the probe depends on trainable weights: it reached the training step with "
            "a graph (grad_fn), since something trained ran before it, e.g. an encoder in "
            "on_after_batch_transfer. Run that in training_step, so that the loss is a function of "
            "the weights, or pass loss_fn=(module, batch) -> scalar and a probe of its own."
        )
    twin = tensor.detach().clone()
    return twin.requires_grad_() if tensor.requires_grad else twin


def _held(*owners: Any, many: int = _MANY) -> Iterator[Any]:
    """Walks through what objects hold, themselves included; the user's own getters do not run."""
    seen: dict[int, Any] = {}
    look = [(owner, 0) for owner in owners]
    while look and len(seen) < 100 * many:
        value, depth = look.pop()
        if id(value) in seen or isinstance(value, _LEAVES):
            continue
        seen[id(value)] = value
        yield value
        if depth < _DEEPEST:
            look += [(inner, depth + 1) for inner in _inside(value, many)]


def _inside(value: Any, many: int) -> list[Any]:
    inside: list[Any]
    if isinstance(value, Tensor):
        return []
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, types.MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, types.FunctionType):
        inside = list(value.__defaults__ or ())
        for cell in value.__closure__ or ():
            with suppress(ValueError):  # Not filled yet.
                inside.append(cell.cell_contents)
        # Of globals only generators: all else is walked to from where it is held.
        used = (value.__globals__.get(name) for name in value.__code__.co_names)
        return inside + [u for u in used if isinstance(u, GENERATORS)]
    inside = []
    if isinstance(value, dict):
        inside += value.values() if len(value) <= many else ()
    elif isinstance(value, list | tuple | set | deque):
        inside += value if len(value) <= many else ()
    with suppress(AttributeError):
        inside += object.__getattribute__(value, "__dict__").values()
    for kind in type(value).__mro__:
        slots = [v for v in vars(kind).values() if isinstance(v, types.MemberDescriptorType)]
        for slot in slots if kind.__module__ != "builtins" else ():
            with suppress(AttributeError):
                inside.append(slot.__get__(value))
    reads = [getattr(type(value), name, None) for name in _READS]
    return inside + [f for f in reads if isinstance(f, types.FunctionType)]


def _generators_of(*owners: Any) -> list[Any]:
    """Finds the random generators within these objects; their data are too large to fence."""
    return [value for value in _held(*owners) if isinstance(value, GENERATORS)]


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _is_storable(value: Any) -> bool:
    """Whether torch.load takes it back with weights_only=True, by any release."""
    if type(value) is dict or type(value) is OrderedDict:
        return all(_is_storable(v) for pair in value.items() for v in pair)
    if type(value) in (list, tuple):
        return all(map(_is_storable, value))
    if type(value) is Tensor:
        return value.layout == torch.strided
    return type(value) in (int, float, bool, str, type(None))


def _checksum(batches: dict[int, Any]) -> int:
    """Sums up what the tensors of batches hold."""
    total = 0
    for leaf in tree_flatten(batches)[0]:
        for value in (leaf,) if isinstance(leaf, Tensor) else _held(leaf):
            if isinstance(value, Tensor):
                with suppress(RuntimeError):  # Sparse, nested or quantized.
                    flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
                    total = zlib.crc32(flat.numpy().data, total)
    return total


def _what(loader: Any) -> Any:
    dataset = getattr(loader, "dataset", None)
    return loader if dataset is None else dataset


def _name(value: Any) -> str:
    return repr(value) if isinstance(value, str) else f"a {type(value).__name__}"
