"""What hangs in the loggers beside scalars: figures, the summary, distributions, a layout."""

import io
import re
import sys
import time
from types import SimpleNamespace

import markdown
import numpy as np
import pytest
import pytorch_lightning as pl
from PIL import Image
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from support.figures import drawn
from support.models import Validated, toy_loader
from support.training import fit
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.util import tensor_util

from lightning_lca import History, LCACallback
from lightning_lca.record import summary
from lightning_lca.record.tables import StepTable
from lightning_lca.reporting.distributions import Distributions
from lightning_lca.reporting.figures import Gallery

pytestmark = [pytest.mark.figures, pytest.mark.slow]
KINDS = ("images", "tensors", "histograms")
CORE = {"heatmap", "cumulative", "ledger", "totals", "helping", "synchrony"}


class Credits(pl.Callback):
    """Keeps every step's credits."""

    def __init__(self, lca):
        self.lca, self.values = lca, {}

    def on_train_batch_end(self, trainer, *args):
        last = self.lca.last.values
        self.values[trainer.global_step] = {n: v.numpy().copy() for n, v in last.items()}


def read(log_dir):
    events = EventAccumulator(str(log_dir), size_guidance=dict.fromkeys(KINDS, 0))
    events.Reload()
    return events


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """A run as TensorBoard has it."""
    directory = tmp_path_factory.mktemp("shown")
    logger = TensorBoardLogger(directory, version="v")
    lca = LCACallback(track_parameters=True, figures=True)
    credits = Credits(lca)
    with drawn():
        fit(directory, lca, credits, steps=20, trainer={"logger": logger})
    return lca, credits, read(lca.log_dir)


def test_tensorboard_has_the_figures_of_the_finished_run(shown):
    lca, _, events = shown
    names = {tag.removeprefix("lca_figures/") for tag in events.Tags()["images"]}
    assert names >= CORE | {"helping_per_weight", "trajectories", "distribution"}
    for tag in events.Tags()["images"]:
        (event,) = events.Images(tag)  # Too short a run for more than the end.
        image = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)).convert("L"))
        assert image.shape == (event.height, event.width)
        assert event.width >= 500
        assert image.std() > 5, f"{tag} is blank"
    assert not (lca.log_dir / "lca_figures").exists()


@pytest.mark.parametrize(("logger", "taken"), [(CSVLogger, 0), (TensorBoardLogger, 10)])
def test_distributions_are_taken_only_where_a_logger_shows_them(
    tmp_path, monkeypatch, logger, taken
):
    steps, take = [], Distributions.of
    monkeypatch.setattr(Distributions, "of", lambda *a: (steps.append(1), take(*a))[1])
    fit(tmp_path, steps=20, figures=False, trainer={"logger": logger(tmp_path)})
    assert len(steps) == taken


def test_distributions_hold_every_weight_and_their_mean_is_the_layers_lca(shown):
    lca, credits, events = shown
    for g, layer in enumerate(lca.history.groups):
        tag = f"lca_layer_credit/0{g} {layer}"
        found = {e.step + 1: e.histogram_value for e in events.Histograms(tag)}
        assert sorted(found) == list(range(2, 21, 2)), "ten occasions"
        weights = int(lca.history.sizes[g])
        for step, histogram in found.items():
            assert histogram.num == sum(histogram.bucket) == weights
            lca_of_layer = lca.history.allocated[step - 1, g]
            assert histogram.sum / weights == pytest.approx(lca_of_layer, rel=1e-5)
            mine = weights * np.concatenate(
                [v.ravel() for n, v in credits.values[step].items() if n.startswith(layer)]
            )
            assert (histogram.min, histogram.max) == pytest.approx((mine.min(), mine.max()))
            counted = np.histogram(mine, [-np.inf, *histogram.bucket_limit[:-1], np.inf])[0]
            assert np.abs(counted - histogram.bucket).sum() <= 2, "but for rounding at edges"


def test_the_summary_reads_as_a_table_in_the_text_tab(shown):
    lca, _, events = shown
    text = tensor_util.make_ndarray(events.Tensors("lca/summary/text_summary")[-1].tensor_proto)
    html = markdown.markdown(text.item().decode(), extensions=["markdown.extensions.tables"])
    for line in summary.Ledger.of(lca.history).lines:
        assert f"<td>{line.name}</td>" in html
        assert f"{line.credit:+.4f}" in html
    assert html.count("<table>") == 2


