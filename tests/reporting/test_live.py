"""The view of a notebook that trains: what it shows, how often, and that it disturbs nothing."""

import base64
import io
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from support.assertions import assert_same
from support.harmless import Case, Everything, twins
from support.models import Validated, pl, toy_loader
from support.training import fit

from lightning_lca import LCACallback
from lightning_lca.reporting import live
from lightning_lca.training.meter import Meter


class Notebook:
    """IPython as it is in a kernel: keeps what is displayed, and how often it was shown anew."""

    def __init__(self, monkeypatch):
        self.outputs = []  # One list of bundles per display.
        display = SimpleNamespace(display=self.display)
        shell = SimpleNamespace(kernel=object())
        ipython = SimpleNamespace(get_ipython=lambda: shell, display=display, version_info=(9, 0))
        monkeypatch.setitem(sys.modules, "IPython", ipython)
        monkeypatch.setitem(sys.modules, "IPython.display", display)

    def display(self, bundle, *, raw, display_id):
        assert raw
        assert display_id is True
        shown = [bundle]
        self.outputs.append(shown)

        def update(bundle, *, raw):
            assert raw
            shown.append(bundle)

        return SimpleNamespace(update=update)

    @property
    def shown(self):
        """All that the one output has shown."""
        (shown,) = self.outputs
        return shown


class Clock:
    """Stands still but for what training and, where it is given, drawing take."""

    def __init__(self, monkeypatch, *, draws=None):
        self.now, self.drawn = 100.0, 0

        def heatmap(histories):
            self.now += draws
            self.drawn += 1
            return b"a picture"

        monkeypatch.setattr(live, "clock", lambda: self.now)
        if draws is not None:
            monkeypatch.setattr(live, "heatmap", heatmap)


class Steps(pl.Callback):
    """Moves the clock on by what a step takes."""

    def __init__(self, clock, takes):
        self.clock, self.takes = clock, takes

    def on_train_batch_start(self, *args):
        self.clock.now += self.takes


@pytest.fixture
def notebook(monkeypatch):
    return Notebook(monkeypatch)


def figure_of(bundle):
    found = re.search(r"data:image/png;base64,([A-Za-z0-9+/=]+)", bundle["text/html"])
    image = Image.open(io.BytesIO(base64.b64decode(found[1]))).convert("L")
    return np.asarray(image)


def test_one_output_follows_training_and_ends_with_the_findings(tmp_path, notebook, monkeypatch):
    clock = Clock(monkeypatch)
    lca = fit(tmp_path, Steps(clock, 2.0), LCACallback(live=True), steps=12).lca
    titles = [bundle["text/plain"] for bundle in notebook.shown]
    assert titles[0].startswith("LCA at step 1 of 12: loss on the probe")
    assert titles[-1].startswith("LCA up to step 12 of 12: loss on the probe")
    assert len(titles) == 13, "every step takes two seconds, and there is the end"
    first, last = notebook.shown[0]["text/html"], notebook.shown[-1]["text/html"]
    assert "How sure" in last
    assert "How sure" not in first, "findings take their time"
    for group in lca.history.groups:
        assert group in first
    assert f"{lca.history.allocated[:, 0].sum():+.4f}" in last
    assert figure_of(notebook.shown[0]).std() > 5
    assert figure_of(notebook.shown[-1]).std() > 5
    assert (figure_of(notebook.shown[0]) != figure_of(notebook.shown[-1])).any()


@pytest.mark.parametrize(("takes", "updates"), [(0.01, 1), (0.25, 15), (0.6, 30)])
def test_it_is_updated_at_most_once_a_second(tmp_path, notebook, monkeypatch, takes, updates):
    clock, collected, collect = Clock(monkeypatch, draws=0.0), [], Meter.collect
    monkeypatch.setattr(
        Meter, "collect", lambda m: (collected.append(len(m._pending)), collect(m))[1]
    )
    fit(
        tmp_path,
        LCACallback(live=True, figures=False),
        Steps(clock, takes),
        steps=60,
        trainer={"log_every_n_steps": 100},
    )
    assert len(notebook.shown) == updates + 1
    assert len([n for n in collected if n]) <= updates + 1, "rows are copied for updates only"


