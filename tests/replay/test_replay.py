"""Replay: the record of saved checkpoints is the one that the callback writes in training."""

from __future__ import annotations

import importlib
import logging
import os
import random
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from scripts import replayed
from scripts.replayed import ByHand, Data, Net, Once, Stream, Watched
from support.assertions import assert_ledger_closes
from support.models import pl, unrecorded
from support.processes import environment, wait_for
from support.replays import STEPS, events, train

from lightning_lca import History
from lightning_lca.cli.main import main
from lightning_lca.replay import ReplayError, player
from lightning_lca.replay.checkpoints import allowing
from lightning_lca.replay.runs import RECORD, replay

pytestmark = pytest.mark.slow  # Every test trains, saves and replays.

EXACT = ("steps", "helping", "hurting", "splits", "converged")
LOSSES = ("loss_before", "loss_after")
SMALL = ("residual", "drift")  # Differences of losses.


def assert_same(replayed, live):
    """Compares a replayed history with that of the callback, both from their records."""
    assert replayed.groups == live.groups
    assert len(live) > 1
    for column in EXACT:
        assert np.array_equal(getattr(replayed, column), getattr(live, column)), column
    for column in LOSSES:
        assert getattr(replayed, column) == pytest.approx(getattr(live, column), rel=1e-6), column
    scale = np.abs(live.loss_before).max()
    for column in SMALL:
        a, b = getattr(replayed, column), getattr(live, column)
        assert a == pytest.approx(b, rel=1e-6, abs=1e-6 * scale), column
    assert np.allclose(
        replayed.allocated, live.allocated, rtol=1e-6, atol=1e-6 * np.abs(live.allocated).max()
    )
    assert np.abs(live.allocated).max() > 0
    assert replayed.split_columns == live.split_columns
    for name, mine in replayed.rows.shares.items():
        theirs = live.rows.shares[name]
        assert np.allclose(mine, theirs, rtol=1e-5, atol=1e-6, equal_nan=True), name
    assert replayed.lost == live.lost == 0
    assert replayed.windows.keys() == live.windows.keys()
    for name, mine in replayed.windows.items():
        theirs = live.windows[name]
        assert mine.names == theirs.names
        # In training every checkpoint of the callback ends a window, too.
        at = np.searchsorted(theirs.steps, mine.steps)
        assert np.array_equal(theirs.steps[at], mine.steps)
        for column in ("measured", "helping", "allocated"):
            if (values := getattr(mine, column)) is not None:
                so_far = getattr(theirs, column).cumsum(0)[at]
                assert np.allclose(values.cumsum(0), so_far, rtol=1e-6, atol=1e-8), (name, column)


CASES = {
    "plain": (Net, {}, {}),
    "several probes, finer sums": (
        Net,
        {},
        {
            "probe": {"train": "train", "own": replayed.BATCHES},
            "neurons": True,
            "track_parameters": True,
            "group_by": "parameter",
        },
    ),
    "a stream": (Net, {}, {"data": Stream()}),
    "eval mode, where running statistics are read": (Net, {}, {"probe_mode": "eval"}),
    "dropout on": (Net, {}, {"probe_mode": "train", "probe_batches": 2, "seed": 5}),
    "refined": (Net, {}, {"tolerance": 1e-7}),
    "another rule, a loss_fn": (
        Net,
        {},
        {"quadrature": "gauss2", "loss_fn": replayed.loss_fn},
    ),
    "shares, of some layers": (
        Net,
        {},
        {
            "breakdown": ["order", "term"],
            "oscillation": True,
            "loss_fn": replayed.terms,
            "exclude": "*.bias",
            "probe_batches": 2,
        },
    ),
    "configure_model": (Net, {"late": True, "width": 9}, {}),
    "compiled": (Net, {"compiles": True}, {}),
    "a loss that knows the step": (Net, {"anneals": True}, {}),
    "double precision": (Net, {}, {"precision": "64-true"}),
    "mixed precision": (Net, {}, {"precision": "bf16-mixed"}),
    "weights only": (Net, {}, {"slim": True}),
    "manual optimization": (ByHand, {}, {"loss_fn": replayed.loss_fn}),
    "a module with its own data, finished by setup": (Watched, {}, {"data": None}),
    "on a GPU": (Net, {}, {"accelerator": "gpu", "precision": "bf16-mixed"}),
}
ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@pytest.mark.parametrize(
    "case",
    [
        *[name for name in CASES if "GPU" not in name],
        pytest.param("on a GPU", marks=ON_GPU),
    ],
)
@pytest.mark.filterwarnings("ignore:LCA. the probe loss changed from")
@pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization")
def test_on_checkpoints_of_every_step_it_gives_the_live_record(tmp_path, case):
    model, arguments, options = CASES[case]
    live = train(tmp_path, model(**arguments), **({"data": Data()} | options))
    options = {k: v for k, v in options.items() if k != "slim"} | {"log_every_n_steps": 4}
    data = options.pop("data", Data())
    (record,) = replay(tmp_path, model, data and type(data), **options)
    assert record == tmp_path / RECORD
    for name in live.histories:
        assert_same(History.load(record, name), History.load(live.log_dir, name))
    drifts = case.startswith(("eval mode", "a loss that knows", "shares, of some"))
    assert (np.abs(live.history.drift).max() > 0) == drifts


