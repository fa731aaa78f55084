"""What a person runs on a finished or running log directory: ``python -m lightning_lca``."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import lightning_lca
from lightning_lca.cli import replay as replay_command
from lightning_lca.cli.terminal import InputError, say
from lightning_lca.record import export
from lightning_lca.record.history import History
from lightning_lca.record.progress import counted
from lightning_lca.record.reader import Reader, places
from lightning_lca.record.summary import together


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; gives the exit status: 0, 2 for wrong input, 130 if it was interrupted."""
    parser = _parser()
    typed = list(sys.argv[1:] if arguments is None else arguments)
    try:
        given: dict[str, dict[str, Any]] = {}
        if typed[:1] == ["replay"]:
            typed, given = replay_command.given(typed)
        options = parser.parse_args(typed, argparse.Namespace(given=given))
        options.run(options)
    except InputError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # As by `| head`.
        sys.stderr.close()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightning-lca",
        description="Loss Change Allocation of training runs, from their log directories.",
    )
    version = f"%(prog)s {lightning_lca.__version__}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    summary = commands.add_parser("summary", help="print the table and ledger of every run")
    _takes_runs(summary)
    summary.add_argument(
        "--all", action="store_true", help="a row for every layer, also where there are many"
    )
    summary.set_defaults(run=_summary)

    figures = commands.add_parser("figures", help="draw every figure as a PNG file")
    _takes_runs(figures)
    figures.add_argument("--out", type=Path, required=True, metavar="DIR", help="where to put them")
    figures.add_argument("--dpi", type=int, default=150, help="dots per inch (150)")
    figures.set_defaults(run=_figures)

    table = commands.add_parser("export", help="write one run's record as a table")
    _takes_runs(table)
    table.add_argument(
        "--to",
        type=Path,
        required=True,
        metavar="FILE",
        help="a .csv or .parquet file: one row per step; .npz: all arrays, windows included",
    )
    table.add_argument("--long", action="store_true", help="one row per step and layer")
    table.set_defaults(run=_export)

    replay_command.add_to(commands)

    demo = commands.add_parser("demo", help="train a small network for a few seconds to look at")
    demo.add_argument(
        "--out",
        type=Path,
        default=Path("lca_demo"),
        metavar="DIR",
        help="where its log directory is made (lca_demo)",
    )
    demo.add_argument(
        "--steps", type=int, metavar="N", help="optimizer steps; findings need 50 (300)"
    )
    demo.set_defaults(run=_demo)
    return parser


def _takes_runs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("logdir", type=Path, metavar="LOGDIR", help="of a run, or of several runs")
    parser.add_argument("--probe", help="which probe, where several were measured (all, or first)")


def _summary(options: argparse.Namespace) -> None:
    runs = _runs(options.logdir)
    several = len(runs) > 1
    for i, (name, reader) in enumerate(runs.items()):
        for probe, history in _histories(reader, options.probe, name).items():
            title = " ".join([name] * several + [f"probe {probe!r}"] * (len(reader.histories) > 1))
            print("\n" * (i > 0) + (f"{title}\n" if title else "") + history.summary(options.all))
        if options.probe is None and (told := together(reader.histories)):
            print(f"\n{told}")


def _figures(options: argparse.Namespace) -> None:
    from lightning_lca import figures

    if options.dpi < 10:
        raise InputError(f"--dpi must be at least 10, got {options.dpi}.")
    runs = _runs(options.logdir)
    for name, reader in runs.items():
        histories = _histories(reader, options.probe, name)
        for probe, history in histories.items():
            if not len(history):
                say(f"{name or options.logdir}: no step was measured yet, nothing to draw.")
                continue
            directory = options.out / name if len(runs) > 1 else options.out
            directory = directory / _as_file(probe) if len(histories) > 1 else directory
            directory.mkdir(parents=True, exist_ok=True)
            drawn: dict[str, Callable[[], Any]] = {}
            for file, draw in figures.available(history).items():
                drawn[file] = partial(draw, history)
            if probe == "val":
                drawn |= figures.between(histories)
            for file, make in counted([*drawn.items()], "figure", "drawing"):
                path = directory / f"{file.replace('/', '_')}.png"
                try:
                    with np.errstate(all="ignore"):  # Numbers that are not finite leave gaps.
                        make().savefig(path, dpi=options.dpi)
                except OSError as error:
                    why = error.strerror or error
                    raise InputError(f"{path} cannot be written: {why}.") from error
                except Exception as error:  # One figure never takes the others along.
                    say(f"{path} cannot be drawn: {type(error).__name__}: {error}.")
            say(f"Figures are in {directory}.")


