"""Notebooks on a real kernel: the tutorial, the live view, and TensorBoard below a cell."""

import json
import os
import re
import sysconfig

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from support import ROOT
from support.models import pl
from support.processes import PATIENCE, environment
from support.training import fit

from lightning_lca import History

TUTORIAL = ROOT / "examples" / "tutorial.ipynb"
pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True, scope="module")
def own_place(tmp_path_factory):
    """Where kernels and servers leave what they would leave in the home."""
    place = tmp_path_factory.mktemp("place")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RUNTIME_DIR", "CONFIG_DIR", "DATA_DIR"):
            patch.setenv(f"JUPYTER_{name}", str(place / name.lower()))
        patch.setenv("JUPYTER_PLATFORM_DIRS", "1")
        patch.setenv("IPYTHONDIR", str(place / "ipython"))
        patch.setenv("TMPDIR", str(place))  # TensorBoard notes here which servers run.
        yield place


class Watching(NotebookClient):
    """Notes how often each output was shown anew."""

    def process_message(self, message, cell, cell_index):
        if message["msg_type"] == "update_display_data":
            self.updates = getattr(self, "updates", 0) + 1
        return super().process_message(message, cell, cell_index)


def execute(notebook, directory):
    """Runs all cells, one after the other, in a kernel of their own."""
    places = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    client = Watching(
        notebook,
        timeout=PATIENCE,
        kernel_name="python3",
        resources={"metadata": {"path": str(directory)}},
    )
    client.execute(env=environment(PATH=places))
    return client


def cells(*sources):
    notebook = nbformat.v4.new_notebook()
    notebook.cells = [nbformat.v4.new_code_cell(source) for source in sources]
    return notebook


def kinds(notebook):
    """What each cell of code shows: its types of data, the richest of each output."""
    order = ("image/png", "text/html", "text/plain")
    return [
        [
            next(kind for kind in order if kind in output.data)
            for output in cell.outputs
            if output.output_type in ("display_data", "execute_result")
        ]
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


@pytest.fixture(scope="module")
def tutorial(tmp_path_factory):
    """The tutorial, run afresh."""
    notebook = nbformat.read(TUTORIAL, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    directory = tmp_path_factory.mktemp("tutorial")
    client = execute(notebook, directory)
    return notebook, client, directory


def test_the_tutorial_runs_and_shows_what_its_stored_outputs_show(tutorial):
    notebook, *_ = tutorial
    stored = nbformat.read(TUTORIAL, as_version=4)
    nbformat.validate(stored)
    assert kinds(notebook) == kinds(stored)
    assert [kind for cell in kinds(notebook) for kind in cell] == [
        "text/html",  # The live view.
        "image/png",
        "text/html",
        "text/html",
        "image/png",
        "text/html",
    ]
    assert TUTORIAL.stat().st_size < 600_000
    assert "/work" not in (text := TUTORIAL.read_text())
    assert "/tmp" not in text


def test_the_tutorials_view_followed_the_training(tutorial):
    notebook, client, _ = tutorial
    (view,) = (
        output.data["text/html"]
        for cell in notebook.cells
        if "live=True" in cell.source and cell.cell_type == "code"
        for output in cell.outputs
        if output.output_type == "display_data"
    )
    assert "LCA up to step" in view
    assert "data:image/png;base64," in view
    assert "How sure" in view
    assert client.updates >= 1, "the end, and what came before it"


def test_what_the_tutorial_says_of_its_run_is_true(tutorial):
    history = History.load(tutorial[2] / "lightning_logs" / "version_0")
    credit = history.allocated
    assert credit.sum() < -2
    assert credit[:40].sum() < 0.8 * credit.sum(), "most of the learning is in the first steps"
    turns = (np.diff(np.sign(credit[40:].sum(1))) != 0).sum()
    assert turns > 10, "later, blue and red take turns"
    assert np.abs(history.residual).sum() < 0.01 * np.abs(credit).sum()
    assert history.helping.mean() > history.hurting.mean()
    part = history.breakdowns["part"]
    sums = dict(zip(part.names, part.allocated.sum(0).T, strict=True))
    assert (sums["signal"] < 0).all()
    assert (sums["momentum"] < 0).all()
    assert (sums["noise"] > 0).all()


def test_a_live_view_leaves_training_bitwise_the_same_on_a_kernel(tmp_path):
    made = cells(
        """
        import pathlib
        from support.assertions import assert_same
        from support.harmless import Case, Everything, fit
        from lightning_lca.reporting import live

        live.EVERY, live.MOST_TIME = 0.0, 1e9
        runs = []
        for lca in (None, []):
            runs.append(fit(Case(Everything, lca={"live": True}), pathlib.Path("run"), lca=lca))
            pathlib.Path("run").rename(f"run{len(runs)}")
        """.replace("\n        ", "\n"),
        "assert_same(*runs); print('the same')",
    )
    client = execute(made, tmp_path)
    assert client.updates == 7, "each of seven steps, and the end; the first made the output"
    assert made.cells[-1].outputs[-1].text == "the same\n"


def test_tensorboard_opens_below_a_cell_as_the_guide_says(tmp_path, own_place):
    logger = pl.loggers.TensorBoardLogger(tmp_path, "lightning_logs")
    fit(tmp_path, trainer={"logger": logger}, steps=6)
    for text in ((ROOT / "lightning_lca" / "docs" / "notebooks.md").read_text(), tutorial_text()):
        (code,) = [
            block
            for block in re.findall(r"```\w+\n(.*?)```", text, re.S)
            if "%load_ext tensorboard" in block
        ]
    stop = """
    import os, signal
    from tensorboard import manager
    for server in manager.get_all():
        os.kill(server.pid, signal.SIGTERM)
    """.replace("\n    ", "\n")
    ask = """
    import json, time, urllib.request
    from tensorboard import manager
    (server,) = manager.get_all()
    def ask(route):
        url = f"http://localhost:{server.port}/data/plugin/lca/{route}"
        return json.loads(urllib.request.urlopen(url).read())
    until = time.monotonic() + 600
    while not (runs := ask("runs")["runs"]) and time.monotonic() < until:
        time.sleep(0.2)
    print([run["name"] for run in runs])
    """.replace("\n    ", "\n")
    made = cells(*code.strip().splitlines(), ask, stop)
    try:
        execute(made, tmp_path)
    finally:
        stop_all(own_place)
    html = "".join(o.data.get("text/html", "") for o in made.cells[1].outputs if "data" in o)
    assert "<iframe" in html
    assert made.cells[2].outputs[-1].text == "['version_0']\n"


def tutorial_text():
    notebook = nbformat.read(TUTORIAL, as_version=4)
    return "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def stop_all(directory):
    """Stops the servers that TensorBoard has noted in a directory for temporary files."""
    for note in directory.glob(".tensorboard-info/pid-*.info"):
        os.kill(json.loads(note.read_text())["pid"], 15)
