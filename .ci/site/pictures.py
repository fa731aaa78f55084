"""Draws the figures of the guide, of the runs in `runs`.

python .ci/site/pictures.py            all of them, some minutes the first time
python .ci/site/pictures.py heatmap    the ones named
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from runs import run, save

from lightning_lca import figures


def of(made: str, draw: Callable[..., Any], **options: Any) -> Any:
    """Draws a figure of a run."""
    return lambda: draw(run(made), **options)


def generalization(made: str) -> Any:
    """Draws both probes of a run."""
    return lambda: figures.generalization(run(made, "train"), run(made, "val"))


HURTS = "too_much_momentum"
PICTURES: dict[str, Callable[[], Any]] = {
    "heatmap": of("digits", figures.heatmap),
    "heatmap_hurts": of(HURTS, figures.heatmap),
    "cumulative": of("digits", figures.cumulative),
    "cumulative_hurts": of(HURTS, figures.cumulative),
    "stack": of("digits", figures.stack),
    "stack_hurts": of(HURTS, figures.stack),
    "totals": of("digits", figures.totals),
    "totals_hurts": of(HURTS, figures.totals),
    "ledger": of("digits", figures.ledger),
    "ledger_chords": of("chords", figures.ledger),
    "helping": of("digits", figures.helping),
    "helping_hurts": of(HURTS, figures.helping),
    "helping_per_step": of("digits", figures.helping_per_step),
    "helping_per_weight": of("digits", figures.helping_per_weight),
    "synchrony": of("digits", figures.synchrony),
    "neurons": of("digits", figures.neurons, layer="conv2"),
    "distribution": of("digits", figures.distribution),
    "trajectories": of("digits", figures.trajectories),
    "oscillation": of("digits", figures.oscillation),
    "oscillation_unshuffled": of("unshuffled", figures.oscillation),
    "breakdown_part": of("digits", figures.breakdown, name="part"),
    "breakdown_part_hurts": of(HURTS, figures.breakdown, name="part"),
    "breakdown_order": of("digits", figures.breakdown, name="order"),
    "breakdown_order_hurts": of(HURTS, figures.breakdown, name="order"),
    "breakdown_term": of("terms", figures.breakdown, name="term"),
    "generalization": generalization("digits"),
    "generalization_overfits": generalization("few_images"),
}


if __name__ == "__main__":
    for picture in sys.argv[1:] or PICTURES:
        save(PICTURES[picture](), picture)
