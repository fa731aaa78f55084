"""The store between TensorBoard's data provider and the views, on a provider made of a dict."""

import errno
import json
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from support.processes import PATIENCE
from werkzeug.datastructures import MultiDict

from lightning_lca import History
from lightning_lca.analysis.bins import Bins
from lightning_lca.record import eventfile as record
from lightning_lca.record.description import STEADY
from lightning_lca.record.reader import Reader
from lightning_lca.record.tables import StepTable, WindowTable
from lightning_lca.tensorboard import runs as store_module
from lightning_lca.tensorboard import spill, views
from lightning_lca.tensorboard.answers import as_json, plain
from lightning_lca.tensorboard.plugin import LCALoader, LCAPlugin
from lightning_lca.tensorboard.provider import Source
from lightning_lca.tensorboard.query import Query, QueryError
from lightning_lca.tensorboard.runs import Store
from lightning_lca.tensorboard.snapshot import Range, Table

LAYERS = ("conv", "head")
SIZES = np.array([100, 7])


def make_rows(steps, seed=0, groups=2, sizes=SIZES):
    generator = np.random.default_rng(seed)
    steps = np.asarray(steps)
    helping = generator.integers(0, 5, (len(steps), groups)).astype(np.uint8)
    return StepTable(
        steps=steps,
        allocated=generator.normal(size=(len(steps), groups)).astype(np.float32),
        helping=helping,
        hurting=(5 - helping).astype(np.uint8),
        loss_before=generator.normal(size=len(steps)),
        loss_after=generator.normal(size=len(steps)),
        residual=generator.normal(size=len(steps)),
        drift=generator.normal(size=len(steps)),
        splits=np.ones(len(steps), np.int64),
        converged=generator.random(len(steps)) < 0.5,
        trained=np.full(len(steps), sizes.sum()),
        seconds=generator.random(len(steps)),
    )


def make_table(steps, groups=LAYERS, sizes=SIZES, group_by="layer", **arguments):
    history = History(list(groups), list(sizes), group_by)
    history.append(make_rows(steps, groups=len(groups), sizes=np.array(sizes), **arguments))
    return Table.of(history)


class Provider:
    """Events {run: {tag: [(step, wall time, bytes)]}}, and what was asked."""

    def __init__(self):
        self.events = {}
        self.clock = 0.0
        self.listed, self.read = [], []
        self.most = 10**9

    def write(self, run, tags, step, at=None):
        for tag, data in tags.items():
            self.clock = self.clock + 1 if at is None else at
            self.events.setdefault(run, {}).setdefault(tag, []).append((step, self.clock, data))

    def session(self, run, first_step=0, at=None, **more):
        meta = {"first_step": first_step, "probes": [None], "groups": LAYERS}
        meta |= {"sizes": SIZES.tolist(), "settings": {"every_n_steps": 1}} | more
        self.write(run, {record.META: json.dumps(meta).encode()}, first_step, at)

    def chunk(self, run, rows, at=None):
        tags = record.tagged("chunk", int(rows.steps[0]), None, rows.parts(SIZES))
        self.write(run, tags, int(rows.steps[-1]), at)

    def list_tensors(self, context, *, experiment_id, plugin_name, run_tag_filter):
        self.listed.append(run_tag_filter)
        return {
            run: {
                tag: SimpleNamespace(
                    max_step=max(e[0] for e in events), max_wall_time=max(e[1] for e in events)
                )
                for tag, events in tags.items()
            }
            for run, tags in self._matching(run_tag_filter).items()
        }

    def read_tensors(self, context, *, experiment_id, plugin_name, downsample, run_tag_filter):
        assert downsample > 10**6
        self.read.append(sorted(run_tag_filter.tags))
        found = self._matching(run_tag_filter)
        if (
            sum(len(e[2]) for tags in found.values() for es in tags.values() for e in es)
            > self.most
        ):
            raise RuntimeError("RESOURCE_EXHAUSTED")
        return {
            run: {
                tag: [
                    SimpleNamespace(step=s, wall_time=w, numpy=np.array(d, object))
                    for s, w, d in events
                ]
                for tag, events in tags.items()
            }
            for run, tags in found.items()
        }

    def _matching(self, wanted):
        found = {}
        for run, tags in list(self.events.items()):
            if wanted.runs is None or run in wanted.runs:
                some = {t: list(e) for t, e in list(tags.items())}
                kept = {t: e for t, e in some.items() if wanted.tags is None or t in wanted.tags}
                found |= {run: kept} if kept else {}
        return found


