"""What is measured, as tables of columns: one row per step, or one per window of steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_lca.record import eventfile

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
SCALARS = (
    "loss_before",
    "loss_after",
    "residual",
    "drift",
    "splits",
    "converged",
    "trained",
    "seconds",
)
_RAW = "raw_residual"  # A part of the record where it is another than the residual.
_SPLIT = "split_"  # What the parts of the record start with that hold a breakdown.
LARGEST = 10**15  # Of any count or step: well inside what a float64, and so a web page, holds.


@dataclass(frozen=True)
class Breakdown:
    """Credit split into shares that add up to it, for T measured steps and G groups.

    Attributes:
        names: What the shares are (K,).
        allocated: Credit of every share [T, G, K], in loss units; negative = helped. Σ over K is
            the credit of the group. NaN in steps that were measured without it.
    """

    names: tuple[str, ...]
    allocated: Floats


@dataclass(frozen=True)
class StepTable:
    """Some measured steps, one row each, for G groups.

    Rows read from a record have narrower types: float32 credits and the smallest integers that hold
    the counts.

    Attributes:
        steps: Optimizer steps done at the end of each segment [T].
        allocated: Credit per group [T, G], in loss units; negative = helped.
        helping: Number of weights that helped [T, G].
        hurting: Number of weights that hurt [T, G].
        loss_before: Probe loss at the segment's start [T].
        loss_after: Probe loss at its end [T].
        residual: Loss change within the segment that the credits leave unexplained [T].
        drift: Loss change between the end of the segment before and this start [T].
        splits: Panels that the rule was applied on [T].
        converged: Whether |residual| ≤ tolerance, where one was asked for, and all numbers are
            finite [T].
        trained: Number of weights that were being trained [T].
        seconds: What the measurement took, as the host saw it [T].
        shares: By name of a breakdown, what every share was credited [T, G, K].
        raw_residual: What the rule left unexplained before a closed rule shared it out over the
            weights [T]; that of other rules is the residual.
    """

    steps: Ints
    allocated: Floats
    helping: Ints
    hurting: Ints
    loss_before: Floats
    loss_after: Floats
    residual: Floats
    drift: Floats
    splits: Ints
    converged: npt.NDArray[np.bool_]
    trained: Ints
    seconds: Floats
    shares: Mapping[str, Floats] = field(default_factory=dict)
    raw_residual: Floats = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        """Takes the residual for the raw one, where no rule shared anything out."""
        if self.raw_residual is None:
            object.__setattr__(self, "raw_residual", self.residual)

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, rows: slice | npt.NDArray[np.bool_]) -> StepTable:
        shares = {name: values[rows] for name, values in self.shares.items()}
        return StepTable(**{n: getattr(self, n)[rows] for n in _columns()}, shares=shares)

    def split_into(self, counts: Mapping[str, int]) -> StepTable:
        """Takes the same steps with just these breakdowns {name: shares}; NaN where one lacks."""
        if {name: values.shape[2] for name, values in self.shares.items()} == counts:
            return self
        shape = self.allocated.shape
        shares: dict[str, Floats] = {}
        for name, count in counts.items():
            values = self.shares.get(name, np.full((*shape, count), np.nan))
            fits = values.shape[2] == count
            shares[name] = values if fits else np.full((*shape, count), np.nan)
        return replace(self, shares=shares)

    @property
    def finite(self) -> npt.NDArray[np.bool_]:
        """Whether losses and credits of each step are finite, so that sums count it [T]."""
        ends = np.isfinite(self.loss_before) & np.isfinite(self.loss_after)
        return ends & np.isfinite(self.residual) & np.isfinite(self.allocated).all(axis=1)

    @property
    def unmoved(self) -> npt.NDArray[np.bool_]:
        """Steps in which no weight got credit [T]: a gradient scaler skips such steps."""
        finite = np.isfinite(self.allocated).all(axis=1)
        credited = (self.helping + self.hurting).sum(axis=1)
        return np.asarray(finite & (credited == 0))

    @classmethod
    def join(cls, parts: Sequence[StepTable]) -> StepTable:
        """Stacks tables on top of each other."""
        shares = {name: np.concatenate([p.shares[name] for p in parts]) for name in parts[0].shares}
        return cls(
            **{name: np.concatenate([getattr(p, name) for p in parts]) for name in _columns()},
            shares=shares,
        )

    @property
    def arrays(self) -> dict[str, Any]:
        """All columns by name, those of breakdowns under ``split_`` and their name."""
        columns = {name: getattr(self, name) for name in _columns()}
        return columns | {f"{_SPLIT}{name}": values for name, values in self.shares.items()}

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, Any]) -> StepTable:
        """Makes a table of what `arrays` gave."""
        shares = {
            name.removeprefix(_SPLIT): values
            for name, values in arrays.items()
            if name.startswith(_SPLIT)
        }
        return cls(**{name: arrays[name] for name in _columns()}, shares=shares)

    @classmethod
    def none(cls, groups: int) -> StepTable:
        """Makes a table without rows."""
        wide = {"allocated": float, "helping": np.int64, "hurting": np.int64}
        kinds = {"steps": np.int64, "splits": np.int64, "trained": np.int64, "converged": np.bool_}
        columns: dict[str, Any] = {
            name: np.empty((0, groups), wide[name])
            if name in wide
            else np.empty(0, kinds.get(name, float))
            for name in _columns()
        }
        return cls(**columns)

    def parts(self, sizes: Ints, *, closes: bool = False) -> dict[str, eventfile.Array]:
        """Returns the arrays that the record keeps: credits to float32, everything else exactly.

        Args:
            sizes: Number of weights of every group [G].
            closes: Whether the raw residual is another than the residual.
        """
        narrow = eventfile.counts_dtype(sizes)
        return {
            "steps": self.steps,
            "allocated": _single(self.allocated),
            "helping": self.helping.astype(narrow),
            # Idle weights are few and steady: unlike hurting ones they compress to almost nothing.
            "idle": (sizes - self.helping - self.hurting).astype(narrow),
            "scalars": np.stack([getattr(self, name).astype(float) for name in SCALARS], 1),
            **({_RAW: self.raw_residual.astype(float)} if closes else {}),
            **{f"{_SPLIT}{name}": _single(values) for name, values in self.shares.items()},
        }

    @classmethod
    def from_parts(cls, parts: Mapping[str, Any], sizes: Ints) -> StepTable:
        """Reads back what `parts` gave, without widening it.

        Raises:
            KeyError: A part is missing. ValueError: Parts do not fit together, or hold what is not
                measured.
        """
        steps, allocated, helping, idle, scalars = (parts[name] for name in cls.columns(0))
        shares = {
            name.removeprefix(_SPLIT): part
            for name, part in parts.items()
            if name.startswith(_SPLIT)
        }
        counts = {name: part.shape[-1] if part.ndim else 0 for name, part in shares.items()}
        raw = parts.get(_RAW)
        expected = cls.columns(len(sizes), counts, closes=raw is not None)
        for name, columns in expected.items():
            if parts[name].shape != (len(steps), *columns):
                shape = (len(steps), *columns)
                raise ValueError(f"{name} has shape {parts[name].shape}, expected {shape}.")
        _check_kinds("iu", steps=steps)
        _check_kinds("u", helping=helping, idle=idle)
        _check_kinds("f", allocated=allocated, scalars=scalars, **shares)
        if raw is not None:
            _check_kinds("f", **{_RAW: raw})
        _check_steps(steps)
        named = dict(zip(SCALARS, scalars.T.astype(np.float64), strict=True))
        exact = {"splits": np.int64, "converged": np.bool_, "trained": np.int64}
        for name in exact:
            most = 1 if name == "converged" else LARGEST
            if not ((named[name] >= 0) & (named[name] <= most)).all():
                raise ValueError(f"{name} holds numbers beyond 0 to {most}.")
        kind = helping.dtype
        return cls(
            steps=steps.astype(np.int64, copy=False),
            allocated=allocated,
            helping=helping,
            # Modulo 2^bits, so that it needs no wider numbers.
            hurting=sizes.astype(kind) - helping - idle.astype(kind, copy=False),
            raw_residual=named["residual"] if raw is None else raw.astype(np.float64),
            shares=shares,
            **{name: column.astype(exact.get(name, np.float64)) for name, column in named.items()},
        )

    @staticmethod
    def columns(
        groups: int, counts: Mapping[str, int] | None = None, *, closes: bool = False
    ) -> dict[str, tuple[int, ...]]:
        """Tells the shape of a row of every part of the record.

        Args:
            groups: How many there are.
            counts: Of every breakdown, how many shares it has.
            closes: Whether the raw residual is another than the residual.
        """
        wide = (groups,)
        split = {f"{_SPLIT}{name}": (groups, count) for name, count in (counts or {}).items()}
        raw: dict[str, tuple[int, ...]] = {_RAW: ()} if closes else {}
        return (
            split
            | raw
            | {
                "steps": (),
                "allocated": wide,
                "helping": wide,
                "idle": wide,
                "scalars": (len(SCALARS),),
            }
        )


def _columns() -> list[str]:
    """Names the columns of a table of steps, breakdowns apart."""
    return [f.name for f in fields(StepTable) if f.name != "shares"]


@dataclass(frozen=True)
class WindowTable:
    """Credit of many small things, summed over windows of steps: coarse in time, fine in space.

    Attributes:
        names: What is credited (N,): "conv1.weight", "conv1/0" (its first channel) or
            "conv1.weight[3, 0, 2, 2]" (a single weight).
        steps: Last optimizer step of every window [W]; a window starts where the one before ends.
        measured: Number of measured steps in every window [W].
        allocated: Credit within every window [W, N], in loss units; negative = helped.
        helping: Single weights only: number of measured steps in which each one helped [W, N].
        layers: Parameters and neurons only: the layer that each belongs to (N,).
        kinds: Parameters only: "kernel", "bias" or "norm" (N,).
        sampled_from: Single weights only: the number of weights that these are a sample of.
    """

    names: tuple[str, ...]
    steps: Ints
    measured: Ints
    allocated: Floats
    helping: Ints | None = None
    kinds: tuple[str, ...] = ()
    sampled_from: int = 0
    layers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Tells the layers from the names, where nobody said them."""
        if not self.layers and not self.sampled_from:
            what = "parameter" if self.kinds else "neuron"
            layers = tuple(layer_of(name, what) for name in self.names)
            object.__setattr__(self, "layers", layers)

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, rows: slice | npt.NDArray[np.bool_]) -> WindowTable:
        return replace(
            self,
            steps=self.steps[rows],
            measured=self.measured[rows],
            allocated=self.allocated[rows],
            helping=None if self.helping is None else self.helping[rows],
        )

    @classmethod
    def none(
        cls,
        names: Sequence[str],
        *,
        kinds: Sequence[str] = (),
        sampled_from: int = 0,
        layers: Sequence[str] = (),
    ) -> WindowTable:
        """Makes a table without rows."""
        none = np.empty(0, np.int64)
        wide = np.empty((0, len(names)))
        helping = wide.astype(np.int64) if sampled_from else None
        return cls(
            tuple(names), none, none, wide, helping, tuple(kinds), sampled_from, tuple(layers)
        )

    @classmethod
    def join(cls, parts: Sequence[WindowTable]) -> WindowTable:
        """Stacks tables of the same things on top of each other."""
        columns = ["steps", "measured", "allocated"]
        columns += ["helping"] if parts[0].helping is not None else []
        stacked: dict[str, Any] = {
            c: np.concatenate([getattr(p, c) for p in parts]) for c in columns
        }
        return replace(parts[0], **stacked)

    def parts(self) -> dict[str, eventfile.Array]:
        """Returns the arrays that the record keeps: credits to float32, everything else exactly."""
        parts: dict[str, eventfile.Array] = {
            "span": np.stack([self.steps, self.measured], 1),
            "allocated": _single(self.allocated),
        }
        if self.helping is not None:
            narrow = eventfile.counts_dtype([int(self.measured.max(initial=0))])
            parts["helping"] = self.helping.astype(narrow)
        return parts

    def from_parts(self, parts: Mapping[str, Any]) -> WindowTable:
        """Reads windows of the same things back from what `parts` gave.

        Raises:
            KeyError: A part is missing. ValueError: Parts do not fit together, or hold what is not
                measured.
        """
        span, allocated = parts["span"], parts["allocated"]
        helping = None if self.helping is None else parts["helping"]
        shape = (len(span), len(self.names))
        if span.shape[1:] != (2,) or any(
            x is not None and x.shape != shape for x in (allocated, helping)
        ):
            raise ValueError(f"Windows of {len(self.names)} things do not fit together.")
        _check_kinds("iu", span=span)
        _check_kinds("f", allocated=allocated)
        _check_steps(span[:, 0])
        if not ((span[:, 1] >= 0) & (span[:, 1] <= LARGEST)).all():
            raise ValueError(f"measured holds numbers beyond 0 to {LARGEST}.")
        if helping is not None:
            _check_kinds("u", helping=helping)
        return replace(
            self,
            steps=span[:, 0].astype(np.int64),
            measured=span[:, 1].astype(np.int64),
            allocated=allocated.astype(float),
            helping=None if helping is None else helping.astype(np.int64),
        )


