"""Runs kept up to date with their event files, and bounded in memory."""

from __future__ import annotations

import bisect
import json
import logging
import math
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lightning_lca.analysis.bins import spacing
from lightning_lca.record import eventfile
from lightning_lca.record.description import Description, DescriptionError
from lightning_lca.record.history import History
from lightning_lca.record.reader import Reader
from lightning_lca.record.tables import StepTable
from lightning_lca.tensorboard.digest import Digester
from lightning_lca.tensorboard.provider import Event, Mark, Source
from lightning_lca.tensorboard.query import QueryError, show
from lightning_lca.tensorboard.snapshot import Run, Table, listing
from lightning_lca.tensorboard.spill import allocate

_LOG = logging.getLogger(__name__)
MEMORY = 200 * 2**20  # Bytes of tables that are kept; the one in use stays in any case.
PATIENCE = 1.0  # Seconds for which a listing is believed,
SELDOM = 10.0  # or so many times the seconds that it took: for very long records it takes long.
BUDGET = 0.4  # Seconds for which records are read before something is answered.
_BATCH = 128  # Tags that are read at once: some 4 MB.
_TABLES = ("chunk", "neurons")  # What the page shows. Single weights would fill the memory.


@dataclass
class _Reading:
    """A run's reader, and what it was fed.

    ``run`` is None before the first reading, and after the memory was given to others. ``feeding``
    goes on reading where it was left; None: all there was is read.
    """

    reader: Reader = field(default_factory=Reader)
    run: Run | None = None
    description: dict[str, Any] | None = None
    seen: dict[str, Mark] = field(default_factory=dict)
    until: float = -math.inf  # Wall time of the latest event that was fed.
    failed: int = 0
    believed_until: float = -math.inf
    feeding: Iterator[float] | None = None
    digesters: dict[str, tuple[History, int, Digester]] = field(default_factory=dict)

    def forget(self) -> None:
        """Frees the memory; the description stays, and what it was made of."""
        self.reader, self.run, self.until, self.failed = Reader(), None, -math.inf, 0
        self.digesters = {}

    def digester(self, probe: str, history: History) -> Digester:
        """Finds what has seen the earlier rows of a history; a new one, where rows were dropped."""
        of, cuts, digester = self.digesters.get(probe, (None, 0, None))
        if digester is None or of is not history or cuts != history.cuts:
            digester = Digester(history, allocate)
            self.digesters[probe] = history, history.cuts, digester
        return digester


class Store:
    """All runs of a TensorBoard.

    One lock guards the reading; what is handed out never changes, so that views need none.
    """

    def __init__(self) -> None:
        """Reads nothing yet."""
        self._lock = threading.Lock()
        self._readings: dict[tuple[str, str], _Reading] = {}  # The one used last comes last.

    def run(self, source: Source, name: str) -> Run:
        """Returns a run as it is now.

        Of a long record that is what was read so far: those who ask for descriptions read on, and
        while they do nobody waits for them.

        Raises:
            QueryError: There is none of this name, or it has no LCA record.
        """
        there = self._readings.get((source.experiment, name))
        known = None if there is None else there.run
        if there is not None and known is not None and known.has_rows:
            if there.feeding is not None or not self._lock.acquire(blocking=False):
                return known
        else:
            self._lock.acquire()
        try:
            reading = self._current(source, name, time.monotonic() + BUDGET)
            assert reading.run is not None
            return reading.run
        finally:
            self._lock.release()

    def describe(self, source: Source) -> list[dict[str, Any]]:
        """Tells of every run what the page needs.

        Many long runs take long to read: every call reads for less than a second, first those that
        are half read, then those that waited longest. Of runs not read yet there is the name, and
        None for the number of rows.
        """
        names = source.runs()
        deadline = time.monotonic() + BUDGET
        for name in sorted(names, key=lambda n: self._turn(source, n)):
            with self._lock:
                try:
                    self._current(source, name, deadline, to_describe=True)
                except QueryError:  # It is gone.
                    pass
                except Exception as error:  # One run never takes the others along.
                    self._give_up(source, name, error)
            if time.monotonic() > deadline:
                break
        return [self._description(source, name) for name in names]

    # -- inside -----------------------------------------------------------------------------------

    def _turn(self, source: Source, name: str) -> tuple[bool, float]:
        """Tells when a run is read: those with less come first."""
        reading = self._readings.get((source.experiment, name))
        if reading is None:
            return True, -math.inf
        return reading.feeding is None, reading.believed_until

    def _description(self, source: Source, name: str) -> dict[str, Any]:
        reading = self._readings.get((source.experiment, name))
        if reading is not None and reading.description is not None:
            return reading.description
        return Run(name, "", {}, {}, 0, read=0.0).describe() | {"rows": None, "error": None}

    def _give_up(self, source: Source, name: str, error: Exception) -> None:
        """Describes a run that cannot be read, whatever the reason."""
        _LOG.warning("LCA: run %r cannot be read.", name, exc_info=error)
        reading = self._readings.setdefault((source.experiment, name), _Reading())
        reading.forget()
        reading.seen, reading.feeding = {}, None
        reading.description = _unreadable(name, f"{type(error).__name__}: {error}")
        reading.believed_until = time.monotonic() + SELDOM

    def _current(
        self, source: Source, name: str, deadline: float, to_describe: bool = False
    ) -> _Reading:
        """Brings a run up to date; if only to describe it, not where its memory was given away."""
        key = (source.experiment, name)
        reading = self._readings.get(key) or _Reading()
        known = reading.description if to_describe else reading.run
        asked = time.monotonic()
        if reading.feeding is None and (known is None or asked >= reading.believed_until):
            tags = source.tags(name)
            listed = time.monotonic()
            if not tags:
                self._readings.pop(key, None)
                raise QueryError(
                    f"No run {show(name)} with an LCA record. {listing('runs', source.runs())} "
                    "A run gets a record by training with LCACallback."
                )
            if known is None or tags != reading.seen:
                reading.feeding = _feed(source, name, reading, tags)
            done = time.monotonic()
            reading.believed_until = done + max(PATIENCE, SELDOM * (listed - asked))
        if reading.feeding is not None:
            _read_on(source, name, reading, deadline)
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
                reading.feeding = None


