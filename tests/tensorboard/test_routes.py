"""A real TensorBoard on real records: what the page is told, and what it is refused."""

import contextlib
import csv
import io
import json
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from pytorch_lightning.loggers import TensorBoardLogger
from support.models import Classifier, toy_loader
from support.processes import PATIENCE, environment, tensorboard, wait_for
from support.training import fit
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from torch import nn

import lightning_lca.tensorboard
from lightning_lca import History
from lightning_lca.record import eventfile as record
from lightning_lca.record import writer as board
from lightning_lca.record.export import wide
from lightning_lca.record.synchrony import rates, synchrony

pytestmark = pytest.mark.slow

STATIC = Path(lightning_lca.tensorboard.__file__).parent / "static"
LAUNCH = "from tensorboard.main import run_main; run_main()"
HIDDEN = "import tensorboard.default as d; d.get_dynamic_plugins = lambda: []; "
BROKEN = "import sys; sys.modules['lightning_lca.record.history'] = None; "
HOSTILE = {"<script>alert(1)</script>": nn.Linear(12, 8), "=1+1": nn.Linear(8, 4)}


# -- runs -----------------------------------------------------------------------------------------


def train(root, name, steps, net=None, **arguments):
    logger = TensorBoardLogger(root, name=None, version=name)
    model = Classifier if net is None else lambda: Classifier(net())
    fit(root, model=model, steps=steps, trainer={"logger": logger}, **arguments)


def hostile():
    net = nn.Sequential()
    for name, layer in HOSTILE.items():
        net.add_module(name, layer)
    return net


def damage(path):
    """Adds the same chunks under later steps, each broken in one of the ways there are."""
    events = [(tag, data) for tag, data in record.read(path) if tag != record.META]
    writer = EventFileWriter(str(path), filename_suffix=".damaged")
    for step, (tag, data) in enumerate(events, 1000):
        tag, broken = [
            (tag, data[:-9]),
            (tag, b""),
            (tag, b"\xff\xfe not JSON\n"),
            (f"{tag}s", data),
            (tag, b'{"dtype": "O", "shape": [1]}\n'),
        ][step % 5]
        summary = record.summarize({tag.replace("/0000", "/0009"): broken})
        writer.add_event(Event(step=step, wall_time=time.time(), summary=summary))
    writer.close()


def behead(source, path):
    """Copies a record, but for what its session says of itself."""
    writer = EventFileWriter(str(path))
    for step, (tag, data) in enumerate(record.read(source)):
        summary = record.summarize({tag: b"{]" if tag == record.META else data})
        writer.add_event(Event(step=step, wall_time=time.time(), summary=summary))
    writer.close()


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    root = tmp_path_factory.mktemp("logs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(board, "CHUNK_STEPS", 32)
        own = [next(iter(toy_loader(shuffle=False)))]
        train(root, "two", 150, probe={"fit": "train", "own": own}, neurons=True)
        train(root, "sparse", 120, every_n_steps=5)
        train(root, "sub/neuron", 40, group_by="neuron")
        train(root, "again", 90, run_seed=1)
        train(root, "again", 50, run_seed=2)
        train(root, "hostile", 20, net=hostile)
        train(root, "damaged", 64)
        damage(root / "damaged")
        train(root, "other net", 20, net=lambda: nn.Sequential(nn.Linear(12, 4)))
        behead(root / "sparse", root / "headless")
    return root


# -- servers --------------------------------------------------------------------------------------


class Server:
    def __init__(self, log_dir, *arguments, prefix="", launch=LAUNCH):
        command, self.port = tensorboard(
            log_dir, "--path_prefix", prefix, *arguments, launch=launch
        )
        self.root = f"http://localhost:{self.port}{prefix}/data/"
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment(),
        )

    def reply(self, path, method="GET", **query):
        """Gives (status, headers, bytes) of a path below data/."""
        address = self.root + path + ("?" + urllib.parse.urlencode(query) if query else "")
        request = urllib.request.Request(address, method=method)
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as reply:
                return reply.status, reply.headers, reply.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.headers, error.read()

    def json(self, path, **query):
        code, _, data = self.reply(path, **query)
        assert code == 200, data
        return json.loads(data, parse_constant=lambda constant: pytest.fail(f"{constant} in JSON"))

    def lca(self, route, **query):
        return self.json(f"plugin/lca/{route}", **query)

    def run(self, name):
        return next((r for r in self.lca("runs")["runs"] if r["name"] == name), None)

    def wait(self, condition, what):
        def asked():
            with contextlib.suppress(OSError):
                return condition()

        return wait_for(asked, what, pause=0.1, process=self.process)

    def close(self):
        self.process.terminate()
        self.process.wait()