def _single(values: Floats) -> eventfile.Array:
    """Narrows numbers to float32, unless some lie beyond its range, or next to zero."""
    with np.errstate(over="ignore", under="ignore"):
        single = values.astype(np.float32)
    lost = (np.isinf(single) & np.isfinite(values)) | (
        (values != 0) & (np.abs(single) < np.finfo(np.float32).tiny)
    )
    return values.astype(np.float64) if lost.any() else single


def _check_kinds(kinds: str, **columns: eventfile.Array) -> None:
    """Refuses columns of other numbers than of these kinds, as numpy names them."""
    for name, column in columns.items():
        if column.dtype.kind not in kinds:
            raise ValueError(f"{name} holds {column.dtype}, expected one of kind {kinds!r}.")


def _check_steps(steps: eventfile.Array) -> None:
    """Refuses steps that do not rise, or lie beyond what can be."""
    if len(steps) and not (int(steps.min()) >= 0 and int(steps.max()) <= LARGEST):
        raise ValueError(f"steps lie beyond 0 to {LARGEST}.")
    if not (steps[1:] > steps[:-1]).all():
        raise ValueError("steps do not rise.")


def layer_of(name: str, what: str) -> str:
    """Tells the layer from a name, where an older record does not say it.

    Args:
        name: Of a group.
        what: "parameter" or "neuron"; other groups are layers themselves.

    Example:
        >>> layer_of("conv.parametrizations.weight.original", "parameter")
        'conv'
        >>> layer_of("fc/3", "neuron")
        'fc'
    """
    if what == "neuron":
        return name.rpartition("/")[0]
    if what == "parameter":
        path, _, leaf = name.rpartition(".")
        return path.partition("parametrizations.")[0].rstrip(".") or leaf
    return name