def test_drawing_takes_a_tenth_of_training_at_most(tmp_path, notebook, monkeypatch):
    clock = Clock(monkeypatch, draws=3.0)
    fit(tmp_path, LCACallback(live=True), Steps(clock, 1.0), steps=100)
    assert clock.drawn == 1 + 100 // 30 + 1, "the first, one every thirty seconds, and the last"
    assert len(notebook.shown) > 90, "the table goes on with the figure that there is"


@pytest.mark.parametrize("late", [False, True])
def test_training_is_bitwise_the_same(tmp_path, capsys, notebook, monkeypatch, late):
    """With everything that a module can hold, where each step is shown, and where none is."""
    monkeypatch.setattr(live, "EVERY", 1e9 if late else 0.0)
    monkeypatch.setattr(live, "MOST_TIME", 1e9)
    plain, measured, _ = twins(Case(Everything, lca={"live": True}), tmp_path, capsys)
    assert_same(plain, measured)
    assert len(notebook.shown) == (2 if late else 8)


def test_several_probes_are_shown_below_one_another(tmp_path, notebook):
    probes = {"train": "train", "val": "val"}
    data = toy_loader(), toy_loader(shuffle=False)
    lca = fit(tmp_path, model=Validated, data=data, live=True, probe=probes, steps=60).lca
    (*_, last) = notebook.shown
    for shown in (last["text/html"], lca._repr_html_()):
        assert "<h4>probe &#x27;train&#x27;</h4>" in shown
        assert "<h4>probe &#x27;val&#x27;</h4>" in shown
        assert "<h4>train against validation</h4>" in shown
        assert shown.count("How sure") >= 2


def test_an_interrupted_training_leaves_what_was_measured(tmp_path, notebook):
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 7:
                raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fit(tmp_path, LCACallback(live=True), Stop(), steps=20)
    assert notebook.shown[-1]["text/plain"].startswith("LCA up to step 7 of 20")


def test_what_goes_wrong_in_it_ends_the_view_and_not_the_training(tmp_path, notebook, monkeypatch):
    monkeypatch.setattr(live, "EVERY", 0.0)
    monkeypatch.setattr(live, "heatmap", lambda histories: 1 / 0)
    with pytest.warns(UserWarning, match="ZeroDivisionError in the live view: division") as told:
        run = fit(tmp_path, live=True, steps=12)
    assert len([w for w in told if "live view" in str(w.message)]) == 1
    assert len(run.lca.history) == run.trainer.global_step == 12
    assert not notebook.outputs


@pytest.mark.parametrize("terminal", [False, True])
def test_where_there_is_no_notebook_a_line_says_so(tmp_path, monkeypatch, caplog, terminal):
    monkeypatch.delitem(sys.modules, "IPython", raising=False)
    if terminal:
        shell = SimpleNamespace(get_ipython=SimpleNamespace, version_info=(9, 0))
        monkeypatch.setitem(sys.modules, "IPython", shell)
    with caplog.at_level("INFO"):
        lca = fit(tmp_path, live=True, steps=5).lca
    assert (
        "live=True shows its view in a notebook (Jupyter, Colab, VS Code), and this is none"
        in caplog.text
    )
    assert len(lca.history) == 5


def test_a_callback_shows_itself_before_and_after_training(tmp_path):
    lca = LCACallback(probe_mode="eval")
    assert "LCA: training has not started." in lca._repr_html_()
    assert repr(lca).startswith("LCACallback(probe=train, probe_mode=eval, every_n_steps=1")
    fit(tmp_path, lca, steps=12)
    page = lca._repr_html_()
    assert lca.history._repr_html_().split("How sure")[0].split("</style>")[1] in page
    assert figure_of({"text/html": page}).std() > 5
