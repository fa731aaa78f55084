"""The command line, as a person types it."""

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import pytorch_lightning as pl
from pytorch_lightning.loggers import TensorBoardLogger
from support.processes import environment
from support.training import fit

from lightning_lca import History, LCACallback
from lightning_lca.cli.main import main


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """Two runs in one directory: a with one probe, b with two; and a logger's run without LCA."""
    directory = tmp_path_factory.mktemp("logs")
    callbacks = {}
    for name, probe in (("a", "train"), ("b", {"fit": "train", "own": "train"}), ("plain", None)):
        lca = callbacks[name] = LCACallback(probe=probe, neurons=True) if probe else pl.Callback()
        logger = TensorBoardLogger(directory, name="runs", version=name)
        fit(directory, lca, steps=30, measured=False, trainer={"logger": logger})
    return directory, callbacks


def run(*arguments, capsys=None):
    status = main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return status, out, err


def test_summary_prints_what_the_callback_does(logs, capsys):
    directory, callbacks = logs
    status, out, err = run("summary", directory / "runs" / "a", capsys=capsys)
    assert (status, out.strip(), err) == (0, callbacks["a"].summary(), "")


def test_summary_of_a_directory_names_its_runs_and_probes(logs, capsys):
    directory, callbacks = logs
    _, out, _ = run("summary", directory, capsys=capsys)
    assert [line for line in out.splitlines() if line.startswith(("runs/", "probe"))] == [
        "runs/a",
        "runs/b probe 'fit'",
        "runs/b probe 'own'",
    ]
    assert callbacks["a"].summary() in out
    _, out, _ = run("summary", directory / "runs" / "b", "--probe", "own", capsys=capsys)
    assert out == f"probe 'own'\n{callbacks['b'].histories['own'].summary()}\n"


def test_csv_wide_and_long_hold_the_history_exactly(logs, tmp_path, capsys):
    log_dir = logs[0] / "runs" / "a"
    history = History.load(log_dir)
    run("export", log_dir, "--to", tmp_path / "wide.csv", capsys=capsys)
    run("export", log_dir, "--to", tmp_path / "new" / "long.csv", "--long", capsys=capsys)
    wide = list(csv.DictReader((tmp_path / "wide.csv").read_text().splitlines()))
    assert [int(r["steps"]) for r in wide] == history.steps.tolist()
    for g, layer in enumerate(history.groups):
        for prefix, column in (
            ("lca", "allocated"),
            ("helping", "helping"),
            ("hurting", "hurting"),
        ):
            read = np.array([r[f"{prefix}/{layer}"] for r in wide], np.float32)
            assert np.array_equal(read, getattr(history, column)[:, g].astype(np.float32))
            if prefix != "lca":
                counts = np.rint(read.astype(float) * history.sizes[g])
                assert np.array_equal(counts, getattr(history.rows, column)[:, g])
    for name in ("loss_before", "residual", "seconds"):
        assert [float(r[name]) for r in wide] == getattr(history, name).tolist()
    text = (tmp_path / "new" / "long.csv").read_text()
    long = list(csv.DictReader(text.splitlines()))
    assert [(int(r["steps"]), r["layer"]) for r in long] == [
        (s, g) for s in history.steps for g in history.groups
    ]
    assert [np.float32(r["lca"]) for r in long] == history.allocated.ravel().tolist()


