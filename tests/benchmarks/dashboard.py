"""What the TensorBoard page costs on long runs and large models, per request.

    python tests/benchmarks/dashboard.py [50x100000 2000x5000 ...] [--slow] [--logs DIRECTORY]

Synthetic records of so many layers x steps go through the real writer into real event files; a real
TensorBoard then answers what the page asks. Reads /proc, so Linux only. With --logs the records are
kept there, and not made again.
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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from lightning_lca.record.tables import StepTable
from lightning_lca.record.writer import RecordWriter
from lightning_lca.tensorboard.answers import COLUMNS

CASES = ["50x100000", "2000x5000", "100x1000000"]
BLOCK = 4096  # Steps that are made at once.
WITHOUT = "import tensorboard.default as d; d.get_dynamic_plugins = lambda: []; "
LAUNCH = "from tensorboard.main import run_main; run_main()"


# -- the record -----------------------------------------------------------------------------------


def names(layers: int) -> list[str]:
    """Names layers as those of a model of blocks of ten."""
    inside = ("norm1", "q", "k", "v", "out", "norm2", "up", "gate", "down", "scale")
    return [f"model.blocks.{i // 10}.{inside[i % 10]}" for i in range(layers)]


def synthetic(steps: int, sizes: Any, generator: np.random.Generator) -> Iterator[StepTable]:
    """Makes rows like a training's: credits of all sizes, counts near one half."""
    layers = len(sizes)
    size = 10 ** generator.uniform(-7, -4, layers)
    loss = 2.3
    for first in range(0, steps, BLOCK):
        count = min(BLOCK, steps - first)
        scale = size / np.sqrt(1 + np.arange(first, first + count)[:, None] / 500)
        credit = scale * generator.normal(-0.1, 1, (count, layers))
        share = generator.normal(0.5, 0.003, (count, layers))
        helping = np.rint(sizes * share).astype(np.int64)
        residual = 1e-8 * generator.normal(size=count)
        losses = loss + np.concatenate([[0], (credit.sum(1) + residual).cumsum()])
        loss = float(losses[-1])
        yield StepTable(
            steps=np.arange(first + 1, first + count + 1),
            allocated=credit,
            helping=helping,
            hurting=sizes - helping,
            loss_before=losses[:-1],
            loss_after=losses[1:],
            residual=residual,
            drift=np.zeros(count),
            splits=np.ones(count, np.int64),
            converged=np.ones(count, bool),
            trained=np.full(count, sizes.sum()),
            seconds=generator.uniform(0.01, 0.02, count),
        )


def write(root: Path, layers: int, steps: int) -> None:
    """Writes a run with the probes "train" and "val"; the second has every tenth step."""
    generator = np.random.default_rng(0)
    sizes = generator.integers(500, 2_000_000, layers)
    writer = RecordWriter(root / "run", sizes, None, print)
    writer.describe(
        {
            "probes": ["train", "val"],
            "group_by": "layer",
            "groups": names(layers),
            "sizes": sizes.tolist(),
            "settings": {"every_n_steps": 1},
        },
        0,
    )
    for rows in synthetic(steps, sizes, generator):
        writer.add("train", rows)
        writer.add("val", rows[rows.steps % 10 == 0])
        writer.write(everything=False)
    writer.close()


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

    def open(self, route: str, *, accept: str = COLUMNS, **query: Any) -> Any:
        """Asks for a route below data/, as the page does in a browser."""
        address = self.root + route + ("?" + urllib.parse.urlencode(query) if query else "")
        headers = {"Accept-Encoding": "gzip", "Accept": accept}
        return urllib.request.urlopen(
            urllib.request.Request(address, headers=headers), timeout=1200
        )

    def get(self, route: str, **query: Any) -> bytes:
        """Reads an answer."""
        with self.open(route, **query) as reply:
            data: bytes = reply.read()
            return gzip.decompress(data) if reply.headers["Content-Encoding"] == "gzip" else data

    def lca(self, route: str, **query: Any) -> Any:
        """Reads an answer of the plugin as JSON."""
        return json.loads(self.get(f"plugin/lca/{route}", accept="application/json", **query))

    def settle(self) -> float:
        """Waits until the event files are loaded, that is until the processes idle."""
        began, used = time.perf_counter(), -1.0
        while used < (used := sum(_cpu(pid) for pid in self._processes())):
            time.sleep(0.7)
        return time.perf_counter() - began

    def memory(self, name: str) -> float:
        """Tells a kind of memory of the Python process in MB, by its name in /proc."""
        return _status(self.process.pid, name) / 1024

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


def milliseconds(ask: Callable[[], Any]) -> float:
    """Times a request."""
    began = time.perf_counter()
    ask()
    return 1000 * (time.perf_counter() - began)


def spans(steps: int, generator: np.random.Generator, count: int) -> list[dict[str, int]]:
    """Draws ranges of all lengths, from 200 steps to nearly all."""
    widths = np.geomspace(200, 0.9 * steps, count).astype(int)
    starts = [int(generator.integers(1, steps - width + 1)) for width in widths]
    return [{"start": s, "stop": s + int(w) - 1} for s, w in zip(starts, widths, strict=True)]