def all_read(server, logs):
    runs = {r["name"]: r for r in server.lca("runs")["runs"]}
    names = {str(p.parent.relative_to(logs)) for p in logs.rglob("*tfevents*")}
    rows = {n: len(History.load(logs / n)) for n in names - {"headless"}}
    return names == set(runs) and all(runs[n]["rows"] == rows[n] for n in rows)


@pytest.fixture(scope="module", params=["fast", "slow"])
def server(request, logs):
    slow = request.param == "slow"
    arguments = ["--load_fast=false"] if slow else ["--load_fast=auto"]
    server = Server(logs, *arguments, prefix="/some/where" if slow else "")
    try:
        server.wait(lambda: all_read(server, logs), "all rows")
        yield server
    finally:
        server.close()


# -- what is told ---------------------------------------------------------------------------------


def test_the_tab_is_there_and_its_page_is_served(server):
    listed = server.json("plugins_listing")["lca"]
    assert listed["enabled"]
    assert listed["tab_name"] == "LCA"
    assert listed["loading_mechanism"]["type"] == "IFRAME"
    prefix = urllib.parse.urlparse(server.root).path
    assert listed["loading_mechanism"]["module_path"] == f"{prefix}plugin/lca/index.js"
    types = {".js": "text/javascript", ".css": "text/css"}
    for path in filter(Path.is_file, STATIC.rglob("*")):
        name = path.relative_to(STATIC).as_posix()
        code, headers, data = server.reply(f"plugin/lca/{name}")
        assert (code, data) == (200, path.read_bytes())
        assert headers["Content-Type"].startswith(types.get(path.suffix, "text/plain"))
        assert headers["X-Content-Type-Options"] == "nosniff"


RANGES = [
    {},
    {"bins": 1},
    {"bins": 7, "start": 37, "stop": 101},
    {"bins": 2000},
    {"bins": 4, "start": 0, "stop": 10**12},
    {"bins": 50, "start": 110},
    {"bins": 3, "start": 5000, "stop": 5002},
]
PROBES = [("two", "fit"), ("two", "own"), ("sparse", ""), ("again", ""), ("damaged", "")]


def masks(edges, steps):
    return [(steps > a) & (steps <= b) for a, b in pairwise(edges)]


@pytest.mark.parametrize("span", RANGES)
@pytest.mark.parametrize(("run", "probe"), PROBES)
def test_sums_per_bin_are_numpys_on_the_record(server, logs, run, probe, span):
    history = History.load(logs / run, probe or None)
    if span.get("start", 0) > history.steps[-1] and "stop" not in span:
        assert server.reply("plugin/lca/bins", run=run, probe=probe, **span)[0] == 400
        return
    answer = server.lca("bins", run=run, probe=probe, **span)
    edges, steps = answer["edges"], history.steps
    every = 5 if run == "sparse" else 1
    assert edges[0] == span.get("start", int(steps[0]) - every + 1) - 1
    assert edges[-1] == span.get("stop", steps[-1])
    assert len(edges) - 1 <= span.get("bins", 500)
    widths = np.diff(edges)
    assert (widths[:-1] == widths[0]).all()
    assert widths[0] >= min(every, edges[-1] - edges[0])
    assert answer["layers"] == list(history.groups)
    assert answer["sizes"] == history.sizes.tolist()
    inside, before = masks(edges, steps), steps <= edges[0]
    assert np.array(answer["credit"]).T.tolist() == [
        history.allocated[mask].sum(0).tolist() for mask in inside
    ]
    assert answer["before"] == history.allocated[before].sum(0).tolist()
    for name in ("residual", "drift"):
        assert answer[name] == [getattr(history, name)[m].sum() for m in inside]
        assert answer[f"{name}_before"] == getattr(history, name)[before].sum()
    assert answer["measured"] == [m.sum() for m in inside]
    assert answer["unconverged"] == [(~history.converged)[m].sum() for m in inside]
    assert answer["loss_first"] == history.loss_before[0]
    assert answer["loss"][1:] == [history.loss_after[m][-1] if m.any() else None for m in inside]
    start = history.loss_after[before][-1] if before.any() else history.loss_before[0]
    assert answer["loss"][0] == start
    # With what came before, every edge's loss is explained but for the record's float32.
    told = np.sum(answer["credit"], 0) + answer["residual"] + answer["drift"]
    first = np.sum(answer["before"]) + answer["residual_before"] + answer["drift_before"]
    explained = answer["loss_first"] + first + np.cumsum(told)
    real = [x for x in answer["loss"][1:] if x is not None]
    assert [e for e, m in zip(explained, inside) if m.any()] == pytest.approx(real, abs=1e-5)


