"""A loss scale of the probe's own, so that small float16 gradients do not vanish."""

from __future__ import annotations

import torch
from torch import Tensor

_FIRST, _GROW_AFTER = 2.0**16, 2000


class LossScale:
    """The power of two that a loss is multiplied by before its gradient is taken.

    It is lowered until no gradient overflows, and grows again after two thousand that did not.
    Powers of two round nothing, so it does not show in a gradient that float16 can hold.

    Attributes:
        value: The scale.
    """

    def __init__(self) -> None:
        """Starts at torch's own default."""
        self.value = _FIRST
        self._good = 0
        self._before: float | None = None  # It was lowered for a gradient that is still tried.

    def unscaled(self, gradients: list[Tensor]) -> list[Tensor]:
        """Gives gradients [*shape] of the loss itself, in new tensors."""
        unscaled = list(torch._foreach_mul(gradients, 1 / self.value))
        if self._before is not None and self.value <= 1 and not _are_finite(unscaled):
            self.value = self._before  # That it was lowered did not help.
        self._before = None
        return unscaled

    def fits(self, gradients: list[Tensor]) -> bool:
        """Whether scaled gradients are finite; if not, lowers the scale while it can."""
        if self.value <= 1 or _are_finite(gradients):
            self._good += 1
            if self._good >= _GROW_AFTER:
                self.value, self._good = min(2 * self.value, _FIRST), 0
            return True
        self._before = self._before or self.value
        self.value, self._good = max(1.0, self.value / 4), 0
        return False


def _are_finite(gradients: list[Tensor]) -> bool:
    norms = torch._foreach_norm([g for g in gradients if g.numel()], float("inf"))
    return bool(torch.stack(list(norms)).isfinite().all())