@pytest.fixture
def provider():
    return Provider()


@pytest.fixture
def source(provider):
    return Source(provider, None, "")


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """Every request looks for news."""
    monkeypatch.setattr(store_module, "PATIENCE", 0.0)
    monkeypatch.setattr(store_module, "SELDOM", 0.0)


def from_scratch(provider, run):
    """What a reader makes of all events in the order of writing."""
    reader = Reader()
    events = sorted(
        (wall, tag, data)
        for tag, series in provider.events[run].items()
        for _, wall, data in series
    )
    for _, tag, data in events:
        reader.feed(tag, data)
    return reader.histories[""].rows


def assert_current(store, source, provider, run="run"):
    told, expected = store.run(source, run).table(None).rows, from_scratch(provider, run)
    assert np.array_equal(told.steps, expected.steps)
    assert np.array_equal(told.allocated, expected.allocated)
    assert np.array_equal(told.residual, expected.residual)


# -- the store ------------------------------------------------------------------------------------


def test_only_what_is_new_is_read(provider, source):
    store = Store()
    provider.session("run")
    for first in range(1, 100, 10):
        provider.chunk("run", make_rows(range(first, first + 10), first))
        provider.read.clear()
        assert_current(store, source, provider)
        assert {t for tags in provider.read for t in tags if t != record.META} == {
            f"lca/chunk/{first:09d}/{p}"
            for p in ("steps", "allocated", "helping", "idle", "scalars")
        }
    provider.read.clear()
    assert_current(store, source, provider)
    assert not provider.read


def test_a_session_that_takes_over_or_writes_over_is_followed(provider, source):
    store = Store()
    provider.session("run")
    for first in (1, 11, 21):
        provider.chunk("run", make_rows(range(first, first + 10), first))
    assert_current(store, source, provider)
    provider.session("run", first_step=15)
    provider.chunk("run", make_rows(range(16, 21), 5))
    assert_current(store, source, provider)
    assert store.run(source, "run").table(None).last_step == 20
    provider.session("run", first_step=10)
    provider.chunk("run", make_rows(range(11, 15), 6))  # The tag of an older chunk.
    assert_current(store, source, provider)
    assert store.run(source, "run").table(None).last_step == 14
    provider.session("run", first_step=0)
    provider.chunk("run", make_rows(range(1, 4), 7))
    assert_current(store, source, provider)
    assert (len(store.run(source, "run").table(None).rows), store.run(source, "run").lost) == (3, 0)


def test_sums_that_were_kept_are_made_anew_where_a_session_takes_over(provider, source):
    store = Store()
    provider.session("run")
    provider.chunk("run", make_rows(range(1, 201), 1))
    before = store.run(source, "run").table(None)
    for first_step, stop in ((100, 180), (20, 30), (25, 230)):
        provider.session("run", first_step=first_step)
        provider.chunk("run", make_rows(range(first_step + 1, stop + 1), stop))
        table = store.run(source, "run").table(None)
        rows = from_scratch(provider, "run")
        for name in ("allocated", "helping", "hurting"):
            told = table.column(name).total(slice(0, len(rows)))
            assert told == pytest.approx(getattr(rows, name).sum(0, dtype=float), abs=1e-9)
        assert table.finite.tolist() == rows.finite.tolist()
    was = make_rows(range(1, 201), 1).allocated.sum(0, dtype=float)
    assert before.column("allocated").total(slice(0, 200)) == pytest.approx(was, abs=1e-9)


