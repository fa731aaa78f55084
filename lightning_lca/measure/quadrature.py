"""Quadrature rules on [0, 1] as validated data.

A rule says where on a segment the gradient is taken (nodes) and how much each value counts
(weights). Along a straight step, Simpson's rule is the classical fourth-order Runge-Kutta method
applied to the path integral of the gradient, whose integrand does not depend on the state.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

_MOMENT_TOLERANCE = 1e-12


@dataclass(frozen=True)
class Quadrature:
    """A rule ∫₀¹ f(s) ds ≈ Σ wᵢ f(sᵢ), checked by mathematics when it is built.

    Attributes:
        name: What the rule is called in messages and records.
        nodes: Positions [k], increasing, each in [0, 1].
        weights: Weights [k]; they sum to 1 and may be negative.
        degree: Polynomials up to this degree are integrated exactly: Σ wᵢ sᵢʲ = 1/(j+1) for j ≤
            degree.
        closes: Whether what the rule leaves of the loss change is shared out over the weights, by
            how much the gradient of each changes along its motion. Needs both ends.
        adapts: Whether, where that is much, the middle is taken, too: Simpson's rule for that step.

    Raises:
        ValueError: The lists differ in length, a node lies outside [0, 1] or out of order, a moment
            up to ``degree`` is wrong, or a rule that closes is not the trapezoid.

    Example:
        >>> Quadrature("trapezoid", nodes=(0.0, 1.0), weights=(0.5, 0.5), degree=1).first_is_start
        True
        >>> Quadrature("thirds", nodes=(0.0, 0.5, 1.0), weights=(1 / 3, 1 / 3, 1 / 3), degree=2)
        Traceback (most recent call last):
            ...
        ValueError: Quadrature 'thirds' claims degree 2, but integrates s^2 to 0.416667
            instead of ...
    """

    name: str
    nodes: tuple[float, ...]
    weights: tuple[float, ...]
    degree: int
    closes: bool = False
    adapts: bool = False

    def __post_init__(self) -> None:
        """Checks shapes, order and moments."""
        if (self.closes and self.nodes != (0.0, 1.0)) or (self.adapts and not self.closes):
            raise ValueError(
                f"Quadrature {self.name!r} closes or adapts, which needs nodes=(0.0, 1.0) and "
                f"closes=True; got nodes={self.nodes} and closes={self.closes}."
            )
        if not self.nodes or len(self.nodes) != len(self.weights):
            raise ValueError(
                f"Quadrature {self.name!r} needs as many weights as nodes, at least one: got "
                f"{len(self.nodes)} nodes and {len(self.weights)} weights."
            )
        if any(not 0.0 <= s <= 1.0 for s in self.nodes) or any(
            a >= b for a, b in zip(self.nodes, self.nodes[1:], strict=False)
        ):
            raise ValueError(
                f"Quadrature {self.name!r} needs increasing nodes in [0, 1], got {self.nodes}."
            )
        if self.degree < 0:
            raise ValueError(
                f"Quadrature {self.name!r} needs a degree of at least 0 (weights that sum to 1), "
                f"got {self.degree}."
            )
        for j in range(self.degree + 1):
            moment = math.fsum(w * s**j for s, w in zip(self.nodes, self.weights, strict=True))
            if not abs(moment - 1 / (j + 1)) <= _MOMENT_TOLERANCE:
                raise ValueError(
                    f"Quadrature {self.name!r} claims degree {self.degree}, but integrates s^{j} "
                    f"to {moment:.6g} instead of {1 / (j + 1):.6g}. Correct the weights or lower "
                    "the degree."
                )

    @property
    def first_is_start(self) -> bool:
        """Whether the rule uses the gradient at the start, which the step before may have taken."""
        return self.nodes[0] == 0.0

    @property
    def last_is_stop(self) -> bool:
        """Whether the rule uses the gradient at the end, which the next step may take over."""
        return self.nodes[-1] == 1.0

    @property
    def gradients_per_step(self) -> int:
        """Gradients that a chain of segments costs per segment once the start is taken over."""
        # A rule with a start but no end (Euler) takes the end gradient early, for the next step.
        return len(self.nodes) - (self.first_is_start and self.last_is_stop)

    def composite(self, panels: int) -> Quadrature:
        """Applies the rule on each of ``panels`` equal parts of [0, 1]; shared nodes are merged.

        Example:
            >>> rule = SIMPSON.composite(2)
            >>> rule.nodes
            (0.0, 0.25, 0.5, 0.75, 1.0)
            >>> [round(12 * w) for w in rule.weights]
            [1, 4, 2, 4, 1]
        """
        if panels < 1:
            raise ValueError(f"A composite rule needs at least 1 panel, got {panels}.")
        nodes: list[float] = []
        weights: list[float] = []
        for panel in range(panels):
            for s, w in zip(self.nodes, self.weights, strict=True):
                node = (panel + s) / panels
                if nodes and node == nodes[-1]:
                    weights[-1] += w / panels
                else:
                    nodes.append(node)
                    weights.append(w / panels)
        return Quadrature(f"{self.name} x{panels}", tuple(nodes), tuple(weights), self.degree)


EULER = Quadrature("euler", (0.0,), (1.0,), 0)
MIDPOINT = Quadrature("midpoint", (0.5,), (1.0,), 1)
TRAPEZOID = Quadrature("trapezoid", (0.0, 1.0), (1 / 2, 1 / 2), 1)
CLOSED_TRAPEZOID = Quadrature("closed_trapezoid", (0.0, 1.0), (1 / 2, 1 / 2), 1, closes=True)
ADAPTIVE = Quadrature("adaptive", (0.0, 1.0), (1 / 2, 1 / 2), 1, closes=True, adapts=True)
SIMPSON = Quadrature("simpson", (0.0, 0.5, 1.0), (1 / 6, 4 / 6, 1 / 6), 3)
BOOLE = Quadrature(
    "boole", (0.0, 0.25, 0.5, 0.75, 1.0), (7 / 90, 32 / 90, 12 / 90, 32 / 90, 7 / 90), 5
)
GAUSS2 = Quadrature("gauss2", (0.5 - math.sqrt(1 / 12), 0.5 + math.sqrt(1 / 12)), (1 / 2, 1 / 2), 3)
GAUSS3 = Quadrature(
    "gauss3", (0.5 - math.sqrt(3 / 20), 0.5, 0.5 + math.sqrt(3 / 20)), (5 / 18, 8 / 18, 5 / 18), 5
)

QuadratureName = Literal[
    "euler",
    "midpoint",
    "trapezoid",
    "closed_trapezoid",
    "adaptive",
    "simpson",
    "boole",
    "gauss2",
    "gauss3",
]
RULES: dict[str, Quadrature] = {
    rule.name: rule
    for rule in (
        EULER,
        MIDPOINT,
        TRAPEZOID,
        CLOSED_TRAPEZOID,
        ADAPTIVE,
        SIMPSON,
        BOOLE,
        GAUSS2,
        GAUSS3,
    )
}


def as_quadrature(rule: Any) -> Quadrature:
    """Looks a rule up by name; a `Quadrature` is passed through.

    Raises:
        ValueError: No rule has this name.
        TypeError: Neither a name nor a `Quadrature`.
    """
    if isinstance(rule, Quadrature):
        return rule
    if not isinstance(rule, str):
        raise TypeError(
            f"quadrature must be a name or a Quadrature, got {type(rule).__name__}. "
            f"Names: {', '.join(RULES)}."
        )
    if rule not in RULES:
        raise ValueError(
            f"Unknown quadrature {rule!r}. Choose one of {', '.join(RULES)}, or pass a Quadrature."
        )
    return RULES[rule]
