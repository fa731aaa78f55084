"""The floors of the house: a folder imports from lower ones only, and the light ones stay light."""

import ast
import subprocess
import sys
from pathlib import Path
from types import FunctionType

import pytest

import lightning_lca

FLOORS = {
    **dict.fromkeys(["measure", "record"], 1),
    **dict.fromkeys(["analysis", "runtime"], 2),
    **dict.fromkeys(["probe", "figures", "tensorboard"], 3),
    **dict.fromkeys(["reporting"], 4),
    **dict.fromkeys(["training"], 5),
    **dict.fromkeys(["replay"], 6),
    **dict.fromkeys(["cli"], 7),
}
NUMPY_TOWER = {"record", "analysis", "figures", "tensorboard"}
HOME = Path(lightning_lca.__file__).parent
FILES = sorted(p for p in HOME.rglob("*.py") if p.parent != HOME)


def imports_of(path, nodes=ast.walk):
    """Lists (folder, file) of the package's own modules that a file imports."""
    for node in nodes(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lightning_lca"):
            parts = node.module.split(".")[1:]
            # `from lightning_lca.record import eventfile` and `from lightning_lca import figures`.
            for alias in node.names if len(parts) < 2 else [None]:
                folder, *file = [*parts, *([alias.name] if alias else [])]
                yield folder, (file or [""])[0]


def folder_of(path):
    return path.relative_to(HOME).parts[0]


def test_every_folder_has_its_floor():
    assert {folder_of(path) for path in FILES} == FLOORS.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(HOME).as_posix())
def test_a_folder_imports_from_lower_floors_only(path):
    mine = folder_of(path)
    for folder, _ in imports_of(path):
        assert folder == mine or FLOORS[folder] < FLOORS[mine], f"{mine} imports {folder}"
        if mine in NUMPY_TOWER:
            assert folder in NUMPY_TOWER, f"{mine} is free of torch, and imports {folder}"


def test_no_file_imports_itself_in_a_circle():
    graph = {}
    for path in FILES:
        key = (folder_of(path), path.stem)
        # What a function imports when it is called is no circle.
        graph[key] = {i for i in imports_of(path, ast.iter_child_nodes) if i[0] == key[0]}
    while leaves := [key for key, needs in graph.items() if not needs & graph.keys()]:
        for key in leaves:
            del graph[key]
    assert not graph


def loaded_after(code):
    code += "; import sys; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


TYPES = {
    *("BreakdownName", "FrameName", "GroupBy", "ProbeMode", "ProbeSource", "QuadratureName"),
    "Segments",
}


def found(name):
    return getattr(lightning_lca, name)


HEAVY = {"torch", "pytorch_lightning", "lightning", "torchmetrics", "matplotlib", "tensorboard"}


def test_importing_the_dashboard_loads_neither_torch_nor_lightning_nor_matplotlib():
    light = "import lightning_lca.tensorboard.plugin, lightning_lca.tensorboard.routes"
    assert not loaded_after(light) & (HEAVY - {"tensorboard"})
    assert "numpy" not in loaded_after("import lightning_lca.tensorboard")


def test_importing_the_package_loads_neither_torch_nor_lightning():
    assert not loaded_after("import lightning_lca; dir(lightning_lca)") & HEAVY


def test_the_record_is_read_without_torch():
    read = "import lightning_lca, pathlib; lightning_lca.History; "
    read += "from lightning_lca.record.eventfile import read; list(read(pathlib.Path('.')))"
    assert not loaded_after(read) & (HEAVY - {"tensorboard"})


def test_the_pure_core_is_used_without_lightning():
    names = "allocate, refine, Segment, Quadrature, Sample, Grouping"
    assert not loaded_after(f"from lightning_lca import {names}") & (HEAVY - {"torch"})


def test_every_public_name_is_there_and_no_other():
    types = {n for n in lightning_lca.__all__ if not isinstance(found(n), type | FunctionType)}
    assert types == TYPES, "names of types that no value has"
    for name in set(lightning_lca.__all__) - types:
        assert found(name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'LCACalback'"):
        lightning_lca.LCACalback  # noqa: B018