def test_a_chunk_seen_in_part_and_then_written_over_is_not_lost(provider, source):
    store, rows = Store(), make_rows(range(1, 11), 1)
    provider.session("run")
    tags = record.tagged("chunk", 1, None, rows.parts(SIZES))
    halves = [dict(list(tags.items())[:2]), dict(list(tags.items())[2:])]
    provider.write("run", halves[0], 10)
    assert store.run(source, "run").lost == 1
    provider.write("run", halves[1], 10)
    provider.session("run")
    provider.chunk("run", make_rows(range(1, 21), 2))
    assert_current(store, source, provider)
    assert store.run(source, "run").lost == 0


def test_what_comes_late_is_put_in_its_place(provider, source):
    store = Store()
    provider.session("run", at=1.0)
    provider.chunk("run", make_rows(range(1, 11), 1), at=50.0)
    provider.chunk("run", make_rows(range(21, 31), 3), at=70.0)
    assert_current(store, source, provider)
    provider.chunk("run", make_rows(range(11, 21), 2), at=60.0)
    assert_current(store, source, provider)
    assert len(store.run(source, "run").table(None).rows) == 30
    provider.session("run", first_step=5, at=55.0)
    assert_current(store, source, provider)
    assert store.run(source, "run").table(None).rows.steps.tolist() == [
        *range(1, 6),
        *range(11, 31),
    ]


def test_chunks_whose_session_was_pushed_out_are_not_lost(provider, source):
    store = Store()
    provider.chunk("run", make_rows(range(1, 31), 1))
    provider.session("run")
    provider.chunk("run", make_rows(range(1, 11), 2))
    provider.events["run"] = {t: e[-1:] for t, e in provider.events["run"].items()}
    run = store.run(source, "run")
    assert (len(run.table(None).rows), run.lost) == (10, 0)


def test_a_reply_that_is_too_large_is_asked_for_in_halves(provider, source):
    provider.session("run")
    for first in range(1, 100, 10):
        provider.chunk("run", make_rows(range(first, first + 10), first))
    provider.most = 2000
    assert_current(Store(), source, provider)
    assert 3 < len(provider.read) < 60
    provider.most = 60
    run = Store().run(source, "run")
    assert run.error


