"""Loss Change Allocation after the fact: from one saved checkpoint of a run to the next."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from lightning_lca.measure.quadrature import as_quadrature
from lightning_lca.record.history import History
from lightning_lca.replay.checkpoints import ReplayError, find, in_order
from lightning_lca.replay.parallel import DealingCallback
from lightning_lca.replay.player import Bar, ReplayCallback
from lightning_lca.replay.recipe import Recipe, name_of
from lightning_lca.replay.workers import Group, Pool
from lightning_lca.training.callback import LCACallback

__all__ = ["RECORD", "ReplayError", "replay"]
RECORD = "lca_replay"  # Directory of a run's record.


def replay(
    runs: str | Path | Sequence[str | Path],
    model: Callable[..., Any],
    data: Any = None,
    *,
    out: str | Path | None = None,
    model_arguments: Mapping[str, Any] | None = None,
    data_arguments: Mapping[str, Any] | None = None,
    accelerator: str = "auto",
    precision: Any = "32-true",
    weights_only: bool = True,
    progress: bool = True,
    workers: int = 1,
    threads: int | None = None,
    **lca: Any,
) -> dict[Path, History]:
    """Measures LCA from each saved checkpoint of a run to the next, and records it.

    The checkpoints of a run are put in the order of their ``global_step``. The motion between two
    of them is one segment: on checkpoints of every n-th step the record is that of a training with
    ``LCACallback(every_n_steps=n)``, from the first checkpoint on. What is changed is the straight
    line: what other code than the optimizer did to the weights in between is part of it.

    Each run is set up as a Trainer does it for training (``prepare_data``, ``setup``,
    ``configure_model``, ``configure_optimizers``, ``on_fit_start``, ``on_train_start``), and no
    step is taken. An interrupted replay goes on where it stopped when it is called again, and so
    does one to which training has added checkpoints since.

    With ``workers=n`` that many processes measure, and this one writes what they find: one record,
    to the bit that of one process with as many threads, where kernels add in a fixed order (on a
    CPU they do). They are started afresh, so that a script calls this under
    ``if __name__ == "__main__":``, and classes and functions are those of modules. One that is
    killed is replaced. Started by ``torchrun``, on one machine or several that see the same files,
    its processes measure without being asked: the first deals out and writes.

    Args:
        runs: Directories with checkpoints of one run or of several, or the files themselves; all
            files in one directory are of one run.
        model: The LightningModule's class, which gets its hyperparameters from the checkpoint, or a
            function that builds the module.
        data: A LightningDataModule, a training loader, (training loader, validation loader), or a
            class or function that gives one of these. Not needed if ``probe`` is batches or a
            loader, or if the module has loaders itself.
        out: Where records are put, one directory per run; by default each is next to the
            checkpoints, as ``lca_replay``.
        model_arguments: What the model is built with, in place of hyperparameters.
        data_arguments: The same for the data.
        accelerator: As the Trainer's.
        precision: As the Trainer's: that of the training.
        weights_only: False trusts checkpoints that hold other than weights and plain values, which
            can run any code when they are loaded.
        progress: Shows a bar on a terminal.
        workers: Processes that measure.
        threads: Of torch, in each process that measures. None: as many as torch takes, divided by
            the workers.
        lca: Arguments of `LCACallback`, with the same meaning: ``probe``, ``probe_batches``,
            ``probe_mode``, ``loss_fn``, ``quadrature``, ``tolerance``, ``group_by`` and so on.
            With ``every_n_steps=n`` checkpoints that are nearer than n steps are passed over.
            ``breakdown=True`` is all but "part", which only training can tell.

    Returns:
        {directory of the record: history}, of the first probe if there are several. Nothing in
        the processes of ``torchrun`` that only measure.

    Raises:
        ReplayError: Checkpoints, model, data or Trainer do not fit together. Of several runs, the
            others are replayed all the same. Or what workers need cannot be pickled, or they end
            again and again at one place.
        ValueError: An argument of `LCACallback` is out of range. TypeError: of the wrong type.
        KeyboardInterrupt: It was interrupted; what was measured is kept.

    Example:
        >>> # replay("lightning_logs/version_0", Net, Data, quadrature="midpoint")
    """
    listed = [runs] if isinstance(runs, str | Path) else list(runs)
    for name, usual in (("max_overhead", None), ("segments", "batch")):
        if lca.get(name, usual) != usual:
            raise ValueError(
                f"{name} is for training: a replay has one segment from checkpoint to checkpoint. "
                "Leave it out; every_n_steps says how many steps a segment has at least."
            )
    lca["probe"] = _to_keep(lca.get("probe", "train"))
    lca["breakdown"] = to_tell(lca.get("breakdown", False), lca.get("loss_fn") is not None)
    LCACallback(**lca)  # Mistakes in its arguments are told before anything is read.
    for name, count in (("workers", workers), ("threads", threads)):
        if isinstance(count, bool) or not (isinstance(count, int) or count is None):
            raise TypeError(f"{name} must be a whole number, got {count!r}.")
        if count is not None and count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}.")
    recipe = Recipe(
        model,
        data,
        model_arguments,
        data_arguments,
        accelerator,
        precision,
        weights_only,
        lca,
    )
    with Group.joined() as group:
        if group is not None and workers > 1:
            raise ReplayError(
                f"torchrun says how many processes there are; got workers={workers} as well. Leave "
                "it out, and give torchrun --nproc-per-node."
            )
        rule = lca.get("quadrature", "simpson")
        if (group is not None or workers > 1) and as_quadrature(rule).adapts:
            raise ReplayError(
                f"quadrature={rule!r} compares every segment with those before it, so that they "
                'cannot be dealt out. Take one process, or quadrature="closed_trapezoid".'
            )
        if group is not None and group.rank:
            group.serve(recipe, threads)
            return {}
        found = find([Path(run) for run in listed])
        records = _records(list(found), None if out is None else Path(out))
        if group is None and workers == 1:
            with _threads(threads):
                return _replay(recipe, found, records, progress, None)
        share = threads or (None if group else max(1, torch.get_num_threads() // workers))
        with Pool(recipe, workers, share, group) as pool:
            return _replay(recipe, found, records, progress, pool)


def _replay(
    recipe: Recipe,
    found: Mapping[Path, Sequence[Path]],
    records: Mapping[Path, Path],
    progress: bool,
    pool: Pool | None,
) -> dict[Path, History]:
    """Replays run after run.

    Args:
        recipe: How they are set up.
        found: Checkpoints by directory.
        records: Where each directory's record goes.
        progress: Shows bars on a terminal.
        pool: Who measures; None: this process.
    """
    histories: dict[Path, History] = {}
    failed: list[str] = []
    for directory, files in found.items():
        record = records[directory]
        bar = _bar(record, progress)
        told: dict[str, Any] = {
            "weights_only": recipe.weights_only,
            "bar": bar,
            "arguments": recipe.lca,
        }
        try:
            checkpoints = in_order(files, weights_only=recipe.weights_only, bar=bar)
            player = (
                ReplayCallback(checkpoints, record, **told)
                if pool is None
                else DealingCallback(checkpoints, record, **told, pool=pool)
            )
            if player.resume(model=name_of(recipe.model), precision=str(recipe.precision)):
                recipe.play(player, checkpoints[0].path, record)
        except ReplayError as error:
            if len(found) == 1:
                raise
            failed.append(
                f"{directory}: {error}".replace(f"{directory}: {directory}", f"{directory}")
            )
            warnings.warn(failed[-1], stacklevel=3)
            continue
        if player.interrupted:
            raise KeyboardInterrupt
        histories[record] = History.load(record)
    if failed:
        raise ReplayError(
            f"{len(failed)} of {len(found)} runs could not be replayed; the first: {failed[0]}"
        )
    return histories


def to_tell(asked: Any, has_terms: bool) -> Any:
    """Says what credit is split into: True is all that a replay can tell.

    Raises:
        ValueError: What a step was made of, which checkpoints do not tell.
    """
    if asked is True:
        return ["order", "term"] if has_terms else ["order"]
    if asked == "part" or (isinstance(asked, list | tuple) and "part" in asked):
        raise ValueError(
            'breakdown="part" is for training: what a step was made of follows from the optimizer '
            "and its gradient in that step, and checkpoints hold neither. "
            'breakdown=["order"] can be replayed, and "term" with a loss_fn that returns several.'
        )
    return asked


def _to_keep(probe: Any) -> Any:
    """Keeps the batches of iterators, which give them only once, for every run."""
    if isinstance(probe, Mapping):
        return {name: _to_keep(source) for name, source in probe.items()}
    return list(probe) if isinstance(probe, Iterator) else probe


def _records(directories: Sequence[Path], out: Path | None) -> dict[Path, Path]:
    """Chooses where each run's record is put, {directory of checkpoints: of the record}."""
    # Lightning keeps them in version_0/checkpoints: the run is version_0.
    runs = {d: d.parent if d.name == "checkpoints" else d for d in map(Path.absolute, directories)}
    places = [runs[d.absolute()] for d in directories]
    if out is None:
        return {d: place / RECORD for d, place in zip(directories, places, strict=True)}
    above = Path(os.path.commonpath([place.parent for place in places]))
    return {d: out / place.relative_to(above) for d, place in zip(directories, places, strict=True)}


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Has torch compute on so many threads meanwhile; None: as it does."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _bar(record: Path, progress: bool) -> Bar:
    def bar(items: Sequence[Any]) -> Iterable[Any]:
        shown: Iterable[Any] = tqdm(
            items, desc=record.parent.name, unit="checkpoint", disable=None if progress else True
        )
        return shown

    return bar