def _bytes(reading: _Reading) -> int:
    return sum(t.bytes for t in reading.run.tables.values()) if reading.run else 0


def _read_on(source: Source, name: str, reading: _Reading, deadline: float) -> None:
    """Reads until all is read, or a time; then tells what there is."""
    assert reading.feeding is not None
    try:
        share = next((s for s in reading.feeding if time.monotonic() > deadline), 1.0)
    except Exception:
        reading.feeding = None
        raise
    reader = reading.reader
    if share == 1:
        reading.feeding = None
    # What is only half read is not lost.
    lost = reader.lost + reading.failed if share == 1 else 0
    stamp = f"{len(reading.seen)}-{reading.until:.6f}-{lost}" + f"-{share:.6f}" * (share < 1)
    for history in reader.histories.values():
        history.grow_in(allocate)
    tables = {
        p: Table.of(h, source.experiment, name, stamp, p, digester=reading.digester(p, h))
        for p, h in reader.histories.items()
    }
    settings = reader.description.settings if reader.description is not None else {}
    problem = reader.problems[0] if reader.problems else ""
    reading.run = Run(name, stamp, tables, settings, lost, problem, share)
    reading.description = reading.run.describe()
    try:
        json.dumps(reading.description, allow_nan=False)
    except (ValueError, TypeError, RecursionError) as error:
        reading.description = _unreadable(name, str(error))


def _feed(source: Source, name: str, reading: _Reading, tags: dict[str, Mark]) -> Iterator[float]:
    """Feeds what is new, in batches; from the start where a session wrote over an older one.

    Yields:
        Which share is fed, wherever the rest may wait.
    """
    new = {tag: mark for tag, mark in tags.items() if reading.seen.get(tag) != mark}
    again = (new.keys() & reading.seen.keys()) - {eventfile.META}
    late = any(mark.wall_time <= reading.until for mark in new.values())
    if reading.run is None or again or late or reading.seen.keys() - tags.keys():
        reading.forget()
        new = tags
    order = _Order.of(source, name, new, reading.until)
    for fed, event in enumerate(order.events(source, name)):
        if fed and fed % _BATCH == 0:
            _join(reading.reader, fed)
            yield min(0.999, fed / len(new))
        _take(reading, event)
    if order.astray and not _is_steady(reading.reader):
        _find_astray(source, name, reading, order.astray)
    reading.seen = tags
    reading.until = max(mark.wall_time for mark in tags.values())


def _take(reading: _Reading, event: Event) -> None:
    try:
        reading.reader.feed(event.tag, event.data)
    except Exception:  # Whatever is wrong with one chunk must not hide the others.
        reading.failed += 1


def _unreadable(name: str, why: str) -> dict[str, Any]:
    return Run(name, "", {}, {}, 1, why).describe()


