"""Half-precision weights, whose small updates round away: how many, told once."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_lca.measure.allocation import Segment
from lightning_lca.measure.tensors import HALF
from lightning_lca.runtime.notices import warn


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
