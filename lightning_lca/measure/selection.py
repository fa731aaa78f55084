"""Which parameters are measured: patterns of names that are included, and excluded.

What is left out is a constant of the loss surface at every measurement, as a frozen weight is. If
it is trained all the same, its motion changes that surface between one measurement and the next.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase


@dataclass(frozen=True)
class Selection:
    """Patterns as those of file names: ``*`` stands for any text, dots included.

    A pattern that matches the name of a module takes all of it.

    Attributes:
        include: Patterns of what is measured; none: everything.
        exclude: Patterns of what is left out of that.

    Example:
        >>> selection = Selection(include=("encoder",), exclude=("*.bias",))
        >>> [n in selection for n in ("encoder.fc.weight", "encoder.fc.bias", "head.weight")]
        [True, False, False]
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    @property
    def is_everything(self) -> bool:
        """Whether nothing is left out."""
        return not self.include and not self.exclude

    def __contains__(self, name: str) -> bool:
        """Whether the parameter of that name is measured."""
        if self.is_everything:
            return True
        is_included = not self.include or _matches(name, self.include)
        return is_included and not _matches(name, self.exclude)

    def complaint(self, names: Sequence[str]) -> str | None:
        """Tells of the first pattern that matches none of a model's parameters [names]."""
        for argument, patterns in (("include", self.include), ("exclude", self.exclude)):
            for pattern in patterns:
                if not any(_matches(name, (pattern,)) for name in names):
                    return f"{argument}={pattern!r} matches no parameter. {_hint(pattern, names)}"
        return None


EVERYTHING = Selection()


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(known, pattern) for known in _names_of(name) for pattern in patterns)


def _names_of(name: str) -> list[str]:
    """Lists what a pattern may name a parameter by: itself, and every module around it.

    Example:
        >>> _names_of("net.conv.parametrizations.weight.original0")[-2:]
        ['net.conv.parametrizations.weight.original0', 'net.conv.weight']
    """
    parts = name.split(".")
    names = [".".join(parts[:i]) for i in range(1, len(parts) + 1)]
    if "parametrizations" in parts[:-1]:  # As it was called before.
        place = parts.index("parametrizations")
        names.append(".".join([*parts[:place], parts[place + 1]]))
    return names


def _hint(pattern: str, names: Sequence[str]) -> str:
    """Names what may be meant."""
    known = list(dict.fromkeys(n for name in names for n in _names_of(name)))
    plain = pattern.strip(".*") or pattern
    near = difflib.get_close_matches(plain, known, n=3, cutoff=0.5)
    if near:
        return f"Did you mean {' or '.join(map(repr, near))}?"
    top = list(dict.fromkeys(name.partition(".")[0] for name in names))
    more = ", ..." if len(top) > 8 else ""
    return (
        f"Patterns match full names, as {names[0]!r}; those here begin with "
        f"{', '.join(map(repr, top[:8]))}{more}."
    )
