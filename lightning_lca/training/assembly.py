"""From what was asked for to probes and meters."""

from __future__ import annotations

from typing import Any

from lightning_lca.measure.groups import Grouping
from lightning_lca.probe.batches import read_batches
from lightning_lca.probe.probe import Probe
from lightning_lca.reporting.distributions import Distributions
from lightning_lca.runtime.processes import Ranks
from lightning_lca.training.meter import Meter
from lightning_lca.training.settings import Settings
from lightning_lca.training.windows import Detail


def make_probe(trainer: Any, module: Any, asked: Settings, source: Any, ranks: Ranks) -> Probe:
    """Reads a probe's batches and evaluates it once; every rank must call this.

    Raises:
        MisconfigurationException: There is no batch, or no loss that can be measured.
    """
    probe = Probe(
        trainer,
        module,
        read_batches(source, trainer, asked.probe_batches, asked.seed, ranks),
        mode=asked.probe_mode,
        loss_fn=asked.loss_fn,
        seed=asked.seed,
        ranks=ranks,
    )
    probe.check()
    return probe


def make_meter(
    probe: Probe, module: Any, asked: Settings, grouping: Grouping, ranks: Ranks
) -> Meter:
    """Makes a meter that has measured nothing."""
    detail = Detail(
        module,
        grouping,
        neurons=asked.neurons,
        weights=asked.track_parameters,
        seed=asked.seed,
        process=ranks.process,
    )
    return Meter(
        probe,
        grouping,
        detail,
        Distributions(module),
        asked.rule,
        ranks,
        tolerance=asked.tolerance,
        max_splits=asked.max_splits,
        track_parameters=asked.track_parameters,
    )