def test_listing_is_believed_for_a_while(provider, source, monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(store_module, "PATIENCE", 0.3)
    monkeypatch.setattr(store_module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    store = Store()
    provider.session("run")
    provider.chunk("run", make_rows(range(1, 11)))
    for _ in range(20):
        store.run(source, "run")
        clock.now += 0.01
    assert len(provider.listed) == 1
    clock.now += 0.15
    store.run(source, "run")
    assert len(provider.listed) == 2


def test_memory_goes_to_the_runs_in_use(provider, source, monkeypatch):
    for name in "abc":
        provider.session(name)
        provider.chunk(name, make_rows(range(1, 101)))
    store = Store()
    one = store.run(source, "a").table(None).bytes
    table = store.run(source, "a").table(None)
    arrays = [*make_rows(range(100)).arrays.values()]
    arrays += [c.blocks for c in table.digest.columns.values()]
    arrays += vars(table.digest.per_step).values()
    assert one == sum(array.nbytes for array in arrays)
    monkeypatch.setattr(store_module, "MEMORY", int(2.5 * one))

    def held():
        return {n for (_, n), reading in store._readings.items() if reading.run is not None}

    store.run(source, "b")
    assert held() == {"a", "b"}
    store.run(source, "c")
    assert held() == {"b", "c"}
    described = store.describe(source)
    assert [d["rows"] for d in described] == [100, 100, 100]
    assert held() == {"b", "c"}, "to describe a run again it need not be read again"
    assert len(store.run(source, "a").table(None).rows) == 100
    provider.chunk("b", make_rows(range(101, 103)))
    assert [d["rows"] for d in store.describe(source)] == [100, 102, 100]


def test_many_long_runs_are_described_bit_by_bit(provider, source, monkeypatch):
    monkeypatch.setattr(store_module, "BUDGET", 0.0)
    for name in "abcd":
        provider.session(name)
        provider.chunk(name, make_rows(range(1, 11)))
    store = Store()
    unread = []
    for _ in range(5):
        described = store.describe(source)
        assert [d["name"] for d in described] == list("abcd")
        assert all(d["error"] is None for d in described)
        unread.append(sum(d["rows"] is None for d in described))
    assert unread == [3, 2, 1, 0, 0]


def test_a_long_record_is_shown_as_far_as_it_was_read(provider, source, monkeypatch):
    monkeypatch.setattr(store_module, "BUDGET", 0.0)
    monkeypatch.setattr(store_module, "_BATCH", 7)  # Less than two chunks of five parts.
    provider.session("run")
    for first in range(1, 301, 10):
        provider.chunk("run", make_rows(range(first, first + 10), first))
    whole = from_scratch(provider, "run")
    store, seen = Store(), []
    while True:
        (told,) = store.describe(source)
        seen.append((told["read"], told["rows"]))
        assert (told["lost"], told["error"]) == (0, None)
        table = store.run(source, "run").table(None)
        assert len(table.rows) == told["rows"] == store.run(source, "run").describe()["rows"]
        assert np.array_equal(table.rows.allocated, whole.allocated[: len(table.rows)])
        answer = views.bins(table, Range(bins=3))
        wanted = whole.allocated[: len(table.rows)].sum(0, dtype=float)
        assert answer["total"] == pytest.approx(wanted, abs=1e-12)
        if told["read"] == 1:
            break
    assert len(seen) > 15
    assert seen == sorted(set(seen)), "every look reads on"
    assert_current(store, source, provider)


def test_what_is_written_while_a_long_record_is_read_is_not_missed(provider, source, monkeypatch):
    monkeypatch.setattr(store_module, "BUDGET", 0.0)
    monkeypatch.setattr(store_module, "_BATCH", 7)
    provider.session("run")
    for first in range(1, 301, 10):
        provider.chunk("run", make_rows(range(first, first + 10), first))
    store = Store()
    for look in range(200):
        (told,) = store.describe(source)
        if look == 5:
            provider.chunk("run", make_rows(range(301, 311), 301))
        if look == 10:  # A session takes over, and writes over chunks that were not read yet.
            provider.session("run", first_step=150, clock=STEADY)
            provider.chunk("run", make_rows(range(151, 161), 7))
        if look > 10 and told["read"] == 1 and told["rows"] == 160:
            break
    assert_current(store, source, provider)
    assert store.run(source, "run").lost == 0


def test_a_run_of_which_no_step_is_read_yet_says_so(provider, source, monkeypatch):
    monkeypatch.setattr(store_module, "BUDGET", 0.0)
    monkeypatch.setattr(store_module, "_BATCH", 2)
    provider.session("run")
    provider.chunk("run", make_rows(range(1, 11)))
    store = Store()
    with pytest.raises(QueryError, match="is being read"):
        store.run(source, "run").table(None)
    while store.describe(source)[0]["read"] < 1:
        pass
    assert_current(store, source, provider)


@pytest.fixture(params=["files", "a full disk", "no such files"])
def crowded(request, monkeypatch):
    """Every array is too large for memory."""
    monkeypatch.setattr(spill, "LARGE", 0)
    if request.param == "a full disk":

        def full(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(spill.os, "posix_fallocate", full)
    if request.param == "no such files":
        monkeypatch.delattr(spill.os, "posix_fallocate")
    return request.param


def test_what_is_too_large_for_memory_lies_in_files(provider, source, crowded):
    store = Store()
    provider.session("run")
    kept = []
    for first in range(1, 200, 10):
        provider.chunk("run", make_rows(range(first, first + 10), first))
        assert_current(store, source, provider)
        kept.append(store.run(source, "run").table(None))
    whole = from_scratch(provider, "run").allocated
    for table in kept:  # Later rows lie behind those that were handed out.
        rows = len(table.rows)
        assert np.array_equal(table.rows.allocated, whole[:rows])
        total = table.column("allocated").total(slice(0, rows))
        assert total == pytest.approx(whole[:rows].sum(0, dtype=float), abs=1e-12)
    assert (kept[-1].bytes == 0) == (crowded == "files")


def test_nobody_waits_while_another_run_is_being_read(provider, source, monkeypatch):
    for name in ("known", "long"):
        provider.session(name)
        provider.chunk(name, make_rows(range(1, 11)))
    store, reads, goes_on = Store(), threading.Event(), threading.Event()
    store.run(source, "known")
    read = provider.read_tensors

    def slowly(context, *, run_tag_filter, **more):
        if "long" in run_tag_filter.runs:
            reads.set()
            assert goes_on.wait(PATIENCE)
        return read(context, run_tag_filter=run_tag_filter, **more)

    monkeypatch.setattr(provider, "read_tensors", slowly)
    reader = threading.Thread(target=store.describe, args=(source,))
    reader.start()
    assert reads.wait(PATIENCE)
    answers = []
    asker = threading.Thread(target=lambda: answers.append(store.run(source, "known")))
    asker.start()
    asker.join(60)
    waited = asker.is_alive()
    goes_on.set()
    reader.join()
    asker.join()
    assert not waited
    assert len(answers[0].table(None).rows) == 10


def test_unknown_names_leave_nothing_behind(provider, source):
    provider.session("run")
    store = Store()
    for name in ("x", "../run", "run/"):
        with pytest.raises(QueryError, match=r"The runs are 'run'\. A run gets a record by"):
            store.run(source, name)
    assert not store._readings


def test_a_run_that_went_away_is_gone(provider, source):
    provider.session("run")
    provider.chunk("run", make_rows(range(1, 11)))
    store = Store()
    store.run(source, "run")
    provider.events.clear()
    with pytest.raises(QueryError, match="There are no runs"):
        store.run(source, "run")
    assert store.describe(source) == []


def test_threads_see_whole_tables_while_the_run_goes_on(provider, source):
    provider.session("run")
    provider.chunk("run", make_rows(range(1, 11), 1))
    store, wrong, done = Store(), [], threading.Event()
    whole = np.concatenate([make_rows(range(f, f + 10), f).allocated for f in range(1, 600, 10)])

    def ask():
        while not done.is_set():
            try:
                answer = views.bins(store.run(source, "run").table(None), Range(bins=2000))
                credit = np.array(answer["credit"]).T
                if not np.array_equal(credit, whole[: len(credit)]) or len(credit) % 10:
                    wrong.append(len(credit))
                store.describe(source)
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for first in range(11, 600, 10):
        provider.chunk("run", make_rows(range(first, first + 10), first))
        time.sleep(0.005)
    done.set()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(store.run(source, "run").table(None).rows) == 600


@pytest.mark.parametrize(
    "data", [b"", b"\xff", b"{}\n", b'{"dtype": "<f4", "shape": [-3]}\n', b"[]\n", b"null\nx"]
)
def test_broken_bytes_cost_their_chunk_alone(provider, source, data):
    provider.session("run")
    for first in (1, 11, 21):
        provider.chunk("run", make_rows(range(first, first + 10), first))
    provider.events["run"]["lca/chunk/000000011/helping"] = [(20, 8.0, data)]
    run = Store().run(source, "run")
    assert run.table(None).rows.steps.tolist() == [*range(1, 11), *range(21, 31)]
    assert run.lost == 1


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b"null", b'{"probes": 3}', b'{"groups": [1]}'])
def test_a_broken_description_is_told(provider, source, data):
    provider.write("run", {record.META: data}, 0)
    provider.chunk("run", make_rows(range(1, 11)))
    store = Store()
    with pytest.raises(QueryError, match=r"Run 'run': the description .* is damaged"):
        store.run(source, "run").table(None)
    (described,) = store.describe(source)
    assert described["error"]
    assert described["lost"] >= 1


# -- bins and views -------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [1, 2, 3, 7, 11, 12, 2000])
def test_bins_tile_the_range_and_empty_ones_are_zero(most):
    steps = np.array([3, 4, 5, 11, 12, 30])
    values = np.array([1.0, 2, 4, 8, 16, 32])
    for first, last, least in ((1, 30, 1), (4, 12, 1), (6, 10, 1), (20, 50, 3), (31, 99, 1)):
        tiles = Bins.by_steps(steps, first, last, most, least)
        widths = np.diff(tiles.edges)
        assert (tiles.edges[0], tiles.edges[-1]) == (first - 1, last)
        assert 1 <= len(widths) <= most
        assert (widths > 0).all()
        assert len(set(widths[:-1])) <= 1
        inside = [(steps > a) & (steps <= b) for a, b in zip(tiles.edges, tiles.edges[1:])]
        assert tiles.sums(values).tolist() == [values[m].sum() for m in inside]
        assert tiles.measured.tolist() == [m.sum() for m in inside]


def test_what_is_not_finite_is_none():
    table = make_table(range(1, 7))
    table.rows.allocated[1, 0] = np.nan
    table.rows.loss_after[3] = np.inf
    table.rows.residual[2] = np.nan
    table = Table.of(table.history)
    answer = plain(views.bins(table, Range(bins=3)))
    assert answer["not_finite"] == [1, 2, 0]
    for layer in range(2):
        first, second, third = answer["credit"][layer]
        assert first == table.rows.allocated[0, layer], "the step is left out, of every layer"
        assert second is None, "no step is left"
        assert third == table.rows.allocated[4:, layer].sum(dtype=float)
    assert answer["loss"][2] is None
    assert answer["residual"][1] is None
    for view in (views.table(table, Range()), views.synchrony(table, Range(), 3), answer):
        as_json(view)
    assert plain(np.nan) is None
    assert plain([1.5, np.inf]) == [1.5, None]


def test_an_empty_range_is_answered():
    table = make_table(range(1, 7))
    for view in (
        views.bins(table, Range(50, 60)),
        views.helping(table, Range(50, 60), "conv"),
        views.table(table, Range(50, 60)),
        views.compare(table, table, Range(50, 60)),
        views.synchrony(table, Range(50, 60), 20),
    ):
        as_json(view)
    assert views.table(table, Range(50, 60))["rows"] == 0
    assert views.bins(table, Range(50, 60))["loss"][0] == table.rows.loss_after[-1]


def test_one_row_and_one_group_are_enough():
    table = make_table([40], groups=["only"], sizes=[3])
    answer = plain(views.bins(table, Range()))
    assert (answer["edges"], answer["credit"]) == ([39, 40], plain(table.rows.allocated))
    assert views.synchrony(table, Range(), 20)["moments"] == 0


def test_of_many_channels_the_most_helpful_and_the_most_hurting_are_shown():
    names = [f"wide/{i}" for i in range(700)] + ["thin/0"]
    table = make_table(range(1, 1001), groups=names, sizes=[1] * 701, group_by="neuron")
    assert table.layers == ["wide", "thin"]
    assert table.layer_sizes.tolist() == [700, 1]
    answer = plain(views.channels(table, Range(bins=2000), "wide"))
    assert (answer["shown"], answer["of"]) == (256, 700)
    total = table.rows.allocated[:, :700].astype(float).sum(0)
    assert answer["total"] == [*np.sort(total)[:128], *np.sort(total)[-128:]]
    assert [names.index(c) for c in answer["channels"]][:128] == np.argsort(total)[:128].tolist()
    assert len(answer["credit"]) * len(answer["credit"][0]) <= 2**17
    assert views.channels(table, Range(), "thin")["of"] == 1


def test_the_channels_of_a_parameter_are_those_of_its_layer():
    original = "conv.parametrizations.weight.original0"
    history = History([original, "conv.bias", "free"], [8, 2, 1], "parameter")
    history.append(make_rows(range(1, 21), groups=3, sizes=np.array([8, 2, 1])))
    credit = np.arange(8.0).reshape(4, 2)
    steps, measured = np.array([5, 10, 15, 20]), np.full(4, 5)
    history.append_windows("neurons", WindowTable(("conv/0", "conv/1"), steps, measured, credit))
    table = Table.of(history)
    for layer in (original, "conv.bias"):
        answer = plain(views.channels(table, Range(bins=2000), layer))
        assert (answer["edges"], answer["credit"]) == ([0, 5, 10, 15, 20], credit.T.tolist())
    with pytest.raises(QueryError, match="Layer 'free' has no channels"):
        views.channels(table, Range(), "free")


def test_the_channels_of_a_recurrent_layer_are_those_of_all_its_levels():
    history = History(["rnn", "block", "block.conv"], [8, 2, 1], "layer")
    history.append(make_rows(range(1, 21), groups=3, sizes=np.array([8, 2, 1])))
    names = ("rnn.l0/0", "rnn.l0/1", "rnn.l1/0", "block/0", "block.conv/0")
    steps, measured = np.array([10, 20]), np.array([10, 10])
    credit = np.arange(10.0).reshape(2, 5)
    history.append_windows("neurons", WindowTable(names, steps, measured, credit))
    table = Table.of(history)
    shown = [views.channels(table, Range(), layer)["channels"] for layer in table.layers]
    assert shown == [["rnn.l0/0", "rnn.l0/1", "rnn.l1/0"], ["block/0"], ["block.conv/0"]]


def test_spacing_of_a_sparse_run_is_the_least_width():
    table = make_table([10, 20, 30, 37])
    answer = plain(views.bins(table, Range(bins=2000)))
    assert answer["edges"] == [0, 10, 20, 30, 37]
    assert answer["measured"] == [1, 1, 1, 1]
    assert plain(views.bins(table, Range(11, 30, 2000))["edges"]) == [10, 20, 30]


# -- the way in -----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["+5", "-1", "5.0", "1e3", "٣", " 5", "5\n", "0x5", "", "9" * 30])
def test_numbers_are_digits_within_their_range(value):
    with pytest.raises(QueryError, match="bins must be a whole number from 1 to 2000"):
        Query(MultiDict({"bins": value})).bins()
    with pytest.raises(QueryError, match="start must be a whole number from 0 to"):
        Query(MultiDict({"start": value})).steps()


def test_the_users_own_sampling_is_kept():
    for given, expected in (({}, {"lca": 0}), ({"lca": 7}, {"lca": 7}), (None, None)):
        flags = SimpleNamespace(samples_per_plugin=given)
        LCALoader().fix_flags(flags)
        assert flags.samples_per_plugin == expected
    LCALoader().fix_flags(SimpleNamespace())


@pytest.mark.filterwarnings("ignore:html5lib's sanitizer:DeprecationWarning")
def test_the_plugin_reads_nothing_before_it_is_asked(provider):
    plugin = LCALoader().load(SimpleNamespace(data_provider=provider, multiplexer=None))
    assert isinstance(plugin, LCAPlugin)
    routes = plugin.get_plugin_apps()
    assert {"/index.js", "/runs", "/bins"} <= routes.keys()
    assert all(route.startswith("/") and ".." not in route for route in routes)
    assert not plugin.is_active()
    assert plugin.data_plugin_names() == ("lca",)
    assert not provider.listed + provider.read
