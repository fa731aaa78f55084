"""The probe's data: fixed, seeded batches, read without touching the loaders that training uses."""

from __future__ import annotations

import types
from collections.abc import Sized
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.data import DataLoader, IterableDataset

from lightning_lca.probe.isolation import GENERATORS, fence
from lightning_lca.runtime.lightnings import MisconfigurationException, Trainer
from lightning_lca.runtime.processes import Ranks

ProbeSource = Any  # "train" | "val" | iterable of batches | DataLoader
_DEEPEST, _MANY = 6, 100  # How far generators are looked for.
_LEAVES = (torch.Tensor, str, bytes, int, float, type, types.ModuleType, type(None))
_REMEDY = "Pass the batches themselves, e.g. probe=[next(iter(loader))]."


def read_batches(
    source: ProbeSource, trainer: Trainer, count: int, seed: int, ranks: Ranks
) -> dict[int, Any]:
    """Reads this rank's batches of a probe on the host, {number within the whole probe: batch}.

    "train" and "val" draw ``count`` batches per rank of the loader's own size from its dataset (or
    as many as it has), a seeded subset without replacement; a DataLoader or another iterable is
    read whole, in its own order, and shared among the ranks. Random streams and the generators of
    loaders, samplers and datasets are left as they were.

    Raises:
        MisconfigurationException: No such loader, a loader that cannot be read a second time, or no
            batch.
    """
    if isinstance(source, str):
        loaders = trainer.train_dataloader if source == "train" else _val_loader(trainer)
        # Several loaders give batches of the same structure: {"a": loader, "b": loader} and so on.
        plans = [_plan(loader, count * ranks.world, seed) for loader in tree_flatten(loaders)[0]]
        mine = ranks.mine(min(map(len, plans)))
        batches = {
            i: tree_map(lambda _: next(parts), loaders)  # noqa: B023 (consumed at once)
            for i in mine
            for parts in [
                iter(
                    _load(loader, [plan[i]], seed + i)[0]
                    for loader, plan in zip(tree_flatten(loaders)[0], plans, strict=True)
                )
            ]
        }
    else:
        read = _read(source, seed) if isinstance(source, DataLoader) else list(source)
        batches = {i: read[i] for i in ranks.mine(len(read))}
    if not batches:
        raise MisconfigurationException(
            f"The probe is empty: got 0 batches from {_name(source)}. Pass at least one, "
            "e.g. probe=[next(iter(loader))]."
        )
    return batches


def batch_sizes(batches: list[Any]) -> list[int]:
    """Counts the samples of every batch by its first tensor; ones if a batch has none."""
    sizes = []
    for batch in batches:
        leaves = tree_flatten(batch)[0]
        lengths = [len(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.dim()]
        sizes.append(lengths[0] if lengths else 0)
    return sizes if all(sizes) else [1] * len(batches)


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


def _plan(loader: Any, count: int, seed: int) -> list[Any]:
    """Draws the indices of some batches, a seeded subset of the loader's dataset."""
    dataset = getattr(loader, "dataset", None)
    if not isinstance(loader, DataLoader) or isinstance(dataset, IterableDataset):
        raise MisconfigurationException(
            f"The probe cannot read {_name(loader if dataset is None else dataset)} a second time "
            "without disturbing training. " + _REMEDY
        )
    if not isinstance(dataset, Sized):
        raise MisconfigurationException(
            f"The probe cannot draw from {_name(dataset)}, which has no length. " + _REMEDY
        )
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(dataset), generator=generator).tolist()
    size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)
    if size is None:
        if loader.batch_sampler is not None:
            raise MisconfigurationException(
                f"The probe cannot tell the batch size of {_name(loader.batch_sampler)}. " + _REMEDY
            )
        return order[:count]  # Each item of the dataset is a batch.
    return [b for i in range(count) if (b := order[i * size : (i + 1) * size])]


def _read(loader: DataLoader[Any], seed: int) -> list[Any]:
    """Reads a loader given by the user, whole, through a copy that has no workers."""
    if isinstance(loader.dataset, IterableDataset):
        with fence(seed=seed):
            return list(loader)
    sampler: Any = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    inner = getattr(sampler, "sampler", None)
    with fence(_generators_of(loader, sampler, inner), seed=seed):
        indices = list(sampler)
    return _load(loader, indices, seed)


def _load(loader: DataLoader[Any], indices: list[Any], seed: int) -> list[Any]:
    batched = loader.batch_sampler is not None
    fresh: DataLoader[Any] = DataLoader(
        loader.dataset,
        batch_sampler=indices if batched else None,
        sampler=None if batched else indices,
        batch_size=1 if batched else None,
        collate_fn=loader.collate_fn,
        num_workers=0,
    )
    with fence(_generators_of(loader.dataset, loader.collate_fn), seed=seed):
        return list(fresh)


def _generators_of(*owners: Any) -> list[Any]:
    """Finds the random generators within these objects; their data are too large to fence."""
    found, seen, look = [], set(), [(owner, 0) for owner in owners]
    while look:
        value, depth = look.pop()
        if id(value) in seen or depth > _DEEPEST:
            continue
        seen.add(id(value))
        if isinstance(value, GENERATORS):
            found.append(value)
            continue
        inside = list(getattr(value, "__dict__", {}).values())
        inside += [getattr(value, name, None) for name in ("__self__", "func", "args", "keywords")]
        if isinstance(value, dict) and len(value) <= _MANY:
            inside += value.values()
        elif isinstance(value, list | tuple) and len(value) <= _MANY:
            inside += value
        look += [(v, depth + 1) for v in inside if not isinstance(v, _LEAVES)]
    return found


def _name(value: Any) -> str:
    return repr(value) if isinstance(value, str) else f"a {type(value).__name__}"
