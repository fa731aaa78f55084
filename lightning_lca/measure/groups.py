"""From weights to groups: sums and counts per parameter, layer, neuron and so on, on the device.

Every parameter is seen as a matrix of *rows*; a grouping says which group each row belongs to. By
neuron a tensor has one row per output channel, and the row of a bias joins the row of its unit; by
head it has one row per attention head; in all other groupings a tensor is one row.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lca.measure.allocation import Weights
from lightning_lca.measure.heads import HeadRows, head_rows
from lightning_lca.measure.naming import layer_of, module_of, stem_of
from lightning_lca.measure.parameters import (
    any_cut,
    is_counted_here,
    is_cut,
    named_parameters,
    rows_here,
    submodule,
)
from lightning_lca.measure.sums import (
    Columns,
    Run,
    in_few_kernels,
    in_the_cache,
    pieces_of,
    runs_of,
)
from lightning_lca.measure.tensors import ALIGNED, CHUNK, LARGE, Flat, bundles, on_accelerator

# "parameter", "layer", "neuron", "head", "module:2", or (name, parameter) -> label.
GroupBy = Callable[[str, nn.Parameter], str] | str
CUSTOM = "custom"  # What a grouping by a function is called.
_BY = ("parameter", "layer", "neuron", "head")
_DEPTH = re.compile(r"module:([1-9]\d{0,8})")


def check_group_by(by: Any) -> None:
    """Refuses what names no grouping.

    Raises:
        ValueError: It is none of the names, and no function.
    """
    if callable(by) or (isinstance(by, str) and (by in _BY or _DEPTH.fullmatch(by))):
        return
    raise ValueError(
        f"group_by must be one of {', '.join(map(repr, _BY))}; 'module:2' for modules to that "
        f"depth, from 1; or a function (name, parameter) -> text. Got {by!r}."
    )


@dataclass(frozen=True)
class GroupSums:
    """What each group did on one segment.

    Attributes:
        numbers: Of every group credit, helping and hurting, then Σ A per parameter
            [3 x groups + parameters], float64.
        groups: How many groups there are.
    """

    numbers: Tensor
    groups: int

    @property
    def table(self) -> Tensor:
        """Of every group credit, helping and hurting [3, groups], float64."""
        return self.numbers[: 3 * self.groups].view(3, self.groups)

    @property
    def parameters(self) -> Tensor:
        """Σ A per parameter [parameters], float64."""
        return self.numbers[3 * self.groups :]

    @property
    def credit(self) -> Tensor:
        """Σ A per group [groups], float64, in loss units; negative = helped."""
        return self.numbers[: self.groups]

    @property
    def helping(self) -> Tensor:
        """Number of weights with A < 0 per group [groups], int64."""
        return self.table[1].long()

    @property
    def hurting(self) -> Tensor:
        """Number of weights with A > 0 per group [groups], int64. The rest is idle."""
        return self.table[2].long()


@dataclass(frozen=True)
class _Rows:
    """How one parameter splits into rows.

    A transposed convolution keeps its output channels in dimension 1, once for each of its
    ``blocks`` (groups) along dimension 0.
    """

    groups: Tensor  # [rows] int64, the group of every row that this process holds
    dim: int
    blocks: int
    size: int  # Elements of the whole parameter.
    is_counted: bool  # Whether this process speaks for its part.

    def matrix(self, values: Tensor) -> Tensor:
        """Shows values row by row: [*shape] -> [rows, elements per row]."""
        if self.dim == 1:
            values = values.reshape(self.blocks, -1, *values.shape[1:]).movedim(2, 1)
        return values.reshape(len(self.groups), -1 if values.numel() else 0)

    def of_elements(self, shape: Sequence[int]) -> Tensor:
        """Returns the group of every element [*shape]."""
        rows = self.groups.view(self.blocks, -1) if self.dim == 1 else self.groups[None]
        channels = shape[self.dim] if len(shape) > self.dim else 1
        rows = rows.repeat_interleave(channels // rows.shape[1], 1)  # A head has several.
        if self.dim == 1:
            table = rows.view(self.blocks, 1, -1, *[1] * (len(shape) - 2))
            inputs = shape[0] // self.blocks
            return table.expand(self.blocks, inputs, *shape[1:]).reshape(tuple(shape))
        return rows.view(-1, *[1] * (len(shape) - 1)).expand(tuple(shape))


@dataclass(frozen=True)
class _Plan:
    """Where the sums of some parameters' rows go, on the device."""

    into: Tensor  # [4 x rows]: groups of sum, balance and count above 0; parameters.
    pieces: list[tuple[slice, Tensor, Tensor]]  # Per bundle of tensors: see `pieces_of`.
    counts: Tensor | None  # [rows] of 1 and 0; None: those of all rows count.


