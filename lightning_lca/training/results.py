"""What stays of a measurement when the callback is copied or pickled: plain data on the host."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lightning_lca.measure.allocation import Allocation
from lightning_lca.record.history import History
from lightning_lca.training.meter import Meter


@dataclass(frozen=True)
class Results:
    """One probe's results so far.

    Attributes:
        history: Measured steps.
        totals: Cumulative credit of every weight {name: [*shape]}, where parameters are tracked.
        last: None: the latest allocation is not kept.
    """

    history: History
    totals: dict[str, Tensor] | None
    last: Allocation | None = None

    @classmethod
    def of(cls, meter: Meter) -> Results:
        """Takes what a meter has measured, up to its last `collect`."""
        totals = meter.totals
        return cls(meter.history, totals and {n: t.cpu() for n, t in totals.items()})
