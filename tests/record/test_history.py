"""The record: what is in memory, what is on the disk, and what a killed process leaves."""

import signal
import struct
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from support.models import pl, toy_loader
from support.processes import environment
from support.training import fit
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util import tensor_util

from lightning_lca import Grouping, History, LCACallback
from lightning_lca.record import eventfile
from lightning_lca.record.tables import StepTable

CSVLogger, TensorBoardLogger = pl.loggers.CSVLogger, pl.loggers.TensorBoardLogger

EXACT = ("steps", "helping", "hurting", "loss_before", "loss_after", "residual", "drift")
COLUMNS = (*EXACT, "splits", "converged", "trained", "seconds")


def assert_same(loaded, history):
    for column in COLUMNS:
        a, b = getattr(loaded, column), getattr(history, column)
        assert np.array_equal(a, b), column
        assert a.dtype == b.dtype, column
    assert np.array_equal(loaded.allocated, history.allocated.astype(np.float32))
    assert loaded.allocated.dtype == np.float64
    assert (loaded.groups, loaded.sizes.tolist()) == (history.groups, history.sizes.tolist())


@pytest.mark.parametrize("logger", [TensorBoardLogger, CSVLogger, None])
@pytest.mark.parametrize("group_by", ["layer", "neuron"])
def test_the_record_reads_back_as_it_was_in_memory(tmp_path, logger, group_by):
    logger = {"logger": logger(tmp_path) if logger else False}
    lca = fit(tmp_path, trainer=logger, group_by=group_by, steps=20).lca
    assert len(lca.history) == 20
    assert_same(History.load(lca.log_dir), lca.history)


def test_tensorboards_own_loader_reads_the_same_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_lca.record.writer.CHUNK_STEPS", 8)
    lca = fit(tmp_path, trainer={"logger": TensorBoardLogger(tmp_path)}, steps=27).lca
    accumulator = EventAccumulator(str(lca.log_dir))  # With TensorBoard's default limits.
    accumulator.Reload()
    ours = {t for t in accumulator.Tags()["tensors"] if t.startswith("lca/") and "text" not in t}
    assert ours == set(accumulator.PluginTagToContent("lca")), "all belong to the plugin"
    tags = [t for t in ours if t.startswith("lca/chunk/")]
    chunks = sorted({t.split("/")[2] for t in tags})
    assert chunks == ["000000001", "000000009", "000000017", "000000025"]

    def part(chunk, name):
        (event,) = accumulator.Tensors(f"lca/chunk/{chunk}/{name}")
        return eventfile.unpack(tensor_util.make_ndarray(event.tensor_proto).item())

    history = lca.history
    steps = np.concatenate([part(c, "steps") for c in chunks])
    allocated = np.concatenate([part(c, "allocated") for c in chunks])
    helping = np.concatenate([part(c, "helping") for c in chunks])
    assert np.array_equal(steps, history.steps)
    assert np.array_equal(allocated, history.allocated.astype(np.float32))
    assert np.array_equal(helping / history.sizes, history.helping)


def test_named_probes_are_recorded_side_by_side(tmp_path):
    own = [next(iter(toy_loader(shuffle=False)))]
    lca = fit(tmp_path, probe={"fit": "train", "own": own}).lca
    for name in ("fit", "own"):
        assert_same(History.load(lca.log_dir, name), lca.histories[name])
    assert_same(History.load(lca.log_dir), lca.histories["fit"])
    with pytest.raises(ValueError, match=r"No probe 'val' in .*; it has \['fit', 'own'\]"):
        History.load(lca.log_dir, "val")


def test_a_second_session_takes_over_from_the_step_it_starts_at(tmp_path):
    logger = TensorBoardLogger(tmp_path, version="same")
    first = fit(tmp_path, trainer={"logger": logger}, steps=9, run_seed=1).lca
    again = TensorBoardLogger(tmp_path, version="same")
    second = fit(tmp_path, trainer={"logger": again}, steps=5, run_seed=2).lca
    assert first.log_dir == second.log_dir
    assert_same(History.load(second.log_dir), second.history)


class Follow(pl.Callback):
    """Adds up credits and helping steps of every weight, from `LCACallback.last`."""

    def __init__(self, lca):
        self.lca, self.helped, self.first = lca, None, None

    def on_train_batch_end(self, trainer, *args):
        values = self.lca.last.values
        if self.helped is None:
            self.helped = {n: torch.zeros_like(v, dtype=torch.long) for n, v in values.items()}
        for name, value in values.items():
            self.helped[name] += value < 0
        if trainer.global_step == 7:
            self.first = {n: v.clone() for n, v in self.lca.totals.items()}


