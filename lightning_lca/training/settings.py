"""What a user asks for, checked when it is typed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, Literal, Protocol, get_args

from torch import Tensor

from lightning_lca.measure.groups import CUSTOM, GroupBy, check_group_by
from lightning_lca.measure.quadrature import (
    CLOSED_TRAPEZOID,
    SIMPSON,
    Quadrature,
    as_quadrature,
)
from lightning_lca.measure.selection import Selection
from lightning_lca.probe.loss import LossFn, ProbeMode

Segments = Literal["batch", "step"]
BreakdownName = Literal["part", "order", "term"]
BREAKDOWNS: tuple[BreakdownName, ...] = get_args(BreakdownName)


class HasDataset(Protocol):
    """What loads batches of a data set, as a DataLoader does; no text, which is iterable, too."""

    dataset: Any

    def __iter__(self) -> Iterator[Any]: ...


# What the batches of one probe come from.
ProbeSource = Literal["train", "val"] | HasDataset | list[Any] | tuple[Any, ...] | Iterator[Any]


@dataclass
class Chords:
    """How many optimizer steps a segment has, and by which rule it is measured.

    Attributes:
        every: Their number, as given or as ``max_overhead`` chose; None until it has.
        rule: The rule, likewise.
        is_final: Whether a training that goes on from a checkpoint keeps what was chosen.
    """

    every: int | None
    rule: Quadrature
    is_final: bool = False

    def choose(self, every: int, rule: Quadrature) -> None:
        """Takes what ``max_overhead`` chose."""
        self.every, self.rule, self.is_final = every, rule, True


@dataclass(frozen=True)
class Settings:
    """The arguments of `LCACallback`, where their meaning is told.

    Attributes:
        sources: {name: source} of every probe; the name of a single one is None.
        rule: The quadrature rule.
        selection: Which weights are measured.
        needs_terms: Whether loss_fn must return several terms; else it may.
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
    selection: Selection
    log_every_n_steps: int | None
    seed: int
    track_parameters: bool
    neurons: bool
    figures: bool
    custom_scalars: bool
    live: bool
    breakdown: tuple[str, ...]
    oscillation: bool
    needs_terms: bool = False

    @property
    def sees_whole(self) -> bool:
        """Whether every process must know loss and gradient of the whole probe, not of its share.

        That is where what is done next depends on them, and where credit is not linear in them.
        """
        return self.tolerance is not None or self.rule.closes

    @property
    def splits(self) -> tuple[str, ...]:
        """What is noted of every group beside its credit."""
        return (*self.breakdown, *(("oscillation",) if self.oscillation else ()))

    @classmethod
    def check(
        cls,
        *,
        probe: Any,
        quadrature: Any,
        include: Any,
        exclude: Any,
        breakdown: Any = (),
        **arguments: Any,
    ) -> Settings:
        """Builds the settings from what was typed.

        Raises:
            ValueError: An argument out of range.
            TypeError: One of the wrong type.
        """
        rule = as_quadrature(quadrature)
        has_terms = arguments["loss_fn"] is not None and not rule.closes
        settings = cls(
            sources=_sources(probe),
            rule=rule,
            breakdown=_breakdowns(breakdown, has_terms=has_terms),
            needs_terms=not isinstance(breakdown, bool) and "term" in _breakdowns(breakdown),
            selection=Selection(_patterns("include", include), _patterns("exclude", exclude)),
            **arguments,
        )
        _one_of("probe_mode", settings.probe_mode, get_args(ProbeMode))
        check_group_by(settings.group_by)
        _one_of("segments", settings.segments, get_args(Segments))
        for name in (
            "track_parameters",
            "neurons",
            "figures",
            "custom_scalars",
            "live",
            "oscillation",
        ):
            _switch(name, getattr(settings, name))
        for name in ("probe_batches", "every_n_steps", "max_splits", "log_every_n_steps"):
            value = getattr(settings, name)
            if value is not None or name != "log_every_n_steps":
                _whole(name, value)
        _whole("seed", settings.seed, 0, 2**32 - 1)
        if settings.max_splits & (settings.max_splits - 1):
            raise ValueError(
                f"max_splits must be a power of two, since panels are doubled; got "
                f"{settings.max_splits}. Choose {2 ** (settings.max_splits.bit_length() - 1)} or "
                f"{2 ** settings.max_splits.bit_length()}."
            )
        if settings.loss_fn is not None and not callable(settings.loss_fn):
            raise TypeError(
                "loss_fn must be a function (module, batch) -> scalar, got "
                f"{type(settings.loss_fn).__name__}."
            )
        chords = settings.every_n_steps > 1 or settings.max_overhead is not None
        if settings.segments == "step" and chords:
            raise ValueError(
                'segments="step" measures every optimizer step, so it needs every_n_steps=1 and no '
                f"max_overhead; got every_n_steps={settings.every_n_steps} and "
                f'max_overhead={settings.max_overhead}. Chords need segments="batch".'
            )
        if settings.max_overhead is not None:
            _number("max_overhead", settings.max_overhead, ", e.g. max_overhead=0.1 for 10 %")
            if settings.max_overhead > 1:
                raise ValueError(
                    f"max_overhead={settings.max_overhead:g} lets training take "
                    f"{1 + settings.max_overhead:g} times as long. It is a share, at most 1: "
                    "max_overhead=0.1 is 10 %. Leave it out where there is no limit."
                )
        if settings.splits:
            _check_breakdown(settings)
        if settings.tolerance is not None:
            _number("tolerance", settings.tolerance, " in loss units, e.g. 1e-3")
            if settings.rule != SIMPSON:
                raise ValueError(
                    f"A tolerance refines Simpson's rule, got quadrature={settings.rule.name!r}. "
                    'Choose quadrature="simpson" or tolerance=None.'
                )
        return settings

    def chords(self) -> Chords:
        """Returns how long segments are at the start of a training."""
        return Chords(self.every_n_steps if self.max_overhead is None else None, self.rule)

    @property
    def choices(self) -> tuple[Quadrature, ...]:
        """The rules that ``max_overhead`` chooses from: the one asked for, and a cheaper one."""
        if self.max_overhead is None or self.rule != SIMPSON or self.tolerance is not None:
            return (self.rule,)
        return (self.rule,) if "term" in self.breakdown else (self.rule, CLOSED_TRAPEZOID)

    def key(self, *, whole: bool = False) -> str:
        """Names what is measured; ``whole``: with all that tells several callbacks apart."""
        probes = [n or (s if isinstance(s, str) else "own") for n, s in self.sources.items()]
        budget = "" if self.max_overhead is None else f"max_overhead={self.max_overhead}, "
        budget += 'segments="step", ' if self.segments == "step" else ""
        parts = "".join(
            f", {argument}={'+'.join(patterns)}" for argument, patterns in self._parts.items()
        )
        rest = ""
        if whole:
            loss_fn = getattr(self.loss_fn, "__qualname__", self.loss_fn and "own")
            rest = f", probe_batches={self.probe_batches}, loss_fn={loss_fn}, "
            rest += f"tolerance={self.tolerance}, max_splits={self.max_splits}, seed={self.seed}, "
            rest += f"track_parameters={self.track_parameters}, neurons={self.neurons}"
            rest += f", breakdown={list(self.breakdown)}" if self.breakdown else ""
            rest += ", oscillation=True" if self.oscillation else ""
        return (
            f"LCACallback(probe={'+'.join(probes)}, probe_mode={self.probe_mode}, "
            f"{budget}every_n_steps={self.every_n_steps}, quadrature={self.rule.name}, "
            f"group_by={self.grouping}{parts}{rest})"
        )

    @property
    def grouping(self) -> str:
        """What the groups are, as text; a function goes by its name."""
        if isinstance(self.group_by, str):
            return self.group_by
        return f"{CUSTOM} {getattr(self.group_by, '__qualname__', type(self.group_by).__name__)}"

    @property
    def _parts(self) -> dict[str, list[str]]:
        """The patterns that were given, by argument."""
        given = {"include": self.selection.include, "exclude": self.selection.exclude}
        return {argument: list(patterns) for argument, patterns in given.items() if patterns}

    def describe(self) -> dict[str, Any]:
        """Returns what the record keeps, as plain values."""
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
            "breakdown": list(self.breakdown),
            "oscillation": self.oscillation,
            **self._parts,
        }


