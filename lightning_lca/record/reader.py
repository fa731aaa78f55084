"""From the record's tags to histories: sessions, chunks and windows, in the order of writing."""

from __future__ import annotations

import os
from itertools import islice
from pathlib import Path
from typing import Any

from lightning_lca.record import eventfile
from lightning_lca.record.description import Description, DescriptionError
from lightning_lca.record.history import History
from lightning_lca.record.progress import bar
from lightning_lca.record.tables import StepTable

_ROWS = 2**13  # Most rows of a chunk, sixteen times what is written,
_CELLS = 2**18  # and most rows times groups; a single row may have more.
_OPEN = 2**26  # Most bytes of tables that are not complete.
# What windows may take, and how many times the bytes that they are packed in: enough for those of
# a training whose loss is not a number, which shrink to almost nothing.
_WINDOWS = 2**27
_RATIO = 256
_KEPT = 5  # Most problems that are remembered in words.
_LISTED = 10  # Most runs that an error names,
_LOOKED = 1000  # and directories that are looked into for them.

_Key = tuple[str, int, str]


class Reader:
    """Builds histories from the record's tags, fed in the order in which they were written.

    A record may be damaged, or made to harm: what is declared is checked before memory is reserved
    for it, and what cannot be read is counted.

    Attributes:
        histories: Every probe's table, by name; "" for a single unnamed one.
        description: What the latest session says of itself; None before the first.
        problems: The first pieces that could not be read, in words.
    """

    def __init__(self) -> None:
        """Starts without a session."""
        self.histories: dict[str, History] = {}
        self.description: Description | None = None
        self.problems: list[str] = []
        self._callback: str | None = None  # Whose history it is, as far as some session said it.
        self._is_newer = False  # Whether the latest session has a format that is not known here.
        self._unread = 0
        self._open: dict[_Key, dict[str, eventfile.Array]] = {}
        self._in_open = 0  # Bytes.
        self._fed = self._in_windows = 0

    @classmethod
    def of(cls, directory: Path) -> Reader:
        """Reads all of a log directory.

        Raises:
            FileNotFoundError: The directory does not exist or holds no LCA record that can be read.
        """
        reader = cls()
        with bar(eventfile.size(directory), "B", f"reading {directory}") as shown:
            for tag, data in eventfile.read(directory, shown.update):
                reader.feed(tag, data)
        if not reader.histories:
            there = "holds no LCA record" if directory.is_dir() else "does not exist"
            if reader.lost:
                why = reader.problems[0] if reader.problems else "it has no description (lca/meta)"
                there = (
                    "holds no LCA record that can be read: it is damaged at its beginning or of "
                    f"another version: {why}"
                )
            raise FileNotFoundError(
                f"{directory} {there}. Give the run's log directory, the one with its event files, "
                + _below(directory)
            )
        for history in reader.histories.values():
            history.lost = reader.lost
        return reader

    @property
    def meta(self) -> dict[str, Any] | None:
        """The settings in what the latest session says of itself; None before the first."""
        return None if self.description is None else {"settings": self.description.settings}

    @property
    def lost(self) -> int:
        """Pieces that could not be read so far: chunks of steps, or stretches of a file."""
        return self._unread + len(self._open)

    def feed(self, tag: str | None, data: bytes) -> None:
        """Takes one tag; a table's rows are there as soon as all its parts are.

        Args:
            tag: As `eventfile.read` gives it; None for something unreadable.
            data: What is stored under it, or why it cannot be read.
        """
        self._fed += len(data)
        if tag == eventfile.META:
            self._begin(data)
        elif tag is None:
            self._lose(data.decode(errors="replace"))
        elif (parsed := eventfile.Tag.parse(tag)) and not self._is_newer:
            self._take(parsed, data)

    # -- inside -----------------------------------------------------------------------------------

    def _lose(self, why: str, pieces: int = 1) -> None:
        self._unread += pieces
        self._remember(why)

    def _remember(self, why: str) -> None:
        if why and len(self.problems) < _KEPT:
            self.problems.append(why)

    def _begin(self, data: bytes) -> None:
        """Starts a session: what was measured up to its first step stays."""
        try:
            metadata = Description.parse(data)
        except DescriptionError as error:
            self._is_newer = error.is_newer
            self._lose(f"a description ({eventfile.META}) cannot be used: {error}")
            return
        self._is_newer = False
        fresh = {probe: _empty(metadata, probe) for probe in metadata.probes}
        # Another callback measures something else, and its history is another one.
        if self._callback is None or metadata.callback in (None, self._callback):
            for probe, history in fresh.items():
                before = self.histories.get(probe)
                if before is not None and before.measures_like(history):
                    before.cut(metadata.first_step)
                    before.go_on_like(history)
                    fresh[probe] = before
        self.histories, self.description = fresh, metadata
        self._callback = metadata.callback or self._callback
        self._unread += len(self._open)
        self._open, self._in_open = {}, 0

    def _take(self, tag: eventfile.Tag, data: bytes) -> None:
        """Takes a part of a table; what cannot be read leaves the table open, as does the rest."""
        key = tag[:3]
        history = self.histories.get(tag.probe)
        columns = None if history is None else _columns(history, tag.table)
        if history is None or columns is None:
            self._open[key] = {}
            self._remember(f"{tag}: no description tells of it")
            return
        if tag.part not in columns:
            return  # Of a later version.
        parts = self._open.setdefault(key, {})
        self._in_open -= _bytes(parts)
        try:
            parts[tag.part] = self._unpack(history, tag, data, columns[tag.part])
            if parts.keys() == columns.keys():
                self._close(history, tag, parts)
                del self._open[key]
                return
            # Parts are written together: what is not complete by now never will be.
            if self._in_open + _bytes(parts) > _OPEN:
                for other in self._open.values():
                    if other is not parts:
                        other.clear()
                self._in_open = 0
            self._in_open += _bytes(parts)
        except ValueError as error:
            self._remember(f"{tag}: {error}")
            parts.clear()

    def _unpack(
        self, history: History, tag: eventfile.Tag, data: bytes, columns: tuple[int, ...]
    ) -> eventfile.Array:
        """Unpacks a part of a table, if it has the size of one; ValueError if not."""
        if tag.table != "chunk":
            declared = history.declared(tag.table)
            if declared is not None and not history.is_named(tag.table):
                self._reserve(declared.memory, tries=True)
            part = eventfile.unpack(data, columns)
            self._reserve(2 * part.nbytes)
            return part
        part = eventfile.unpack(data, columns)
        if len(part) > _ROWS:
            raise ValueError(f"It has {len(part):,} rows; a chunk has at most {_ROWS:,}.")
        if len(part) > 1 and part.size > _CELLS:
            raise ValueError(f"It has {part.size:,} numbers; a chunk has at most {_CELLS:,}.")
        return part

    def _reserve(self, memory: int, *, tries: bool = False) -> None:
        """Counts what windows take; ValueError where it is out of all proportion."""
        most = max(_WINDOWS, _RATIO * self._fed)
        if self._in_windows + memory > most:
            raise ValueError(f"Windows would take more than {most >> 20} MiB.")
        self._in_windows += 0 if tries else memory

    def _close(
        self, history: History, tag: eventfile.Tag, parts: dict[str, eventfile.Array]
    ) -> None:
        """Adds a table whose parts are complete to a history."""
        if tag.table == "chunk":
            rows = StepTable.from_parts(parts, history.sizes)
            if len(rows) and rows.steps[0] != tag.first_step:
                raise ValueError(f"It starts at step {rows.steps[0]}.")
            # A session that did not say where it starts still wins over the one before.
            if len(history) and len(rows) and rows.steps[0] <= history.last_step:
                history.cut(int(rows.steps[0]) - 1)
            history.append(rows)
            return
        columns = history.declared(tag.table)
        if columns is not None and not history.is_named(tag.table):
            self._reserve(columns.memory)
        history.append_windows(tag.table, history.template(tag.table).from_parts(parts))


