"""TensorBoard's data provider, as the record's tags and their bytes."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from lightning_lca.record import eventfile

_EVERYTHING = 10**9  # Data points of a tag; 0 would ask for none.


class Mark(NamedTuple):
    """The latest event of a tag: tells whether there is a newer one."""

    step: int
    wall_time: float


class Event(NamedTuple):
    """One string that a run wrote."""

    wall_time: float
    tag: str
    data: bytes


@dataclass(frozen=True)
class Source:
    """The data provider, on behalf of one request.

    Attributes:
        provider: TensorBoard's.
        context: Of the request.
        experiment: Name of the experiment; "" on a local TensorBoard.
    """

    provider: Any
    context: Any
    experiment: str

    def runs(self) -> list[str]:
        """Lists the runs that have an LCA record."""
        return sorted(self._list(None, [eventfile.META]))

    def directory(self) -> str | None:
        """Names what TensorBoard reads; a local directory in full, None where it does not tell."""
        try:
            told = self.provider.experiment_metadata(self.context, experiment_id=self.experiment)
            location = str(told.data_location)
        except Exception:  # Each provider has errors of its own; it is a hint, no more.
            return None
        return os.path.abspath(location) if os.path.isdir(location) else location or None

    def tags(self, run: str) -> dict[str, Mark]:
        """Lists a run's tags of this plugin; none if there is no such run."""
        return self._list([run], None).get(run, {})

    def read(self, run: str, tags: Collection[str]) -> Iterator[Event]:
        """Reads all events of these tags, in no particular order.

        What cannot be read comes as an event without data.
        """
        from tensorboard.data.provider import RunTagFilter

        try:
            found = self.provider.read_tensors(
                self.context,
                experiment_id=self.experiment,
                plugin_name=eventfile.PLUGIN,
                downsample=_EVERYTHING,
                run_tag_filter=RunTagFilter(runs=[run], tags=list(tags)),
            )
        # A reply over 256 MiB, or one tensor that is none: each provider has errors of its own.
        except Exception:
            if len(tags) > 1:
                half, ordered = len(tags) // 2, list(tags)
                yield from self.read(run, ordered[:half])
                yield from self.read(run, ordered[half:])
            else:
                yield from (Event(0.0, tag, b"") for tag in tags)
            return
        for tag, series in found.get(run, {}).items():
            for datum in series:
                data = datum.numpy.item() if datum.numpy.size == 1 else b""
                data = data if isinstance(data, bytes) else b""
                yield Event(_seconds(datum.wall_time), tag, data)

    def started(self, run: str) -> float | None:
        """Finds the wall time of a run's first event; None where the provider does not tell."""
        try:
            runs = self.provider.list_runs(self.context, experiment_id=self.experiment)
            (found,) = (r.start_time for r in runs if r.run_name == run)
            return None if found is None else float(found)
        except Exception:  # Each provider has errors of its own; it is a hint, no more.
            return None

    def _list(self, runs: Any, tags: Any) -> dict[str, dict[str, Mark]]:
        from tensorboard.data.provider import RunTagFilter

        listed = self.provider.list_tensors(
            self.context,
            experiment_id=self.experiment,
            plugin_name=eventfile.PLUGIN,
            run_tag_filter=RunTagFilter(runs=runs, tags=tags),
        )
        return {
            run: {
                tag: Mark(series.max_step, _seconds(series.max_wall_time))
                for tag, series in tags.items()
            }
            for run, tags in (listed or {}).items()
        }


def _seconds(wall_time: float) -> float:
    """Makes a wall time one that can be sorted."""
    return wall_time if math.isfinite(wall_time) else 0.0