def _join(reader: Reader, fed: int) -> None:
    """Makes one array of many small ones; these leave holes that the process would keep."""
    for history in reader.histories.values():
        history.grow_in(allocate)
        _ = history.rows
        # Windows are copied each time: the more there are, the more seldom.
        if history.group_by != "neuron" and (fed // _BATCH).bit_count() == 1:
            _ = history.neurons


@dataclass(frozen=True)
class _Order:
    """What is new, in the order of writing.

    TensorBoard tells of no order but that of the clock. Sessions are told apart by it; within one,
    steps rise, whatever the clock did: older records follow a clock that is set back.

    Attributes:
        sessions: What each new session says of itself, by the clock.
        tags: The tags of chunks after each of these; first those before them all.
        astray: Tags that by the clock lie before the session that took over from them.
    """

    sessions: list[Event]
    tags: list[list[str]]
    astray: dict[str, Mark]

    @classmethod
    def of(cls, source: Source, name: str, new: dict[str, Mark], since: float) -> _Order:
        """Orders what is new since a wall time; -inf: since the beginning."""
        sessions = sorted(source.read(name, [eventfile.META])) if eventfile.META in new else []
        sessions = [event for event in sessions if event.wall_time > since]
        begins = [event.wall_time for event in sessions]
        # A session is void where a later one starts before it.
        first = list(map(_first_step, sessions))
        limits = [min(first[i:], default=math.inf) for i in range(len(begins) + 1)]
        tags: list[list[tuple[Any, ...]]] = [[] for _ in range(len(begins) + 1)]
        astray = {}
        for tag, mark in new.items():
            parsed = eventfile.Tag.parse(tag)
            if parsed is None or parsed.table not in _TABLES:
                continue
            place = bisect.bisect_right(begins, mark.wall_time)
            # A session that starts over can push the description of the one before out of
            # TensorBoard's memory; what that one wrote is void then, not lost.
            if (since == -math.inf and place == 0 and begins) or (
                parsed.first_step > limits[place]
            ):
                astray[tag] = mark
            else:
                key = (parsed.first_step, parsed.table, parsed.probe, mark.wall_time, tag)
                tags[place].append(key)
        return cls(sessions, [[key[-1] for key in sorted(some)] for some in tags], astray)

    def events(self, source: Source, name: str) -> Iterator[Event]:
        """Reads them.

        Of a chunk that several sessions wrote only the latest event is read: the session that wrote
        it starts before the chunk, so the older one is void. A session's own tag is one and the
        same for all, and every event of it counts.
        """
        for place, tags in enumerate(self.tags):
            if place:
                yield self.sessions[place - 1]
            yield from _latest(source, name, tags)


def _first_step(session: Event) -> float:
    """Reads after which step a session starts; never, if it cannot be read."""
    try:
        return Description.parse(session.data).first_step
    except DescriptionError:
        return math.inf


def _latest(source: Source, name: str, tags: list[str]) -> Iterator[Event]:
    """Reads the latest event of each tag, in this order."""
    for first in range(0, len(tags), _BATCH):
        some, found = tags[first : first + _BATCH], dict[str, Event]()
        for event in source.read(name, some):
            found[event.tag] = max(event, found.get(event.tag, event))
        yield from (found[tag] for tag in some if tag in found)


def _is_steady(reader: Reader) -> bool:
    """Whether the latest session was written by a clock that is never set back."""
    return reader.description is not None and reader.description.is_steady


def _find_astray(source: Source, name: str, reading: _Reading, astray: dict[str, Mark]) -> None:
    """Finds chunks that were written when the clock had been set back, among void ones.

    One that nothing in the run was written before can be nothing else. Another one goes on from the
    last row if its steps and losses do; if not, it is what a former training left. Where there is
    no way to tell, chunks are counted as lost.
    """
    began = source.started(name)
    reader = reading.reader
    found: dict[tuple[str, str], dict[int, list[str]]] = {}
    for tag in astray:
        parsed = eventfile.Tag.parse(tag)
        if parsed is not None and parsed.probe in reader.histories:
            chunks = found.setdefault((parsed.table, parsed.probe), {})
            chunks.setdefault(parsed.first_step, []).append(tag)
    # Chunks of steps first: windows follow them.
    for (table, probe), chunks in sorted(found.items()):
        history = reader.histories[probe]
        for first in sorted(chunks):
            windows = history.neurons if table != "chunk" else None
            last = history.last_step if windows is None else int(np.max(windows.steps, initial=0))
            if first <= last:
                continue
            events = list(_latest(source, name, chunks[first]))
            is_certain = began is not None and min(e.wall_time for e in events) <= began
            if table != "chunk" and not is_certain and first > history.last_step:
                break
            if table == "chunk" and not is_certain:
                rows = _rows(events, history)
                if rows is not None and not _follows(rows, history):
                    break
                if rows is None or not _goes_on(rows, history):
                    if rows is None or began is None or not len(history):
                        reading.failed += sum(step >= first for step in chunks)
                    break
            for event in events:
                _take(reading, event)


def _rows(events: list[Event], history: History) -> StepTable | None:
    """Reads a chunk, if it is whole."""
    try:
        parts = {e.tag.rpartition("/")[2]: eventfile.unpack(e.data) for e in events}
        return StepTable.from_parts(parts, history.sizes)
    except (KeyError, ValueError):
        return None


def _follows(rows: StepTable, history: History) -> bool:
    """Whether rows begin where a history ends."""
    if not len(rows) or not len(history):
        return bool(len(rows))
    usual = spacing(np.concatenate([history.steps[-2:], rows.steps]))
    return int(rows.steps[0]) - history.last_step <= usual


def _goes_on(rows: StepTable, history: History) -> bool:
    """Whether the loss of rows goes on from where a history ends."""
    if not len(history):
        return False
    before, after = float(rows.loss_before[0]), float(history.loss_after[-1])
    gap = before - after - float(rows.drift[0])
    return abs(gap) <= 1e-9 * max(abs(before), abs(after))
