"""Runs the core suite against old and new Lightnings, torchmetrics and torch, for one table.

    python .ci/matrix.py                   every cell; two of them fetch a torch of some GB
    python .ci/matrix.py oldest            the named ones
    python .ci/matrix.py oldest -- ARGS    other arguments for pytest in place of the core suite

Environments are built in .matrix/ and serve again as long as they are there; it may be deleted.
The lower bounds are those of pyproject.toml; other versions are those of .ci/constraints.txt or,
where a cell says "newest", the newest there are. Needs Python 3.11 and packaging, which the
environment of the tests has.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
import venv
from dataclasses import dataclass
from pathlib import Path

import tomllib
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
WHERE = ROOT / ".matrix"
CORE = [
    "tests/measure/test_metrics.py",
    "tests/probe/test_probe.py",
    "tests/promises/test_copies.py",
    "tests/promises/test_harmless.py",
    "tests/promises/test_lightning_cli.py",
    "tests/promises/test_manual.py",
    "tests/promises/test_resume.py",
    "tests/promises/test_truth.py",
    "tests/record/test_history.py",
    "tests/training/test_callback.py",
    "tests/training/test_meter.py",
]
SHOWN = ("torch", "pytorch-lightning", "lightning", "torchmetrics", "numpy")


def requirements() -> dict[str, Requirement]:
    """Reads {package: requirement} from pyproject.toml, extras that tests need included."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *extras["parquet"], *extras["examples"]]
    return {needed.name: needed for needed in map(Requirement, lines)}


def lower_bound(needed: Requirement) -> str:
    """Finds the one version that a requirement calls its oldest."""
    (oldest,) = (bound.version for bound in needed.specifier if bound.operator == ">=")
    return oldest


def pinned(package: str) -> str:
    """Finds the version of a package in the constraints."""
    text = (ROOT / ".ci" / "constraints.txt").read_text()
    return re.search(rf"^{package}==([\w.+]+)", text, re.MULTILINE)[1]


NEEDED = requirements()
LOW = {name: lower_bound(needed) for name, needed in NEEDED.items()}
# What is newest, but for versions that are excluded; lightning is pytorch-lightning renamed.
PL, L = (
    f"{name}{NEEDED['pytorch-lightning'].specifier}" for name in ("pytorch-lightning", "lightning")
)
FLOOR = [f"{name}=={version}" for name, version in LOW.items() if name != "torch"]
OLD_PL, OLD_L = (
    f"pytorch-lightning=={LOW['pytorch-lightning']}",
    f"lightning=={LOW['pytorch-lightning']}",
)


@dataclass(frozen=True)
class Cell:
    """One set of versions.

    Attributes:
        packages: Requirements, beside torch and what tests need.
        root: The Lightning whose Trainer trains.
        torch: Version of torch; "" is the newest.
        without: A package to take out again, that others require.
    """

    packages: tuple[str, ...]
    root: str = "pytorch_lightning"
    torch: str = pinned("torch")
    without: str | None = None


CELLS = {
    "newest": Cell((PL, "torchmetrics")),
    "oldest": Cell(tuple(FLOOR)),  # Every lower bound but that of torch.
    "lightning-newest": Cell((L,), "lightning.pytorch", without="pytorch-lightning"),
    "lightning-oldest": Cell((OLD_L,), "lightning.pytorch", without="pytorch-lightning"),
    "both-train-pl": Cell((L, PL)),
    "both-train-lightning": Cell((L, PL), "lightning.pytorch"),
    "both-old-pl": Cell((L, OLD_PL), "lightning.pytorch"),
    "both-old-lightning": Cell((OLD_L, PL)),
    "torchmetrics-oldest": Cell((PL, f"torchmetrics=={LOW['torchmetrics']}")),
    "pl-2.2": Cell(("pytorch-lightning==2.2.*",)),
    "pl-2.3": Cell(("pytorch-lightning==2.3.*",)),
    "pl-2.4": Cell(("pytorch-lightning==2.4.*",)),
    "pl-2.5": Cell(("pytorch-lightning==2.5.*",)),
    "floor": Cell(tuple(FLOOR), torch=LOW["torch"]),  # Every lower bound.
    "torch-newest": Cell((PL, "torchmetrics"), torch=""),
}


def pip(python: Path, log: Path, *arguments: str) -> None:
    """Runs pip, and shows the end of what it said if it failed."""
    run = subprocess.run(
        [python, "-m", "pip", *arguments], capture_output=True, text=True, check=False
    )
    log.write_text(run.stdout + run.stderr)
    if run.returncode:
        raise RuntimeError(run.stderr.strip().splitlines()[-1])


