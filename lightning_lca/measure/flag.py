"""A yes or no that is on its way from the device, so that nothing waits for it until it is used."""

from __future__ import annotations

import torch
from torch import Tensor


class Flag:
    """A boolean [] on a device; ``bool(flag)`` reads it on the host.

    From CUDA it is copied as soon as it is known, beside whatever is queued behind it: reading it
    waits for the flag alone and not for the device.
    """

    def __init__(self, value: Tensor) -> None:
        """Takes a boolean tensor [], and starts to copy it."""
        self.tensor = value
        self._host = value
        self._arrived: torch.cuda.Event | None = None
        if value.device.type == "cuda":
            self._host = torch.empty((), dtype=torch.bool, pin_memory=True)
            self._host.copy_(value, non_blocking=True)
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record(torch.cuda.current_stream(value.device))

    def __bool__(self) -> bool:
        if self._arrived is not None:
            self._arrived.synchronize()
        return bool(self._host)

    @classmethod
    def of(cls, value: bool, device: torch.device) -> Flag:
        """Makes a flag of what the host knows."""
        # A fill, and not a copy: the host would wait for a copy.
        return cls(torch.full((), value, dtype=torch.bool, device=device))
