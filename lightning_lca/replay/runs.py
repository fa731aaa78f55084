"""Loss Change Allocation after the fact: from one saved checkpoint of a run to the next."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lightning_lca.probe.isolation import fence
from lightning_lca.record.history import History
from lightning_lca.replay.checkpoints import ReplayError, allowing, find, in_order, one_line, read
from lightning_lca.replay.player import Bar, LeftError, ReplayCallback, does_not_fit
from lightning_lca.runtime import lightnings
from lightning_lca.runtime.lightnings import LightningModule
from lightning_lca.training.callback import LCACallback

__all__ = ["RECORD", "ReplayError", "replay"]
RECORD = "lca_replay"  # Directory of a run's record.
_VERSION = "pytorch-lightning_version"  # Whatever Lightning saves has it.
_TALKATIVE = ("pytorch_lightning", "lightning.pytorch", "lightning.fabric", "lightning_fabric")
_HINTS = (
    "does not have many workers",
    "GPU available but not used",
    "smaller than the logging interval",
    "Experiment logs directory",
    "treespec",
    "Found keys that are",
    "You defined a `validation_step`",
    "You passed in a `val_dataloader`",
    "persistent_workers",
    "in eval mode",
)


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
        lca: Arguments of `LCACallback`, with the same meaning: ``probe``, ``probe_batches``,
            ``probe_mode``, ``loss_fn``, ``quadrature``, ``tolerance``, ``group_by`` and so on.
            With ``every_n_steps=n`` checkpoints that are nearer than n steps are passed over.
            ``breakdown=True`` is all but "part", which only training can tell.

    Returns:
        {directory of the record: history}, of the first probe if there are several.

    Raises:
        ReplayError: Checkpoints, model, data or Trainer do not fit together. Of several runs, the
            others are replayed all the same.
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
    found = find([Path(run) for run in listed])
    records = _records(list(found), None if out is None else Path(out))
    histories: dict[Path, History] = {}
    failed: list[str] = []
    for directory, files in found.items():
        record = records[directory]
        bar = _bar(record, progress)
        try:
            checkpoints = in_order(files, weights_only=weights_only, bar=bar)
            player = ReplayCallback(
                checkpoints, record, weights_only=weights_only, bar=bar, arguments=lca
            )
            if player.resume(model=_name(model), precision=str(precision)):
                with fence(seed=lca.get("seed", 0)), _quiet():
                    first = checkpoints[0].path
                    module = _build(model, model_arguments, first, weights_only, "model")
                    loaders = _loaders(module, data, data_arguments, first, weights_only, player)
                    trainer = _trainer(module, player, record, accelerator, precision)
                    _fit(trainer, module, loaders)
        except ReplayError as error:
            if len(found) == 1:
                raise
            failed.append(
                f"{directory}: {error}".replace(f"{directory}: {directory}", f"{directory}")
            )
            warnings.warn(failed[-1], stacklevel=2)
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


def _build(
    make: Any, arguments: Mapping[str, Any] | None, path: Path, weights_only: bool, option: str
) -> Any:
    """Builds the module or the data: a class with hyperparameters, or a function."""
    given = dict(arguments or {})
    remedy = (
        f"Give what it needs, e.g. --{option}.ARGUMENT VALUE, or name a function that builds it."
    )
    load = getattr(make, "load_from_checkpoint", None) if isinstance(make, type) else None
    # A file that someone made by hand has no hyperparameters.
    if load is not None and _VERSION in read(path, weights_only=weights_only):
        given |= {"checkpoint_path": path, "map_location": "cpu"}
        if option == "model":
            given["strict"] = False  # Weights are loaded later, when all layers are there.
    elif callable(make):
        load = make
    else:
        raise ReplayError(f"{make!r} is neither a class nor a function. {remedy}")
    try:
        with allowing(weights_only):
            made = load(**given)
    except Exception as error:
        if "loading state_dict" in str(error):
            raise does_not_fit(path, make, error) from error
        raise ReplayError(
            f"{_name(make)} cannot be built: {type(error).__name__}: {one_line(error)}. {remedy}"
        ) from error
    if option == "model" and not isinstance(made, lightnings.LIGHTNING_MODULES):
        raise ReplayError(
            f"{_name(make)} gives a {type(made).__name__}, not a LightningModule. Name the class "
            "that was trained, or a function that builds it (--model package.module.Class)."
        )
    return made


def _loaders(
    module: LightningModule,
    data: Any,
    arguments: Mapping[str, Any] | None,
    path: Path,
    weights_only: bool,
    player: ReplayCallback,
) -> dict[str, Any]:
    """Returns what `Trainer.fit` takes as data."""
    made = _build(data, arguments, path, weights_only, "data") if callable(data) else data
    if isinstance(made, lightnings.of(module, "").LightningDataModule):
        return {"datamodule": made}
    if isinstance(made, tuple):
        return dict(zip(("train_dataloaders", "val_dataloaders"), made, strict=False))
    if made is not None:
        return {"train_dataloaders": made}
    base = lightnings.of(module, "").LightningModule
    own = {
        name
        for name in ("train", "val")
        if getattr(type(module), f"{name}_dataloader") is not getattr(base, f"{name}_dataloader")
    }
    if missing := player.draws_from - own:
        raise ReplayError(
            f"There is no probe: {type(module).__name__} has no {missing.pop()}_dataloader. Give "
            "its data (--data package.module.DataModule), or batches to measure on "
            "(--probe package.module.function)."
        )
    # Nothing is read from it, and the Trainer wants one.
    return {} if "train" in own else {"train_dataloaders": [0]}


def _trainer(
    module: LightningModule, player: ReplayCallback, record: Path, accelerator: str, precision: Any
) -> Any:
    """Makes a Trainer that keeps silent and writes nothing but the record."""
    logger = lightnings.of(module, ".loggers").TensorBoardLogger(
        record.parent, name="", version=record.name, default_hp_metric=False
    )
    try:
        return lightnings.of(module, "").Trainer(
            accelerator=accelerator,
            devices=1,
            precision=precision,
            callbacks=[player],
            logger=logger,
            default_root_dir=record,
            max_epochs=-1,
            max_steps=player.last_step,
            num_sanity_val_steps=0,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
    except Exception as error:
        raise ReplayError(
            f"There can be no Trainer(accelerator={accelerator!r}, precision={precision!r}): "
            f"{one_line(error)}"
        ) from error


def _fit(trainer: Any, module: Any, loaders: Mapping[str, Any]) -> None:
    """Sets everything up as for training, until the player takes over."""
    module.configure_callbacks = list  # Those of the training would save, stop and freeze.
    try:
        trainer.fit(module, **loaders)
    except LeftError:
        return
    except lightnings.of(trainer, ".utilities.exceptions").MisconfigurationException as error:
        raise ReplayError(one_line(error, 500)) from error
    raise ReplayError("The training data has no batch. Give a loader that has one (--data).")


def _bar(record: Path, progress: bool) -> Bar:
    def bar(items: Sequence[Any]) -> Iterable[Any]:
        shown: Iterable[Any] = tqdm(
            items, desc=record.parent.name, unit="checkpoint", disable=None if progress else True
        )
        return shown

    return bar


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps back what Lightning has to say to people who train."""
    loggers = [logging.getLogger(name) for name in _TALKATIVE]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for hint in _HINTS:
                warnings.filterwarnings("ignore", f".*{hint}")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _name(value: Any) -> str:
    return str(getattr(value, "__qualname__", type(value).__name__))
