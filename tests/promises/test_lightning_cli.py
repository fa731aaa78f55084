"""LightningCLI: every argument from the command line, from a config file, and from a saved one."""

import importlib
import inspect
import json
import re
import sys

import numpy as np
import pytest
import torch.nn.functional as F
from support.models import LIGHTNING, Validated, pl, toy_loader

from lightning_lca import History, LCACallback, Quadrature

cli = importlib.import_module(f"{LIGHTNING}.cli")
DEFAULTS = {
    "accelerator": "cpu",
    "max_steps": 6,
    "num_sanity_val_steps": 0,
    "limit_val_batches": 1,
    "log_every_n_steps": 2,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
LOSS = f"{__name__}.mean_squares"
LABEL = f"{__name__}.kind_of_weight"
RULE = {"name": "thirds", "nodes": [0.25, 0.75], "weights": [0.5, 0.5], "degree": 1}

# What is typed for every argument, and what it means to Python.
CASES = {
    "probe": [("val", "val"), ("{fit: train, held_out: val}", {"fit": "train", "held_out": "val"})],
    "probe_batches": [("3", 3)],
    "probe_mode": [("eval", "eval"), ("train", "train")],
    "loss_fn": [(LOSS, "mean_squares")],
    "every_n_steps": [("4", 4)],
    "max_overhead": [("0.25", 0.25)],
    "segments": [("step", "step")],
    "quadrature": [("boole", "boole"), (json.dumps(RULE), RULE)],
    "tolerance": [("1e-3", 1e-3), ("0.5", 0.5)],
    "max_splits": [("8", 8)],
    "group_by": [
        ("parameter", "parameter"),
        ("neuron", "neuron"),
        ("module:2", "module:2"),
        ("head", "head"),
        (LABEL, "kind_of_weight"),
    ],
    "include": [("net.0", ("net.0",)), ("[net.0, '*.bias']", ("net.0", "*.bias"))],
    "exclude": [("net.*.bias", ("net.*.bias",)), ("[net.2, 'net.4.*']", ("net.2", "net.4.*"))],
    "log_every_n_steps": [("7", 7)],
    "seed": [("5", 5)],
    "track_parameters": [("true", True)],
    "neurons": [("true", True)],
    "figures": [("false", False)],
    "custom_scalars": [("true", True)],
    "live": [("true", True)],
    "breakdown": [("true", ("part", "order")), ("order", ("order",)), ("[part]", ("part",))],
    "oscillation": [("true", True)],
}
EVERY = [(name, *case) for name, cases in CASES.items() for case in cases]


def mean_squares(module, batch):
    """A loss that a user names by its import path."""
    x, y = batch
    return F.mse_loss(module.net(x), F.one_hot(y, 4).float())


def kind_of_weight(name, parameter):
    """A grouping that a user names by its import path."""
    return "biases" if parameter.dim() == 1 else "matrices"


class Net(Validated):
    """A module that the command line can build."""

    def __init__(self):
        super().__init__()


class Data(pl.LightningDataModule):
    def train_dataloader(self):
        return toy_loader()

    def val_dataloader(self):
        return toy_loader(samples=40, shuffle=False)


class OwnSection(cli.LightningCLI):
    """The other way that Lightning documents: the callback is always there, as ``--lca``."""

    def add_arguments_to_parser(self, parser):
        parser.add_lightning_class_args(LCACallback, "lca")


@pytest.fixture(autouse=True)
def _no_other_command_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning's use of it.


BY_PATH = "--trainer.callbacks=lightning_lca.LCACallback"


def run(*typed, kind=cli.LightningCLI, path=None, fit=False):
    """Runs what is typed after the script's name; gives the callback that came of it."""
    defaults = DEFAULTS | {"default_root_dir": str(path), "logger": False}
    made = kind(
        Net,
        Data,
        seed_everything_default=3,
        trainer_defaults=defaults,
        args=["fit", *typed] if fit else [*typed],
        run=fit,
    )
    return next(c for c in made.trainer.callbacks if isinstance(c, LCACallback))


def meant(name, value):
    """Builds the same callback in Python."""
    if value in ("mean_squares", "kind_of_weight"):
        value = getattr(importlib.import_module(__name__), value)
    if isinstance(value, dict) and name == "quadrature":
        rule = {k: tuple(v) if isinstance(v, list) else v for k, v in value.items()}
        value = Quadrature(**rule)
    return LCACallback(**{name: value})


def test_every_argument_has_a_case_here():
    arguments = set(inspect.signature(LCACallback.__init__).parameters) - {"self"}
    new, gone = arguments - CASES.keys(), CASES.keys() - arguments
    assert not new, (
        f"LCACallback takes {sorted(new)}, which this file never types on a command line: add to "
        "CASES what a user types and what it means."
    )
    assert not gone, f"LCACallback no longer takes {sorted(gone)}: take it out of CASES."


@pytest.mark.slow
@pytest.mark.parametrize(("name", "typed", "value"), EVERY)
def test_an_argument_typed_on_the_command_line_means_what_it_means_in_python(name, typed, value):
    expected = meant(name, value)._settings
    assert expected != LCACallback()._settings, "a case that types the default shows nothing"
    one = run(
        "--trainer.callbacks=lightning_lca.LCACallback", f"--trainer.callbacks.{name}={typed}"
    )
    two = run(f"--lca.{name}={typed}", kind=OwnSection)
    assert one._settings == two._settings == expected


@pytest.mark.slow
@pytest.mark.parametrize(("name", "typed", "value"), EVERY)
def test_an_argument_written_in_yaml_means_what_it_means_in_python(tmp_path, name, typed, value):
    file = tmp_path / "config.yaml"
    file.write_text(
        "trainer:\n  callbacks:\n    - class_path: lightning_lca.LCACallback\n"
        f"      init_args:\n        {name}: {typed}\n"
    )
    assert run(f"--config={file}")._settings == meant(name, value)._settings


ALL = {name: cases[-1][0] for name, cases in CASES.items()}
ALL |= {"quadrature": "simpson", "every_n_steps": "1", "group_by": "layer", "probe_mode": "eval"}
ALL |= {"segments": "batch", "include": "[net.0, net.2]"}
del ALL["max_overhead"]  # It goes by the clock.


def test_the_config_that_the_cli_saves_repeats_the_run(tmp_path):
    typed = [f"--trainer.callbacks.{name}={text}" for name, text in ALL.items()]
    first = run(BY_PATH, *typed, path=tmp_path / "a", fit=True)
    saved = tmp_path / "a" / "config.yaml"
    assert LOSS in saved.read_text()
    again = run(
        f"--config={saved}", f"--trainer.default_root_dir={tmp_path / 'b'}", path=None, fit=True
    )
    assert first._settings == again._settings
    assert first.log_dir != again.log_dir
    for probe in ("fit", "held_out"):
        one, two = (History.load(lca.log_dir, probe) for lca in (first, again))
        assert len(one) == 6
        for column in ("steps", "allocated", "loss_before", "loss_after", "residual", "splits"):
            assert np.array_equal(getattr(one, column), getattr(two, column)), column
        assert one.windows.keys() == two.windows.keys() == {"parameters", "neurons", "weights"}
        for name, window in one.windows.items():
            assert np.array_equal(window.allocated, two.windows[name].allocated)


@pytest.mark.parametrize(
    ("name", "typed", "message"),
    [
        ("probe", "test", "probe must be one of 'train', 'val'; got 'test'."),
        (
            "probe",
            "{a: 3}",
            'probe \'a\' must be "train", "val", a DataLoader or a list of',
        ),
        (
            "probe",
            "[train, val]",
            'Several probes go by name, probe={"train": "train", "val": "val"}.',
        ),
        ("every_n_steps", "0", "every_n_steps must be at least 1, got 0."),
        ("tolerance", "-1", "tolerance must be a positive number in loss units"),
        # These jsonargparse refuses by their types, in its own words.
        ("quadrature", "simson", "quadrature.*'euler', 'midpoint', .*Given value: simson"),
        ("probe_mode", "test", "probe_mode.*'no_dropout', 'eval', 'train'.*Got value: test"),
        ("group_by", "unit", "group_by must be one of 'parameter', 'layer', 'neuron', 'head'"),
        ("include", "[]", "include is empty: got no pattern. Leave it out (include=None)"),
        ("every_n_steps", "2.5", "every_n_steps.*int.*Got value: 2.5"),
        ("loss_fn", f"{__name__}.nothing", "loss_fn.*has no attribute 'nothing'"),
        ("figures", "perhaps", "figures.*bool.*Got value: perhaps"),
    ],
)
def test_what_is_typed_wrong_is_said_in_one_message(capsys, name, typed, message):
    with pytest.raises((SystemExit, ValueError, TypeError)) as raised:
        run(BY_PATH, f"--trainer.callbacks.{name}={typed}")
    said = " ".join((capsys.readouterr().err + str(raised.value)).split())
    assert re.search(message if ".*" in message else re.escape(message), said), said


def descriptions():
    """Reads {argument: what the docstring says of it}, without line breaks."""
    text = inspect.getdoc(LCACallback).partition("Args:\n")[2].partition("\n\n")[0]
    found = re.findall(r"^    (\w+): (.*(?:\n     .*)*)", text, re.MULTILINE)
    return {name: " ".join(said.split()) for name, said in found}


@pytest.mark.parametrize(
    ("kind", "asked", "prefix"),
    [
        (
            cli.LightningCLI,
            "--trainer.callbacks.help=lightning_lca.LCACallback",
            "trainer.callbacks",
        ),
        (OwnSection, "--help", "lca"),
    ],
    ids=["by class path", "own section"],
)
def test_help_tells_of_every_argument_what_the_docstring_does(capsys, kind, asked, prefix):
    with pytest.raises(SystemExit):
        run(asked, kind=kind, fit=True)
    said = "".join(capsys.readouterr().out.split())  # Lines are broken at hyphens, too.
    told = descriptions()
    assert told.keys() == CASES.keys()
    for name, text in told.items():
        assert f"--{prefix}.{name}" in said
        assert "".join(text.split()) in said, name