def places(logdir: Path, most: int | None = None) -> list[Path]:
    """Lists a directory and those below it that have event files, sorted.

    Links to directories are not followed, and one that cannot be read does not stop the others.

    Args:
        logdir: Where to look.
        most: Directories that are looked into; None: all.
    """
    walked = ((Path(place), files) for place, _, files in islice(os.walk(logdir), most))
    return sorted(place for place, files in walked if any("tfevents" in f for f in files))


def _below(directory: Path) -> str:
    """Names the runs below a directory, the latest first; else an example of one."""
    runs = [
        place
        for place in places(directory, _LOOKED)
        if place != directory and any(tag == eventfile.META for tag, _ in eventfile.read(place))
    ]
    if not runs:
        return "e.g. lightning_logs/version_0."
    runs.sort(key=eventfile.newest, reverse=True)
    listed = ", ".join(map(str, runs[:_LISTED]))
    if len(runs) == 1:
        return f"which is below it: {listed}."
    more = f" and {len(runs) - _LISTED} more" if len(runs) > _LISTED else ""
    return f"one of the {len(runs)} below it, the latest first: {listed}{more}."


def _bytes(parts: dict[str, eventfile.Array]) -> int:
    return sum(part.nbytes for part in parts.values())


def _columns(history: History, table: str) -> dict[str, tuple[int, ...]] | None:
    """Tells the shape of a row of every part of a table; None if there is no such table."""
    if table == "chunk":
        return StepTable.columns(
            len(history.groups),
            {n: len(names) for n, names in history.split_columns.items()},
            closes=history.closes,
        )
    columns = history.declared(table)
    return None if columns is None else columns.parts()


def _empty(metadata: Description, probe: str) -> History:
    """Makes the table of a probe that a session's description asks for."""
    history = History(
        metadata.groups,
        metadata.sizes,
        metadata.group_by,
        metadata.layers,
        metadata.breakdowns,
    )
    history.split_into(metadata.breakdowns, metadata.batches.get(probe, 0))
    history.settings, history.closes = dict(metadata.settings), metadata.closes
    for name, columns in metadata.windows.items():
        history.declare(name, columns)
    return history
