"""The command ``lightning-lca replay``: import paths and typed values to a call of `replay`."""

from __future__ import annotations

import argparse
import ast
import difflib
import importlib
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_lca.cli.terminal import InputError, say
from lightning_lca.runtime.nursery import Nursery

_EPILOG = """\
example:
  lightning-lca replay lightning_logs --model mypackage.models.Net --data mypackage.data.Data

The class of the model gets its hyperparameters from the checkpoint (save_hyperparameters), unless
they are given, as --model.width 64. Options are those of LCACallback and of the Trainer.

Several processes measure with --workers N, or on several machines that see the same files:
  torchrun --nnodes 2 --nproc-per-node 4 ... -m lightning_lca replay ...
One record is written, the same as by one process.
"""
_GIVEN = re.compile(r"--(model|data)\.(\w+)(?:=(.*))?", re.DOTALL)
_PASSED_ON = (
    *("probe_batches", "probe_mode", "every_n_steps", "quadrature", "tolerance", "max_splits"),
    *("include", "exclude", "log_every_n_steps", "seed", "neurons", "track_parameters", "figures"),
    "oscillation",
)


def add_to(commands: Any) -> None:
    """Adds the command to a parser's commands."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "replay",
        help="measure between the saved checkpoints of runs",
        description="Loss Change Allocation from each saved checkpoint of a run to the next.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    option = parser.add_argument
    option(
        "runs",
        type=Path,
        nargs="+",
        metavar="RUN",
        help="directory with the checkpoints of a run, or of several; or checkpoint files",
    )
    path = "package.module.NAME"
    option("--model", required=True, metavar=path, help="LightningModule, or function giving one")
    option("--data", metavar=path, help="LightningDataModule, or function giving one or loaders")
    # For --help only: `given` takes them out before.
    for name in ("model", "data"):
        option(f"--{name}.ARGUMENT", dest="_", metavar="VALUE", help=f"what the {name} is built of")
    option("--out", type=Path, metavar="DIR", help="of all records (each beside its checkpoints)")
    option(
        "--probe",
        action="append",
        metavar=f"train|val|{path}",
        help="where the loss is measured (train); may be given several times",
    )
    option("--loss_fn", metavar=path, help="function (module, batch) -> scalar (training_step)")
    option("--probe_batches", type=int, default=1, metavar="N", help="drawn of train or val (1)")
    option("--probe_mode", default="no_dropout", metavar="MODE", help="no_dropout, eval or train")
    option("--every_n_steps", type=int, default=1, metavar="N", help="least steps of a segment (1)")
    option("--quadrature", default="simpson", metavar="RULE", help="simpson, midpoint, ...")
    option("--tolerance", type=float, metavar="LOSS", help="largest residual of a segment")
    option("--max_splits", type=int, default=32, metavar="N", help="most panels of a segment (32)")
    option(
        "--group_by",
        default="layer",
        metavar="WHAT",
        help="layer, parameter, neuron, head, module:2 (depth), or package.module.function",
    )
    names = "pattern of parameters' or modules' names; may be given several times"
    option("--include", action="append", metavar="PATTERN", help=f"what is measured: {names}")
    option("--exclude", action="append", metavar="PATTERN", help="what is left out of that")
    option("--log_every_n_steps", type=int, metavar="N", help="interval of scalars (50)")
    option("--seed", type=int, default=0, metavar="N", help="of the probe (0)")
    option("--neurons", action="store_true", help="keep the credit of every channel")
    option(
        "--breakdown",
        action="append",
        default=[],
        metavar="WHAT",
        help='split credit by "order" or "term"; may be given several times',
    )
    option("--oscillation", action="store_true", help="note how weights turn round")
    option("--track_parameters", action="store_true", help="follow a sample of single weights")
    option("--no_figures", dest="figures", action="store_false", help="draw no figures")
    option("--accelerator", default="auto", metavar="NAME", help="as the Trainer's (auto)")
    option("--precision", default="32-true", metavar="P", help="as the Trainer's (32-true)")
    option("--workers", type=int, default=1, metavar="N", help="processes that measure (1)")
    option("--threads", type=int, metavar="N", help="of each (those of torch, shared out)")
    option(
        "--no_weights_only",
        dest="weights_only",
        action="store_false",
        help="load checkpoints that could run code; only if you trust them",
    )
    parser.set_defaults(run=_run)


def given(arguments: Sequence[str]) -> tuple[list[str], dict[str, dict[str, Any]]]:
    """Takes out what models and data are built of: --model.width 64 and so on.

    Example:
        >>> given(["replay", "--model.width", "64", "runs", "--data.dims=[2, 3]"])
        (['replay', 'runs'], {'model': {'width': 64}, 'data': {'dims': [2, 3]}})
    """
    left: list[str] = []
    found: dict[str, dict[str, Any]] = {}
    rest = iter(arguments)
    for argument in rest:
        match = _GIVEN.fullmatch(argument)
        if match is None:
            left.append(argument)
            continue
        value = match[3] if match[3] is not None else next(rest, None)
        if value is None:
            raise InputError(f"{argument} needs a value.")
        found.setdefault(match[1], {})[match[2]] = _value(value)
    return left, found


def _run(typed: argparse.Namespace) -> None:
    sys.path.insert(0, "")  # Where the user is, as with `python -m`.
    if typed.workers > 1:  # Theirs are imported while this process imports its own.
        Nursery()
    model = resolve(typed.model, "--model")
    data = typed.data and resolve(typed.data, "--data")
    if typed.given.get("data") and not callable(data):
        raise InputError("--data.ARGUMENT needs --data, which names a class or function.")
    for name in ("workers", "threads"):
        if (count := getattr(typed, name)) is not None and count < 1:
            raise InputError(f"--{name} must be at least 1, got {count}.")
    options = {name: getattr(typed, name) for name in _PASSED_ON}
    options["group_by"] = _grouping(typed.group_by)
    options["breakdown"] = typed.breakdown
    options["loss_fn"] = typed.loss_fn and resolve(typed.loss_fn, "--loss_fn")
    options["probe"] = _probe(typed.probe or ["train"])
    from lightning_lca.replay.checkpoints import ReplayError
    from lightning_lca.replay.runs import replay, to_tell
    from lightning_lca.training.callback import LCACallback

    try:
        LCACallback(**options | {"breakdown": to_tell(typed.breakdown, True)})
    except (ValueError, TypeError) as error:
        raise InputError(str(error)) from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default", UserWarning)
            warnings.showwarning = lambda message, *_, **__: say(f"lightning-lca: {message}")
            histories = replay(
                typed.runs,
                model,
                data,
                out=typed.out,
                model_arguments=typed.given.get("model"),
                data_arguments=typed.given.get("data"),
                accelerator=typed.accelerator,
                precision=typed.precision,
                weights_only=typed.weights_only,
                workers=typed.workers,
                threads=typed.threads,
                **options,
            )
    except ReplayError as error:
        raise InputError(str(error)) from error
    except KeyboardInterrupt:
        say("Interrupted. Run the same command again to go on.")
        raise
    for record, history in histories.items():
        say(f"{len(history)} segments are in {record}.")


def _grouping(name: str) -> Any:
    """Returns the argument ``group_by`` of `LCACallback`: no name of a grouping has a dot."""
    return resolve(name, "--group_by") if "." in name else name


def _probe(names: Sequence[str]) -> Any:
    """Returns the argument ``probe`` of `LCACallback`."""
    sources = {}
    for name in names:
        source: Any = name
        if name not in ("train", "val"):
            source = resolve(name, "--probe")
            source = source() if callable(source) else source
        sources[name.rpartition(".")[2]] = source
    if len(sources) < len(names):
        raise InputError(f"Several probes need different names, got {', '.join(names)}.")
    return sources if len(sources) > 1 else next(iter(sources.values()))


def resolve(path: str, option: str) -> Any:
    """Imports what a path such as ``package.module.Class`` names.

    Raises:
        InputError: There is no such thing, or importing it fails.
    """
    home, _, name = path.rpartition(".")
    if not home or not name:
        raise InputError(f"{option} takes an import path, package.module.Name; got {path!r}.")
    try:
        module = importlib.import_module(home)
    except ModuleNotFoundError as error:
        raise InputError(
            f"{option} {path}: there is no module {error.name!r} here. Run this in the directory "
            "that holds it, or install it."
        ) from error
    except Exception as error:
        raise InputError(
            f"{option} {path}: importing {home} fails with {type(error).__name__}: {error}"
        ) from error
    if not hasattr(module, name):
        near = difflib.get_close_matches(name, vars(module), n=1)
        meant = f"; did you mean {near[0]}?" if near else "."
        raise InputError(f"{option} {path}: {home} has no {name!r}{meant}")
    return getattr(module, name)


def _value(text: str) -> Any:
    """Reads a typed value: a Python literal, or YAML as in a config of LightningCLI.

    Example:
        >>> [_value(text) for text in ("1e-3", "[64, 64]", "true", "null", "adam")]
        [0.001, [64, 64], True, None, 'adam']
    """
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        pass
    import yaml  # Lightning brings it.

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text
