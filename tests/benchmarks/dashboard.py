"""What the TensorBoard dashboard costs: on the disk, while training, at start, and per request.

    python tests/benchmarks/dashboard.py [--steps 100000] [--layers 50] [--channels 0]

A synthetic record goes through the real writer into a real event file; two TensorBoards, one for
each way of loading, then answer what the page asks. Reads /proc, so Linux only.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from lightning_lca.record.tables import StepTable, WindowTable
from lightning_lca.reporting.loggers import Board

WINDOW = 50  # Steps of a window of channels: Lightning's default interval.
MODES = {"fast loading": [], "--load_fast=false": ["--load_fast=false"]}
WITHOUT = "import tensorboard.default as d; d.get_dynamic_plugins = lambda: []; "
LAUNCH = "from tensorboard.main import run_main; run_main()"


# -- the record -----------------------------------------------------------------------------------


def synthetic(steps: int, layers: int, generator: np.random.Generator) -> tuple[StepTable, Any]:
    """Makes rows like a training's: credits of all sizes, counts near one half."""
    sizes = generator.integers(500, 2_000_000, layers)
    scale = 10 ** generator.uniform(-7, -4, layers) / np.sqrt(1 + np.arange(steps)[:, None] / 500)
    credit = scale * generator.normal(-0.1, 1, (steps, layers))
    helping = np.rint(sizes * generator.normal(0.5, 0.003, (steps, layers))).astype(np.int64)
    residual = 1e-8 * generator.normal(size=steps)
    loss = 2.3 + np.concatenate([[0], (credit.sum(1) + residual).cumsum()])
    rows = StepTable(
        steps=np.arange(1, steps + 1),
        allocated=credit,
        helping=helping,
        hurting=sizes - helping,
        loss_before=loss[:-1],
        loss_after=loss[1:],
        residual=residual,
        drift=np.zeros(steps),
        splits=np.ones(steps, np.int64),
        converged=np.ones(steps, bool),
        trained=np.full(steps, sizes.sum()),
        seconds=generator.uniform(0.01, 0.02, steps),
    )
    return rows, sizes


def write(root: Path, rows: StepTable, sizes: Any, channels: int) -> tuple[float, float]:
    """Writes a run as the callback would. Gives bytes and seconds per step."""
    trainer = SimpleNamespace(
        loggers=[],
        is_global_zero=True,
        fast_dev_run=False,
        default_root_dir=str(root),
        strategy=SimpleNamespace(broadcast=lambda value: value),
    )
    generator = np.random.default_rng(1)
    board = Board(trainer, sizes)
    names = [f"layer_{i:02d}" for i in range(len(sizes))]
    stems = [[name, channels] for name in names]
    board.meta(
        {
            "version": 1,
            "first_step": 0,
            "probes": [None],
            "group_by": "layer",
            "groups": names,
            "sizes": sizes.tolist(),
            "windows": {"neurons": {"stems": stems}} if channels else {},
            "settings": {"every_n_steps": 1},
        },
        0,
    )
    empty = WindowTable.none([f"{name}/{i}" for name in names for i in range(channels)])
    seconds = 0.0
    for first in range(0, len(rows), WINDOW):
        some = rows[first : first + WINDOW]
        credit = generator.normal(size=(1, len(empty.names)))
        began = time.perf_counter()
        board.add(None, some)
        if channels:
            last, measured = some.steps[-1:], np.array([len(some)])
            board.add_windows(None, {"neurons": WindowTable(empty.names, last, measured, credit)})
        if board.waiting(None) >= board.chunk_steps:
            board.write(everything=False)
        seconds += time.perf_counter() - began
    began = time.perf_counter()
    board.write(everything=True)
    board.close()
    seconds += time.perf_counter() - began
    written = sum(path.stat().st_size for path in root.rglob("*tfevents*"))
    return written / len(rows), seconds / len(rows)


# -- a TensorBoard --------------------------------------------------------------------------------