def test_runs_tell_what_to_ask_for(server, logs):
    for name, probe, first, channels in (
        ("two", "fit", 1, True),
        ("sparse", None, 1, False),
        ("hostile", None, 1, False),
    ):
        run, history = server.run(name), History.load(logs / name, probe)
        assert (run["first_step"], run["last_step"]) == (first, history.steps[-1])
        assert (run["rows"], run["lost"], run["error"]) == (len(history), 0, None)
        assert (run["layers"], run["sizes"]) == (list(history.groups), history.sizes.tolist())
        assert (run["group_by"], run["channels"]) == ("layer", channels)
        assert run["probes"] == (["fit", "own"] if probe else [""])
        assert run["settings"]["every_n_steps"] == (5 if name == "sparse" else 1)


def test_two_sessions_in_one_directory_are_one_history(server, logs):
    history = History.load(logs / "again")
    assert len(history) == 50, "the second session starts over"
    run = server.run("again")
    assert (run["rows"], run["lost"], run["last_step"]) == (50, 0, 50)
    assert np.array_equal(
        np.array(server.lca("bins", run="again", bins=2000)["credit"]).T, history.allocated
    )


def test_helping_is_counted_over_all_weights_of_a_bin(server, logs):
    history = History.load(logs / "two", "own")
    layer = history.groups[1]
    answer = server.lca("helping", run="two", probe="own", bins=7, layer=layer)
    rows, inside = history.rows, masks(answer["edges"], history.steps)
    for k, mask in enumerate(inside):
        for told, columns, trained in (
            (answer["network"], slice(None), rows.trained[mask].sum()),
            (answer["layer"], 1, history.sizes[1] * mask.sum()),
        ):
            helped = int(rows.helping[mask][:, columns].sum(dtype=int))
            hurt = int(rows.hurting[mask][:, columns].sum(dtype=int))
            assert told["share"][k] == helped / (helped + hurt)
            assert told["sd"][k] == 0.5 / np.sqrt(helped + hurt)
            assert (told["helping"][k], told["hurting"][k]) == (helped / trained, hurt / trained)
    assert server.lca("helping", run="two", probe="own")["layer"] is None


def test_channels_add_up_to_their_layer(server, logs):
    history = History.load(logs / "two", "fit")
    layer, windows = history.groups[0], history.neurons
    answer = server.lca("channels", run="two", probe="fit", layer=layer, bins=2000)
    assert (answer["shown"], answer["of"]) == (16, 16)
    assert answer["total"] == sorted(answer["total"])
    assert min(np.diff(answer["edges"])[:-1]) >= np.median(np.diff(windows.steps))
    columns = [windows.names.index(name) for name in answer["channels"]]
    for k, mask in enumerate(masks(answer["edges"], windows.steps)):
        told = [credit[k] for credit in answer["credit"]]
        assert told == windows.allocated[mask][:, columns].sum(0).tolist()
    assert np.sum(answer["credit"]) == pytest.approx(history.allocated[:, 0].sum(), rel=1e-4)


