"""What the files around the package say of it, and of one another."""

import importlib.metadata
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import lightning_lca
from lightning_lca.cli.main import main

ROOT = Path(__file__).parents[2]
MALICIOUS = ("2.6.2", "2.6.3")  # Of pytorch-lightning and of lightning.


@pytest.fixture
def matrix(monkeypatch):
    pytest.importorskip("tomllib", reason="the matrix needs Python 3.11")
    spec = importlib.util.spec_from_file_location("matrix", ROOT / ".ci" / "matrix.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "matrix", module)  # For its dataclasses.
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    spec.loader.exec_module(module)
    return module


def test_the_version_is_that_of_the_installed_package():
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", lightning_lca.__version__)
    assert lightning_lca.__version__ == importlib.metadata.version("lightning-lca")


def test_the_command_line_tells_the_version(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"lightning-lca {lightning_lca.__version__}\n"
    command = [sys.executable, "-m", "lightning_lca", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == f"lightning-lca {lightning_lca.__version__}\n"


def test_hooks_before_a_commit_are_what_ci_runs():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    hooks = [hook["entry"] for repo in config["repos"] for hook in repo["hooks"]]
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert [line for line in lines if line.split(" ")[0] in ("ruff", "mypy")] == hooks


def test_what_contributors_and_ci_are_sent_to_exists(matrix):
    named = set(matrix.CORE)
    for file in (".github/CONTRIBUTING.md", ".ci/run", "lightning_lca/docs/witness.md"):
        text = (ROOT / file).read_text()
        named.update(re.findall(r"\b(?:tests|lightning_lca)/[\w/]*[\w.]*\w", text))
    assert len(named) > 20
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


def test_malicious_uploads_are_in_no_requirement_and_in_no_cell_of_the_matrix(matrix):
    cells = [package for cell in matrix.CELLS.values() for package in cell.packages]
    for needed in map(matrix.Requirement, [*map(str, matrix.NEEDED.values()), *cells]):
        if needed.name in ("pytorch-lightning", "lightning"):
            assert not any(needed.specifier.contains(version) for version in MALICIOUS), needed
            assert len(needed.specifier) > 0


def test_cells_of_the_oldest_versions_take_every_lower_bound(matrix):
    assert set(matrix.LOW) >= {"torch", "pytorch-lightning", "torchmetrics", "tensorboard", "numpy"}
    for name, needed in matrix.NEEDED.items():
        assert needed.specifier.contains(matrix.LOW[name]), needed
        pin = f"{name}=={matrix.LOW[name]}"
        assert (pin in matrix.CELLS["oldest"].packages) == (name != "torch")
    assert matrix.CELLS["floor"].torch == matrix.LOW["torch"]