@pytest.fixture(scope="module")
def detailed(tmp_path_factory):
    """A run with every table of windows, on a network that the sample covers whole."""
    log_dir = tmp_path_factory.mktemp("detailed")
    lca = LCACallback(neurons=True, track_parameters=True)
    follow = Follow(lca)
    fit(log_dir, lca, follow, steps=24, trainer={"log_every_n_steps": 7})
    return lca, follow


@pytest.mark.parametrize("table", ["parameters", "neurons", "weights"])
def test_windows_add_up_to_the_steps_they_cover(detailed, table):
    lca, _ = detailed
    for history, exact in ((lca.history, 1e-12), (History.load(lca.log_dir), 1e-6)):
        windows = getattr(history, table)
        assert windows.steps.tolist() == [7, 14, 21, 24]
        assert windows.measured.tolist() == [7, 7, 7, 3]
        assert windows.allocated.shape == (4, len(windows.names))
        for (start, stop), total in zip(
            ((0, 7), (7, 14), (14, 21), (21, 24)), windows.allocated.sum(1)
        ):
            assert total == pytest.approx(history.allocated[start:stop].sum(), rel=exact)


def test_neuron_windows_are_those_of_a_run_grouped_by_neuron(detailed, tmp_path):
    lca, _ = detailed
    twin = fit(tmp_path, group_by="neuron", steps=24).lca.history
    neurons = lca.history.neurons
    assert neurons.names == twin.groups == twin.neurons.names
    assert np.allclose(neurons.allocated[1], twin.allocated[7:14].sum(0), rtol=0, atol=1e-15)
    assert np.array_equal(twin.neurons.allocated, twin.allocated)


def test_sampled_weights_are_the_weights_they_are_named_after(detailed):
    lca, follow = detailed
    weights = History.load(lca.log_dir).weights
    assert weights.sampled_from == len(weights.names) == lca.history.sizes.sum()
    for i, name in enumerate(weights.names):
        parameter, _, index = name.rstrip("]").partition("[")
        index = tuple(int(x) for x in index.split(","))
        assert weights.helping[:, i].sum() == follow.helped[parameter][index]
        credit = float(lca.totals[parameter][index])
        assert weights.allocated[:, i].sum() == pytest.approx(credit, rel=1e-5, abs=1e-9)
        first = float(follow.first[parameter][index])
        assert weights.allocated[0, i] == pytest.approx(first, rel=1e-5, abs=1e-9)


