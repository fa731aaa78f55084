"""What a session of a record says of itself (``lca/meta``), checked before anything is built on it.

A record may come from anywhere, be damaged, or be written by a later version. So whatever it
declares is checked here, and what would cost memory is counted before it is made.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning_lca.record.eventfile import is_too_large
from lightning_lca.record.tables import LARGEST, Columns, declared

VERSION = 1  # Of the format, as far as it is known here.
STEADY = "steady"  # A writer's clock that never steps back.
_LONGEST_NAME = 10_000  # Characters.
_LONGEST_GROUPING = 100
_DEEPEST = 8  # Lists and objects within one another in the settings.
_COLUMNS = 2**22  # Groups times probes.


class DescriptionError(ValueError):
    """A description that cannot be used: what was found, and what was expected.

    Attributes:
        is_newer: Whether a later version wrote it.
    """

    def __init__(self, message: str, *, is_newer: bool = False) -> None:
        """Says what was found."""
        super().__init__(message)
        self.is_newer = is_newer


@dataclass(frozen=True)
class Description:
    """A session of a record.

    Attributes:
        probes: Names of the probes; "" for a single unnamed one.
        groups: Name of every group (G,).
        sizes: Number of weights of every group (G,).
        group_by: What a group is: "layer", "parameter", "neuron", "head", "module:2", "custom", or
            a text that a later version knows.
        first_step: The session measured what comes after this step.
        layers: The layer of every group (G,); None where the record does not say.
        callback: Tells callbacks apart; None where the record does not say.
        is_steady: Whether the wall times of its events never step back.
        windows: What is summed over windows of steps, by name of the table.
        settings: Of the callback, as plain JSON.
        breakdowns: By name, the names of the shares that credit is split into.
        batches: By probe, how many of its batches have credit of their own; not those with one.
        closes: Whether a rule shared out what it left unexplained, so that rows have that, too.
    """

    probes: tuple[str, ...]
    groups: tuple[str, ...]
    sizes: tuple[int, ...]
    group_by: str
    first_step: int
    layers: tuple[str, ...] | None = None
    callback: str | None = None
    is_steady: bool = False
    windows: Mapping[str, Columns] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    breakdowns: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    batches: Mapping[str, int] = field(default_factory=dict)
    closes: bool = False

    @classmethod
    def parse(cls, data: bytes) -> Description:
        """Reads what a session wrote.

        Raises:
            DescriptionError: It cannot be used.

        Example:
            >>> metadata = b'{"probes": [null], "groups": ["fc"], "sizes": [6], "first_step": 0}'
            >>> Description.parse(metadata).groups
            ('fc',)
        """
        metadata = _json(data)
        version = metadata.get("version", VERSION)
        if type(version) is not int:
            raise DescriptionError(f"version is {_show(version)}, expected a whole number")
        if version > VERSION:
            raise DescriptionError(
                f"it has format {version}, written by a later version of lightning_lca; this one "
                f"reads up to format {VERSION}. Update lightning_lca",
                is_newer=True,
            )
        for key in ("probes", "groups", "sizes", "first_step"):
            if key not in metadata:
                raise DescriptionError(f"it has no {key!r}")
        probes = _different("probes", [_probe(p) for p in _list("probes", metadata["probes"])])
        groups = _different("groups", _names("groups", metadata["groups"]))
        sizes = tuple(_count("sizes", size) for size in _list("sizes", metadata["sizes"]))
        if not probes or not groups:
            raise DescriptionError("it names no probe or no group, expected at least one")
        if len(sizes) != len(groups):
            raise DescriptionError(f"it has {len(groups)} groups and {len(sizes)} sizes")
        breakdowns = _breakdowns(metadata)
        batches = {
            _name("batches", name): _count("batches", count)
            for name, count in _object("batches", metadata.get("batches") or {}).items()
        }
        columns = 1 + sum(map(len, breakdowns.values())) + max(batches.values(), default=0)
        if len(groups) * len(probes) * columns > _COLUMNS:
            raise DescriptionError(
                f"it declares {len(groups):,} groups for {len(probes):,} probes, "
                f"{columns:,} columns each"
            )
        if sum(sizes) > LARGEST:
            raise DescriptionError(f"its sizes add up to {sum(sizes)} weights")
        group_by = metadata.get("group_by", "layer")
        if not isinstance(group_by, str) or not 0 < len(group_by) <= _LONGEST_GROUPING:
            raise DescriptionError(f"group_by is {_show(group_by)}, expected a short text")
        _name("group_by", group_by)
        callback = metadata.get("callback")
        if callback is not None and not isinstance(callback, str):
            raise DescriptionError(f"callback is {_show(callback)}, expected a text")
        layers = (
            _names("layers", metadata["layers"]) if metadata.get("layers") is not None else None
        )
        if layers is not None and len(layers) != len(groups):
            raise DescriptionError(f"it has {len(groups)} groups and {len(layers)} layers")
        return cls(
            probes=probes,
            groups=groups,
            sizes=sizes,
            group_by=group_by,
            first_step=_count("first_step", metadata["first_step"]),
            layers=layers,
            callback=callback,
            is_steady=metadata.get("clock") == STEADY,
            windows=_windows(metadata),
            settings=_settings(metadata),
            breakdowns=breakdowns,
            batches=batches,
            closes=_typed("closes", metadata.get("closes", False), bool, "true or false"),
        )


def _breakdowns(metadata: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Checks what credit is split into."""
    told = _object("breakdowns", metadata.get("breakdowns") or {})
    for name in told:
        if not re.fullmatch("[a-z_]{1,40}", _name("breakdowns", name)):
            raise DescriptionError(f"breakdowns hold {_show(name)}, expected small letters")
    return {name: _different(name, _names(name, names)) for name, names in told.items()}


