"""Replay over processes: one record, to the bit that of one process, whatever is killed."""

from __future__ import annotations

import shutil

import pytest
from scripts import replayed
from scripts.replayed import ByHand, Data, Net, Once, Stream
from support.replays import assert_one_record, train

from lightning_lca.replay.runs import RECORD, replay

slow = pytest.mark.slow  # It trains, and starts processes.

SMALL = {"log_every_n_steps": 4}
CASES = {
    "two probes of several batches, single neurons and weights": (
        Net,
        {},
        Data,
        {
            "probe": {"train": "train", "own": replayed.BATCHES},
            "probe_batches": 2,
            "group_by": "neuron",
            "track_parameters": True,
        },
    ),
    "shares of some parameters, three workers": (
        Net,
        {},
        Data,
        {
            "breakdown": ["order", "term"],
            "oscillation": True,
            "loss_fn": replayed.terms,
            "exclude": "*.bias",
            "group_by": "parameter",
            "workers": 3,
        },
    ),
    "chords, and what is left of the last": (
        Net,
        {},
        Data,
        {"every_n_steps": 5, "neurons": True, "oscillation": True},
    ),
    "refined": (Net, {}, Data, {"tolerance": 1e-7, "group_by": "module:1"}),
    "running statistics that move": (Net, {}, Data, {"probe_mode": "eval", "breakdown": True}),
    "another rule, dropout on": (
        Net,
        {},
        Data,
        {"quadrature": "gauss2", "probe_mode": "train", "seed": 5, "include": ["head", "body.*"]},
    ),
    "the user's code at every node": (
        Net,
        {},
        None,
        {"loss_fn": replayed.by_code, "probe": replayed.BATCHES, "figures": False},
    ),
    "manual optimization, double precision": (
        ByHand,
        {},
        Data,
        {"loss_fn": replayed.loss_fn, "precision": "64-true"},
    ),
    "a stream": (Net, {}, Stream, {"probe_batches": 2}),
    "what is read but once, mixed precision": (Net, {}, Once, {"precision": "bf16-mixed"}),
}


def both(path, model, data, **options):
    """Replays by one process and by workers; gives both records."""
    workers = options.pop("workers", 2)
    (one,) = replay(path, model, data, out=path / "one", **options)
    (many,) = replay(path, model, data, out=path / "many", workers=workers, **options)
    return one, many


@slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization")
@pytest.mark.filterwarnings("ignore:.*IterableDataset.*")
def test_workers_write_the_record_of_one_process(tmp_path, case):
    model, arguments, data, options = CASES[case]
    where = {name: options[name] for name in ("precision",) if name in options}
    train(tmp_path, model(**arguments), Data(), measured=False, steps=16, **where)
    one, many = both(tmp_path, model, data, **SMALL | options)
    assert_one_record(one, many)