def _sources(probe: Any) -> dict[str | None, Any]:
    """Names the probes, and keeps the batches of an iterator, which gives them only once."""
    if not isinstance(probe, Mapping):
        return {None: _source(probe)}
    if not probe:
        raise ValueError('The probe is empty: got {}. Name at least one, e.g. {"train": "train"}.')
    for name in probe:
        if not isinstance(name, str) or not name:
            raise TypeError(
                f"Probes go by names, which are text; got {name!r}. Write "
                'probe={"train": "train", "val": "val"}, for example.'
            )
    return {name: _source(source, f"probe {name!r}") for name, source in probe.items()}


def _source(source: Any, what: str = "probe") -> Any:
    """Checks where one probe's batches come from."""
    if isinstance(source, str):
        _one_of(what, source, ("train", "val"))
        return source
    if not isinstance(source, Iterable) or isinstance(source, Tensor | Mapping):
        raise TypeError(
            f'{what} must be "train", "val", a DataLoader or a list of batches, got '
            f"{type(source).__name__}. One batch is a list of one: probe=[batch]."
        )
    if hasattr(source, "dataset"):
        return source
    if not isinstance(source, list | tuple):
        source = list(source)
    if isinstance(source, tuple) and any(isinstance(part, Tensor) for part in source):
        raise TypeError(
            f"{what} is a tuple of {len(source)} with tensors in it, which looks like one batch. "
            "One batch is a list of one: probe=[(x, y)]; several tensors that are batches "
            "themselves are a list: probe=[x1, x2]."
        )
    if any(isinstance(batch, str) for batch in source):
        raise TypeError(
            f"A list as {what} holds batches, got text: {source!r}. Several probes go by name, "
            'probe={"train": "train", "val": "val"}.'
        )
    if not source:
        raise ValueError(
            f"The {what} is empty: got 0 batches. Pass at least one, e.g. "
            "probe=[next(iter(loader))]."
        )
    return source


