"""What a user's type checker and `help` say: a typo fails, and only public names are named."""

import importlib
import inspect
import re
import subprocess
import sys
import textwrap
import typing

import pytest
from support import ROOT
from support.processes import environment

import lightning_lca
from lightning_lca import History, LCACallback, figures
from lightning_lca.measure.quadrature import RULES, QuadratureName
from lightning_lca.training.settings import BREAKDOWNS, BreakdownName

GOOD = """
from torch.utils.data import DataLoader
from lightning_lca import (
    BreakdownName, FrameName, History, LCACallback, ProbeMode, ProbeSource, QuadratureName, Segments
)

batches: list[int] = [1, 2]
loader: DataLoader[int] = DataLoader(batches)  # type: ignore[arg-type]
probes: dict[str, ProbeSource] = {"train": "train", "val": "val", "own": batches}
mode: ProbeMode = "eval"
rule: QuadratureName = "gauss2"
split: BreakdownName = "order"
segments: Segments = "step"
table: FrameName = "groups"
LCACallback()
LCACallback(probe="val", probe_mode=mode, quadrature=rule, segments=segments)
LCACallback(probe={"train": "train", "val": "val"}, breakdown=["part", "order"])
LCACallback(probe=batches, breakdown=split)
LCACallback(probe=iter(batches), breakdown=True)
LCACallback(probe=loader)
LCACallback(probe=probes)
LCACallback(probe={"a": loader, "b": (1, 2)}, group_by=lambda name, parameter: name)
History.load("lightning_logs/version_0").to_pandas(table)
reveal_type(LCACallback().history.allocated)
"""

BAD = [
    'LCACallback(probe="vall")',
    'LCACallback(probe={"train": "trian"})',
    "LCACallback(probe=3)",
    'LCACallback(probe_mode="evaluate")',
    'LCACallback(quadrature="simson")',
    'LCACallback(breakdown="parts")',
    'LCACallback(breakdown=["part", "orders"])',
    'LCACallback(segments="batches")',
    'LCACallback(neurons="no")',
    'History.load("lightning_logs/version_0").to_pandas("group")',
    "LCACallback(every_n_step=2)",
]


@pytest.mark.slow
def test_a_typo_fails_in_a_users_mypy_and_what_is_right_passes(tmp_path):
    file = tmp_path / "users.py"
    file.write_text(GOOD + "\n".join(BAD) + "\n")
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path / "cache")]
    # The package is looked at where it is, as one that is installed.
    result = subprocess.run(
        [*command, str(file)], capture_output=True, text=True, env=environment(MYPYPATH=str(ROOT))
    )
    told = re.findall(r"users\.py:(\d+): error", result.stdout)
    lines = file.read_text().splitlines()
    assert list(dict.fromkeys(lines[int(n) - 1] for n in told)) == BAD, (
        result.stdout + result.stderr
    )
    assert "ndarray" in re.search(r'note: Revealed type is "(.*)"', result.stdout)[1]


def test_the_names_of_types_are_those_that_are_taken():
    assert set(typing.get_args(QuadratureName)) == RULES.keys()
    assert typing.get_args(BreakdownName) == BREAKDOWNS
    for name in ("ProbeSource", "QuadratureName", "BreakdownName", "ProbeMode", "Segments"):
        assert name in lightning_lca.__all__
        assert name in str(inspect.signature(LCACallback))


def names_in(docstring):
    """The names that a docstring sets in single backticks."""
    return set(re.findall(r"(?<![`\w])`([A-Za-z_][\w.]*)`(?!`)", docstring or ""))


def is_public(name, owner):
    """Whether a reader of the owner's help can find what is named there."""
    if any(part.startswith("_") for part in name.split(".")):
        return False
    for home in (owner, lightning_lca, figures, History):
        found = home
        for part in name.split("."):
            found = getattr(found, part, None)
            if found is None:
                break
        else:
            return True
    module = name.rpartition(".")[0]
    if module.startswith("lightning_lca"):
        return hasattr(importlib.import_module(module), name.rpartition(".")[2])
    return re.search(rf"^\s+{re.escape(name)}: ", inspect.getdoc(owner) or "", re.M) is not None


@pytest.mark.parametrize("name", lightning_lca.__all__)
def test_the_help_of_public_things_names_only_public_things(name):
    owner = getattr(lightning_lca, name)
    if not isinstance(owner, type):
        assert {n for n in names_in(inspect.getdoc(owner)) if not is_public(n, owner)} == set()
        return
    members = [m for n, m in vars(owner).items() if not n.startswith("_")]
    documented = [owner, *(m.__func__ if isinstance(m, classmethod) else m for m in members)]
    for it in documented:
        text = it.__doc__ if isinstance(it, type) else inspect.getdoc(it)
        hidden = {n for n in names_in(text) if not is_public(n, owner)}
        assert not hidden, f"{it} names {hidden}"


def test_the_signature_of_the_callback_names_what_can_be_imported():
    signature = str(inspect.signature(LCACallback))
    known = {*dir(typing), *dir(__builtins__), *dir(importlib.import_module("collections.abc"))}
    known |= {*lightning_lca.__all__, "None", "bool", "int", "str", "float", "True", "False"}
    types = " ".join(re.findall(r": '(.*?)'", signature))
    assert set(re.findall(r"[A-Za-z_]\w+", types)) <= known


def test_the_example_of_the_callback_is_code_that_runs():
    """Doctests run it; here it is looked at: no line of it is hidden in a comment."""
    example = inspect.getdoc(LCACallback).partition("Example:\n")[2]
    code = re.findall(r"^(?:>>>|\.\.\.) (.*)$", textwrap.dedent(example), re.M)
    assert any(line.startswith("trainer.fit(") for line in code)
    assert not any(line.lstrip().startswith("#") for line in code)