@pytest.mark.filterwarnings("ignore:.*IterableDataset.*")
def test_of_data_that_can_be_read_but_once_the_first_batches_are_kept(tmp_path):
    train(tmp_path, Net(), Once())
    (history,) = replay(tmp_path, Net, Once, probe_batches=2).values()
    assert len(history) == STEPS
    assert_ledger_closes(history, relative=1e-5)


@pytest.mark.parametrize(("n", "save"), [(3, 3), (5, 5), (5, 1)])
def test_on_every_nth_step_it_gives_the_record_of_chords(tmp_path, n, save):
    live = train(tmp_path, Net(), Data(), every=n, save=save)
    assert live.history.steps.tolist() == sorted({*range(n, STEPS, n), STEPS})
    chords = {"every_n_steps": n} if save < n else {}
    (history,) = replay(tmp_path, Net, Data, **chords).values()
    assert_same(history, History.load(live.log_dir))


@pytest.mark.parametrize("then", [True, False])
def test_weights_find_their_places_when_only_one_side_is_compiled(tmp_path, then):
    live = train(tmp_path, Net(compiles=then), Data()).history
    arguments = {"compiles": not then}
    (history,) = replay(tmp_path, Net, Data, model_arguments=arguments).values()
    assert [g.replace("_orig_mod.", "") for g in history.groups] == [
        g.replace("_orig_mod.", "") for g in live.groups
    ]
    assert history.allocated == pytest.approx(live.allocated, rel=1e-6, abs=1e-9)
    assert np.array_equal(history.helping, live.helping)


