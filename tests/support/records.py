"""Records made by hand, with valid checksums and whatever content; and all that reads them."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import time
import tracemalloc
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.compat.proto.event_pb2 import Event
from werkzeug.test import Client

from lightning_lca.cli.main import main
from lightning_lca.record import eventfile
from lightning_lca.tensorboard.plugin import LCAPlugin

GROUPS = ("conv", "head")
SIZES = np.array([100, 7])
ROUTES = (
    "bins",
    "helping",
    "channels",
    "table",
    "compare",
    "synchrony",
    "findings",
    "shares",
    "export",
)


def description(**more: Any) -> bytes:
    """What a session says of itself; values of None are left out."""
    said = {
        "version": 1,
        "probes": [None],
        "groups": GROUPS,
        "sizes": SIZES.tolist(),
        "first_step": 0,
        "settings": {"every_n_steps": 1},
    } | more
    return json.dumps({key: value for key, value in said.items() if value is not ...}).encode()


def chunk_parts(first: int = 1, rows: int = 8, loss: float = 2.0) -> dict[str, Any]:
    """The parts of a chunk whose losses fall from `loss` by 0.1 a step, half of it per group."""
    groups = len(GROUPS)
    before = loss - 0.1 * np.arange(rows)
    none, ones = np.zeros(rows), np.ones(rows)
    return {
        "steps": np.arange(first, first + rows),
        "allocated": np.full((rows, groups), -0.05, np.float32),
        "helping": np.full((rows, groups), 5, np.uint8),
        "idle": np.zeros((rows, groups), np.uint8),
        "scalars": np.stack([before, before - 0.1, none, none, ones, ones, 107 * ones, ones], 1),
    }


def chunk(first: int = 1, rows: int = 8, loss: float = 2.0, **changed: Any) -> dict[str, bytes]:
    """A chunk under its tags; parts may be given as arrays, as bytes, or left out (None)."""
    parts = chunk_parts(first, rows, loss) | changed
    return {
        str(eventfile.Tag("chunk", first, "", name)): part
        if isinstance(part, bytes)
        else eventfile.pack(np.asarray(part))
        for name, part in parts.items()
        if part is not None
    }


def packed(dtype: str, shape: Any, body: bytes) -> bytes:
    """A part with a header of one's own."""
    return json.dumps({"dtype": dtype, "shape": shape}).encode() + b"\n" + body


def write(directory: Path, *tags: Mapping[str, bytes], at: Sequence[float] = ()) -> Path:
    """Writes tags to a new event file of a directory, each with what comes with it at a time."""
    directory.mkdir(parents=True, exist_ok=True)
    file = eventfile.EventFile(directory)
    for i, some in enumerate(tags):
        for tag, data in some.items():
            file.write(
                [
                    Event(
                        step=_step(tag, data),
                        wall_time=at[i] if at else time.time(),
                        summary=eventfile.summarize({tag: data}),
                    )
                ]
            )
    file.close()
    return Path(file._file.name)


def _step(tag: str, data: bytes) -> int:
    """The step under which a tag is written."""
    parsed = eventfile.Tag.parse(tag)
    if parsed is not None:
        return parsed.first_step
    try:
        return min(max(int(json.loads(data)["first_step"]), 0), 2**60)
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return 0


def good(directory: Path) -> Path:
    """A record of sixteen steps."""
    said = {eventfile.META: description()}
    return write(directory, said, chunk(1), chunk(9, loss=1.2))


class Tab:
    """The plugin on a log directory, asked as the page does, without a server."""

    def __init__(self, logdir: Path) -> None:
        multiplexer = EventMultiplexer(tensor_size_guidance={"tensors": 0})
        multiplexer.AddRunsFromDirectory(str(logdir))
        multiplexer.Reload()
        self.multiplexer = multiplexer
        provider = MultiplexerDataProvider(multiplexer, str(logdir))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "html5lib's sanitizer", DeprecationWarning)
            self.apps = LCAPlugin(_Context(provider)).get_plugin_apps()

    def reply(self, route: str, **query: Any) -> tuple[int, Any]:
        """Gives status and text of an answer."""
        reply = Client(self.apps[f"/{route}"]).get("/", query_string=query)
        return reply.status_code, reply.get_data(as_text=True)

    def json(self, route: str, **query: Any) -> Any:
        """Gives an answer as Python sees it; it must be one, in strict JSON."""
        code, text = self.reply(route, **query)
        assert code == 200, text
        return json.loads(text, parse_constant=_refuse)

    def run(self, name: str) -> Any:
        """Gives what /runs tells of a run."""
        return next(run for run in self.json("runs")["runs"] if run["name"] == name)

    def routes(self, run: str) -> dict[str, tuple[int, Any]]:
        """Asks everything of a run."""
        some = {"channels": {"layer": "conv"}, "compare": {"run_b": run}}
        return {route: self.reply(route, run=run, **some.get(route, {})) for route in ROUTES}


class _Context:
    def __init__(self, provider: Any) -> None:
        self.data_provider, self.multiplexer = provider, None


def _refuse(constant: str) -> None:
    raise AssertionError(f"{constant} in JSON")


def command(capsys: Any, *arguments: Any) -> tuple[int, str, str]:
    """Runs the command line; gives status, output and what it says beside it."""
    capsys.readouterr()
    status = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return status, out, err


@contextlib.contextmanager
def bounded(calls: float = 1e6, megabytes: float = 200.0) -> Iterator[None]:
    """Makes at most so many calls and takes at most so much memory, and does not hang.

    Calls are counted, not seconds: a machine that is busy with other work must not decide a test.
    What one call does by itself (unpack, convert) is bounded by the memory that it takes.
    """
    made = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal made
        made += event in ("call", "c_call")

    def stop(*_: Any) -> None:
        raise TimeoutError("It hangs.")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 300)
    tracemalloc.start()
    sys.setprofile(count)
    try:
        yield
        sys.setprofile(None)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        sys.setprofile(None)
        tracemalloc.stop()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert made < calls, f"{made:,} calls"
    assert peak < megabytes * 2**20, f"{peak / 2**20:.0f} MB"