def test_neurons_are_shown_as_layers_and_as_channels(server, logs):
    history = History.load(logs / "sub/neuron")
    run = server.run("sub/neuron")
    assert (run["group_by"], run["channels"]) == ("neuron", True)
    assert run["layers"] == ["net.0", "net.2", "net.4"]
    assert run["sizes"] == [208, 272, 68]
    bins = server.lca("bins", run="sub/neuron", bins=4)
    assert np.sum(bins["credit"], 1)[2] == pytest.approx(history.allocated[:, 32:].sum())
    channels = server.lca("channels", run="sub/neuron", bins=2000, layer="net.4")
    order = [history.groups.index(name) for name in channels["channels"]]
    assert np.array_equal(np.array(channels["credit"]).T, history.allocated[:, order])


def test_the_table_is_the_ledger_of_its_range(server, logs):
    history = History.load(logs / "two", "fit")
    answer = server.lca("table", run="two", start=21, stop=120)
    rows = history.rows[20:120]
    assert (answer["rows"], answer["first_step"], answer["last_step"]) == (100, 21, 120)
    assert answer["true_change"] == history.loss_after[119] - history.loss_after[19]
    booked = answer["allocated"] + answer["residual"] + answer["drift"]
    assert booked == pytest.approx(answer["true_change"], abs=1e-5)
    assert answer["largest_residual"] == np.abs(rows.residual).max()
    for g, layer in enumerate(answer["layers"]):
        credit = history.allocated[20:120].sum(0)[g]
        assert (layer["name"], layer["size"]) == (history.groups[g], history.sizes[g])
        assert layer["credit"] == credit
        assert layer["share"] == credit / answer["true_change"]
        assert layer["helping"] == pytest.approx(history.helping[20:120, g].mean())
        assert layer["hurting"] == pytest.approx(history.hurting[20:120, g].mean())


def test_two_runs_are_compared_on_common_bins(server, logs):
    a, b = History.load(logs / "two", "fit"), History.load(logs / "sparse")
    answer = server.lca("compare", run="two", run_b="sparse", start=11, bins=2000)
    assert answer["edges"][0] == 10
    assert answer["edges"][-1] == 150
    assert min(np.diff(answer["edges"])) == 5
    for letter, history in (("a", a), ("b", b)):
        sums = [history.allocated[m].sum(0) for m in masks(answer["edges"], history.steps)]
        assert np.array_equal(np.array(answer[letter]).T, sums)
        before = history.allocated[history.steps <= 10].sum(0)
        assert answer[f"before_{letter}"] == before.tolist()
    other = server.lca("compare", run="two", run_b="other net", probe_b="")
    assert other["layers"] == ["net.0"]
    assert other["only_a"] == ["net.2", "net.4"]
    assert other["only_b"] == []


def test_synchrony_is_that_of_the_rows_in_range(server, logs):
    history = History.load(logs / "two", "fit")
    answer = server.lca("synchrony", run="two", start=11, stop=110, bins=4, strongest=9)
    found = synchrony(history.allocated[10:110], 9)
    row, layer = found.moments.nonzero()
    assert answer["raster"] == [[g, t + 11] for t, g in zip(row.tolist(), layer.tolist())]
    assert (answer["width"], answer["moments"]) == (25, found.moments.sum())
    assert (answer["pairs"], answer["synchronized"]) == (found.pairs, found.synchronized)
    assert (answer["p_value"], answer["p_pairs"]) == (found.p_value, found.p_pairs)
    assert answer["null_mean"] == found.null.mean()
    assert answer["correlation"] == found.correlation.tolist()
    binned = rates(found.moments, [0, 25, 50, 75, 100])
    assert answer["rate"] == binned.observed.tolist()
    assert answer["rate_high"] == binned.high.tolist()
    assert answer["band"] is None
    single = server.lca("synchrony", run="two", start=11, stop=110, strongest=9)
    assert single["coincidences"] == found.coincidences.tolist()
    assert single["band"] == found.band.tolist()
    empty = server.lca("synchrony", run="two", start=11, stop=400, bins=39)
    assert empty["rate"][-1] is None