@dataclass(frozen=True)
class _Layout:
    """The same for tensors that lie side by side: pieces of runs, then rows of large ones."""

    form: tuple[object, ...]
    runs: list[Run]
    large: list[str]
    plan: _Plan


class Grouping:
    """Groups of weights in network order, and their sums.

    Attributes:
        names: Name of every group, in network order.
        sizes: Number of weights of every group [groups].
        layers: The layer that every group belongs to, by name.
        by: "parameter", "layer", "neuron", "head" or "module:2", for example; "custom" where a
            function names the groups.
        parameters: Name of every parameter.
        kinds: Of every parameter: "norm" if it belongs to a normalization, "bias", or "kernel".
        leaves_out: Whether the last sums lack parameters that the table of groups has no place for.
        is_whole: Whether no parameter is cut over processes; else `sums` are of the parts here,
            and add up over processes to those of the whole.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> Grouping(model, "layer").names
        ['0', '2']
        >>> Grouping(model, "neuron").names
        ['0/0', '0/1', '0/2', '2/0']
        >>> grouping = Grouping(model, "layer")
        >>> values = {n: torch.full_like(p, -1.0) for n, p in model.named_parameters()}
        >>> grouping.sums(values).credit.tolist()
        [-9.0, -4.0]
        >>> Grouping(model, lambda name, p: "biases" if p.dim() == 1 else "weights").names
        ['weights', 'biases']
    """

    def __init__(
        self,
        module: nn.Module,
        by: GroupBy = "layer",
        process: int = 0,
        only: Collection[str] | None = None,
    ) -> None:
        """Groups all parameters, frozen ones included; tied ones count once, at their first name.

        Args:
            module: Whose parameters.
            by: "parameter"; "layer": the module that owns it; "neuron": an output channel; "head":
                an attention head, and whatever belongs to none by layer; "module:2": the modules
                to that depth; or a function (name, parameter) -> label.
            process: Number of this process, where parameters are cut over several.
            only: Names of the parameters that are grouped; None: all.

        Raises:
            ValueError: ``by`` is no grouping, neurons are cut in a way that cannot be followed, or
                a function gave an empty label.
            TypeError: A function gave a label that is no text.
        """
        check_group_by(by)
        self.by: str = by if isinstance(by, str) else CUSTOM
        heads = head_rows(module) if by == "head" else {}
        self.is_whole = not any_cut(module)
        index: dict[str, int] = {}
        sizes: dict[int, int] = {}
        layers: dict[int, str] = {}
        self._rows: dict[str, _Rows] = {}
        for name, parameter in named_parameters(module).items():
            if only is not None and name not in only:
                continue
            labels, dim, blocks = _rows_of(module, name, parameter, by, heads)
            groups = [index.setdefault(label, len(index)) for label in labels]
            for label, group in zip(labels, groups, strict=True):
                # Such groups hold several layers: they are shown as layers themselves.
                is_coarse = self.by == CUSTOM or self.by.startswith("module:")
                layers.setdefault(group, label if is_coarse else layer_of(name))
                sizes[group] = sizes.get(group, 0) + parameter.numel() // len(groups)
            by_row = is_cut(parameter) and len(groups) > 1
            here = rows_here(parameter, dim) if by_row else slice(None)
            self._rows[name] = _Rows(
                torch.tensor(groups, dtype=torch.long)[here],
                dim,
                blocks,
                parameter.numel(),
                self.is_whole or is_counted_here(parameter, process),
            )
        self.parameters: list[str] = list(self._rows)
        self.kinds: list[str] = [_kind(module, name) for name in self.parameters]
        self.names: list[str] = list(index)
        self.sizes: list[int] = [sizes[group] for group in range(len(index))]
        self.layers: list[str] = [layers[group] for group in range(len(index))]
        self.leaves_out = False
        self._warned_of: set[str] = set()
        self._layout: _Layout | None = None
        self._plans: dict[tuple[Any, ...], _Plan] = {}

    @property
    def owners(self) -> dict[str, str]:
        """The group of every parameter, {parameter: group}; of its first row, by neuron."""
        return {n: self.names[int(r.groups[0])] for n, r in self._rows.items() if len(r.groups)}

    @property
    def stems(self) -> list[tuple[str, int, str]]:
        """Of groups by neuron: the name before the slash, how many come in a row, and their layer.

        Example:
            >>> Grouping(nn.Sequential(nn.RNN(4, 3), nn.Linear(3, 2)), "neuron").stems
            [('0.l0', 3, '0'), ('1', 2, '1')]
        """
        stems: list[tuple[str, int, str]] = []
        for name, layer in zip(self.names, self.layers, strict=True):
            stem = name.rpartition("/")[0]
            if stems and stems[-1][0] == stem:
                stems[-1] = (stem, stems[-1][1] + 1, layer)
            else:
                stems.append((stem, 1, layer))
        return stems

    def is_counted(self, name: str) -> bool:
        """Whether this process speaks for its part of a parameter."""
        return self._rows[name].is_counted

    def count(self, names: Iterable[str]) -> int:
        """Counts the weights of some parameters, wherever they are held."""
        return sum(self._rows[n].size for n in names if n in self._rows)

    def sums(self, values: Weights) -> GroupSums:
        """Sums credit and counts helpers and hurters per group: {name: [*shape]} -> three [groups].

        Nothing is read back to the host. Names may be any subset of the module's; groups without a
        name in ``values`` are zero. Parameters that the module did not have at first are left out,
        with one warning. Of those that have another size by now the credit is summed and no weight
        counted, with one warning; rows of which there were others are left out.
        """
        if isinstance(values, Flat) and len(values.wholes) == 1:
            return self._sums_side_by_side(values)
        device = next(iter(values.values())).device
        names = tuple(self._known(values))
        rows = [self._rows[n].matrix(values[n].to(device)) for n in names]
        key = (device, *((n, values[n].shape) for n in names))
        if key not in self._plans:
            self._plans = {key: self._plan(names, values, _pieces(rows), None, device)}
        plan = self._plans[key]
        return self._added_up([_of_rows(rows, plan.pieces)] if rows else [], plan)

    def blocks(self, values: Flat) -> tuple[int, list[Tensor]]:
        """Cuts memories into blocks of equal length, each of which belongs to one group.

        Returns:
            The length; and for every memory the group of every block [blocks], one more than there
            are for what is in none.
        """
        rows = {n: self._rows[n] for n in values if n in self._rows and self._rows[n].is_counted}
        lost = {n for n in rows if self._is_resized(n, values[n]) and len(rows[n].groups) != 1}
        block = ALIGNED
        for name, row in rows.items():
            if name not in lost and len(row.groups) > 1:
                width = values[name].numel() // len(row.groups)
                block = math.gcd(block, width if self._is_in_order(name, values[name]) else 1)
        none = len(self.names)
        index = [torch.full((len(w) // block,), none) for w in values.wholes]
        for name, row in rows.items():
            memory, begin, length = values.spans[name]
            if name in lost or not length:
                continue
            place = index[memory][begin // block : -(-(begin + length) // block)]
            if len(row.groups) == 1:
                place.fill_(int(row.groups[0]))
            elif self._is_in_order(name, values[name]):
                place.copy_(row.groups.repeat_interleave(length // len(row.groups) // block))
            else:
                shape, strides = values[name].shape, values[name].stride()
                index[memory].as_strided(shape, strides, begin).copy_(row.of_elements(shape))
        return block, [i.to(w.device) for i, w in zip(index, values.wholes, strict=True)]

    def _sums_side_by_side(self, values: Flat) -> GroupSums:
        """Does the same where small tensors share a memory: in few operations for all of them."""
        layout = self._layout
        if layout is None or layout.form is not values.form:
            layout = self._layout = self._lay_out(values)
        parts = [run.sums(values.wholes, values.scratch()) for run in layout.runs]
        if layout.large:
            rows = [self._rows[n].matrix(values[n]) for n in layout.large]
            parts.append(_of_rows(rows, layout.plan.pieces))
        return self._added_up(parts, layout.plan)

    def _added_up(self, parts: list[Columns], plan: _Plan) -> GroupSums:
        """Adds up what is known of rows or pieces."""
        groups = len(self.names)
        dtype = parts[0][0].dtype if parts else torch.float64
        length = 3 * groups + len(self.parameters) + 1
        total = torch.zeros(length, dtype=dtype, device=plan.into.device)
        if parts:
            columns = [[*column] for column in zip(*parts, strict=True)]
            if plan.counts is not None:
                columns[1:] = [[torch.cat(c) * plan.counts] for c in columns[1:]]
            # The sums once more: for parameters.
            flat = torch.cat([t for c in (*columns, columns[0]) for t in c])
            total.index_add_(0, plan.into, flat)
        helping, hurting = total[groups : 2 * groups], total[2 * groups : 3 * groups]
        torch.sub(hurting, helping, out=helping)
        return GroupSums(total[:-1], groups)

    def _lay_out(self, values: Flat) -> _Layout:
        """Says where the sums of every row go, of tensors that lie side by side."""
        device = values.wholes[0].device
        names = self._known(values)
        most = CHUNK if device.type == "cpu" else LARGE
        small = [n for n in names if values[n].numel() <= most and self._is_in_order(n, values[n])]
        large = [n for n in names if n not in set(small)]
        counts = [len(self._rows[n].groups) for n in small]
        runs = runs_of([values.spans[n] for n in small], counts, most, device)
        rows = [self._rows[n].matrix(values[n]) for n in large]
        of_rows = sum(map(len, rows))
        index, done = [], 0
        for part in runs:
            gaps = part.into == part.rows
            index.append((part.into + done).masked_fill(gaps, sum(counts) + of_rows).cpu())
            done += part.rows
        index.append(torch.arange(of_rows) + done)
        plan = self._plan([*small, *large], values, _pieces(rows), torch.cat(index), device)
        return _Layout(values.form, runs, large, plan)

    def _plan(
        self,
        names: Sequence[str],
        values: Weights,
        pieces: list[tuple[slice, Tensor, Tensor]],
        index: Tensor | None,
        device: torch.device,
    ) -> _Plan:
        """Says where the sums of some parameters' rows go.

        Args:
            names: The parameters.
            values: Tensors like theirs {name: [*shape]}.
            pieces: See `_Plan`.
            index: The row of every piece that is summed [pieces], one more than there are for gaps;
                None: every row by itself.
            device: Where the sums are.
        """
        place = {n: i for i, n in enumerate(self.parameters)}
        groups, owners, counts = [], [], []
        for name in names:
            of_rows = self._rows[name].groups
            groups.append(of_rows)
            owners.append(torch.full_like(of_rows, place[name]))
            counts.append(torch.full_like(of_rows, not self._is_resized(name, values[name])))
        end = [torch.tensor([n]) for n in (len(self.names), len(self.parameters), 1)]
        group, owner, count = (
            torch.cat([*column, last])
            for column, last in zip((groups, owners, counts), end, strict=True)
        )
        if index is None:
            index = torch.arange(len(group) - 1)
        to, size = group[index], len(self.names)
        into = torch.cat([to, to + size, to + 2 * size, owner[index] + 3 * size])
        into[(to == size).repeat(4)] = 3 * size + len(self.parameters)  # What is in no group.
        all_count = bool(count.all())
        return _Plan(into.to(device), pieces, None if all_count else count[index].to(device))

    def _known(self, values: Weights) -> list[str]:
        """Lists those whose rows can be summed here; warns of the others."""
        strangers = [n for n in values if n not in self._rows]
        resized = [n for n in values if self._is_resized(n, values[n])]
        lost = [n for n in resized if len(self._rows[n].groups) != 1]
        self.leaves_out = bool(strangers or lost)
        if strangers:
            self._warn(
                f"{len(strangers)} parameters, {strangers[0]} the first, joined after the start of "
                "training. The table of groups is fixed by then: their credit is left out of it "
                "and shows as residual. Make them in __init__ or configure_model, frozen if they "
                "are to train later."
            )
        if resized:
            what = "credit is left out of the table of groups and shows as residual"
            if not lost:
                what = "credit still counts; its weights count neither as helping nor as hurting"
            self._warn(
                f"{resized[0]} has another size than at the start of training. The table of "
                f"groups is fixed by then: from now on its {what}."
            )
        known = [n for n in values if n in self._rows and n not in lost]
        return [n for n in known if self._rows[n].is_counted]

    def _is_resized(self, name: str, values: Tensor) -> bool:
        """Whether a parameter has another size by now, as a head that grows."""
        rows = self._rows.get(name)
        return self.is_whole and rows is not None and rows.size != values.numel()

    def _is_in_order(self, name: str, values: Tensor) -> bool:
        """Whether a tensor's rows follow one another in memory."""
        rows = self._rows[name]
        return len(rows.groups) == 1 or (rows.dim == 0 and values.is_contiguous())

    def _warn(self, text: str) -> None:
        if text not in self._warned_of:
            warnings.warn(f"LCA: {text}", stacklevel=2)
        self._warned_of.add(text)


def _of_rows(rows: list[Tensor], pieces: list[tuple[slice, Tensor, Tensor]]) -> Columns:
    """Returns sum, balance and count above 0 of rows: [rows, width] each -> three [all rows]."""
    return in_few_kernels(rows, pieces) if on_accelerator(rows[0]) else in_the_cache(rows)


def _pieces(rows: list[Tensor]) -> list[tuple[slice, Tensor, Tensor]]:
    """Cuts rows for an accelerator; a CPU needs no such plan."""
    if not rows or not on_accelerator(rows[0]):
        return []
    device = rows[0].device
    return [
        (bundle, lengths.to(device), into.to(device))
        for bundle in bundles(rows)
        for lengths, into in [pieces_of(rows[bundle])]
    ]


def _rows_of(
    module: nn.Module,
    name: str,
    parameter: nn.Parameter,
    by: GroupBy,
    heads: dict[str, HeadRows],
) -> tuple[list[str], int, int]:
    """Names the group of every row; says in which dimension the rows lie, in how many blocks."""
    if not isinstance(by, str):
        return [_label(by, name, parameter)], 0, 1
    if by == "parameter":
        return [name], 0, 1
    if name in heads:
        return heads[name].labels, heads[name].dim, 1
    if by != "neuron":
        depth = _DEPTH.fullmatch(by)
        parts = layer_of(name).split(".")
        return [".".join(parts[: int(depth[1])] if depth else parts)], 0, 1
    stem = stem_of(name)
    leaf = name.rpartition(".")[2]
    owner = submodule(module, module_of(name))
    if isinstance(owner, nn.RNNBase):
        stem += "." + leaf.split("_", 2)[-1]  # weight_ih_l0 and bias_hh_l0 share the rows of l0.
    if isinstance(owner, nn.modules.conv._ConvTransposeNd) and parameter.dim() > 1:
        return [f"{stem}/{i}" for i in range(owner.out_channels)], 1, owner.groups
    rows = parameter.shape[0] if parameter.dim() else 1
    return [f"{stem}/{i}" for i in range(rows)], 0, 1


def _label(by: Callable[[str, nn.Parameter], str], name: str, parameter: nn.Parameter) -> str:
    """Asks a function for the group of a parameter."""
    label = by(name, parameter)
    remedy = "Return the name of its group, a text such as 'encoder'."
    if not isinstance(label, str):
        raise TypeError(f"group_by gave {label!r} for {name}, a {type(label).__name__}. {remedy}")
    if not label.strip():
        raise ValueError(f"group_by gave an empty text for {name}. {remedy}")
    return label


def _kind(module: nn.Module, name: str) -> str:
    """Tells kernels from biases and from what normalizations learn."""
    leaf = name.rpartition(".")[2]
    owner = submodule(module, module_of(name))
    if "norm" in type(owner).__name__.lower():
        return "norm"
    return "bias" if "bias" in leaf else "kernel"
