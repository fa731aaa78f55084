"""The rooms and their one-way order."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_lca

ROOMS = [
    "quadrature",
    "arithmetic",
    "allocation",
    "names",
    "shards",
    "rowsums",
    "grouping",
    "synchrony",
    "metrics",
    "record",
    "rows",
    "ledger",
    "history",
    "detail",
    "figures.canvas",
    "figures.timeline",
    "figures.style",
    "figures.layers",
    "figures.majority",
    "figures.closeup",
    "figures.moments",
    "figures",
    "scalars",
    "distribution",
    "flavours",
    "notices",
    "board",
    "gallery",
    "signals",
    "fence",
    "fingerprint",
    "flag",
    "ranks",
    "batches",
    "scaling",
    "hooks",
    "modes",
    "objective",
    "probe",
    "path",
    "reuse",
    "meter",
    "results",
    "cost",
    "settings",
    "support",
    "rounding",
    "assembly",
    "session",
    "budget",
    "steps",
    "training",
    "callback",
    "export",
    "demo",
    "checkpoints",
    "player",
    "replay",
    "terminal",
    "replay_command",
    "__main__",
    "tensorboard.query",
    "tensorboard.tables",
    "tensorboard.bins",
    "tensorboard.views",
    "tensorboard.together",
    "tensorboard.source",
    "tensorboard.store",
    "tensorboard.answers",
    "tensorboard.plugin",
]
PACKAGES = ("figures", "tensorboard")
HOME = Path(lightning_lca.__file__).parent


def imports_of(room):
    path = HOME / room.replace(".", "/")
    path = path / "__init__.py" if room in PACKAGES else path.with_suffix(".py")
    for node in ast.walk(ast.parse(path.read_text())):
        if (
            isinstance(node, ast.ImportFrom)
            and node.module
            and node.module.startswith("lightning_lca")
        ):
            base = node.module.partition(".")[2]
            packages = {"": "", **{package: f"{package}." for package in PACKAGES}}
            yield from (
                [packages[base] + alias.name for alias in node.names]
                if base in packages
                else [base]
            )
        elif isinstance(node, ast.Import):
            yield from (a.name.partition(".")[2] for a in node.names if "lightning_lca" in a.name)


def test_every_module_is_a_room():
    for package in ("", *(f"{name}." for name in PACKAGES)):
        found = (HOME / package.replace(".", "/")).glob("*.py")
        rooms = [r for r in ROOMS if r.rpartition(".")[0] == package.rstrip(".")]
        rooms = [r for r in rooms if r not in PACKAGES]
        assert sorted(package + p.stem for p in found) == sorted([*rooms, f"{package}__init__"])


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_from_the_rooms_above_it(room):
    above = ROOMS[: ROOMS.index(room)]
    assert set(imports_of(room)) <= set(above)


def loaded_after(code):
    code += "; import sys; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


HEAVY = {"torch", "pytorch_lightning", "lightning", "torchmetrics", "matplotlib", "tensorboard"}


def test_the_dashboard_knows_the_record_and_not_the_training():
    rooms = [room for room in ROOMS if room.startswith("tensorboard.")]
    outside = {i for room in rooms for i in imports_of(room) if i not in rooms}
    assert outside <= {"record", "history", "synchrony"}


def test_importing_the_dashboard_loads_neither_torch_nor_lightning_nor_matplotlib():
    light = "import lightning_lca.tensorboard.plugin, lightning_lca.tensorboard.answers"
    assert not loaded_after(light) & (HEAVY - {"tensorboard"})
    assert "numpy" not in loaded_after("import lightning_lca.tensorboard")


def test_importing_the_package_loads_neither_torch_nor_lightning():
    assert not loaded_after("import lightning_lca; dir(lightning_lca)") & HEAVY


def test_the_record_is_read_without_torch():
    read = "import lightning_lca, pathlib; lightning_lca.History; "
    read += "from lightning_lca.record import read; list(read(pathlib.Path('.')))"
    assert not loaded_after(read) & (HEAVY - {"tensorboard"})


def test_the_pure_core_is_used_without_lightning():
    names = "allocate, refine, Segment, Quadrature, Sample, Grouping"
    assert not loaded_after(f"from lightning_lca import {names}") & (HEAVY - {"torch"})


def test_every_public_name_is_there_and_no_other():
    for name in lightning_lca.__all__:
        assert getattr(lightning_lca, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'LCACalback'"):
        lightning_lca.LCACalback  # noqa: B018