def _export(options: argparse.Namespace) -> None:
    suffix = options.to.suffix.lower()
    if suffix not in export.FORMATS:
        raise InputError(f"--to must end in {', '.join(export.FORMATS)}; got {options.to.name!r}.")
    if suffix == ".npz" and options.long:
        raise InputError("--long is for .csv and .parquet; .npz holds arrays.")
    runs = _runs(options.logdir)
    if len(runs) > 1:
        raise InputError(
            f"{options.logdir} holds {len(runs)} runs ({_some(runs)}). Give the directory of one."
        )
    ((name, reader),) = runs.items()
    history = next(iter(_histories(reader, options.probe, name).values()))
    try:
        options.to.parent.mkdir(parents=True, exist_ok=True)
        if suffix == ".npz":
            np.savez_compressed(options.to, **export.arrays(history))  # type: ignore[arg-type]
        else:
            columns = export.long(history) if options.long else export.wide(history)
            parts = counted([*export.blocks(columns)], "block", "writing")
            if suffix == ".csv":
                export.write_csv(options.to, columns, parts)
            else:
                export.write_parquet(options.to, parts)
    except ModuleNotFoundError as error:
        raise InputError(
            f"Parquet needs pyarrow ({error}). Run: pip install pyarrow, or choose a .csv file."
        ) from error
    except OSError as error:
        raise InputError(f"{options.to} cannot be written: {error.strerror or error}.") from error
    say(f"{len(history)} measured steps are in {options.to}.")


def _demo(options: argparse.Namespace) -> None:
    from lightning_lca.cli import demo

    steps = demo.STEPS if options.steps is None else options.steps
    if steps < 1:
        raise InputError(f"--steps must be at least 1, got {steps}.")
    say(f"Trains a small network for {steps} steps, and measures each of them.")
    lca = demo.train(options.out, steps=steps)
    print(lca.history.summary())
    print(f"\nNow run:  tensorboard --logdir {shlex.quote(str(options.out))}")
    print("and open its LCA tab.")


def _runs(logdir: Path) -> dict[str, Reader]:
    """Reads the runs in a directory and below it, {relative path: what was read}."""
    if not logdir.is_dir():
        what = "is a file" if logdir.exists() else "does not exist"
        raise InputError(
            f"{logdir} {what}. Give a run's log directory, e.g. lightning_logs/version_0."
        )
    runs: dict[str, Reader] = {}
    damaged = []
    for directory in places(logdir):
        try:
            reader = Reader.of(directory)
        except FileNotFoundError as error:
            if "damaged" in str(error):
                damaged.append(str(error))
            continue
        name = directory.relative_to(logdir).as_posix()
        runs["" if name == "." else name] = reader
        if reader.lost:
            say(
                f"{directory}: {_pieces(reader.lost)} of the record could not be read (cut off or "
                "damaged). The steps in there are missing in what follows."
                + (f" First: {reader.problems[0]}" if reader.problems else "")
            )
    for message in damaged:
        say(message)
    if not runs:
        raise InputError(
            f"{logdir} holds no LCA record that can be read. Give the directory that a run with "
            "LCACallback logged to, e.g. lightning_logs/version_0, or one above it."
        )
    return runs


def _histories(reader: Reader, probe: str | None, name: str) -> dict[str, History]:
    """Picks a run's histories, {probe: history}; all of them if no probe was named."""
    if probe is None:
        return reader.histories
    if probe not in reader.histories:
        there = ", ".join(map(repr, filter(None, reader.histories))) or "a single one, unnamed"
        raise InputError(f"No probe {probe!r}{f' in {name}' if name else ''}; there is {there}.")
    return {probe: reader.histories[probe]}


def _as_file(name: str) -> str:
    """Makes a name that stays within its directory."""
    return re.sub(r"[^\w.-]", "_", name).lstrip(".")[:100] or "_"


def _pieces(count: int) -> str:
    return "1 piece" if count == 1 else f"{count} pieces"


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
