"""Runs kept up to date with their event files, and bounded in memory."""

from __future__ import annotations

import contextlib
import heapq
import math
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from lightning_lca.record import eventfile
from lightning_lca.record.reader import Reader
from lightning_lca.tensorboard.provider import Event, Mark, Source
from lightning_lca.tensorboard.query import QueryError, show
from lightning_lca.tensorboard.snapshot import Run, Table, listing

MEMORY = 200 * 2**20  # Bytes of tables that are kept; the one in use stays in any case.
PATIENCE = 1.0  # Seconds for which a listing is believed,
SELDOM = 10.0  # or so many times the seconds that it took: for very long records it takes long.
BUDGET = 1.0  # Seconds for which runs are read in order to describe them.
_BATCH = 256  # Tags that are read at once: some 8 MB.
_TABLES = ("chunk", "neurons")  # What the page shows. Single weights would fill the memory.


@dataclass
class _Reading:
    """A run's reader, and what it was fed.

    ``run`` is None before the first reading, and after the memory was given to others.
    """

    reader: Reader = field(default_factory=Reader)
    run: Run | None = None
    description: dict[str, Any] | None = None
    seen: dict[str, Mark] = field(default_factory=dict)
    until: float = -math.inf  # Wall time of the latest event that was fed.
    failed: int = 0
    believed_until: float = -math.inf

    def forget(self) -> None:
        """Gives the memory back; the description stays, and what it was made of."""
        self.reader, self.run, self.until, self.failed = Reader(), None, -math.inf, 0


class Store:
    """All runs of a TensorBoard.

    One lock guards the reading; what is handed out never changes, so that views need none.
    """

    def __init__(self) -> None:
        """Reads nothing yet."""
        self._lock = threading.Lock()
        self._readings: dict[tuple[str, str], _Reading] = {}  # The one used last comes last.

    def run(self, source: Source, name: str) -> Run:
        """Gives a run as it is now.

        Raises:
            QueryError: There is none of this name, or it has no LCA record.
        """
        with self._lock:
            reading = self._current(source, name)
            assert reading.run is not None
            return reading.run

    def describe(self, source: Source) -> list[dict[str, Any]]:
        """Tells of every run what the page needs.

        Many long runs take long to read: every call reads for about a second, first those that
        waited longest. Of runs not read yet there is the name, and None for the number of rows.
        """
        names = source.runs()
        deadline = time.monotonic() + BUDGET
        for name in sorted(names, key=lambda n: self._believed_until(source, n)):
            with self._lock, contextlib.suppress(QueryError):
                self._current(source, name, to_describe=True)
            if time.monotonic() > deadline:
                break
        return [self._description(source, name) for name in names]

    # -- inside -----------------------------------------------------------------------------------

    def _believed_until(self, source: Source, name: str) -> float:
        reading = self._readings.get((source.experiment, name))
        return -math.inf if reading is None else reading.believed_until

    def _description(self, source: Source, name: str) -> dict[str, Any]:
        reading = self._readings.get((source.experiment, name))
        if reading is not None and reading.description is not None:
            return reading.description
        return Run(name, "", {}, None, 0).describe() | {"rows": None, "error": None}

    def _current(self, source: Source, name: str, to_describe: bool = False) -> _Reading:
        """Brings a run up to date; if only to describe it, not where its memory was given away."""
        key = (source.experiment, name)
        reading = self._readings.get(key) or _Reading()
        known = reading.description if to_describe else reading.run
        asked = time.monotonic()
        if known is None or asked >= reading.believed_until:
            tags = source.tags(name)
            listed = time.monotonic()
            if not tags:
                self._readings.pop(key, None)
                raise QueryError(
                    f"No run {show(name)} with an LCA record. {listing('runs', source.runs())} "
                    "A run gets a record by training with LCACallback."
                )
            if known is None or tags != reading.seen:
                _feed(source, name, reading, tags)
            done = time.monotonic()
            reading.believed_until = done + max(PATIENCE, SELDOM * (listed - asked))
        if reading.run is not None:
            self._readings.pop(key, None)
            self._readings[key] = reading
            self._make_room(reading)
        return reading

    def _make_room(self, used: _Reading) -> None:
        taken = sum(_bytes(reading) for reading in self._readings.values())
        for reading in self._readings.values():
            if taken > MEMORY and reading is not used:
                taken -= _bytes(reading)
                reading.forget()


def _bytes(reading: _Reading) -> int:
    return sum(t.bytes for t in reading.run.tables.values()) if reading.run else 0


def _feed(source: Source, name: str, reading: _Reading, tags: dict[str, Mark]) -> None:
    """Feeds what is new; from the start where a session wrote over an older one."""
    new = {tag: mark for tag, mark in tags.items() if reading.seen.get(tag) != mark}
    again = (new.keys() & reading.seen.keys()) - {eventfile.META}
    late = any(mark.wall_time <= reading.until for mark in new.values())
    if reading.run is None or again or late or reading.seen.keys() - tags.keys():
        reading.forget()
        new = tags
    fed, join_at = 0, _BATCH
    for event in _events(source, name, new, reading.until):
        if (fed := fed + 1) == join_at:
            _join(reading.reader)
            join_at += max(_BATCH, fed // 2)
        try:
            reading.reader.feed(event.tag, event.data)
        except Exception:  # Whatever is wrong with one chunk must not hide the others.
            reading.failed += 1
    reading.seen = tags
    reading.until = max(mark.wall_time for mark in tags.values())
    lost = reading.reader.lost + reading.failed
    stamp = f"{len(tags)}-{reading.until:.6f}-{lost}"
    histories = reading.reader.histories
    tables = {p: Table.of(h, source.experiment, name, stamp, p) for p, h in histories.items()}
    reading.run = Run(name, stamp, tables, reading.reader.meta, lost)
    reading.description = reading.run.describe()


def _join(reader: Reader) -> None:
    """Makes one array of many small ones; these leave holes that the process would keep."""
    for history in reader.histories.values():
        _ = history.rows, history.group_by != "neuron" and history.neurons


def _events(source: Source, name: str, new: dict[str, Mark], since: float) -> Iterator[Event]:
    """Reads the new events in the order of writing.

    Of a chunk that several sessions wrote only the latest event is read: the session that wrote it
    starts before the chunk, so the older one is void. A session's own tag is one and the same for
    all, and every event of it counts.
    """
    sessions = sorted(source.read(name, [eventfile.META])) if eventfile.META in new else []
    # A session that starts over can push the description of the one before out of TensorBoard's
    # memory; what that one wrote is void then, not lost.
    begin = sessions[0].wall_time if sessions and since == -math.inf else since

    def chunks() -> Iterator[Event]:
        tables = {tag: parsed.table for tag in new if (parsed := eventfile.Tag.parse(tag))}
        tags = [t for t in new if tables.get(t) in _TABLES and new[t].wall_time >= begin]
        tags.sort(key=lambda tag: new[tag].wall_time)
        for first in range(0, len(tags), _BATCH):
            latest: dict[str, Event] = {}
            for event in source.read(name, tags[first : first + _BATCH]):
                latest[event.tag] = max(event, latest.get(event.tag, event))
            yield from sorted(latest.values())

    return heapq.merge([e for e in sessions if e.wall_time > since], chunks())
