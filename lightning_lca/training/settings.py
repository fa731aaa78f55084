"""What a user asks for, checked when it is typed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any, Literal, get_args

from torch import Tensor

from lightning_lca.measure.groups import GroupBy
from lightning_lca.measure.quadrature import SIMPSON, Quadrature, as_quadrature
from lightning_lca.probe.loss import LossFn, ProbeMode

Segments = Literal["batch", "step"]


@dataclass
class Chords:
    """How many optimizer steps a segment has.

    Attributes:
        every: Their number, as given or as ``max_overhead`` chose; None until it has.
        is_final: Whether a training that goes on from a checkpoint keeps a number that was chosen.
    """

    every: int | None
    is_final: bool = False

    def choose(self, every: int) -> None:
        """Takes the number that ``max_overhead`` chose."""
        self.every, self.is_final = every, True


@dataclass(frozen=True)
class Settings:
    """The arguments of `LCACallback`, where their meaning is told.

    Attributes:
        sources: {name: source} of every probe; the name of a single one is None.
        rule: The quadrature rule.
    """

    sources: dict[str | None, Any]
    probe_batches: int
    probe_mode: ProbeMode
    loss_fn: LossFn | None
    every_n_steps: int
    max_overhead: float | None
    segments: Segments
    rule: Quadrature
    tolerance: float | None
    max_splits: int
    group_by: GroupBy
    log_every_n_steps: int | None
    seed: int
    track_parameters: bool
    neurons: bool
    figures: bool
    custom_scalars: bool

    @classmethod
    def check(cls, *, probe: Any, quadrature: Any, **arguments: Any) -> Settings:
        """Builds the settings from what was typed.

        Raises:
            ValueError: An argument out of range.
            TypeError: One of the wrong type.
        """
        settings = cls(sources=_sources(probe), rule=as_quadrature(quadrature), **arguments)
        _one_of("probe_mode", settings.probe_mode, get_args(ProbeMode))
        _one_of("group_by", settings.group_by, get_args(GroupBy))
        for name in ("probe_batches", "every_n_steps", "max_splits", "log_every_n_steps"):
            value = getattr(settings, name)
            if value is not None or name != "log_every_n_steps":
                _count(name, value)
        if settings.loss_fn is not None and not callable(settings.loss_fn):
            raise TypeError(
                "loss_fn must be a function (module, batch) -> scalar, got "
                f"{type(settings.loss_fn).__name__}."
            )
        _one_of("segments", settings.segments, get_args(Segments))
        chords = settings.every_n_steps > 1 or settings.max_overhead is not None
        if settings.segments == "step" and chords:
            raise ValueError(
                'segments="step" measures every optimizer step, so it needs every_n_steps=1 and no '
                f"max_overhead; got every_n_steps={settings.every_n_steps} and "
                f'max_overhead={settings.max_overhead}. Chords need segments="batch".'
            )
        if settings.max_overhead is not None:
            _share("max_overhead", settings.max_overhead)
        if settings.tolerance is not None:
            _tolerance(settings.tolerance, settings.rule)
        return settings

    def chords(self) -> Chords:
        """Returns how long segments are at the start of a training."""
        return Chords(self.every_n_steps if self.max_overhead is None else None)

    def key(self, *, whole: bool = False) -> str:
        """Names what is measured; ``whole``: with all that tells several callbacks apart."""
        probes = [n or (s if isinstance(s, str) else "own") for n, s in self.sources.items()]
        budget = "" if self.max_overhead is None else f"max_overhead={self.max_overhead}, "
        budget += 'segments="step", ' if self.segments == "step" else ""
        rest = ""
        if whole:
            loss_fn = getattr(self.loss_fn, "__qualname__", self.loss_fn and "own")
            rest = f", probe_batches={self.probe_batches}, loss_fn={loss_fn}, "
            rest += f"tolerance={self.tolerance}, max_splits={self.max_splits}, seed={self.seed}, "
            rest += f"track_parameters={self.track_parameters}, neurons={self.neurons}"
        return (
            f"LCACallback(probe={'+'.join(probes)}, probe_mode={self.probe_mode}, "
            f"{budget}every_n_steps={self.every_n_steps}, quadrature={self.rule.name}, "
            f"group_by={self.group_by}{rest})"
        )

    def describe(self) -> dict[str, Any]:
        """Gives what the record keeps, as plain values."""
        return {
            "probe_batches": self.probe_batches,
            "probe_mode": self.probe_mode,
            "every_n_steps": self.every_n_steps if self.max_overhead is None else None,
            "max_overhead": self.max_overhead,
            "segments": self.segments,
            "quadrature": self.rule.name,
            "tolerance": self.tolerance,
            "max_splits": self.max_splits,
            "seed": self.seed,
        }


def _sources(probe: Any) -> dict[str | None, Any]:
    """Names the probes, and keeps the batches of an iterator, which gives them only once."""
    sources: dict[str | None, Any] = dict(probe) if isinstance(probe, Mapping) else {None: probe}
    if not sources:
        raise ValueError('The probe is empty: got {}. Name at least one, e.g. {"train": "train"}.')
    for name, source in sources.items():
        if isinstance(source, str):
            _one_of("probe", source, ("train", "val"))
        elif not isinstance(source, Iterable) or isinstance(source, Tensor | Mapping):
            raise TypeError(
                f'probe must be "train", "val", a DataLoader or a list of batches, got '
                f"{type(source).__name__}. One batch is a list of one: probe=[batch]."
            )
        elif not hasattr(source, "dataset") and not isinstance(source, list | tuple):
            sources[name] = list(source)
        elif isinstance(source, list | tuple) and any(isinstance(b, str) for b in source):
            raise TypeError(
                f"A list as probe holds batches, got text: {source!r}. Several probes go by name, "
                'probe={"train": "train", "val": "val"}.'
            )
    return sources


def _one_of(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        options = ", ".join(map(repr, choices))
        raise ValueError(f"{name} must be one of {options}; got {value!r}.")


def _count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number, got {value!r}.")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}.")


def _share(name: str, value: Any) -> None:
    example = f"e.g. {name}=0.1 for 10 %"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, {example}; got {value!r}.")
    if not (value > 0 and isfinite(value)):
        raise ValueError(f"{name} must be a positive number, {example}; got {value!r}.")


def _tolerance(tolerance: float, rule: Quadrature) -> None:
    if not tolerance > 0:
        raise ValueError(
            f"tolerance must be a positive number in loss units, e.g. 1e-3; got {tolerance}."
        )
    if rule != SIMPSON:
        raise ValueError(
            f"A tolerance refines Simpson's rule, got quadrature={rule.name!r}. "
            'Choose quadrature="simpson" or tolerance=None.'
        )
