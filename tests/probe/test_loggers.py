"""Stand-ins for loggers, beside the loggers themselves: the same answers, and nothing written."""

from __future__ import annotations

import os

import pytest
import torch
from support.models import pl
from support.training import make_trainer

from lightning_lca.probe.loggers import silent

Logger = pl.loggers.logger.Logger


class Own(Logger):
    """A user's logger: its name is a property, its rows a list, its file a slot."""

    __slots__ = ("file",)

    def __init__(self, path):
        super().__init__()
        self.rows, self.path, self.file = [], path, str(path / "own.txt")

    @property
    def name(self):
        return "own"

    @property
    def version(self):
        return len(self.rows)

    @property
    def save_dir(self):
        return str(self.path)

    @property
    def experiment(self):
        return self

    def log_metrics(self, metrics, step=None):
        self.rows.append(metrics)

    def log_hyperparams(self, *args, **kwargs):
        self.rows.append("hyperparameters")

    def log_images(self, key, images):
        self.rows.append(key)

    def remember(self, value):
        """Is no name that says that it writes."""
        self.rows.append(value)
        return len(self.rows)


class Frozen(Logger):
    """Its name and version are attributes of its class; it has no directory."""

    name, version = "frozen", 3

    def log_metrics(self, metrics, step=None):
        raise AssertionError

    log_hyperparams = log_metrics


def csv(path):
    return pl.loggers.CSVLogger(path, name="a", flush_logs_every_n_steps=1)


def tensorboard(path):
    return pl.loggers.TensorBoardLogger(path, name="b", sub_dir="sub", default_hp_metric=False)


def mlflow(path):
    pytest.importorskip("mlflow")
    return pl.loggers.MLFlowLogger("c", save_dir=str(path))


def wandb(path):
    pytest.importorskip("wandb")
    return pl.loggers.WandbLogger("d", save_dir=path, offline=True)


MAKE = {
    "CSVLogger": csv,
    "TensorBoardLogger": tensorboard,
    "of the user": Own,
    "without a directory": lambda path: Frozen(),
    "MLFlowLogger": mlflow,
    "WandbLogger": wandb,
    "DummyLogger": lambda path: pl.loggers.logger.DummyLogger(),
}


@pytest.fixture(params=MAKE)
def logger(request, tmp_path):
    return MAKE[request.param](tmp_path)


def files(path):
    return sorted(
        os.path.join(*p) for at, _, names in os.walk(path) for p in [(at, n) for n in names]
    )


def directories(path):
    return sorted(at for at, _, _ in os.walk(path))


ANSWERS = ("name", "version", "save_dir", "log_dir", "root_dir", "group_separator")


def test_a_stand_in_answers_as_its_logger_does(logger):
    (quiet,) = silent([logger])
    for name in ANSWERS:
        assert getattr(quiet, name, "none") == getattr(logger, name, "none"), name
    assert isinstance(quiet, type(logger))
    assert type(quiet).__name__ == type(logger).__name__
    assert quiet is not logger


def test_a_stand_in_writes_nothing(logger, tmp_path):
    before = files(tmp_path), directories(tmp_path), dict(vars(logger))
    rows = list(vars(logger).get("rows", ()))
    (quiet,) = silent([logger])
    quiet.log_metrics({"a": 1.0}, step=1)
    quiet.log_hyperparams({"rate": 0.1})
    quiet.log_graph(torch.nn.Linear(1, 1))
    quiet.after_save_checkpoint(None)
    quiet.save()
    quiet.finalize("success")
    for name in ("log_image", "log_images", "log_text", "log_table", "watch"):
        if hasattr(quiet, name):
            getattr(quiet, name)("key", [torch.zeros(1)])
    quiet.experiment.add_scalar("a", 1.0, 1)
    quiet.experiment.config.update({"a": 1}).more[0] = 2
    quiet.experiment["a"].append(1)
    with quiet.experiment.start_run() as run:
        run.log({"a": 1})
    assert (files(tmp_path), directories(tmp_path), dict(vars(logger))) == before
    assert list(vars(logger).get("rows", ())) == rows


def test_what_has_no_telling_name_adds_to_the_stand_in_alone(tmp_path):
    logger = Own(tmp_path)
    (quiet,) = silent([logger])
    assert quiet.remember(1) == 1
    assert quiet.experiment.remember(2) is not None
    assert (logger.rows, quiet.file) == ([], logger.file)


def test_setting_an_attribute_of_a_stand_in_leaves_the_logger(tmp_path):
    logger = Own(tmp_path)
    (quiet,) = silent([logger])
    quiet.note, quiet.version, quiet.file = 1, 7, "other"
    assert (hasattr(logger, "note"), logger.version, logger.file) == (
        False,
        0,
        quiet.path.__str__() + "/own.txt",
    )


@pytest.mark.parametrize("make", [csv, tensorboard, Own])
def test_the_directory_of_a_trainer_is_what_training_sees(tmp_path, make):
    logger = make(tmp_path)
    trainer = make_trainer(tmp_path, logger=logger)
    log_dir, before = trainer.log_dir, directories(tmp_path)
    trainer.loggers = silent(trainer.loggers)
    assert trainer.log_dir == log_dir
    assert trainer.logger.experiment.anything() is not None
    assert directories(tmp_path) == before


def test_loggers_go_on_after_their_stand_ins(tmp_path):
    logger = csv(tmp_path)
    (quiet,) = silent([logger])
    quiet.log_metrics({"a": 9.0}, step=1)
    logger.log_metrics({"a": 1.0}, step=2)
    logger.save()
    (path,) = (p for p in files(tmp_path) if p.endswith("metrics.csv"))
    with open(path) as file:
        assert "9.0" not in file.read()


def test_no_loggers_have_no_stand_ins():
    assert silent([]) == []
