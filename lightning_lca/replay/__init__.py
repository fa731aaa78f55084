"""The same measure on saved weights: from one checkpoint of a run to the next."""

from lightning_lca.replay.checkpoints import ReplayError
from lightning_lca.replay.runs import RECORD, replay

__all__ = ["RECORD", "ReplayError", "replay"]
