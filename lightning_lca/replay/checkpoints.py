"""Checkpoints on disk: which belong to a run, in which order, and what is in one."""

from __future__ import annotations

import argparse
import os
import pathlib
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_HARMLESS = [pathlib.PosixPath, pathlib.WindowsPath, argparse.Namespace]
_FORCE = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"  # Lightnings before 2.6 can be told by nothing else.
_NEEDED = ("state_dict", "global_step")
_UNTRUSTED = re.compile(r"(?:GLOBAL|[Uu]nsupported class) ([\w.]+)")


class ReplayError(ValueError):
    """What was given cannot be replayed; the message says what was found and what to do."""


@dataclass(frozen=True)
class Checkpoint:
    """A file with the weights of one moment.

    Attributes:
        path: The file.
        step: Optimizer steps done by then, as the file itself says.
    """

    path: Path
    step: int


def find(paths: Iterable[Path]) -> dict[Path, list[Path]]:
    """Finds checkpoint files, {directory: files}: every directory is a run.

    Args:
        paths: Directories, which are searched for ``*.ckpt`` with all that is below, or files.

    Raises:
        ReplayError: There is no such path, or no checkpoint in it.
    """
    found: dict[Path, list[Path]] = {}
    for path in paths:
        if not path.exists():
            raise ReplayError(
                f"{path} does not exist. Give the directory of a run's checkpoints, e.g. "
                "lightning_logs/version_0, or some above it."
            )
        files = sorted(path.rglob("*.ckpt")) if path.is_dir() else [path]
        for file in list(files):
            if file.is_dir():
                files.remove(file)
                _pass_over(
                    f"{file} is a directory, as sharded checkpoints are. Make it one file by "
                    "`python -m lightning.pytorch.utilities.consolidate_checkpoint`."
                )
        if not files:
            raise ReplayError(
                f"{path} holds no checkpoint (*.ckpt). Save some while training, e.g. by "
                "ModelCheckpoint(every_n_train_steps=100, save_top_k=-1)."
            )
        for file in files:
            of_run = found.setdefault(file.parent, [])
            of_run += [file] if file not in of_run else []
    return found


def in_order(
    files: Sequence[Path],
    *,
    weights_only: bool = True,
    bar: Callable[[Sequence[Path]], Iterable[Path]] = iter,
) -> list[Checkpoint]:
    """Sorts a run's checkpoints by their own step; several of one step count once.

    What cannot be read is passed over with a warning.

    Raises:
        ReplayError: No two steps are left, or two files of one step hold different weights.
    """
    found: dict[int, Checkpoint] = {}
    unread: list[str] = []
    for path in bar(files):
        try:
            content = read(path, weights_only=weights_only)
        except ReplayError as error:
            unread.append(str(error))
            continue
        checkpoint = Checkpoint(path, int(content["global_step"]))
        other = found.setdefault(checkpoint.step, checkpoint)
        if other is checkpoint:
            continue
        weights = read(other.path, weights_only=weights_only)["state_dict"]
        if not _same(weights, content["state_dict"]):
            raise ReplayError(
                f"{other.path} and {path.name} are both of step {checkpoint.step}, and hold "
                "different weights. Move away the one that is not of this run, or name the files "
                "that are in place of their directory."
            )
    if not found:
        others = f" None of its {len(unread)} files can be used." if len(unread) > 1 else ""
        raise ReplayError(unread[0] + others)
    for text in unread:
        _pass_over(text)
    if len(found) < 2:
        raise ReplayError(
            f"{files[0].parent} holds checkpoints of one step only ({next(iter(found))}). LCA is "
            "measured from one step to another: save more, e.g. by "
            "ModelCheckpoint(every_n_train_steps=100, save_top_k=-1)."
        )
    return [found[step] for step in sorted(found)]


def read(path: Path, *, weights_only: bool = True) -> dict[str, Any]:
    """Reads a checkpoint on the CPU; what is not looked at stays on the disk, if it can.

    Args:
        path: The file.
        weights_only: Refuses what could run code when it is loaded.

    Raises:
        ReplayError: It is damaged, not trusted, or no checkpoint of Lightning's.
    """
    mapped = False
    try:
        # Mapped, the optimizers' states, most of the file, are never read. Lightning replaces files
        # and never writes into them, which would break a mapping.
        mapped = zipfile.is_zipfile(path)  # Files from before torch 1.6 are not.
        with warnings.catch_warnings(), allowing(weights_only):
            warnings.simplefilter("ignore")  # On foreign pickles.
            content = torch.load(path, map_location="cpu", mmap=mapped, weights_only=weights_only)
    except Exception as error:  # A file may hold anything, and fail in any way.
        if weights_only and (what := _UNTRUSTED.search(str(error))):
            raise ReplayError(
                f"{path} holds more than weights ({what[1]}), which could run any code when it is "
                "loaded. If you trust where it comes from, load it with weights_only=False "
                "(--no_weights_only)."
            ) from error
        why = (
            one_line(error)
            if isinstance(error, OSError) and mapped
            else f"it is cut off, damaged, or not made by torch.save ({type(error).__name__})"
        )
        raise ReplayError(f"{path} cannot be read: {why}.") from error
    if not isinstance(content, dict) or any(key not in content for key in _NEEDED):
        raise ReplayError(
            f"{path} is not a checkpoint of Lightning's: it has no {' or no '.join(_NEEDED)}."
        )
    return content


@contextmanager
def allowing(weights_only: bool) -> Iterator[None]:
    """Settles what `torch.load` may load, by whomever it is called.

    ``weights_only`` lets pass what can do no harm and older Lightnings save, such as paths. Before
    torch 2.5, which cannot be told, such checkpoints need trust.
    """
    if weights_only:
        allow = getattr(torch.serialization, "safe_globals", None)
        with nullcontext() if allow is None else allow(_HARMLESS):
            yield
        return
    before = os.environ.get(_FORCE)
    os.environ[_FORCE] = "1"
    try:
        yield
    finally:
        del os.environ[_FORCE]
        if before is not None:
            os.environ[_FORCE] = before


def one_line(error: BaseException, most: int = 200, beyond: str = "") -> str:
    """Tells an error in one line, of at most so many letters, from beyond some words on."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = text.partition(beyond)[2] or text if beyond else text
    return text if len(text) <= most else text[: most - 3] + "..."


def _same(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    def alike(x: Any, y: Any) -> bool:
        if not (isinstance(x, Tensor) and isinstance(y, Tensor)):
            return True
        if x.is_floating_point():
            x, y = x.nan_to_num(), y.nan_to_num()
        return torch.equal(x, y)

    return a.keys() == b.keys() and all(alike(a[name], b[name]) for name in a)


def _pass_over(text: str) -> None:
    warnings.warn(f"{text} It is passed over.", stacklevel=3)