def test_the_export_holds_every_row_of_the_range(server, logs):
    history = History.load(logs / "sparse")
    code, headers, data = server.reply("plugin/lca/export", run="sparse", start=20, stop=80)
    assert code == 200
    assert headers["Content-Type"] == "text/csv; charset=utf-8"
    assert headers["Content-Disposition"] == 'attachment; filename="lca_sparse.csv"'
    assert headers["X-Content-Type-Options"] == "nosniff"
    head, *rows = csv.reader(io.StringIO(data.decode()))
    kept = (history.steps >= 20) & (history.steps <= 80)
    expected = {name: column[kept] for name, column in wide(history).items()}
    assert head == list(expected), "the columns of the command line"
    assert head[:3] == ["steps", "loss_before", "loss_after"]
    for i, (name, column) in enumerate(expected.items()):
        told = [r[i] for r in rows]
        if column.dtype == np.float32:
            assert np.array_equal(np.array(told, np.float32), column), name
        else:
            assert told == [str(value) for value in column.tolist()], name


# -- what a stranger wrote, or asks ---------------------------------------------------------------


def test_names_travel_as_data(server):
    code, headers, data = server.reply("plugin/lca/bins", run="hostile")
    assert code == 200
    assert headers["Content-Type"] == "application/json"
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert json.loads(data)["layers"] == [f"net.{name}" for name in HOSTILE]
    layer = "net.<script>alert(1)</script>"
    assert server.lca("helping", run="hostile", layer=layer)["layer"]
    code, headers, data = server.reply("plugin/lca/bins", run='"<script>alert(1)</script>\r\nX: 1')
    assert code == 400
    assert headers["Content-Type"] == "application/json"
    assert "X" not in headers
    _, _, data = server.reply("plugin/lca/export", run="hostile")
    head = next(csv.reader(io.StringIO(data.decode())))
    assert not any(name.startswith(("=", "+", "-", "@", "\t", "\r")) for name in head)


BAD = {
    "": "run is missing",
    "run=nowhere": "No run 'nowhere' with an LCA record.*The runs are.*LCACallback",
    "run=": "No run ''",
    "run=../two": "No run",
    "run=/etc/passwd": "No run",
    "run=two&probe=val": "no probe 'val'. The probes are 'fit', 'own'",
    "run=two&probe=": "no probe ''",
    "run=two&bins=0": "bins must be a whole number from 1 to 2000.*got '0'",
    "run=two&bins=2001": "got '2001'",
    "run=two&bins=1e9": "got '1e9'",
    "run=two&bins=%2B5": r"got '\+5'",
    "run=two&bins=1_0": "got '1_0'",
    "run=two&bins=%D9%A3": "got '٣'",
    "run=two&bins=": "got ''",
    "run=two&bins=%0A5": "got",
    "run=two&start=-1": "start must be a whole number.*got '-1'",
    "run=two&start=1.5": "got '1.5'",
    "run=two&start=nan": "got 'nan'",
    f"run=two&stop={10**30}": "stop must be a whole number",
    "run=two&stop=" + "9" * 5000: "…",
    "run=two&start=9&stop=8": "start=9 lies after stop=8",
    "run=two&start=9999": "start=9999 lies outside the measured steps, 1 to 150",
    "run=two&run=again": "run' was given 2 times",
    "run=two&bins=5&bins=5": "bins' was given 2 times",
    "run=two&width=5": "Unknown parameter 'width'. This route takes run, probe, start, stop, bins",
    "run=headless": "damaged",
}


@pytest.mark.parametrize("query", BAD)
def test_what_cannot_be_answered_is_told(server, query):
    code, headers, data = server.reply(f"plugin/lca/bins?{query}")
    assert (code, headers["Content-Type"]) == (400, "application/json")
    (message,) = json.loads(data).values()
    assert len(message) < 500
    assert re.search(BAD[query], message), message


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("runs?run=two", "takes none"),
        ("helping?run=two&layer=conv", "No layer 'conv'. The layers are 'net.0'"),
        ("channels?run=two", "layer is missing"),
        ("channels?run=two&layer=conv", "No layer"),
        ("channels?run=sparse&layer=net.0", r"LCACallback\(neurons=True\)"),
        ("synchrony?run=two&strongest=0", "strongest must be"),
        ("synchrony?run=two&strongest=1001", "strongest must be"),
        ("compare?run=two", "run_b is missing"),
        ("compare?run=two&run_b=x", "No run 'x'"),
        ("compare?run=two&run_b=two&probe_b=x", "no probe 'x'"),
        ("table?run=two&layer=x", "Unknown parameter"),
        ("export?run=nowhere", "No run"),
    ],
)
def test_every_route_checks_what_it_takes(server, path, why):
    code, _, data = server.reply(f"plugin/lca/{path}")
    assert code == 400
    assert re.search(why, json.loads(data)["error"])