def _breakdowns(breakdown: Any, *, has_terms: bool = True) -> tuple[str, ...]:
    """Lists what credit is split into, each once; terms are those of a loss_fn."""
    if isinstance(breakdown, bool):
        return BREAKDOWNS[: 3 if has_terms else 2] if breakdown else ()
    names = [breakdown] if isinstance(breakdown, str) else breakdown
    if not isinstance(names, list | tuple):
        raise TypeError(
            "breakdown must be True, False or a list of names, got "
            f"{type(breakdown).__name__}. Names: {', '.join(map(repr, BREAKDOWNS))}."
        )
    for name in names:
        _one_of("breakdown", name, BREAKDOWNS)
    return tuple(dict.fromkeys(names))


def _check_breakdown(settings: Settings) -> None:
    if settings.needs_terms and settings.loss_fn is None:
        raise ValueError(
            'breakdown="term" splits credit over the terms of a loss, and training_step gives one '
            "number. Pass loss_fn=(module, batch) -> {term: scalar}."
        )
    if settings.needs_terms and settings.rule.closes:
        raise ValueError(
            f"quadrature={settings.rule.name!r} shares out what it leaves of the change of the "
            'whole loss, not of its terms. With breakdown="term" choose quadrature="simpson".'
        )
    if settings.splits != ("term",) and not settings.rule.first_is_start:
        raise ValueError(
            "breakdown and oscillation need the gradient at the start of a step, which "
            f'quadrature={settings.rule.name!r} does not take. Choose quadrature="simpson".'
        )
    if "part" in settings.breakdown and (
        settings.max_overhead is not None or settings.segments == "step"
    ):
        raise ValueError(
            'breakdown="part" looks at every optimizer step when it is taken, so it needs to know '
            'how long a chord is (every_n_steps, no max_overhead) and segments="batch"; got '
            f"max_overhead={settings.max_overhead} and segments={settings.segments!r}. "
            'breakdown=["order"] goes with both.'
        )


def _patterns(name: str, value: Any) -> tuple[str, ...]:
    """Checks one pattern of names, or several; None: there is none."""
    if value is None:
        return ()
    patterns = (value,) if isinstance(value, str) else value
    example = f'{name}="encoder.*" or {name}=["encoder.*", "*.bias"]'
    if not isinstance(patterns, Sequence) or isinstance(patterns, bytes):
        raise TypeError(
            f"{name} must be a pattern of names or a list of patterns, e.g. {example}; got "
            f"{type(value).__name__}."
        )
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(
                f"{name} holds {pattern!r}, which is no text. Patterns are text, e.g. {example}."
            )
        if not pattern.strip():
            raise ValueError(f"{name} holds an empty pattern. Write, for example, {example}.")
    if not patterns:
        raise ValueError(
            f"{name} is empty: got no pattern. Leave it out ({name}=None), or write, for example, "
            f"{example}."
        )
    return tuple(patterns)


def _one_of(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        options = ", ".join(map(repr, choices))
        raise ValueError(f"{name} must be one of {options}; got {value!r}.")


def _switch(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}.")


def _whole(name: str, value: Any, least: int = 1, most: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number, got {value!r}.")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}.")
    if most is not None and value > most:
        raise ValueError(f"{name} must be at most {most}, got {value}.")


def _number(name: str, value: Any, example: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number{example}; got {value!r}.")
    if not (value > 0 and isfinite(value)):
        raise ValueError(f"{name} must be a positive number{example}; got {value!r}.")