def test_names_cannot_become_markdown_or_html():
    name = "<img src=x onerror=a()>|**x**_y_`z`[a](b)"
    rows = StepTable.from_parts(
        {
            "steps": np.arange(2),
            "allocated": np.ones((2, 1), np.float32),
            "helping": np.ones((2, 1), np.uint8),
            "idle": np.zeros((2, 1), np.uint8),
            "scalars": np.ones((2, 8)),
        },
        np.array([3]),
    )
    history = History([name], [3])
    history.append(rows)
    text = summary.markdown(history)
    html = markdown.markdown(text, extensions=["markdown.extensions.tables"])
    assert "<img" not in html
    assert "<strong>x" not in html
    assert "<a " not in html
    assert html.count("<td") == 7 + 5 * 3, "the name does not split its row"


def test_without_a_logger_for_figures_they_are_files(tmp_path):
    lca, *_ = fit(
        tmp_path, trainer={"logger": CSVLogger(tmp_path)}, probe={"a": "train", "b/../x": "train"}
    )
    files = {p.name for p in lca.log_dir.rglob("*.png")}
    assert files >= {f"{name}.png" for name in CORE}
    assert files >= {f"b_.._x_{name}.png" for name in CORE}
    assert {p.parent.name for p in lca.log_dir.rglob("*.png")} == {"lca_figures"}


def test_train_and_val_are_drawn_against_one_another(tmp_path):
    data, probes = (toy_loader(), toy_loader(shuffle=False)), {"train": "train", "val": "val"}
    logger = TensorBoardLogger(tmp_path, version="v")
    with drawn():
        lca = fit(
            tmp_path,
            model=Validated,
            data=data,
            probe=probes,
            figures=True,
            trainer={"logger": logger},
        ).lca
    images = read(lca.log_dir).Tags()["images"]
    assert [tag for tag in images if "generalization" in tag] == ["lca_figures/generalization"]


def test_figures_can_be_declined(tmp_path):
    lca, *_ = fit(tmp_path, trainer={"logger": TensorBoardLogger(tmp_path)}, figures=False)
    events = read(lca.log_dir)
    assert not events.Tags()["images"]
    assert "lca/summary/text_summary" in events.Tags()["tensors"]


def test_a_tracking_server_that_is_down_does_not_end_training(tmp_path):
    class WandbLogger(CSVLogger):
        calls = 0

        def log_image(self, key, images, step):
            WandbLogger.calls += 1
            raise ConnectionError("no route to host")

    with pytest.warns(UserWarning, match="ConnectionError while a figure was logged: no route"):
        lca = fit(tmp_path, trainer={"logger": WandbLogger(tmp_path)}, steps=20, figures=True).lca
    assert len(lca.history) == 20
    assert WandbLogger.calls == 1


class Shelf(CSVLogger):
    """Keeps what it is given to show, as the package behind each kind of logger takes it."""

    def __init__(self, path):
        super().__init__(path)
        self.shown = []

    @property
    def images(self):
        return {tag: np.asarray(image.convert("L")) for tag, image, _ in self.shown}

    def opened(self, file, name, step):
        self.shown.append((name, Image.open(file), step))

    def log_metrics(self, metrics, step=None):
        """Its experiment writes no CSV."""

    def save(self):
        pass


class WandbLogger(Shelf):
    def log_image(self, key, images, step):
        self.shown.append((key, *images, step))


class TrackioLogger(WandbLogger):
    """Of the user's own, with the method of W&B's."""


class CometLogger(Shelf):
    @property
    def experiment(self):
        return SimpleNamespace(log_image=self.opened)


class MLFlowLogger(Shelf):
    run_id = "of now"

    @property
    def experiment(self):
        def log_figure(run, figure, path):
            assert run == self.run_id
            file = io.BytesIO()
            figure.savefig(file)
            name, step = path.removesuffix(".png").rsplit("/", 1)
            self.opened(file, name, int(step))

        return SimpleNamespace(log_figure=log_figure)