@pytest.mark.parametrize(
    "path",
    [
        "..%2fplugin.py",
        "%2e%2e/plugin.py",
        "..%5cplugin.py",
        "static/index.js",
        "%2fetc%2fpasswd",
        "/etc/passwd",
        "index.js%00.css",
        "index.js/../../plugin.py",
        "plugin.py",
        "",
    ],
)
def test_no_path_leads_out_of_the_page(server, path):
    code, _, data = server.reply(f"plugin/lca/{path}")
    assert code in (400, 404)
    assert b"root:" not in data
    assert b"import" not in data


@pytest.mark.parametrize(
    "route", ["runs", "bins?run=two", "vendor/uPlot.min.css", "export?run=two"]
)
def test_only_reading_is_answered(server, route):
    code, headers, data = server.reply(f"plugin/lca/{route}", method="HEAD")
    assert (code, data) == (200, b"")
    for method in ("POST", "PUT", "DELETE"):
        code, headers, data = server.reply(f"plugin/lca/{route}", method=method)
        assert (code, headers["Allow"]) == (405, "GET, HEAD")


def test_a_damaged_record_is_shown_as_far_as_it_can_be_read(server, logs):
    run = server.run("damaged")
    assert run["rows"] == 64
    assert run["lost"] >= 1
    assert run["error"] is None
    headless = server.run("headless")
    assert "damaged" in headless["error"]
    assert (headless["rows"], headless["layers"], headless["first_step"]) == (0, [], None)


def test_a_run_that_goes_on_is_followed(server, logs):
    logger = TensorBoardLogger(logs, name=None, version="live")
    shutil.rmtree(logs / "live", ignore_errors=True)
    history = History.load(logs / "two", "fit")
    events = logger.experiment._get_file_writer().event_writer
    writer = board.RecordWriter(logs / "live", history.sizes, lambda: events, pytest.fail)
    meta = {"first_step": 0, "probes": [None], "groups": history.groups}
    writer.describe(meta | {"sizes": history.sizes.tolist()}, 0)
    server.wait(lambda: server.run("live"), "the new run")
    code, _, data = server.reply("plugin/lca/bins", run="live")
    assert code == 400
    assert "no measured step yet" in json.loads(data)["error"]
    stamps = []
    for stop in (40, 60, 61):
        start = len(History.load(logs / "live"))
        writer.add(None, history.rows[start:stop])
        writer.write(everything=True)
        server.wait(lambda: server.run("live")["rows"] == stop, "its rows")  # noqa: B023
        stamps.append(server.run("live")["stamp"])
        credit = np.array(server.lca("bins", run="live", bins=2000)["credit"]).T
        assert np.array_equal(credit, history.allocated[:stop])
    assert len(set(stamps)) == 3
    # A new session takes over from step 30.
    writer.describe(meta | {"first_step": 30, "sizes": history.sizes.tolist()}, 30)
    writer.add(None, history.rows[30:50])
    writer.write(everything=True)
    server.wait(lambda: server.run("live")["last_step"] == 50, "the new session")
    assert server.run("live")["rows"] == len(History.load(logs / "live")) == 50
    logger.experiment.close()
    shutil.rmtree(logs / "live")


@pytest.mark.parametrize("patch", [HIDDEN, BROKEN], ids=["hidden", "broken"])
def test_logs_are_shown_where_the_plugin_is_not_there_or_broken(logs, patch):
    server = Server(logs, launch=patch + LAUNCH)
    try:
        tags = server.wait(lambda: server.json("plugin/scalars/tags").get("two"), "the run")
        assert "train_loss" in tags
        assert server.json("plugin/scalars/scalars", run="two", tag="train_loss")
        assert "lca" not in server.json("plugins_listing")
    finally:
        server.close()
