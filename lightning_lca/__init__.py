"""Loss Change Allocation for PyTorch Lightning: which weights, neurons and layers learn.

Names are imported when they are first used, so that TensorBoard can load its plugin without torch.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_lca.measure.allocation import (
        Allocation,
        Field,
        Position,
        Sample,
        Segment,
        allocate,
        refine,
    )
    from lightning_lca.measure.groups import GroupBy, Grouping
    from lightning_lca.measure.metrics import GroupCredit, HelpingFraction, HurtingFraction
    from lightning_lca.measure.quadrature import Quadrature, QuadratureName
    from lightning_lca.probe.classes import per_class
    from lightning_lca.probe.loss import ProbeMode
    from lightning_lca.record.findings import Finding
    from lightning_lca.record.frames import FrameName
    from lightning_lca.record.history import History
    from lightning_lca.training.callback import LCACallback
    from lightning_lca.training.freezing import LCAFreeze
    from lightning_lca.training.settings import BreakdownName, ProbeSource, Segments

__version__ = "0.1.0"  # The one place: pyproject.toml reads it here.

__all__ = [
    "Allocation",
    "BreakdownName",
    "Field",
    "Finding",
    "FrameName",
    "GroupBy",
    "GroupCredit",
    "Grouping",
    "HelpingFraction",
    "History",
    "HurtingFraction",
    "LCACallback",
    "LCAFreeze",
    "Position",
    "ProbeMode",
    "ProbeSource",
    "Quadrature",
    "QuadratureName",
    "Sample",
    "Segment",
    "Segments",
    "allocate",
    "per_class",
    "refine",
]

_HOME = {
    "measure.allocation": (
        "Allocation",
        "Field",
        "Position",
        "Sample",
        "Segment",
        "allocate",
        "refine",
    ),
    "training.callback": ("LCACallback",),
    "training.freezing": ("LCAFreeze",),
    "training.settings": ("BreakdownName", "ProbeSource", "Segments"),
    "measure.groups": ("GroupBy", "Grouping"),
    "record.findings": ("Finding",),
    "probe.classes": ("per_class",),
    "probe.loss": ("ProbeMode",),
    "record.frames": ("FrameName",),
    "record.history": ("History",),
    "measure.metrics": ("GroupCredit", "HelpingFraction", "HurtingFraction"),
    "measure.quadrature": ("Quadrature", "QuadratureName"),
}


def __getattr__(name: str) -> Any:
    """Imports a public name from its room (PEP 562)."""
    for room, names in _HOME.items():
        if name in names:
            value = getattr(importlib.import_module(f"lightning_lca.{room}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__


class _Moved:
    """Says what to do to whoever loads a pickle that was made before modules lay in folders."""

    names = ("callback", "history", "quadrature", "results", "rows", "settings")

    @classmethod
    def find_spec(cls, name: str, *_: Any) -> None:
        """Comes last among the finders of modules, when there is none of that name."""
        module = name.removeprefix(f"{__name__}.")
        if module != name and module in cls.names:
            raise ModuleNotFoundError(
                f"There is no module {name}: modules moved into folders. A pickle of LCACallback "
                "from before cannot be loaded; its results are in its record, "
                "lightning_lca.History.load(log_dir). Public names are imported from "
                "lightning_lca itself.",
                name=name,
            )


sys.meta_path.append(_Moved)