@dataclass(frozen=True)
class Columns:
    """What a table of windows credits, as a session declares it; its names are not made yet.

    A few bytes can declare a thousand million neurons.

    Attributes:
        names: Of parameters; the layers of neurons, and the parameters of single weights.
        counts: How many columns each of these names stands for (1 for parameters).
        layers: The layer of each of these names; none for single weights.
        kinds: Of parameters.
        indices: Of single weights: the flat indices in each of these parameters.
        shapes: Of single weights: the shapes of these parameters.
        sampled_from: As in `WindowTable`.
        is_numbered: Whether the columns are numbered within these names, as neurons are.
    """

    names: tuple[str, ...]
    counts: tuple[int, ...]
    layers: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    indices: tuple[tuple[int, ...], ...] = ()
    shapes: tuple[tuple[int, ...], ...] = ()
    sampled_from: int = 0
    is_numbered: bool = False

    def __len__(self) -> int:
        return sum(self.counts)

    @property
    def memory(self) -> int:
        """Bytes that all names take, roughly."""
        return sum(n * (len(x) + 90) for x, n in zip(self.names, self.counts, strict=True))

    def __iter__(self) -> Iterator[str]:
        """Makes the names, one by one."""
        if self.indices:
            for name, indices, shape in zip(self.names, self.indices, self.shapes, strict=True):
                for index in indices:
                    yield f"{name}{[int(i) for i in np.unravel_index(index, shape)]}"
        elif self.is_numbered:
            for name, count in zip(self.names, self.counts, strict=True):
                yield from (f"{name}/{i}" for i in range(count))
        else:
            yield from self.names

    def is_named(self, names: Sequence[str]) -> bool:
        """Whether these are the names of the columns."""
        return len(self) == len(names) and all(a == b for a, b in zip(self, names, strict=True))

    def parts(self) -> dict[str, tuple[int, ...]]:
        """Tells the shape of a row of every part of the record."""
        parts: dict[str, tuple[int, ...]] = {"span": (2,), "allocated": (len(self),)}
        return parts | ({"helping": (len(self),)} if self.sampled_from else {})

    def table(self) -> WindowTable:
        """Makes the table without rows."""
        layers = [x for x, n in zip(self.layers, self.counts, strict=False) for _ in range(n)]
        return WindowTable.none(
            tuple(self), kinds=self.kinds, sampled_from=self.sampled_from, layers=layers
        )


