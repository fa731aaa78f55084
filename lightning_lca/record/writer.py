"""The record as it is written: packed chunks of measured steps, down to the disk."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

try:
    import fcntl
except ModuleNotFoundError:  # Windows.
    fcntl = None  # type: ignore[assignment]

from lightning_lca.record import eventfile
from lightning_lca.record.description import STEADY
from lightning_lca.record.tables import Ints, StepTable, WindowTable

CHUNK_STEPS = 512
CHUNK_BYTES = 2**18
CHUNK_SECONDS = 15.0
PATIENCE = 5.0  # Seconds: a process that was killed may take some to let go of its record.
_MOST_RECORDS = 100  # In one run.
_here: set[Path] = set()  # Directories that this process holds.


class RecordWriter:
    """Writes chunks to one event file: one that is open already, or one of our own.

    Training never ends for want of a disk: what fails is told once. Rows that could not be written
    are kept, and tried again every fifteen seconds, in a file of our own.

    Attributes:
        chunk_steps: Measured steps that make a full chunk.
    """

    def __init__(
        self,
        log_dir: Path | None,
        sizes: Ints,
        stream: Callable[[], Any] | None,
        warn: Callable[[str], None],
    ) -> None:
        """Writes nothing yet.

        Args:
            log_dir: Where files of our own go; None where nothing is written at all.
            sizes: Number of weights of every group [G].
            stream: Finds the writer of events (``add_event``, ``flush``) of an open file there;
                None: a file of our own.
            warn: Says what went wrong.
        """
        self._log_dir = log_dir
        self._sizes = sizes
        self._stream = stream
        self._warn = warn
        self._own: eventfile.EventFile | None = None
        self._metadata: dict[str, Any] = {}
        self._is_described = False  # Whether the description is in the file.
        self._written_to = 0  # Last step in the record.
        self._failure: Exception | None = None  # Since the last success.
        self._unwritten: dict[str | None, list[StepTable]] = {}
        self._windows: dict[tuple[str, str | None], list[WindowTable]] = {}
        self._wrote = time.monotonic()
        self._latest = -math.inf  # Wall time of the latest event; before the first, not known.
        self.chunk_steps = 1
        self.hold(0)

    def hold(self, shares: int) -> None:
        """Takes how many numbers of every group the widest breakdown has in a step."""
        # An event of moderate size never holds the writer's thread for long.
        numbers = max(1, len(self._sizes)) * max(1, shares)
        self.chunk_steps = max(1, min(CHUNK_STEPS, CHUNK_BYTES // (8 * numbers)))

    def describe(self, metadata: Mapping[str, Any], step: int | None = None) -> None:
        """Takes what describes a session of the record.

        Args:
            metadata: As JSON.
            step: The session starts after this step; None: it goes on, and only knows more.
        """
        self._metadata, self._is_described = dict(metadata), False
        self._written_to = self._written_to if step is None else step
        self._try(everything=False)

    def add(self, probe: str | None, rows: StepTable) -> None:
        """Takes measured steps of a probe for the record."""
        self._unwritten.setdefault(probe, []).append(rows)

    def add_windows(self, probe: str | None, windows: Mapping[str, WindowTable]) -> None:
        """Takes sums over windows of steps for the record."""
        for table, window in windows.items():
            self._windows.setdefault((table, probe), []).append(window)

    def waiting(self, probe: str | None) -> int:
        """Counts the measured steps of a probe that are not in the record yet."""
        return sum(map(len, self._unwritten.get(probe, [])))

    @property
    def overdue(self) -> bool:
        """Whether the last chunk was written so long ago that part of one should follow."""
        return time.monotonic() - self._wrote > CHUNK_SECONDS

    @property
    def failing(self) -> bool:
        """Whether the last attempt to write failed."""
        return self._failure is not None

    def write(self, *, everything: bool) -> None:
        """Writes full chunks of the record, or all there is, down to the disk."""
        self._try(everything=everything)

    def close(self) -> None:
        """Writes all there is, and closes our own event file; a logger closes its own."""
        self._try(everything=True)
        missing = sum(map(self.waiting, self._unwritten))
        if self._failure is not None and missing:
            self._warn(
                f"{missing} measured steps are missing in the record in {self._log_dir}, which "
                f"could not be written: {self._failure}. They are in lca.history."
            )
        if self._own is not None:
            self._own.close()
            self._own = None

    # -- inside -----------------------------------------------------------------------------------

    def _try(self, *, everything: bool) -> None:
        if self._log_dir is None:
            self._unwritten, self._windows = {}, {}
            return
        try:
            self._write_all(everything)
            self._failure = None
        except Exception as error:
            if self._failure is None:
                self._warn(
                    f"the record in {self._log_dir} could not be written: {error}. Training goes "
                    f"on, lca.history has all steps, and every {CHUNK_SECONDS:.0f} s it is tried "
                    "again."
                )
            self._failure = error
            # A writer that failed once fails for ever; from now on we have our own.
            self._stream = None
            if self._own is not None:
                self._own.close()
                self._own = None
        self._wrote = time.monotonic()

    def _write_all(self, everything: bool) -> None:
        """Writes what is due; what was not written stays, if that raises."""
        assert self._log_dir is not None
        if self._latest == -math.inf:
            self._latest = eventfile.last_time(self._log_dir)
            # A logger's file that was opened after the clock was set back is read before the
            # files that are there already.
            if eventfile.newest(self._log_dir) > time.time():
                self._stream = None
        if self._stream is None and self._own is None:
            self._own = eventfile.EventFile(self._log_dir)
            self._is_described = False
        if not self._is_described:
            # Of a file that followed on another, only what comes later counts.
            described = self._metadata | {"first_step": self._written_to, "clock": STEADY}
            self._write({eventfile.META: json.dumps(described).encode()}, self._written_to)
            self._is_described = True
        for probe, parts in self._unwritten.items():
            rows = StepTable.join(parts)
            self._unwritten[probe] = [rows]
            while len(rows) >= (1 if everything else self.chunk_steps):
                chunk, rows = rows[: self.chunk_steps], rows[self.chunk_steps :]
                packed = chunk.parts(self._sizes, closes=bool(self._metadata.get("closes")))
                tags = eventfile.tagged("chunk", int(chunk.steps[0]), probe, packed)
                self._write(tags, int(chunk.steps[-1]))
                self._unwritten[probe] = [rows]
        for (table, probe), windows in list(self._windows.items()):
            joined = WindowTable.join(windows)
            # Many come at once where a record goes on in another directory.
            most = max(1, CHUNK_BYTES // (8 * max(1, len(joined.names))))
            while len(joined):
                some, joined = joined[:most], joined[most:]
                tags = eventfile.tagged(table, int(some.steps[0]), probe, some.parts())
                self._write(tags, int(some.steps[-1]))
                self._windows[table, probe] = [joined]
            del self._windows[table, probe]

    def _write(self, tags: Mapping[str, bytes], step: int) -> None:
        """Writes events that belong together, down to the disk."""
        from tensorboard.compat.proto.event_pb2 import Event

        events = [
            Event(step=step, wall_time=self._now(), summary=eventfile.summarize({tag: data}))
            for tag, data in tags.items()
        ]
        if self._stream is None:
            assert self._own is not None
            self._own.write(events)
        else:
            writer = self._stream()
            for event in events:
                writer.add_event(event)
            writer.flush()
        self._written_to = max(self._written_to, step)

    def _now(self) -> float:
        """Tells the time by a clock that never steps back: dashboards order events by it."""
        self._latest = max(time.time(), math.nextafter(self._latest + 1e-6, math.inf))
        return self._latest


@dataclass
class Claim:
    """The directory that a record is written to, held by one writer at a time.

    Attributes:
        directory: Where the record goes; None where nothing is written.
        name: What its keys start with: "lca" in a run's own directory, "lca2" in ``lca2`` in there.
        is_elsewhere: Whether the directory that was asked for first is held by another.
    """

    directory: Path | None
    name: str = "lca"
    is_elsewhere: bool = False
    _lock: int | None = field(default=None, repr=False)

    def release(self) -> None:
        """Lets others write there."""
        if self._lock is not None:
            lock, self._lock = self._lock, None
            # Explicitly: workers that were forked meanwhile hold copies of the descriptor.
            with contextlib.suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_UN)
            os.close(lock)
            if self.directory is not None:
                _here.discard(self.directory)

    def __del__(self) -> None:
        self.release()


def claim(run: Path | None, place: int = 0, record: str | Path | None = None) -> Claim:
    """Finds a directory for a record that no other process or callback writes to.

    The lock is on the directory itself, so that nothing is left behind, and ends with the process.
    Where there are no such locks, as on Windows or some network disks, the place decides alone.

    Args:
        run: The run's own directory; None where nothing is written.
        place: Which one of the Trainer's callbacks this is, from 0.
        record: Where the record was that should go on; it is preferred if it belongs to the run.

    Raises:
        BlockingIOError: A hundred others hold all there are.
    """
    if run is None:
        return Claim(None, "lca" if place == 0 else f"lca{place + 1}")
    choices = {run: "lca"} | {run / f"lca{i}": f"lca{i}" for i in range(2, _MOST_RECORDS + 1)}
    wanted = list(choices)[place:] + list(choices)[:place]
    if record is not None and Path(record) in choices:
        wanted.insert(0, Path(record))
    for directory in wanted:
        waits = directory == wanted[0] and directory not in _here
        try:
            lock = _lock(directory, PATIENCE if waits else 0.0)
        except BlockingIOError:
            continue
        if lock is not None:
            _here.add(directory)
        return Claim(directory, choices[directory], directory != wanted[0], lock)
    raise BlockingIOError(
        f"{len(choices)} other records are being written in {run}. Give each Trainer a directory "
        "of its own, e.g. by default_root_dir or its logger."
    )


def _lock(directory: Path, patience: float) -> int | None:
    """Locks a directory; returns what to unlock, or None where that cannot be done.

    Args:
        directory: Is made if need be.
        patience: Seconds to wait for another to let go of it.

    Raises:
        BlockingIOError: Another holds it.
    """
    if fcntl is None or ":/" in directory.as_posix():  # Windows; a bucket.
        return None
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = os.open(directory, os.O_RDONLY)
    except OSError:  # The writer tells of it.
        return None
    until = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        except BlockingIOError:
            if time.monotonic() >= until:
                os.close(lock)
                raise
            time.sleep(0.05)
        except OSError:  # A disk without locks.
            os.close(lock)
            return None
