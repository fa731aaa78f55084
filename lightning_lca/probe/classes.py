"""One probe per class, so that a run tells for whom each layer learns."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
)

from lightning_lca.probe.batches import choose_from

Label = int | float | str

_KEYS = ("label", "labels", "target")
_MOST = 100  # Classes that are found rather than named: each costs gradients at every step.
_SIGN_OF_LIFE = 5.0  # Seconds.


def per_class(
    data: Dataset[Any] | DataLoader[Any],
    examples: int = 64,
    label: Callable[[Any], Any] | None = None,
    classes: Sequence[Any] | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    names: Mapping[Any, str] | Callable[[Any], str] | None = None,
) -> dict[str, list[Any]]:
    """Draws one probe per class: {name: batches}, for ``LCACallback(probe=per_class(data))``.

    Every class has equally many examples, drawn by ``seed``, the same at every call. The examples
    are read by index, in a process of its own where that works: no random stream moves and no
    iterator of training is used up, so that training stays bit for bit what it is. Each probe costs
    its own gradients at every measured step.

    Labels of a TensorDataset, and of a dataset with ``targets`` and no ``target_transform`` (as
    torchvision's), and of subsets of these, are known beforehand. Otherwise examples are read in
    the drawn order until the ``classes`` have enough, or all of them where ``classes`` is None.

    Args:
        data: A dataset with a length, or a DataLoader, whose dataset and ``collate_fn`` are used;
            of its samplers only SubsetRandomSampler narrows the choice.
        examples: Number per class.
        label: sample -> its class, an int, text, or a tensor of one number. Any other property
            does as well, as the length of a text in tens. None: the sample's last item, or its
            "label", "labels" or "target".
        classes: Which values, in this order. None: all that there are, sorted, at most 100.
        batch_size: Of the probe's batches; None: a class is one batch.
        seed: Draws the examples; also that of random transforms while they are read.
        names: {class: name} or class -> name of its probe. None: "class_3", or the text itself.

    Returns:
        {name: list of batches, as the loader collates them}, in the order of the classes.

    Raises:
        ValueError: A class has too few examples, there are too many classes, or an argument is out
            of range. TypeError: a stream, or a label that is neither a number nor text.

    Example:
        >>> x, y = torch.arange(6.0), torch.tensor([0, 1, 0, 1, 1, 1])
        >>> probes = per_class(torch.utils.data.TensorDataset(x, y), examples=2)
        >>> {name: labels.tolist() for name, [(_, labels)] in probes.items()}
        {'class_0': [0, 0], 'class_1': [1, 1]}
    """
    for what, value in (("examples", examples), ("batch_size", batch_size)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise TypeError(f"{what} must be a whole number, got {value!r}.")
        if value is not None and value < 1:
            raise ValueError(f"{what} must be at least 1, got {value}.")
    loader = _loader(data)
    indices = _indices(loader)
    generator = torch.Generator().manual_seed(seed)
    order = [indices[i] for i in torch.randperm(len(indices), generator=generator).tolist()]
    wanted = None if classes is None else [_plain(value) for value in classes]
    if wanted is not None and (not wanted or len(set(wanted)) < len(wanted)):
        raise ValueError(f"classes must name at least one class, and each once; got {classes!r}.")
    choice = _Choice(loader, order, label, wanted, examples, batch_size or examples)
    *_, (found, chosen) = choose_from(loader, choice.read, seed)
    chosen_classes = _in_order(found) if wanted is None else wanted
    _check(chosen_classes, found, examples, is_open=wanted is None)
    named = {_name(value, names): chosen[value] for value in chosen_classes}
    if len(named) < len(chosen_classes):
        raise ValueError(
            f"Two classes have the same name: {len(chosen_classes)} classes got {len(named)} names,"
            f" {', '.join(named)}. Give each its own by names={{class: name}}."
        )
    return named


class _OtherLabelError(Exception):
    """A dataset says other labels than its samples have."""


@dataclass(frozen=True)
class _Choice:
    """What is to be read, and from where.

    Attributes:
        loader: Whose dataset and collate function are used.
        order: Indices of the dataset, as they are drawn.
        label: Tells a sample's class; None: as in `per_class`.
        wanted: The classes; None: all.
        examples: Of each class.
        size: Of a batch.
    """

    loader: DataLoader[Any]
    order: list[int]
    label: Callable[[Any], Any] | None
    wanted: list[Label] | None
    examples: int
    size: int

    def read(self) -> Iterator[Any]:
        """Reads; gives None now and then, and at the end (count found, batches) by class."""
        known = None if self.label is not None else _known(self.loader.dataset)
        if known is not None:
            try:
                yield from self._search(self._candidates(known), known)
                return
            except _OtherLabelError:  # What the dataset says is not what it gives.
                pass
        yield from self._search(self.order)

    def _search(self, order: list[int], known: Tensor | None = None) -> Iterator[Any]:
        """Reads samples in this order until every class has enough.

        Raises:
            _OtherLabelError: A label is not the known one.
        """
        found: dict[Label, int] = {}
        kept: dict[Label, list[Any]] = {value: [] for value in self.wanted or ()}
        told = time.monotonic()
        for i in order:
            sample: Any = self.loader.dataset[i]
            value = _plain(_last(sample) if self.label is None else self.label(sample), i)
            if known is not None and value != known[i].item():
                raise _OtherLabelError
            found[value] = found.get(value, 0) + 1
            held = kept.setdefault(value, []) if self.wanted is None else kept.get(value)
            if held is not None and len(held) < self.examples:
                held.append(sample)
            if self.wanted is None and len(kept) > _MOST:
                break  # That is an error, and items that are kept take memory.
            if self.wanted is not None and all(len(v) == self.examples for v in kept.values()):
                break
            if time.monotonic() - told > _SIGN_OF_LIFE:
                told = time.monotonic()
                yield None
        collate = self.loader.collate_fn
        is_whole = len(kept) <= _MOST or self.wanted is not None
        yield (
            found,
            {
                value: [collate(v[i : i + self.size]) for i in range(0, len(v), self.size)]
                for value, v in kept.items()
                if is_whole and len(v) == self.examples
            },
        )

    def _candidates(self, known: Tensor) -> list[int]:
        """Leaves the first indices of every class, in the drawn order."""
        left: dict[Label, int] = {}
        candidates = []
        for i, value in zip(self.order, known[self.order].tolist(), strict=True):
            left[value] = left.get(value, 0) + 1
            is_wanted = self.wanted is None or value in self.wanted
            if is_wanted and left[value] <= self.examples:
                candidates.append(i)
        return candidates


def _loader(data: Any) -> DataLoader[Any]:
    """Takes a loader as it is, or makes one of a dataset.

    Raises:
        TypeError: It cannot be read by index. ValueError: the loader makes no batches.
    """
    dataset = data.dataset if isinstance(data, DataLoader) else data
    is_indexed = hasattr(dataset, "__getitem__") and isinstance(dataset, Sized)
    if isinstance(dataset, IterableDataset | Mapping | Tensor) or not is_indexed:
        raise TypeError(
            "per_class reads samples by index, which needs a dataset with a length, or a "
            f"DataLoader of one; got {type(dataset).__name__}. Of a stream, collect samples first "
            "and pass them as a list."
        )
    if not isinstance(data, DataLoader):
        return DataLoader(dataset)
    if data.batch_sampler is None:
        raise ValueError(
            "The loader has batch_size=None: its dataset gives batches rather than samples, whose "
            "classes are mixed. Pass a dataset of samples."
        )
    return data


def _indices(loader: DataLoader[Any]) -> list[int]:
    """Lists the items to choose from."""
    sampler = getattr(loader.batch_sampler, "sampler", loader.sampler)
    if type(sampler) is SubsetRandomSampler:
        return [int(i) for i in sampler.indices]
    return list(range(len(loader.dataset)))  # type: ignore[arg-type]


def _known(dataset: Any) -> Tensor | None:
    """Tells the labels of a dataset without reading it [N], if it says them."""
    if type(dataset) is Subset:
        labels = _known(dataset.dataset)
        return None if labels is None else labels[torch.as_tensor(dataset.indices)]
    if type(dataset) is ConcatDataset:
        parts = [_known(part) for part in dataset.datasets]
        whole = [part for part in parts if part is not None]
        return torch.cat(whole) if whole and len(whole) == len(parts) else None
    if type(dataset) is TensorDataset:
        labels = dataset.tensors[-1]
    elif getattr(dataset, "target_transform", None) is None:
        labels = getattr(dataset, "targets", None)
    else:
        return None
    if isinstance(labels, list | tuple) and all(type(value) is int for value in labels):
        labels = torch.tensor(labels)
    if isinstance(labels, np.ndarray) and labels.dtype.kind in "iu":
        labels = torch.as_tensor(labels.astype(np.int64))
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        return None
    return labels.cpu() if labels.dim() == 1 and len(labels) == len(dataset) else None


def _last(sample: Any) -> Any:
    """Finds a sample's label where no function tells it."""
    if isinstance(sample, Mapping):
        key = next((key for key in _KEYS if key in sample), None)
        if key is None:
            raise TypeError(
                f"A sample has none of the keys {', '.join(_KEYS)}; it has "
                f"{', '.join(map(str, sample))}. Say its class by label=lambda sample: ...."
            )
        return sample[key]
    if isinstance(sample, list | tuple) and sample:
        return sample[-1]
    raise TypeError(
        f"A sample is a {type(sample).__name__}, neither a tuple nor a dict, so that its class is "
        "not known. Say it by label=lambda sample: ...."
    )


def _plain(value: Any, index: int | None = None) -> Label:
    """Makes a class of a label: a number or text that can be a key.

    Raises:
        TypeError: It is neither.
    """
    plain = value.item() if _has_one_number(value) else value
    if isinstance(plain, float) and plain.is_integer():
        plain = int(plain)
    is_number = isinstance(plain, int | float) and not math.isnan(plain)
    if is_number or isinstance(plain, str):
        return int(plain) if isinstance(plain, bool) else plain
    found = f"a {type(value).__name__}"
    if hasattr(value, "shape"):
        found += f" of shape {tuple(value.shape)}"
    where = "" if index is None else f" of sample {index}"
    raise TypeError(
        f"A class is a number or text; the label{where} is {found}, {value!r:.60}. Say the class "
        "of a sample by label=lambda sample: ...."
    )


def _has_one_number(value: Any) -> bool:
    return isinstance(value, Tensor | np.ndarray | np.generic) and value.ndim == 0


def _in_order(found: Mapping[Label, int]) -> list[Label]:
    """Sorts classes: numbers first."""
    return sorted(found, key=lambda value: (isinstance(value, str), value))


def _check(
    classes: Sequence[Label], found: Mapping[Label, int], examples: int, *, is_open: bool
) -> None:
    """Refuses classes without enough examples, and too many classes.

    Raises:
        ValueError: There are such.
    """
    if is_open and len(classes) > _MOST:
        raise ValueError(
            f"There are more than {_MOST} classes, and each would be a probe of its own, with "
            "gradients at every step. Name some by classes=[...], or make few of many by label="
            "lambda sample: ...."
        )
    if not classes:
        raise ValueError("The dataset is empty: found 0 samples. Pass one that has some.")
    few = {value: found.get(value, 0) for value in classes if found.get(value, 0) < examples}
    if few:
        told = ", ".join(f"{value!r} has {count}" for value, count in list(few.items())[:5])
        more = f" and {len(few) - 5} more classes have too few" if len(few) > 5 else ""
        raise ValueError(
            f"Each class needs examples={examples}; class {told}{more}. Ask for fewer examples, or "
            "name the classes that have enough by classes=[...]."
        )


def _name(value: Label, names: Mapping[Any, str] | Callable[[Any], str] | None) -> str:
    if names is None:
        return value if isinstance(value, str) else f"class_{value}"
    if isinstance(names, Mapping):
        if value not in names:
            raise ValueError(f"names has none for class {value!r}; it has {list(names)!r:.80}.")
        return names[value]
    return names(value)
