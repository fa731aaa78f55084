"""The compatibility page tells the truth: every row names a test, and that test is there."""

import re
import subprocess
import sys

import pytest
from support import ROOT, TESTS

PAGE = ROOT / "lightning_lca" / "docs" / "compatibility.md"
WORDS = {"yes", "limits", "refused", "not run in CI"}


def rows():
    """The rows of tables of set-ups; that of measured models has no tests to name."""
    found, header = [], None
    for line in PAGE.read_text().splitlines():
        cells = [c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]]
        header = None if not cells else header or cells[0]
        if cells and cells[0] != header and set(cells[0]) != {"-"} and header != "model":
            found.append(cells)
    return found


@pytest.fixture(scope="module")
def collected():
    """Every test of the files that the page names, {node}."""
    files = sorted({str(TESTS / held.strip("`").split("::")[0]) for *_, held in rows()})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run([*command, *files], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-2000:]
    return {line.removeprefix("tests/") for line in done.stdout.splitlines() if "::" in line}


def test_every_row_says_how_it_stands_and_names_a_test():
    assert len(rows()) > 30
    for cells in rows():
        assert len(cells) == 4, cells
        setup, status, remark, held = cells
        assert status in WORDS, setup
        assert re.fullmatch(r"`\w+/test_\w+\.py(::\w+(\[[^`]*\])?)?`", held), setup
        assert remark or status == "yes", f"{setup}: {status}, and why?"


@pytest.mark.slow
def test_every_test_that_the_page_names_exists(collected):
    for setup, *_, held in rows():
        node = held.strip("`")
        found = [n for n in collected if n == node or n.startswith((node + "[", node + "::"))]
        assert found, f"{setup}: there is no {node}"


def test_the_readme_leads_to_the_page():
    assert "lightning_lca/docs/compatibility.md" in (ROOT / "README.md").read_text()