def _settings(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Checks what the callback was asked for; numbers among it are compared later."""
    settings = _object("settings", metadata.get("settings") or {})
    if not _is_shallow(settings, _DEEPEST):
        raise DescriptionError(f"settings are nested more than {_DEEPEST} levels deep")
    for name in ("every_n_steps", "tolerance"):
        value = settings.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise DescriptionError(f"{name} is {_show(value)}, expected a number")
    return settings


def _windows(metadata: Mapping[str, Any]) -> dict[str, Columns]:
    """Checks what tables of windows hold, without making the names of their columns."""
    windows = _object("windows", metadata.get("windows") or {})
    told = {
        name: _object(name, windows.get(name) or {})
        for name in ("parameters", "neurons", "weights")
    }
    if parameters := told["parameters"]:
        names = _different("parameters", _names("parameters", parameters.get("names")))
        _check_lengths("parameters", names, parameters, "kinds", is_needed=True)
        _check_lengths("parameters", names, parameters, "layers")
    if neurons := told["neurons"]:
        stems = _list("stems", neurons.get("stems"))
        for stem in stems:
            if not isinstance(stem, list) or len(stem) != 2:
                raise DescriptionError(f"stems hold {_show(stem)}, expected [layer, neurons]")
            _name("stems", stem[0])
            _count("stems", stem[1])
        if sum(count for _, count in stems) > LARGEST:
            raise DescriptionError(f"it declares more than {LARGEST:.0e} neurons")
        _check_lengths("stems", stems, neurons, "layers")
    shapes = _object("shapes", metadata.get("shapes") or {})
    if weights := told["weights"]:
        _count("of", weights.get("of"))
        for name, places in _object("indices", weights.get("indices")).items():
            if _name("indices", name) not in shapes:
                raise DescriptionError(f"it has no shape of {_show(name)}")
            shape = [_count("shapes", n) for n in _list("shapes", shapes[name])]
            numbers = [_count("indices", place) for place in _list("indices", places)]
            whole = math.prod(shape)
            if len(shape) > 32 or whole > LARGEST or max(numbers, default=-1) >= whole:
                raise DescriptionError(f"weights of {_show(name)} lie outside its shape")
    return declared(told, shapes)


def _check_lengths(
    what: str, names: Sequence[Any], told: Mapping[str, Any], key: str, *, is_needed: bool = False
) -> None:
    """Checks names that belong to others, one to one."""
    if told.get(key) is None and not is_needed:
        return
    if len(_names(key, told.get(key))) != len(names):
        raise DescriptionError(f"it has {len(names)} {what} and {len(told[key])} {key}")


def _json(data: bytes) -> dict[str, Any]:
    """Reads an object; numbers that are not finite become None, which JSON can hold."""
    if is_too_large(data):
        raise DescriptionError(f"it has {len(data):,} bytes, and would take far more memory")
    try:
        metadata = json.loads(data, parse_constant=lambda _: None, parse_float=_finite)
    except RecursionError as error:
        raise DescriptionError("it is nested too deep") from error
    except ValueError as error:
        raise DescriptionError(f"it is no JSON: {_short(str(error))}") from error
    return _object("it", metadata)


def _finite(text: str) -> float | None:
    value = float(text)
    return value if math.isfinite(value) else None


def _object(what: str, value: Any) -> dict[str, Any]:
    return _typed(what, value, dict, "an object")  # type: ignore[no-any-return]


def _list(what: str, value: Any) -> list[Any]:
    return _typed(what, value, list, "a list")  # type: ignore[no-any-return]


def _typed(what: str, value: Any, kind: type, expected: str) -> Any:
    if not isinstance(value, kind):
        raise DescriptionError(f"{what} is {_show(value)}, expected {expected}")
    return value


def _count(what: str, value: Any) -> int:
    if type(value) is not int or not 0 <= value <= LARGEST:
        raise DescriptionError(
            f"{what} holds {_show(value)}, expected a whole number of at least 0"
        )
    return value


def _names(what: str, value: Any) -> tuple[str, ...]:
    return tuple(_name(what, name) for name in _list(what, value))


def _name(what: str, value: Any) -> str:
    if not isinstance(value, str) or len(value) > _LONGEST_NAME or not _is_text(value):
        raise DescriptionError(
            f"{what} holds {_show(value)}, expected a name of at most {_LONGEST_NAME:,} characters"
        )
    return value


def _probe(value: Any) -> str:
    return "" if value is None else _name("probes", value)


def _different(what: str, names: Any) -> tuple[str, ...]:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise DescriptionError(f"{what} holds {_show(name)} twice")
        seen.add(name)
    return tuple(names)


def _is_text(value: str) -> bool:
    """Whether it can be written: halves of a pair of surrogates cannot."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_shallow(value: Any, levels: int) -> bool:
    """Whether lists and objects lie at most so deep in one another."""
    if not isinstance(value, (dict, list)):
        return True
    inside: Callable[[], Any] = value.values if isinstance(value, dict) else value.__iter__
    return levels > 0 and all(_is_shallow(part, levels - 1) for part in inside())


def _show(value: Any) -> str:
    """Quotes what was found, at a length that a message can bear."""
    if isinstance(value, (dict, list)):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    return (
        ascii(value[:60] if isinstance(value, str) else value) if _is_small(value) else "a number"
    )


def _is_small(value: Any) -> bool:
    return not isinstance(value, int) or abs(value) < 10**30


def _short(text: str) -> str:
    return text if len(text) <= 100 else f"{text[:100]}…"