def environment(home: Path, *paths: Path) -> Path:
    """Makes a virtual environment that also sees some other directories; gives its Python."""
    python = home / "bin" / "python"
    if not python.exists():
        venv.create(home, with_pip=True)
        (site_packages(home) / "matrix.pth").write_text("".join(f"{path}\n" for path in paths))
    return python


def site_packages(home: Path) -> Path:
    """Finds where an environment keeps its packages."""
    return next((home / "lib").glob("python*")) / "site-packages"


def install(home: Path, python: Path, *arguments: str) -> None:
    """Installs into an environment, unless just this was installed there before."""
    done, asked = home / "done", "\n".join(arguments)
    if done.exists() and done.read_text() == asked:
        return
    pip(python, WHERE / f"{home.name}.pip.log", "install", *arguments)
    done.write_text(asked)


def base(version: str) -> Path:
    """Builds what the cells of one torch share: torch and what tests need."""
    home = WHERE / f"torch-{version or 'newest'}"
    own = ("torch", "pytorch-lightning", "torchmetrics")
    rest = [str(needed) for name, needed in NEEDED.items() if name not in own]
    rest += ["pytest", "jsonargparse[signatures]", "rich"]
    if version == pinned("torch"):
        rest += ["-c", str(ROOT / ".ci" / "constraints.txt")]
    elif version == LOW["torch"]:
        rest += [f"{name}=={oldest}" for name, oldest in LOW.items() if name not in own]
    install(home, environment(home), f"torch=={version}" if version else "torch", *rest)
    return home


def build(name: str, cell: Cell) -> Path:
    """Builds the environment of a cell; gives its Python."""
    home = WHERE / name
    python = environment(home, ROOT, site_packages(base(cell.torch)))
    # torch stays the one below, whatever a Lightning thinks of its version.
    # Lightning below 2.5 needs pkg_resources, which newer setuptools lack.
    install(home, python, *cell.packages, "setuptools<81")
    if cell.without:
        pip(python, WHERE / f"{name}.pip.log", "uninstall", "-y", cell.without)
    return python


def versions(python: Path) -> list[str]:
    """Asks an environment which versions it has."""
    code = (
        "import importlib.metadata as m\n"
        f"for name in {SHOWN}:\n"
        "    try: print(m.version(name))\n"
        "    except m.PackageNotFoundError: print('-')"
    )
    return subprocess.run(
        [python, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()


def test(name: str, cell: Cell, python: Path, arguments: list[str]) -> tuple[str, bool]:
    """Runs tests in a cell; gives pytest's closing line and whether all passed."""
    ignored = [
        "ignore::DeprecationWarning",  # Of old packages, at import.
        "ignore::FutureWarning",
        "ignore:TypedStorage is deprecated:UserWarning",
        "ignore:pkg_resources is deprecated:UserWarning",
    ]
    flags = [flag for warning in ignored for flag in ("-W", warning)]
    run = subprocess.run(
        [python, "-m", "pytest", "-q", *flags, *arguments],
        cwd=ROOT,
        env=os.environ | {"LCA_LIGHTNING": cell.root, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    (WHERE / f"{name}.log").write_text(run.stdout)
    return (run.stdout.strip().splitlines() or ["no output"])[-1], run.returncode == 0


def main() -> int:
    """Builds and tests cell by cell; fails if any test did."""
    asked, rest = sys.argv[1:], []
    if "--" in asked:
        at = asked.index("--")
        asked, rest = asked[:at], asked[at + 1 :]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cells", nargs="*", help=", ".join(CELLS))
    names = parser.parse_args(asked).cells or list(CELLS)
    if unknown := set(names) - set(CELLS):
        parser.error(f"No such cell: {', '.join(sorted(unknown))}. Cells: {', '.join(CELLS)}.")
    WHERE.mkdir(exist_ok=True)
    rows, good = [], True
    for name in names:
        cell, began = CELLS[name], time.monotonic()
        try:
            python = build(name, cell)
            found = versions(python)
            result, passed = test(name, cell, python, rest or CORE)
        except RuntimeError as error:
            found, result, passed = ["?"] * len(SHOWN), f"not built: {error}", False
        good &= passed
        verdict = "ok" if passed else "FAILED"
        rows.append([name, *found, cell.root, verdict, result])
        print(f"{name}: {result} ({time.monotonic() - began:.0f} s in all)", flush=True)
    table = [["cell", *SHOWN, "trains with", "", "tests"], *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    print()
    for row in table:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