def measure(log_dir: Path, steps: int, arguments: list[str]) -> dict[str, str]:
    """Asks one TensorBoard everything."""
    found: dict[str, str] = {}
    server = Server(log_dir, arguments)
    try:
        found["TensorBoard has loaded the file after, s"] = f"{server.settle():.1f}"
        before = {kind: server.memory(kind) for kind in ("RssAnon", "RssFile")}
        began = time.perf_counter()
        while not (runs := server.lca("runs")["runs"]) or not runs[0]["rows"]:
            time.sleep(0.05)
        name = runs[0]["name"]
        fold = {"fold": 40, "toggle": "[]"}
        server.get("plugin/lca/bins", run=name, bins=1000, **fold)
        found["first view (runs, bins)"] = f"{1000 * (time.perf_counter() - began):.0f}"
        while (run := server.lca("runs")["runs"][0])["read"] < 1 or run["rows"] < steps:
            time.sleep(0.2)
        found["all steps are read after, s"] = f"{time.perf_counter() - began:.1f}"
        whole = {"run": name, "bins": 1000}
        layer = runs[0]["layers"][7]
        more = {
            "bins": fold,
            "table": fold,
            "shares": fold,
            "helping": {"layer": layer},
            "compare": {"run_b": name, "probe_b": "val", **fold},
            "synchrony": {"bins": 300},
        }
        routes = ["bins", "table", "shares", "helping", "compare", "generalization", "findings"]
        generator = np.random.default_rng(1)
        zooms = spans(steps, generator, 8)
        for route in [*routes, "synchrony"]:
            asked = whole | more.get(route, {})

            def took(route: str = route, asked: Any = asked, **span: Any) -> float:
                return milliseconds(lambda: server.get(f"plugin/lca/{route}", **asked, **span))

            found[f"{route}, whole run"] = f"{took():.0f}"
            times = [took(**span) for span in zooms]
            found[f"{route}, zooms: median"] = f"{np.median(times):.0f}"
            found[f"{route}, zooms: longest"] = f"{max(times):.0f}"
        asks = [
            (route, whole | more.get(route, {}) | zooms[-2]) for route in ["synchrony", *routes]
        ]
        with ThreadPoolExecutor(len(asks)) as pool:
            began = time.perf_counter()
            every = [pool.submit(server.get, f"plugin/lca/{r}", **asked) for r, asked in asks]
            for one in every:
                one.result()
            found["all of these at once, a zoom"] = f"{1000 * (time.perf_counter() - began):.0f}"
        for kind, what in (("RssAnon", "memory growth"), ("RssFile", "and in temporary files")):
            found[f"{what}, MB"] = f"{server.memory(kind) - before[kind]:.0f}"
        began, sent, first = time.perf_counter(), 0, 0.0
        with server.open("plugin/lca/export", run=name) as reply:
            while part := reply.read(2**20):
                first = first or time.perf_counter() - began
                sent += len(part)
        took = time.perf_counter() - began
        found["export, s"] = f"{took:.1f}"
        found["export, MB"] = f"{sent / 2**20:.0f}"
        found["export, first bytes after"] = f"{1000 * first:.0f}"
    finally:
        server.close()
    return found


def starts(log_dir: Path, arguments: list[str]) -> str:
    """Times how long TensorBoard takes to start without the plugin and with it, in seconds."""
    took: dict[str, list[float]] = {WITHOUT: [], "": []}
    for _ in range(3):
        for patch in took:
            server = Server(log_dir, arguments, patch + LAUNCH)
            took[patch].append(server.start)
            server.close()
    without, with_it = (min(seconds) for seconds in took.values())
    return f"TensorBoard starts in {without:.2f} s without the plugin, {with_it:.2f} s with it."


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("cases", nargs="*", default=CASES, help="layers x steps, as 50x100000")
    parser.add_argument("--slow", action="store_true", help="TensorBoard without fast loading")
    parser.add_argument("--logs", type=Path, help="keeps the records here")
    asked = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    arguments = ["--load_fast=false"] if asked.slow else []
    columns: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory() as directory:
        for case in asked.cases:
            layers, _, steps = case.partition("x")
            logs = (asked.logs or Path(directory)) / case
            if not logs.exists():
                began = time.perf_counter()
                write(logs, int(layers), int(steps))
                took = time.perf_counter() - began
                size = sum(path.stat().st_size for path in logs.rglob("*tfevents*"))
                print(f"{case}: {size / 2**20:.0f} MB, written in {took:.0f} s", flush=True)
            if not columns:
                print(starts(logs, arguments), flush=True)
            columns[case] = measure(logs, int(steps), arguments)
            print(f"\n{case}; ms, if not said otherwise", flush=True)
            for what, told in columns[case].items():
                print(f"  {what:42}{told:>10}", flush=True)
    print(f"\n{'ms, if not said otherwise':42}" + "".join(f"{case:>16}" for case in columns))
    for what in next(iter(columns.values())):
        print(f"{what:42}" + "".join(f"{column[what]:>16}" for column in columns.values()))


if __name__ == "__main__":
    main()
