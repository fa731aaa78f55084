"""From the record's tags to histories: sessions, chunks and windows, in the order of writing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning_lca.record import eventfile
from lightning_lca.record.history import History
from lightning_lca.record.tables import StepTable, window_tables


class Reader:
    """Builds histories from the record's tags, fed in the order in which they were written.

    Attributes:
        histories: Every probe's table, by name; "" for a single unnamed one.
        meta: What the latest session says of itself; None before the first.
    """

    def __init__(self) -> None:
        """Starts without a session."""
        self.histories: dict[str, History] = {}
        self.meta: dict[str, Any] | None = None
        self._unread = 0
        self._open: dict[tuple[str, int, str], dict[str, eventfile.Array]] = {}

    @classmethod
    def of(cls, directory: Path) -> Reader:
        """Reads all of a log directory.

        Raises:
            FileNotFoundError: The directory does not exist or holds no LCA record.
        """
        reader = cls()
        for tag, data in eventfile.read(directory):
            reader.feed(tag, data)
        if not reader.histories:
            there = "holds no LCA record" if directory.is_dir() else "does not exist"
            if reader._unread:
                there = "holds an LCA record that cannot be read: it is damaged at its beginning"
            raise FileNotFoundError(
                f"{directory} {there}. Give the run's log directory, the one with its event files, "
                "e.g. lightning_logs/version_0."
            )
        for history in reader.histories.values():
            history.lost = reader.lost
        return reader

    @property
    def lost(self) -> int:
        """Pieces that could not be read so far: chunks of steps, or stretches of a file."""
        return self._unread + len(self._open)

    def feed(self, tag: str | None, data: bytes) -> None:
        """Takes one tag; a table's rows are there as soon as all its parts are.

        Args:
            tag: As `eventfile.read` gives it; None for something unreadable.
            data: What is stored under it.
        """
        if tag == eventfile.META:
            self._begin(data)
        elif tag is None:
            self._unread += 1
        elif parsed := eventfile.Tag.parse(tag):
            key = parsed[:3]
            parts = self._open.setdefault(key, {})
            try:
                parts[parsed.part] = eventfile.unpack(data)
                self._close(parsed, parts)
            except KeyError:
                return  # Some part has not come yet.
            except ValueError:
                parts.clear()
                return
            del self._open[key]

    def _begin(self, data: bytes) -> None:
        """Starts a session: what was measured up to its first step stays."""
        try:
            meta = json.loads(data)
            fresh = {probe or "": _empty(meta) for probe in meta["probes"]}
            first = int(meta["first_step"])
        except (ValueError, KeyError, TypeError):
            self._unread += 1
            return
        for probe, history in fresh.items():
            before = self.histories.get(probe)
            if before is not None and before.measures_like(history):
                before.cut(first)
                before.settings, before.layers = history.settings, history.layers
                fresh[probe] = before
        self.histories, self.meta = fresh, meta
        self._unread += len(self._open)
        self._open = {}

    def _close(self, tag: eventfile.Tag, parts: dict[str, eventfile.Array]) -> None:
        history = self.histories[tag.probe]
        if tag.table == "chunk":
            rows = StepTable.from_parts(parts, history.sizes)
            # A session that did not say where it starts still wins over the one before.
            if len(history) and len(rows) and rows.steps[0] <= history.last_step:
                history.cut(int(rows.steps[0]) - 1)
            history.append(rows)
        else:
            template = history._windows[tag.table][0]
            history.append_windows(tag.table, template.from_parts(parts))


def _empty(meta: dict[str, Any]) -> History:
    """Makes the table that a session's description asks for."""
    group_by, layers = meta.get("group_by", "layer"), meta.get("layers")
    history = History(meta["groups"], meta["sizes"], group_by, layers)
    history.settings = dict(meta.get("settings") or {})
    tables = window_tables(meta.get("windows", {}), meta.get("shapes", {}))
    for name, table in tables.items():
        history.append_windows(name, table)
    return history