def test_a_large_network_is_sampled(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_lca.training.windows.SAMPLE", 40)
    names = set()
    for seed in range(3):
        weights = fit(tmp_path, track_parameters=True, run_seed=seed).lca.history.weights
        names.add(weights.names)
        assert len(set(weights.names)) == 40
    assert len(names) == 1, "the draw depends on LCACallback's own seed alone"
    assert weights.sampled_from == 548


def test_kinds_tell_kernels_from_biases_and_norms():
    net = torch.nn.Sequential(
        torch.nn.utils.parametrizations.weight_norm(torch.nn.Conv1d(2, 3, 1)),
        torch.nn.BatchNorm1d(3),
        torch.nn.LSTM(3, 2),
    )
    kinds = dict(zip(Grouping(net).parameters, Grouping(net).kinds))
    assert kinds.pop("1.weight") == kinds.pop("1.bias") == "norm"
    assert {n for n, k in kinds.items() if k == "bias"} == {
        "0.bias",
        "2.bias_ih_l0",
        "2.bias_hh_l0",
    }
    assert {k for n, k in kinds.items() if "bias" not in n} == {"kernel"}


def damage(lca, tag, mark):
    """Flips a bit of what a tag holds, some bytes after a mark."""
    (path,) = lca.log_dir.glob("*tfevents*")
    whole = bytearray(path.read_bytes())
    whole[whole.index(mark, whole.index(tag.encode())) + 6] ^= 4
    path.write_bytes(whole)


@pytest.mark.parametrize("part", ["steps", "allocated", "helping", "idle", "scalars"])
def test_a_damaged_chunk_costs_its_own_steps_alone(tmp_path, monkeypatch, part):
    monkeypatch.setattr("lightning_lca.record.writer.CHUNK_STEPS", 8)
    lca = fit(tmp_path, steps=24).lca
    damage(lca, f"lca/chunk/000000009/{part}", b"}\n")
    loaded = History.load(lca.log_dir)
    assert loaded.steps.tolist() == [*range(1, 9), *range(17, 25)]
    assert np.array_equal(loaded.residual, np.delete(lca.history.residual, slice(8, 16)))
    assert loaded.lost == 1


def test_a_record_without_its_description_says_so(tmp_path):
    lca = fit(tmp_path).lca
    (path,) = lca.log_dir.glob("*tfevents*")
    path.write_bytes(path.read_bytes().replace(b'"groups"', b'"groupt"'))  # In all there are.
    with pytest.raises(FileNotFoundError, match="damaged at its beginning"):
        History.load(lca.log_dir)


def test_a_damaged_length_ends_a_file_and_is_counted(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_lca.record.writer.CHUNK_STEPS", 8)
    lca = fit(tmp_path, steps=24).lca
    (path,) = lca.log_dir.glob("*tfevents*")
    whole = bytearray(path.read_bytes())
    position = 0
    (length,) = struct.unpack_from("<Q", whole)
    while b"lca/chunk/000000017/steps" not in whole[position : position + length + 16]:
        position += length + 16
        (length,) = struct.unpack_from("<Q", whole, position)
    whole[position] ^= 1
    path.write_bytes(whole)
    loaded = History.load(lca.log_dir)
    assert len(loaded) == 16
    assert loaded.lost == 1


def test_directories_without_a_record_are_named(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"holds no LCA record\. Give the run's log directory"
    ):
        History.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        History.load(tmp_path / "nowhere")


def test_a_file_cut_anywhere_loads_up_to_the_cut(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_lca.record.writer.CHUNK_STEPS", 4)
    lca = fit(tmp_path, steps=24).lca
    (path,) = lca.log_dir.glob("*tfevents*")
    whole = path.read_bytes()
    rows = []
    for size in np.linspace(len(whole) * 0.3, len(whole) - 1, 12).astype(int):
        path.write_bytes(whole[:size])
        loaded = History.load(lca.log_dir)
        assert np.array_equal(loaded.steps, lca.history.steps[: len(loaded)])
        assert np.array_equal(loaded.residual, lca.history.residual[: len(loaded)])
        rows.append(len(loaded))
    assert rows == sorted(rows)
    assert rows[-1] >= 20, "a cut in the last chunk costs the last chunk alone"
    assert all(n % 4 == 0 for n in rows)


@pytest.mark.slow
def test_a_killed_process_loses_at_most_its_last_chunk(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent(
            """
            import sys
            import lightning_lca.record.writer as board
            from support.models import Classifier, pl, toy_loader
            from support.training import make_trainer
            from lightning_lca import LCACallback

            board.CHUNK_STEPS = 16

            class Tell(pl.Callback):
                def on_train_batch_end(self, trainer, *args):
                    print("step", trainer.global_step, flush=True)

            trainer = make_trainer(sys.argv[1], LCACallback(), Tell(), max_steps=100_000)
            trainer.fit(Classifier(), toy_loader())
            """
        )
    )
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", script, tmp_path],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment(),
    )
    told = 0
    for line in process.stdout:
        if line.startswith("step"):
            told = int(line.split()[1])
        if told >= 200:
            process.send_signal(signal.SIGKILL)
            break
    process.stdout.close()
    process.wait()
    assert told >= 200
    loaded = History.load(tmp_path / "lca_logs" / "version_0")
    assert loaded.steps.tolist() == list(range(1, len(loaded) + 1))
    assert len(loaded) > told - 16
    change = loaded.loss_after[-1] - loaded.loss_before[0]
    booked = loaded.allocated.sum() + loaded.residual.sum() + loaded.drift.sum()
    assert booked == pytest.approx(change, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("log_every", [5, 1000])
def test_memory_beside_the_table_does_not_grow(tmp_path, monkeypatch, log_every):
    monkeypatch.setattr("lightning_lca.record.writer.CHUNK_STEPS", 16)
    most = []

    class Look(pl.Callback):
        def on_train_batch_end(self, *args):
            (meter,) = lca._training.meters.values()
            most.append(meter.pending + lca._training.reporter._writer.waiting(None))

    pl.seed_everything(0)
    lca = LCACallback()
    fit(tmp_path, lca, Look(), steps=150, trainer={"log_every_n_steps": log_every})
    assert max(most) <= 16
    assert len(lca.history) == 150


def test_fifty_layers_take_less_than_400_bytes_a_step():
    """On noise, which compresses worst: credits of all sizes, counts spread like a binomial's."""
    generator = np.random.default_rng(0)
    sizes = generator.integers(100, 2_000_000, 50)
    steps, groups = 512, 50
    credit = generator.normal(size=(steps, groups)) * 10 ** generator.uniform(-6, -2, groups)
    helping = generator.binomial(sizes, 0.5, (steps, groups))
    rows = StepTable(
        steps=np.arange(steps),
        allocated=credit,
        helping=helping,
        hurting=sizes - helping,
        residual=generator.normal(size=steps),
        loss_before=generator.normal(size=steps),
        loss_after=generator.normal(size=steps),
        drift=np.zeros(steps),
        splits=np.ones(steps, np.int64),
        converged=np.ones(steps, bool),
        trained=np.full(steps, sizes.sum()),
        seconds=generator.uniform(size=steps),
    )
    parts = rows.parts(sizes)
    tags = eventfile.tagged("chunk", 1, None, parts)
    assert (
        max(len(eventfile.summarize({t: d}).SerializeToString()) for t, d in tags.items()) < 2**18
    )
    written = sum(len(eventfile.summarize({t: d}).SerializeToString()) for t, d in tags.items())
    assert written / steps < 400
    unpacked = {tag.rsplit("/", 1)[1]: eventfile.unpack(data) for tag, data in tags.items()}
    again = StepTable.from_parts(unpacked, sizes)
    assert np.array_equal(again.hurting, rows.hurting)
    assert np.array_equal(again.seconds, rows.seconds)


@pytest.mark.parametrize(
    "array",
    [
        np.array(3.5),
        np.zeros((0, 4), np.float32),
        np.arange(24, dtype=">i4").reshape(2, 3, 4)[:, ::2],
        np.array([True, False]),
        np.array([np.nan, np.inf, -0.0]),
    ],
)
def test_packing_is_exact_for_every_shape_and_dtype(array):
    again = eventfile.unpack(eventfile.pack(array))
    assert np.array_equal(again, array, equal_nan=array.dtype.kind == "f")
    assert again.shape == array.shape
    assert (
        np.signbit(again).tolist() == np.signbit(array).tolist()
        if array.dtype.kind == "f"
        else True
    )


@pytest.mark.parametrize("data", [b"", b"{}\n", b'{"dtype":"<f4","shape":[2]}\nxx', b"\xff\n\xff"])
def test_bytes_that_are_no_packed_array_are_refused(data):
    with pytest.raises(ValueError, match="Not a packed array of an LCA record"):
        eventfile.unpack(data)


def test_a_directory_of_runs_is_told_from_a_run(tmp_path):
    logs = tmp_path / "lightning_logs"
    for i in range(3):
        fit(
            tmp_path, trainer={"logger": TensorBoardLogger(tmp_path, "lightning_logs")}, steps=i + 1
        )
    run = TensorBoardLogger(tmp_path, "lightning_logs")
    run.log_metrics({"loss": 1.0})  # A run without LCA.
    run.save()
    with pytest.raises(FileNotFoundError) as error:
        History.load(logs)
    told = str(error.value)
    assert f"{logs} holds no LCA record. Give the run's log directory" in told
    paths = [f"{logs}/version_{i}" for i in (0, 1, 2)]
    assert sorted(told.split("first: ")[1].rstrip(".").split(", ")) == paths
    assert "one of the 3 below it" in told
    with pytest.raises(FileNotFoundError, match=r"e\.g\. lightning_logs/version_0\.$"):
        History.load(logs / "version_3")
    with pytest.raises(FileNotFoundError, match=r"does not exist.*e\.g\. lightning_logs/version_0"):
        History.load(tmp_path / "nothing")
    for i in (1, 2):
        for file in (logs / f"version_{i}").iterdir():
            file.unlink()
    with pytest.raises(FileNotFoundError, match=r"which is below it: .*version_0\.$"):
        History.load(logs)


def test_of_many_runs_the_latest_are_named(tmp_path):
    run = fit(tmp_path, trainer={"logger": TensorBoardLogger(tmp_path)}, steps=2).lca.log_dir
    (file,) = run.glob("*tfevents*")
    name = file.name.split(".")
    for i in range(12):
        (tmp_path / f"runs/{i}").mkdir(parents=True)
        copy = ".".join([*name[:3], str(2_000_000_000 + 60 * i), *name[4:]])
        (tmp_path / f"runs/{i}/{copy}").write_bytes(file.read_bytes())
    with pytest.raises(FileNotFoundError, match=r"one of the 12 .* first: \S+runs/11, \S+runs/10,"):
        History.load(tmp_path / "runs")
    with pytest.raises(FileNotFoundError, match=r"runs/2 and 2 more\.$"):
        History.load(tmp_path / "runs")


@pytest.mark.parametrize(("patience", "watched"), [(0.0, True), (60.0, True), (0.0, False)])
def test_reading_shows_a_bar_where_it_takes_long_and_somebody_looks(
    tmp_path, monkeypatch, capsys, patience, watched
):
    lca = fit(tmp_path, steps=20).lca
    monkeypatch.setattr("lightning_lca.record.progress.PATIENCE", patience)
    monkeypatch.setattr("lightning_lca.record.progress.is_watched", lambda: watched)
    monkeypatch.setenv("TQDM_MININTERVAL", "0")
    capsys.readouterr()
    assert len(History.load(lca.log_dir)) == 20
    out, err = capsys.readouterr()
    assert not out
    assert (f"reading {lca.log_dir}" in err) == (watched and patience == 0)