def declared(
    metadata: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]
) -> dict[str, Columns]:
    """Reads what a session's description says of its tables of windows.

    Args:
        metadata: {"parameters": {"names", "kinds", "layers"}, "neurons": {"stems": [(stem,
            neurons)], "layers": of each stem}, "weights": {"indices": {parameter: flat indices},
            "of": weights sampled from}}, each where there is such a table.
        shapes: Shape of every parameter.
    """
    tables = {}
    if table := metadata.get("parameters"):
        names = tuple(table["names"])
        layers = table.get("layers") or [layer_of(name, "parameter") for name in names]
        ones = (1,) * len(names)
        tables["parameters"] = Columns(names, ones, tuple(layers), tuple(table["kinds"]))
    if table := metadata.get("neurons"):
        stems = tuple(stem for stem, _ in table["stems"])
        counts = tuple(count for _, count in table["stems"])
        layers = tuple(table.get("layers") or stems)
        tables["neurons"] = Columns(stems, counts, layers, is_numbered=True)
    if table := metadata.get("weights"):
        indices = table["indices"]
        tables["weights"] = Columns(
            tuple(indices),
            tuple(map(len, indices.values())),
            indices=tuple(map(tuple, indices.values())),
            shapes=tuple(tuple(shapes[name]) for name in indices),
            sampled_from=table["of"],
        )
    return tables


def window_tables(
    metadata: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]
) -> dict[str, WindowTable]:
    """Makes empty tables of windows from what `declared` takes.

    Example:
        >>> metadata = {"weights": {"indices": {"fc.weight": [0, 5]}, "of": 6}}
        >>> window_tables(metadata, {"fc.weight": [2, 3]})["weights"].names
        ('fc.weight[0, 0]', 'fc.weight[1, 2]')
    """
    return {name: columns.table() for name, columns in declared(metadata, shapes).items()}