def test_npz_and_parquet_hold_the_history_exactly(logs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("lightning_lca.record.export.BLOCK", 7)
    log_dir = logs[0] / "runs" / "b"
    history = History.load(log_dir, "own")
    for name in ("t.npz", "t.parquet"):
        run("export", log_dir, "--probe", "own", "--to", tmp_path / name, capsys=capsys)
    run("export", log_dir, "--to", tmp_path / "long.parquet", "--long", capsys=capsys)
    arrays = np.load(tmp_path / "t.npz")
    assert np.array_equal(arrays["allocated"], history.allocated)
    assert np.array_equal(arrays["neurons_allocated"], history.neurons.allocated)
    assert arrays["neurons_names"].tolist() == list(history.neurons.names)
    assert arrays["groups"].tolist() == list(history.groups)
    wide = pyarrow.parquet.read_table(tmp_path / "t.parquet").to_pydict()
    assert wide["steps"] == history.steps.tolist()
    assert wide[f"lca/{history.groups[1]}"] == history.allocated[:, 1].tolist()
    long = pyarrow.parquet.read_table(tmp_path / "long.parquet").to_pydict()
    assert long["layer"][:3] == list(history.groups)


@pytest.mark.slow
def test_figures_are_drawn_for_every_run_and_probe(logs, tmp_path, capsys):
    status, _, err = run("figures", logs[0], "--out", tmp_path, "--dpi", 40, capsys=capsys)
    assert status == 0
    drawn = {p.parent.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.png")}
    assert drawn == {"runs/a", "runs/b/fit", "runs/b/own"}
    assert (tmp_path / "runs" / "a" / "heatmap.png").read_bytes().startswith(b"\x89PNG")
    assert f"Figures are in {tmp_path / 'runs' / 'a'}." in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["summary", "{logs}/nowhere"], "nowhere does not exist. Give a run's log directory"),
        (["summary", "{logs}/runs/plain"], "plain holds no LCA record that can be read. Give the"),
        (["summary", "{logs}/file"], "file is a file. Give a run's log directory"),
        (["summary", "{logs}/runs/b", "--probe", "x"], "No probe 'x'; there is 'fit', 'own'"),
        (["summary", "{logs}/runs/a", "--probe", "x"], "there is a single one, unnamed"),
        (
            ["export", "{logs}", "--to", "x.csv"],
            "holds 2 runs (runs/a, runs/b). Give the directory",
        ),
        (
            ["export", "{logs}/runs/a", "--to", "x.xls"],
            "must end in .csv, .parquet, .npz; got 'x.xls'",
        ),
        (["export", "{logs}/runs/a", "--to", "x.npz", "--long"], "--long is for .csv and .parquet"),
        (["export", "{logs}/runs/a", "--to", "{logs}/file/x.csv"], "cannot be written: "),
        (["figures", "{logs}/runs/a", "--out", "x", "--dpi", "1"], "--dpi must be at least 10"),
    ],
)
def test_mistakes_are_named_without_a_traceback(logs, capsys, arguments, message):
    (logs[0] / "file").touch()
    status, out, err = run(*(a.format(logs=logs[0]) for a in arguments), capsys=capsys)
    assert (status, out) == (2, "")
    assert message in err
    assert err.startswith("lightning-lca: ")
    assert len(err.splitlines()) == 1


def test_a_damaged_record_is_read_as_far_as_it_goes_and_the_loss_is_told(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("lightning_lca.record.writer.CHUNK_STEPS", 8)
    lca = LCACallback()
    fit(tmp_path, lca, steps=24)
    (path,) = lca.log_dir.glob("*tfevents*")
    data = bytearray(path.read_bytes())
    at = data.index(b"lca/chunk/000000009/allocated")
    data[data.index(b"}\n", at) + 9] ^= 1
    path.write_bytes(data)
    status, out, err = run("summary", lca.log_dir, capsys=capsys)
    assert status == 0
    assert "16 measured steps" in out
    assert "1 piece of the record could not be read" in err
    path.write_bytes(b"not an event file at all")
    status, out, err = run("summary", lca.log_dir, capsys=capsys)
    assert status == 2
    assert "damaged at its beginning" in err


def test_the_demo_takes_as_many_steps_as_asked(tmp_path, capsys):
    status, out, err = run("demo", "--out", tmp_path, "--steps", "12", capsys=capsys)
    assert status == 0
    assert "Trains a small network for 12 steps, and measures each of them." in err
    assert "12 measured steps" in out
    assert len(History.load(tmp_path / "version_0", "val")) == 12
    status, _, err = run("demo", "--out", tmp_path, "--steps", "0", capsys=capsys)
    assert (status, err) == (2, "lightning-lca: --steps must be at least 1, got 0.\n")


@pytest.mark.slow
def test_the_installed_command_makes_a_demo_to_look_at(tmp_path):
    command = Path(sys.executable).with_name("lightning-lca")
    done = subprocess.run(
        [command, "demo", "--out", tmp_path / "a demo"],
        capture_output=True,
        text=True,
        env=environment(),
        check=True,
    )
    assert f"tensorboard --logdir '{tmp_path / 'a demo'}'" in done.stdout
    history = History.load(tmp_path / "a demo" / "version_0", "val")
    assert len(history) == 300
    assert history.loss_after[-1] < 0.2 * history.loss_before[0]
    assert history.neurons is not None
    assert history.weights is not None
    assert "hidden" in done.stdout