class LitLogger(Shelf):
    @property
    def experiment(self):
        shelf = self

        class Series:
            def __getitem__(self, key):
                return SimpleNamespace(
                    append=lambda image, step: shelf.shown.append((key, image.data, step))
                )

        return Series()


@pytest.mark.parametrize("kind", [WandbLogger, TrackioLogger, CometLogger, MLFlowLogger, LitLogger])
def test_each_logger_gets_the_figures_in_its_own_way(tmp_path, monkeypatch, kind):
    class LitImage:
        def __init__(self, data):
            self.data = data

    monkeypatch.setitem(sys.modules, "litlogger", SimpleNamespace(Image=LitImage))
    logger = kind(tmp_path)
    lca = fit(tmp_path, trainer={"logger": logger}, steps=20, figures=True).lca
    assert logger.images.keys() >= {f"lca_figures/{name}" for name in CORE}
    for tag, image in logger.images.items():
        assert image.std() > 5, f"{tag} is blank"
    assert {step for _, _, step in logger.shown} == {19}, "on the loggers' x axis"
    assert not (lca.log_dir / "lca_figures").exists()


def plan(**known):
    """What a Gallery reads of a Trainer."""
    unknown = {
        "loggers": [],
        "max_steps": -1,
        "max_epochs": None,
        "num_training_batches": float("inf"),
        "accumulate_grad_batches": 1,
    }
    return SimpleNamespace(**(unknown | known))


def occasions(gallery, steps):
    found = []
    for step in range(1, steps + 1):
        if gallery.due(step):
            found.append(step)
            gallery.turn(step)
    return found


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        ({"max_steps": 1000}, list(range(100, 1001, 100))),
        (
            {"max_epochs": 3, "num_training_batches": 101, "accumulate_grad_batches": 2},
            [15, 31, 46, 61, 76, 92, 107, 122, 138, 153],
        ),
        (
            {"max_epochs": 3, "num_training_batches": 100, "max_steps": 50},
            list(range(5, 51, 5)),
        ),
        ({"max_epochs": -1}, [16, 32, 64, 128, 256, 512]),
    ],
)
def test_there_are_ten_occasions_or_one_every_doubling(tmp_path, known, expected):
    gallery = Gallery(plan(**known), tmp_path, draws=True)
    assert occasions(gallery, expected[-1]) == expected


def test_drawing_takes_a_twentieth_of_training_at_most(tmp_path, monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(time, "monotonic", lambda: clock.now)
    drawn = []

    def available(history):
        def make(history):
            clock.now += 3
            drawn.append(clock.now)
            raise RuntimeError("no picture")

        return {"slow": make}

    monkeypatch.setattr("lightning_lca.figures.available", available)
    gallery = Gallery(plan(), tmp_path, draws=True)

    def train():
        for _ in range(1000):
            clock.now += 1
            gallery.draw({"lca": [1]}, 0, last=False)

    with pytest.warns(UserWarning, match="slow could not be made, RuntimeError: no picture"):
        train()
    assert 0.04 * clock.now < 3 * len(drawn) <= 0.05 * clock.now
    with pytest.warns(UserWarning, match="slow could not be made"):
        gallery.draw({"lca": [1]}, 0, last=True)
    assert clock.now - drawn[-1] < 1e-9, "the end is always drawn"


def test_the_layout_is_beside_the_users_own(tmp_path):
    logger = TensorBoardLogger(tmp_path, version="v")
    logger.experiment.add_custom_scalars({"mine": {"loss": ["Multiline", ["train_loss"]]}})
    lca, *_ = fit(tmp_path, trainer={"logger": logger}, custom_scalars=True)
    runs = EventMultiplexer().AddRunsFromDirectory(str(lca.log_dir)).Reload()
    titles, charts = [], {}
    for run in runs.Runs():
        for event in runs.Tensors(run, "custom_scalars__config__"):
            layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
            titles += [category.title for category in layout.category]
            charts |= {
                c.title: c.multiline.tag for category in layout.category for c in category.chart
            }
    assert sorted(titles) == ["LCA", "mine"]
    scalars = read(lca.log_dir).Tags()["scalars"]
    found = [t for pattern in charts["cumulative LCA"] for t in scalars if re.search(pattern, t)]
    assert found == [f"lca_layer_cum/{i:02d} {g}" for i, g in enumerate(lca.history.groups)]