@pytest.mark.filterwarnings("ignore:LCA. the probe loss changed from")
def test_checkpoints_made_by_hand_do_as_well(tmp_path):
    live = train(tmp_path, Net(anneals=True), Data())
    for path in (tmp_path / "checkpoints").iterdir():
        content = content_of(path)
        content = {key: content[key] for key in ("state_dict", "global_step")}
        torch.save(content, path, _use_new_zipfile_serialization=False)
    build = lambda: Net(anneals=True)  # noqa: E731
    (history,) = replay(tmp_path, build, replayed.loaders, log_every_n_steps=4).values()
    assert_same(history, History.load(live.log_dir))
    assert history.windows["parameters"].steps.tolist() == [4, 8, 12]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Checkpoints of every step, and the record of the callback."""
    path = tmp_path_factory.mktemp("trained")
    return path / "checkpoints", train(path, Net(), Data(), slim=True, probe=replayed.BATCHES)


@pytest.fixture
def runs(trained, tmp_path):
    """Two runs in one directory, as Lightning lays them out."""
    for name in ("a", "b"):
        shutil.copytree(trained[0], tmp_path / "runs" / name / "checkpoints")
    return tmp_path / "runs"


def content_of(path):
    with allowing(weights_only=True):
        return torch.load(path, weights_only=True)


NAMES = ("--model", "scripts.replayed.Net", "--probe", "scripts.replayed.probe")


def run(*arguments, capsys):
    status = main(["replay", *map(str, arguments)])
    return status, capsys.readouterr().err


def assert_identical(a, b):
    """Compares two records to the bit, clocks apart."""
    one, two = History.load(a), History.load(b)
    for column in (*EXACT, *LOSSES, *SMALL, "allocated"):
        assert np.array_equal(getattr(one, column), getattr(two, column)), column
    for name, window in one.windows.items():
        for column in ("steps", "measured", "allocated"):
            assert np.array_equal(getattr(window, column), getattr(two.windows[name], column))
    assert one.lost == two.lost == 0
    assert events(a) == events(b)


def test_several_runs_in_one_call_get_a_record_each(trained, runs, tmp_path, capsys):
    live = History.load(trained[1].log_dir)
    status, err = run(runs, *NAMES, "--log_every_n_steps", 4, capsys=capsys)
    assert (status, len(err.splitlines())) == (0, 2)
    for name in ("a", "b"):
        record = runs / name / RECORD
        assert f"{STEPS} segments are in {record}." in err
        assert_same(History.load(record), live)
        assert [step for step, _ in events(record)["lca/total"]] == [3, 7, 11]
    assert main(["summary", str(runs)]) == 0
    assert capsys.readouterr().out.count("12 measured steps") == 2
    checkpoints = (runs / "a" / "checkpoints").glob("*.ckpt")
    run(*checkpoints, *NAMES, "--out", tmp_path / "out", "--no_figures", capsys=capsys)
    run(runs, *NAMES, "--out", tmp_path / "out", "--no_figures", capsys=capsys)
    for name in ("a", "b"):
        assert_same(History.load(tmp_path / "out" / name), live)


def test_a_replay_that_was_killed_goes_on_as_if_unbroken(runs, monkeypatch):
    options = (*NAMES, "--loss_fn", "scripts.replayed.loss_until_saved", "--log_every_n_steps", "2")
    command = [sys.executable, "-m", "lightning_lca", "replay", runs / "a", *options]
    state = runs / "a" / RECORD / "replay.pt"
    around = environment(REPLAY_WAITS_AT=str(state))
    with open(runs / "told", "w") as told:
        process = subprocess.Popen(command, env=around, stderr=told)
    try:
        wait_for(state.exists, "the first state", process=process)
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL, (runs / "told").read_text()
    assert 0 < torch.load(state, weights_only=True)["callback"]["steps"] < STEPS - 2
    for name in ("a", "b"):
        assert main(["replay", str(runs / name), *options]) == 0
    assert len(list((runs / "a" / RECORD).glob("*tfevents*"))) > 1
    assert_identical(runs / "a" / RECORD, runs / "b" / RECORD)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_replay_that_was_asked_to_stop_goes_on_as_if_unbroken(runs, capsys, monkeypatch, number):
    calls = []

    def interrupted(module, batch):
        calls.append(1)
        if len(calls) == 70:
            os.kill(os.getpid(), number)
        return unrecorded(module.loss(batch))

    monkeypatch.setattr(replayed, "loss_fn", interrupted)
    options = (*NAMES, "--loss_fn", "scripts.replayed.loss_fn", "--log_every_n_steps", 3)
    status, err = run(runs / "a", *options, capsys=capsys)
    assert (status, err) == (130, "Interrupted. Run the same command again to go on.\n")
    assert 3 < len(History.load(runs / "a" / RECORD)) < STEPS
    run(runs, *options, capsys=capsys)
    assert_identical(runs / "a" / RECORD, runs / "b" / RECORD)


def test_checkpoints_that_come_later_are_added_to_the_record(trained, runs, tmp_path):
    later = tmp_path / "later"
    later.mkdir()
    saved = sorted((runs / "a" / "checkpoints").iterdir(), key=lambda path: path.stat().st_mtime)
    for path in saved[7:]:
        path.rename(later / path.name)
    (first,) = replay(runs / "a", Net, probe=replayed.BATCHES).values()
    assert first.last_step == 6
    for path in later.iterdir():
        path.rename(saved[0].parent / path.name)
    (record,) = replay(runs / "a", Net, probe=replayed.BATCHES)
    live = History.load(trained[1].log_dir)
    for column in (*EXACT, *LOSSES, *SMALL, "allocated"):
        assert np.array_equal(getattr(History.load(record), column), getattr(live, column)), column
    before = sorted(record.iterdir())
    (again,) = replay(runs / "a", Net, probe=replayed.BATCHES).values()
    assert sorted(record.iterdir()) == before, "nothing is left to do"
    assert len(again) == STEPS


@pytest.mark.parametrize("argument", [{"max_overhead": 0.1}, {"segments": "step"}])
def test_what_only_training_can_do_is_refused(runs, argument):
    with pytest.raises(ValueError, match=f"{next(iter(argument))} is for training: a replay has"):
        replay(runs / "a", Net, **argument)


def test_what_a_step_was_made_of_is_refused_and_all_is_what_can_be_told(runs, capsys):
    with pytest.raises(ValueError, match='breakdown="part" is for training'):
        replay(runs / "a", Net, breakdown=["order", "part"], probe=replayed.BATCHES)
    status, err = run(runs / "a", *NAMES, "--breakdown", "part", capsys=capsys)
    assert (status, len(err.splitlines())) == (2, 1)
    assert "checkpoints hold neither" in err
    (history,) = replay(runs / "a", Net, breakdown=True, probe=replayed.BATCHES).values()
    assert set(history.breakdowns) == {"order"}
    out = ["--out", str(runs / "other"), "--breakdown", "order", "--oscillation"]
    assert run(runs / "a", *NAMES, *out, capsys=capsys)[0] == 0
    (record,) = (runs / "other").rglob("replay.pt")
    read = History.load(record.parent)
    assert set(read.breakdowns) == {"order"}
    assert read.oscillation is not None


def test_a_record_with_a_gap_is_made_anew(runs):
    (record,) = replay(runs / "a", Net, probe=iter(replayed.BATCHES))
    for path in record.glob("*tfevents*"):
        path.unlink()
    with pytest.warns(UserWarning, match="is not whole: all checkpoints are measured again"):
        (history,) = replay(runs / "a", Net, probe=replayed.BATCHES).values()
    assert len(history) == STEPS


def test_what_is_no_sound_checkpoint_is_told_and_passed_over(trained, runs, capsys):
    saved = runs / "a" / "checkpoints"
    (saved / "cut.ckpt").write_bytes((saved / "start.ckpt").read_bytes()[:5000])
    (saved / "foreign.ckpt").write_text("not a checkpoint")
    (saved / "sharded.ckpt").mkdir()
    torch.save({"weights": torch.ones(2)}, saved / "other.ckpt")
    status, err = run(runs / "a", *NAMES, capsys=capsys)
    lines = err.splitlines()
    assert (status, len(lines)) == (0, 5)
    assert all(line.startswith("lightning-lca: ") for line in lines[:4])
    assert all(line.endswith("It is passed over.") for line in lines[:4])
    for said in (
        "sharded.ckpt is a directory, as sharded checkpoints are. Make it one file by",
        "cut.ckpt cannot be read: it is cut off, damaged, or not made by torch.save (",
        "foreign.ckpt cannot be read: it is cut off, damaged, or not made by torch.save (",
        "other.ckpt is not a checkpoint of Lightning's: it has no state_dict or no global_step.",
    ):
        assert any(said in line for line in lines), said
    assert_same(History.load(runs / "a" / RECORD), History.load(trained[1].log_dir))


class Stranger:
    """Nothing that torch would load without trust."""


def spoil(directory, what):
    """Damages the checkpoints of a run in one way."""
    paths = sorted(directory.iterdir())
    if what == "one":
        for path in paths[1:]:
            path.unlink()
    elif what == "mixed":
        content = content_of(paths[0])
        content["state_dict"]["head.bias"] += 1
        torch.save(content, directory / "other.ckpt")
    elif what == "untrusted":
        for path in paths:
            content = content_of(path)
            torch.save(content | {"stranger": Stranger()}, path)
    elif what == "lacking":
        content = content_of(directory / "last.ckpt")
        del content["state_dict"]["head.bias"]
        torch.save(content, directory / "last.ckpt")
        next(directory.glob("*step=12.ckpt")).unlink()
    elif what == "measured":
        replay(directory, Net, probe=replayed.BATCHES, quadrature="midpoint")
    elif what == "gone":
        replay(directory, Net, probe=replayed.BATCHES)
        (directory / "last.ckpt").unlink()
        next(directory.glob("*step=12.ckpt")).unlink()


MISTAKES = {
    ("none", "--model=Net"): "--model takes an import path, package.module.Name; got 'Net'.",
    ("none", "--model=nowhere.Net"): "--model nowhere.Net: there is no module 'nowhere' here. Run",
    ("none", "--model=scripts.replayed.Nett"): "has no 'Nett'; did you mean Net?",
    ("none", "--model=scripts.replayed.Plain"): "Plain gives a Plain, not a LightningModule. Name",
    (
        "none",
        "--model=scripts.replayed.NOT_CALLABLE",
    ): "3 is neither a class nor a function.",
    ("none", "--model.width=8"): "start.ckpt is not of this Net: size mismatch for scale: ",
    ("none", "--model.width=x"): "Net cannot be built: TypeError: ",
    ("none", "--model=scripts.replayed.Needy"): "missing 1 required positional argument: 'depth'.",
    ("lacking", ""): 'last.ckpt is not of this Net: Missing key(s) in state_dict: "head.bias".',
    ("none", "--model=scripts.replayed.Deeper"): 'Missing key(s) in state_dict: "extra.weight",',
    ("none", "--probe=train"): "There is no probe: Net has no train_dataloader. Give its data (--",
    ("none", "--probe=scripts.replayed.nothing"): "The probe 'nothing' is empty: got 0 batches.",
    (
        "none",
        "--data.batch_size=3",
    ): "--data.ARGUMENT needs --data, which names a class or func",
    ("none", "--loss_fn=scripts.replayed.NOT_CALLABLE"): "loss_fn must be a function (module, ba",
    ("none", "--quadrature=sympson"): "sympson",
    (
        "none",
        "--tolerance=-1",
    ): "tolerance must be a positive number in loss units, e.g. 1e-3; got -1.0.",
    ("none", "--accelerator=abacus"): "There can be no Trainer(accelerator='abacus', precision=",
    ("none", "--precision=31"): "There can be no Trainer(accelerator='auto', precision='31'",
    ("none", "--model.width"): "--model.width needs a value.",
    (
        "one",
        "",
    ): "holds checkpoints of one step only (1). LCA is measured from one step to",
    ("mixed", ""): "are both of step 1, and hold different weights. Move away the one that is",
    ("untrusted", ""): "Stranger), which could run any code when it is loaded. If you trust where",
    ("measured", ""): "was measured with quadrature='midpoint', and now quadrature='simpson' is",
    ("gone", ""): "ends at step 12, of which there is no checkpoint any more, so that it cannot",
    ("none", "nowhere"): "nowhere does not exist. Give the directory of a run's checkpoints",
    ("none", "{runs}/empty"): "empty holds no checkpoint (*.ckpt). Save some while training, e.g.",
}


@pytest.mark.parametrize(("what", "option"), MISTAKES, ids=lambda value: value or "-")
def test_mistakes_are_told_in_one_line(runs, capsys, what, option):
    spoil(runs / "a" / "checkpoints", what)
    (runs / "empty").mkdir()
    option = [option.format(runs=runs)] if option else []
    arguments = [*NAMES, *option] if option[:1] and option[0][0] == "-" else [*option, *NAMES]
    status, err = run(runs / "a", *arguments, capsys=capsys)
    assert MISTAKES[what, "".join(option).replace(str(runs), "{runs}")] in err
    assert (status, len(err.splitlines())) == (2, 1)
    assert err.startswith("lightning-lca: ")


def test_a_module_that_cannot_be_imported_says_why(runs, tmp_path, monkeypatch, capsys):
    (tmp_path / "unimportable.py").write_text('raise RuntimeError("on purpose")')
    monkeypatch.chdir(tmp_path)
    status, err = run(runs / "a", "--model", "unimportable.Net", capsys=capsys)
    assert status == 2
    assert "--model unimportable.Net: importing unimportable fails with RuntimeError: on pur" in err


@pytest.mark.filterwarnings("ignore:.*Total length of")
def test_data_that_is_too_little_is_told(runs):
    with pytest.raises(ReplayError, match="data of training end before the probe has as many batc"):
        replay(runs / "a", Net, Once, probe_batches=1000)
    nothing = lambda: torch.utils.data.DataLoader([], 16)  # noqa: E731
    with pytest.raises(ReplayError, match="The training data has no batch"):
        replay(runs / "b", Net, nothing, probe=replayed.BATCHES)


def test_a_checkpoint_that_changes_meanwhile_is_told(runs, monkeypatch):
    found = player.read

    def later(path, **arguments):
        content = found(path, **arguments)
        return content | {"global_step": content["global_step"] + 100}

    monkeypatch.setattr(player, "read", later)
    with pytest.raises(ReplayError, match=r"was of step 0 and is now of step 100: training goes"):
        replay(runs / "a", Net, probe=replayed.BATCHES)


def test_a_run_that_fails_does_not_stop_the_others(runs, capsys):
    spoil(runs / "a" / "checkpoints", "one")
    status, err = run(runs, *NAMES, capsys=capsys)
    assert status == 2
    assert "1 of 2 runs could not be replayed; the first: " in err.splitlines()[-1]
    assert len(History.load(runs / "b" / RECORD)) == STEPS


def test_what_needs_trust_is_loaded_where_it_is_given(runs, capsys):
    for path in (runs / "b" / "checkpoints").iterdir():  # As by older Lightnings.
        torch.save(content_of(path) | {"callbacks": {"dirpath": path}}, path)
    assert run(runs / "b", *NAMES, capsys=capsys)[0] == 0
    spoil(runs / "a" / "checkpoints", "untrusted")
    status, _ = run(runs / "a", *NAMES, "--no_weights_only", capsys=capsys)
    assert status == 0
    assert "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD" not in os.environ


def test_arguments_of_model_and_data_are_typed_as_for_lightning_cli(tmp_path, capsys):
    live = train(tmp_path, Net(width=7), Data(batch_size=24))
    for path in (tmp_path / "checkpoints").iterdir():
        content = content_of(path)
        torch.save({k: v for k, v in content.items() if "hyper" not in k}, path)
    names = ("--model", "scripts.replayed.Net", "--data", "scripts.replayed.Data")
    given = ("--model.width", "7", "--data.batch_size=24")
    status, _ = run(tmp_path, *names, *given, "--log_every_n_steps", "4", capsys=capsys)
    assert status == 0
    assert_same(History.load(tmp_path / RECORD), History.load(live.log_dir))


@pytest.mark.parametrize("subclass", [True, False])
@pytest.mark.filterwarnings("ignore")
def test_checkpoints_of_lightning_cli_know_how_the_model_is_built(
    tmp_path, monkeypatch, capsys, subclass
):
    monkeypatch.chdir(tmp_path)
    classes = () if subclass else (Net, Data)
    names = ("--model=scripts.replayed.Net", "--data=scripts.replayed.Data")
    asked = ("max_steps=6", "accelerator=cpu", "enable_progress_bar=false", "logger=false")
    asked += ("callbacks+=ModelCheckpoint", "callbacks.every_n_train_steps=2")
    asked += ("callbacks.save_top_k=-1", "enable_model_summary=false")
    given = ("--model.width=9", "--data.batch_size=24", *(f"--trainer.{a}" for a in asked))
    arguments = ["fit", *(names if subclass else ()), *given]
    importlib.import_module(f"{pl.__name__}.cli").LightningCLI(*classes, args=arguments)
    assert run(".", *names, capsys=capsys)[0] == 0
    history = History.load(RECORD)
    assert history.steps.tolist() == [4, 6]
    assert history.sizes[0] == 9


def test_weights_that_round_or_move_unseen_are_warned_of(tmp_path):
    train(tmp_path, Net(), Data(), precision="64-true")
    with pytest.warns(UserWarning, match=r"hold torch.float64 and are replayed in torch.float32"):
        replay(tmp_path, Net, Data)

    def frozen():
        net = Net().double()
        net.head.requires_grad_(False)
        return net

    with pytest.warns(UserWarning, match="LCA: 68 weights that Net freezes moved from the first"):
        (history,) = replay(
            tmp_path, frozen, Data, precision="64-true", out=tmp_path / "frozen"
        ).values()
    assert np.abs(history.drift).max() > 0


def test_no_step_is_taken_and_nothing_outside_is_touched(runs, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("called in a replay")

    for hook in ("on_train_end", "on_fit_end", "on_train_batch_start", "configure_callbacks"):
        monkeypatch.setattr(Net, hook, never)
    monkeypatch.setattr(torch.optim.SGD, "step", never)
    states = torch.random.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    saved = {p: p.read_bytes() for p in (runs / "a" / "checkpoints").iterdir()}
    level = logging.getLogger(pl.__name__).level
    replay(runs / "a", Net, Data)
    assert torch.equal(torch.random.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert random.getstate() == states[2]
    assert {p: p.read_bytes() for p in (runs / "a" / "checkpoints").iterdir()} == saved
    assert logging.getLogger(pl.__name__).level == level
    assert {p.name for p in (runs / "a").iterdir()} == {"checkpoints", RECORD}
