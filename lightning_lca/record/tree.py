"""Rows of many layers: modules as blocks that are open or folded, and what a search finds.

Layers are told apart by the dots of their names, as modules are. A block's row is the exact sum of
the layers within; where it is open, these follow it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_lca.record.layers import Layers
from lightning_lca.record.tables import Ints

FOUND = 200  # Most layers that a search lists.
_FEW = 10  # Rows that tell next to nothing: then blocks are opened even if many rows follow.
_DEEPEST = 50  # Modules within one another.
_WIDEST = 80  # Children of a block; of more, neighbours are put together.
_ROUND = (1, 2, 5)


@dataclass(frozen=True)
class Row:
    """A row: one layer, or a block of them.

    Attributes:
        name: Of the layer; of a block, that of its module and ".*", or "first … last" for a run of
            its children.
        depth: How many open blocks it lies in.
        layers: Places of the layers within, in network order.
        is_open: Whether these follow; None for a layer.
    """

    name: str
    depth: int
    layers: tuple[int, ...]
    is_open: bool | None


@dataclass
class _Node:
    """A module, or a layer: then it has no children."""

    name: str
    place: int | None = None
    children: dict[str, _Node] = field(default_factory=dict)

    @property
    def layers(self) -> tuple[int, ...]:
        own = () if self.place is None else (self.place,)
        return (*own, *(place for child in self.children.values() for place in child.layers))


class Tree:
    """Layers by their modules."""

    def __init__(self, names: Sequence[str]) -> None:
        """Takes the names of layers, in network order."""
        self.names = tuple(names)
        root = _Node("")
        for place, name in enumerate(names):
            node, path = root, []
            for part in name.split(".", _DEEPEST):
                path.append(part)
                node = node.children.setdefault(part, _Node(".".join(path)))
            node.place = place
        self._root = _grouped(_Node("", children=_simplest(root).children))

    def block(self, name: str) -> tuple[int, ...] | None:
        """Finds the layers of a block by its name; None if there is no such block."""
        nodes = [self._root]
        for node in nodes:
            if node.children and node.name == name:
                return node.layers
            nodes += node.children.values()
        return None

    def rows(self, most: int, toggled: Collection[str] = ()) -> list[Row]:
        """Lists rows in network order.

        Args:
            most: Of so many layers each has its row. Of more, blocks are opened, one level after
                the other, as long as there are no more rows than that, or fewer than ten.
            toggled: Blocks that are open where they would be folded, or the other way round.
        """
        if len(self.names) <= most:
            return [Row(name, 0, (place,), None) for place, name in enumerate(self.names)]
        opened = self._opened(most)
        return list(self._listed(self._root, 0, opened, set(toggled)))

    def find(self, text: str) -> list[Row]:
        """Lists the layers whose name has all words of a text, below a row with their sum."""
        words = text.lower().split()
        found = [
            place
            for place, name in enumerate(self.names)
            if all(word in name.lower() for word in words)
        ]
        if not found:
            return []
        listed = [Row(self.names[place], 1, (place,), None) for place in found[:FOUND]]
        return [Row(f"*{' '.join(words)}*", 0, tuple(found), True), *listed]

    # -- inside -----------------------------------------------------------------------------------

    def _opened(self, most: int) -> set[str]:
        """Chooses the blocks that are open at first."""
        opened: set[str] = set()
        level, rows = list(self._root.children.values()), len(self._root.children)
        while blocks := [node for node in level if node.children]:
            more = sum(len(node.children) + (node.place is not None) for node in blocks)
            if rows + more > most and (rows >= _FEW or more > 3 * most):
                break
            opened |= {node.name for node in blocks}
            rows += more
            level = [child for node in blocks for child in node.children.values()]
        return opened

    def _listed(
        self, node: _Node, depth: int, opened: set[str], toggled: set[str]
    ) -> Iterator[Row]:
        for child in node.children.values():
            if not child.children:
                yield Row(self.names[child.layers[0]], depth, child.layers, None)
                continue
            is_open = (child.name in opened) != (child.name in toggled)
            yield Row(child.name, depth, child.layers, is_open)
            if is_open:
                if child.place is not None:
                    yield Row(self.names[child.place], depth + 1, (child.place,), None)
                yield from self._listed(child, depth + 1, opened, toggled)


def _simplest(node: _Node) -> _Node:
    """Drops modules that hold just one other, and names blocks."""
    node.children = {name: _simplest(child) for name, child in node.children.items()}
    if len(node.children) == 1 and node.place is None:
        (only,) = node.children.values()
        return only
    if node.children:
        node.name = f"{node.name}.*"
    return node


def _grouped(node: _Node) -> _Node:
    """Puts runs of neighbours together where a module has very many children."""
    children = [_grouped(child) for child in node.children.values()]
    if len(children) > _WIDEST:
        size = _round_up(2 * len(children) / _WIDEST)
        runs = [children[i : i + size] for i in range(0, len(children), size)]
        children = [
            _Node(f"{_bare(run[0])} … {_bare(run[-1])}", children={c.name: c for c in run})
            if len(run) > 1
            else run[0]
            for run in runs
        ]
    node.children = {child.name: child for child in children}
    return node


def _bare(node: _Node) -> str:
    return node.name.removesuffix(".*") if node.children else node.name


def _round_up(size: float) -> int:
    """Finds the next of 1, 2, 5, 10, 20 and so on."""
    power = 1
    while True:
        for times in _ROUND:
            if times * power >= size:
                return times * power
        power *= 10


@lru_cache(maxsize=16)
def tree(names: tuple[str, ...]) -> Tree:
    """Makes a tree, or finds the one that was made of these names."""
    return Tree(names)


@dataclass(frozen=True)
class Folded:
    """Rows as sums of a table's columns; as `Layers`, but some rows lie in others.

    Attributes:
        rows: What is shown.
        within: Which columns make up each layer.
    """

    rows: tuple[Row, ...]
    within: Layers

    @property
    def names(self) -> tuple[str, ...]:
        """Of the rows (L,)."""
        return tuple(row.name for row in self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def sums(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Adds what belongs to one row: [..., G] -> [..., L]."""
        by_layer = self.within.sums(values)
        if not self.rows:
            return by_layer[..., :0]
        places = [place for row in self.rows for place in row.layers]
        first = np.cumsum([0, *(len(row.layers) for row in self.rows[:-1])])
        total: npt.NDArray[Any] = np.add.reduceat(by_layer[..., places], first, axis=-1)
        return total

    def columns(self, row: int) -> Ints:
        """Finds the columns of a row, by its place."""
        return np.flatnonzero(np.isin(self.within.owner, self.rows[row].layers))