class Server:
    """A running TensorBoard, and what it took to start."""

    def __init__(self, log_dir: Path, arguments: list[str], launch: str = LAUNCH) -> None:
        """Starts it and waits for its first answer."""
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        self.root = f"http://localhost:{port}/data/"
        command = [sys.executable, "-c", launch, "--logdir", str(log_dir), "--port", str(port)]
        began = time.perf_counter()
        self.process = subprocess.Popen(
            [*command, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while True:
            with contextlib.suppress(OSError):
                self.get("plugins_listing")
                break
            time.sleep(0.01)
        self.start = time.perf_counter() - began

    def get(self, route: str, **query: Any) -> bytes:
        """Asks for a route below data/."""
        address = self.root + route + ("?" + urllib.parse.urlencode(query) if query else "")
        # Like a browser: compressing the answer takes its part of the time.
        request = urllib.request.Request(address, headers={"Accept-Encoding": "gzip"})
        with urllib.request.urlopen(request, timeout=120) as reply:
            data: bytes = reply.read()
            return gzip.decompress(data) if reply.headers["Content-Encoding"] == "gzip" else data

    def settle(self) -> float:
        """Waits until the event files are loaded, that is until the processes idle."""
        began, used = time.perf_counter(), -1.0
        while used < (used := sum(_cpu(pid) for pid in self._processes())):
            time.sleep(0.7)
        return time.perf_counter() - began

    def memory(self) -> float:
        """Adds up the resident memory of the process and its children, in MB."""
        return sum(_status(pid, "VmRSS") for pid in self._processes()) / 1024

    def close(self) -> None:
        """Stops it."""
        self.process.terminate()
        self.process.wait()

    def _processes(self) -> Iterator[int]:
        yield (pid := self.process.pid)
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(FileNotFoundError):  # A thread that ended meanwhile.
                yield from map(int, (task / "children").read_text().split())


def _cpu(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return float(fields[11]) + float(fields[12])


def _status(pid: int, name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) if found else 0


def milliseconds(ask: Callable[[], Any], times: int = 1) -> float:
    """Times requests; the median."""
    took = []
    for _ in range(times):
        began = time.perf_counter()
        ask()
        took.append(1000 * (time.perf_counter() - began))
    return float(np.median(took))


def measure(log_dir: Path, arguments: list[str], steps: int, channels: int) -> dict[str, str]:
    """Asks one TensorBoard everything."""
    found: dict[str, str] = {}
    starts: dict[str, list[float]] = {WITHOUT: [], "": []}
    for _ in range(3):
        for patch in starts:
            server = Server(log_dir, arguments, patch + LAUNCH)
            starts[patch].append(server.start)
            server.close()
    found["start without the plugin, s"] = f"{min(starts[WITHOUT]):.2f}"
    found["start with it, s"] = f"{min(starts['']):.2f}"
    server = Server(log_dir, arguments)
    found["event file loaded after, s"] = f"{server.settle():.1f}"
    before = server.memory()

    def ask(route: str, **query: Any) -> Any:
        return json.loads(server.get(f"plugin/lca/{route}", **query))

    first = milliseconds(lambda: ask("runs"))
    run = ask("runs")["runs"][0]
    assert run["rows"] == steps, run
    name = run["name"]
    first += milliseconds(lambda: ask("bins", run=name, bins=500))
    found["first runs and bins, ms"] = f"{first:.0f}"
    middle, hundredth = steps // 2, steps // 100
    ranges = {
        "all": (1, steps),
        "a half": (middle // 2, middle // 2 + middle),
        "a hundredth": (middle, middle + hundredth),
        "200 steps": (middle, middle + 199),
    }
    for what, (start, stop) in ranges.items():
        query = {"run": name, "start": start, "stop": stop}
        for bins in (500, 2000):
            took = milliseconds(lambda: ask("bins", **query, bins=bins), 5)  # noqa: B023
            found[f"bins of {what}, {bins}, ms"] = f"{took:.0f}"
    whole = {"run": name, "bins": 500}
    found["helping, ms"] = (
        f"{milliseconds(lambda: ask('helping', **whole, layer='layer_07'), 5):.0f}"
    )
    found["table, ms"] = f"{milliseconds(lambda: ask('table', run=name), 5):.0f}"
    found["compare, ms"] = f"{milliseconds(lambda: ask('compare', **whole, run_b=name), 5):.0f}"
    for strongest in (20, 19, 1000):
        took = milliseconds(lambda: ask("synchrony", **whole, strongest=strongest))  # noqa: B023
        found[f"synchrony, strongest={strongest}, ms"] = f"{took:.0f}"
    if channels:
        took = milliseconds(lambda: ask("channels", **whole, layer="layer_07"), 5)
        found["channels, ms"] = f"{took:.0f}"
    found["memory before, MB"] = f"{before:.0f}"
    found["memory growth, MB"] = f"{server.memory() - before:.0f}"
    took = milliseconds(lambda: server.get("plugin/lca/export", run=name))
    found["export of all, ms"] = f"{took:.0f}"
    found["peak of the Python process, MB"] = f"{_status(server.process.pid, 'VmHWM') / 1024:.0f}"
    server.close()
    return found


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--layers", type=int, default=50)
    parser.add_argument("--channels", type=int, default=0, help="per layer")
    asked = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        rows, sizes = synthetic(asked.steps, asked.layers, np.random.default_rng(0))
        size, seconds = write(root, rows, sizes, asked.channels)
        print(f"{asked.layers} layers, {asked.steps} steps, {asked.channels} channels a layer")
        print(f"{size:.0f} bytes and {1e6 * seconds:.0f} µs a step to write\n")
        del rows
        columns = {
            mode: measure(root, arguments, asked.steps, asked.channels)
            for mode, arguments in MODES.items()
        }
    print(f"{'':36}" + "".join(f"{mode:>20}" for mode in columns))
    for what in next(iter(columns.values())):
        print(f"{what:36}" + "".join(f"{column[what]:>20}" for column in columns.values()))


if __name__ == "__main__":
    main()
