"""Half precision: a loss scale of the probe's own, and what rounding leaves of small updates."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_lca.measure.allocation import Segment
from lightning_lca.measure.tensors import HALF
from lightning_lca.runtime.lightnings import warn

_FIRST, _GROW_AFTER = 2.0**16, 2000


class LossScale:
    """The power of two that a loss is multiplied by before its gradient is taken.

    It is lowered until no gradient overflows, and grows again after two thousand that did not.
    Powers of two round nothing, so it does not show in a gradient that float16 can hold.

    Attributes:
        value: The scale.
        factor: The same as a tensor [], which a recorded loss reads anew each time.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        """Starts at torch's own default."""
        self.value = _FIRST
        self.factor = torch.tensor(_FIRST, device=device)
        self._good = 0
        self._before: float | None = None  # It was lowered for a gradient that is still tried.

    def _set(self, value: float) -> None:
        self.value = value
        self.factor.fill_(value)

    def unscaled(self, gradients: list[Tensor]) -> list[Tensor]:
        """Returns gradients [*shape] of the loss itself, in new tensors."""
        unscaled = list(torch._foreach_mul(gradients, 1 / self.value))
        if self._before is not None and self.value <= 1 and not _are_finite(unscaled):
            self._set(self._before)  # That it was lowered did not help.
        self._before = None
        return unscaled

    def fits(self, gradients: list[Tensor]) -> bool:
        """Whether scaled gradients are finite; if not, lowers the scale while it can."""
        if self.value <= 1 or _are_finite(gradients):
            self._good += 1
            if self._good >= _GROW_AFTER:
                self._set(min(2 * self.value, _FIRST))
                self._good = 0
            return True
        self._before = self._before or self.value
        self._set(max(1.0, self.value / 4))
        self._good = 0
        return False


def _are_finite(gradients: list[Tensor]) -> bool:
    norms = torch._foreach_norm([g for g in gradients if g.numel()], float("inf"))
    return bool(torch.stack(list(norms)).isfinite().all())


class Rounding:
    """Warns at the first motion of half-precision weights of what rounding leaves of it."""

    def __init__(self, module: nn.Module) -> None:
        """Looks for such weights among those that train."""
        types = {p.dtype for p in module.parameters() if p.requires_grad}
        self._waits = bool(types.intersection(HALF))

    @torch.no_grad()
    def look(self, segment: Segment) -> None:
        """Counts on one segment, unless that was done or nothing moved."""
        if not self._waits:
            return
        half = {n: w for n, w in segment.start.items() if w.dtype in HALF}
        counts = [_counts(start, segment.stop[n]) for n, start in half.items()]
        if not counts:
            return
        moved, stuck = torch.stack(counts).sum(0).tolist()
        if not moved:
            return
        self._waits = False
        weights = sum(w.numel() for w in half.values())
        types = " and ".join(sorted({str(w.dtype).removeprefix("torch.") for w in half.values()}))
        warn(
            f"LCA: {weights:,} weights are {types}. In the first step {1 - moved / weights:.1%} of "
            f"them stayed where they were, as updates that are too small round away; for "
            f"{stuck / moved:.1%} of the others there is no number between start and stop at which "
            "the middle of the step could be evaluated. Credits are those of the motion that is "
            'left, and coarse. precision="bf16-mixed" keeps the weights in float32.'
        )


def _counts(start: Tensor, stop: Tensor) -> Tensor:
    """Counts the weights that moved, and those of them without a middle: [2]."""
    middle = torch.lerp(start, stop, 0.5)
    moved = start != stop
    stuck = moved & ((middle == start) | (middle == stop))
    return torch.stack([moved.sum(), stuck.sum()])
