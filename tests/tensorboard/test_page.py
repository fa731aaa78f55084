"""The page as a user meets it: a real Chromium on a real TensorBoard on real training runs."""

import contextlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import urllib.parse
import urllib.request

import numpy as np
import pytest
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select
from support.models import Classifier, toy_data, toy_loader, unrecorded
from support.noise import noisy
from support.processes import PATIENCE, environment, tensorboard, wait_for
from support.training import fit
from torch import nn
from torch.utils.data import DataLoader, Subset

from lightning_lca import History
from lightning_lca.record import writer as board
from lightning_lca.tensorboard import views
from lightning_lca.tensorboard.answers import as_json
from lightning_lca.tensorboard.snapshot import Range, Table

pytestmark = pytest.mark.slow

MINUS = str.maketrans("\N{MINUS SIGN}", "-")
EVIL = "<img src=x onerror=alert(1)>"
LAYERS = ["first", EVIL, "planted", "last"]
STEPS = 60


# -- runs -----------------------------------------------------------------------------------------


class Net(nn.Module):
    """Some layers, one of which is named as badly as a dict's key may be."""

    def __init__(self):
        super().__init__()
        widths = [(12, 16), (16, 16), (16, 16), (16, 4)]
        self.layers = nn.ModuleDict({n: nn.Linear(*w) for n, w in zip(LAYERS, widths)})

    def forward(self, x):
        for layer in list(self.layers.values())[:-1]:
            x = torch.tanh(layer(x))
        return self.layers["last"](x)


class Planted(Classifier):
    """Descends on all layers but one, on which it climbs."""

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", nn.functional.cross_entropy(self.net(x), y))

    def configure_optimizers(self):
        climbing = list(self.net.layers["planted"].parameters())
        rest = [p for p in self.parameters() if all(p is not c for c in climbing)]
        groups = [{"params": rest}, {"params": climbing, "maximize": True, "lr": 0.03}]
        return torch.optim.SGD(groups, lr=0.3)


class Broken(Planted):
    """Its loss is not finite for a while, and training goes on all the same."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        # No recording holds it: of one that has no such steps the probe's loss would be finite.
        return unrecorded(loss * math.nan if 20 <= self.global_step < 25 else loss)

    def on_before_optimizer_step(self, optimizer):
        for p in self.parameters():
            p.grad.nan_to_num_(0)


def train(root, name, kind=Planted, **arguments):
    logger = {"logger": TensorBoardLogger(root, name=None, version=name)}
    later = DataLoader(Subset(toy_data(), range(48, 96)), batch_size=16)
    data = toy_loader(), later
    fit(root, model=lambda: kind(Net()), data=data, steps=STEPS, trainer=logger, **arguments)


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """Three runs; the second is short of channels and of a second probe."""
    root = tmp_path_factory.mktemp("logs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(board, "CHUNK_STEPS", 16)
        train(root, "run_0", Broken)
        probes = {"train": "train", "val": "val"}
        train(root, "run_1", probe=probes, neurons=True, breakdown=True)
        train(root, "run_2", every_n_steps=2)
    return root


# -- TensorBoard and a browser --------------------------------------------------------------------


def rows_at(root):
    """How many rows TensorBoard has read so far."""
    with (
        contextlib.suppress(OSError),
        urllib.request.urlopen(f"{root}data/plugin/lca/runs", timeout=PATIENCE) as reply,
    ):
        return sum(run["rows"] or 0 for run in json.load(reply)["runs"])


@contextlib.contextmanager
def served(logs, rows):
    """Runs TensorBoard on a directory, and waits until it has read so many rows."""
    command, port = tensorboard(logs)
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment(),
    )
    root = f"http://localhost:{port}/"
    try:
        wait_for(lambda: rows_at(root) == rows, f"{rows} rows", process=process)
        yield root
    finally:
        process.terminate()
        process.wait()


@pytest.fixture(scope="module")
def address(logs):
    with served(logs, STEPS * 5 // 2) as root:
        yield root


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    browser, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    if browser is None or chromedriver is None:
        why = "No Chromium. On Debian: apt-get install -y chromium chromium-driver"
        # CI, which installs it, must not pass without; nobody else has to have a browser.
        pytest.fail(why) if os.environ.get("LCA_BROWSER") == "required" else pytest.skip(why)
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    flags += ["--disable-sync", "--disable-background-networking", "--disable-component-update"]
    for flag in [*flags, "--window-size=1400,1000"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(chromedriver))
    driver.downloads = tmp_path_factory.mktemp("downloads")
    driver.execute_cdp_cmd(
        "Browser.setDownloadBehavior",
        {"behavior": "allow", "downloadPath": str(driver.downloads)},
    )
    yield driver
    driver.quit()


def wait(condition, what="the page"):
    return wait_for(condition, what, pause=0.03)


class Page:
    """The LCA tab of a TensorBoard."""

    def __init__(self, driver, address):
        self.driver, self.address = driver, address

    def open(self, inside=False, **state):
        """Loads the page afresh with some state in its address: alone, or inside TensorBoard."""
        place = "" if inside else "data/plugin_entry.html?name=lca"
        hash_ = "".join(f"&p.lca.{k}={urllib.parse.quote(str(v))}" for k, v in state.items())
        self.driver.switch_to.default_content()
        self.driver.get("about:blank")
        self.driver.get(f"{self.address}{place}#lca&kept=1{hash_}")
        return self.enter() if inside else self.ready()

    def enter(self):
        self.driver.switch_to.default_content()
        frame = wait(lambda: self.driver.find_elements(By.TAG_NAME, "iframe"), "the frame")[0]
        self.driver.switch_to.frame(frame)
        return self.ready()

    def ready(self):
        wait(lambda: self.js("return document.documentElement.dataset.ready === 'true'"))
        return self

    def js(self, script, *arguments):
        return self.driver.execute_script(script, *arguments)

    def find(self, testid, inside=""):
        return self.driver.find_element(By.CSS_SELECTOR, f"[data-testid='{testid}'] {inside}")

    def data(self, testid):
        return self.js("return {...arguments[0].dataset}", self.find(testid))

    def text(self, testid):
        return self.find(testid).text

    def click(self, testid, inside=""):
        self.js("arguments[0].scrollIntoView({block: 'center'})", self.find(testid, inside))
        self.find(testid, inside).click()
        return self.ready()

    def hash(self):
        return dict(urllib.parse.parse_qsl(self.js("return parent.location.hash").lstrip("#")))

    def table(self):
        """The table's rows: {layer: [cells]}."""
        rows = self.js(
            "return [...document.querySelectorAll('[data-testid=layer-table] tbody tr')]"
            ".map(row => [row.dataset.name, ...[...row.cells].map(c => c.innerText.trim())])"
        )
        return {name: cells for name, *cells in rows}

    def credits(self):
        cells = self.table().values()
        return [float(row[3].replace("\N{MINUS SIGN}", "-")) for row in cells]

    def row_color(self, testid, row):
        """The mean colour [r, g, b] of a heatmap's row."""
        script = """
            const grid = arguments[0], canvas = grid.querySelector("canvas");
            const {plotLeft, plotTop, plotWidth, rowHeight} = grid.dataset;
            const ratio = canvas.width / grid.clientWidth;
            const y = (Number(plotTop) + (arguments[1] + 0.5) * rowHeight) * ratio;
            const pixels = canvas.getContext("2d").getImageData(
                plotLeft * ratio + 3, y, plotWidth * ratio - 6, 1).data;
            const sums = [0, 0, 0];
            pixels.forEach((value, i) => { if (i % 4 < 3) sums[i % 4] += value; });
            return sums.map((sum) => sum / (pixels.length / 4));
        """
        return self.js(script, self.find(testid), row)

    def drag(self, testid, start, stop):
        """Drags over the middle of a plot, from one fraction of its width to another."""
        hit = self.find(testid, ".hit")
        self.js("arguments[0].scrollIntoView({block: 'center'})", hit)
        width = hit.size["width"]
        (
            ActionChains(self.driver, duration=20)
            .move_to_element_with_offset(hit, round((start - 0.5) * width), 0)
            .click_and_hold()
            .move_by_offset(round((stop - start) * width), 0)
            .release()
            .perform()
        )
        return self.ready()


@pytest.fixture(scope="module")
def page(driver, address):
    return Page(driver, address)


@pytest.fixture(autouse=True)
def _clean(page):
    """No test leaves an error in the console, or asks another machine for anything."""
    page.driver.get_log("browser")
    yield
    logged = [e for e in page.driver.get_log("browser") if e["level"] == "SEVERE"]
    # Chromium asks for an icon of its own accord where the page has no TensorBoard around it.
    assert [e["message"] for e in logged if "favicon.ico" not in e["message"]] == []
    events = [json.loads(e["message"])["message"] for e in page.driver.get_log("performance")]
    asked = [e["params"] for e in events if e["method"] == "Network.requestWillBeSent"]
    hosts = {urllib.parse.urlparse(p["request"]["url"]).hostname for p in asked}
    assert hosts <= {"localhost", None}  # None: data: and blob:


@pytest.fixture(scope="module")
def history(logs):
    return {
        "train": History.load(logs / "run_1", "train"),
        "val": History.load(logs / "run_1", "val"),
        "other": History.load(logs / "run_2"),
    }


# -- what a user sees -----------------------------------------------------------------------------


def test_the_tab_opens_in_tensorboard(page):
    page.driver.get("about:blank")
    page.driver.get(page.address)
    tab = wait(
        lambda: next(
            (
                tab
                for tab in page.driver.find_elements(By.CSS_SELECTOR, ".mat-mdc-tab")
                if tab.text.strip() == "LCA"
            ),
            None,
        ),
        "the tab",
    )
    tab.click()
    page.enter()
    assert page.find("heatmap").is_displayed()
    assert page.text("run") == "run_0\nrun_1\nrun_2"


def test_layers_stand_in_network_order_with_their_true_sums(page, history):
    page.open(run="run_1")
    groups = list(history["train"].groups)
    assert [g.split(".")[-1] for g in groups] == LAYERS
    assert json.loads(page.data("heatmap")["layers"]) == groups
    assert list(page.table()) == groups
    np.testing.assert_allclose(page.credits(), history["train"].allocated.sum(0), rtol=6e-3)


def test_a_hurting_layer_is_red_and_a_helping_one_blue(page, history):
    credit = history["train"].allocated
    assert (credit[:, 2] > 0).mean() > 0.8
    assert credit.sum(0)[3] < 0
    page.open(run="run_1")
    red, _, blue = page.row_color("heatmap", 2)
    assert red > blue + 20
    red, _, blue = page.row_color("heatmap", 3)
    assert blue > red + 20


def test_the_verdict_tells_what_happened(page, history):
    page.open(run="run_1")
    train = history["train"]
    change = train.loss_after[-1] - train.loss_before[0]
    assert f"The loss fell by {abs(change):.4g}" in page.text("verdict-loss")
    assert f"Steps 1–{STEPS}" in page.text("verdict-loss")
    assert "3 layers helped, 1 hurt" in page.text("verdict-layers")
    assert "planted" in page.text("verdict-layers")
    assert "often than by chance" in page.text("verdict-together")
    assert page.data("verdict-trust")["warn"] == "false"


@contextlib.contextmanager
def answering(page, route, answer):
    """Gives the page an answer of one's own, whatever the server says."""
    given, body = json.dumps(f"/lca/{route}?"), json.dumps(as_json(answer))
    script = f"""
        const real = window.fetch;
        window.fetch = (url, ...more) => String(url).includes({given})
            ? Promise.resolve(new Response({body})) : real(url, ...more);
    """
    add = "Page.addScriptToEvaluateOnNewDocument"
    key = page.driver.execute_cdp_cmd(add, {"source": script})
    try:
        yield
    finally:
        page.driver.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", key)


def test_findings_tell_what_hurts_how_sure_that_is_and_what_to_try(page, history):
    layers = history["train"].groups
    planted = np.array([0, 2, 1, 0])
    run = History(layers, np.full(4, 1000))
    run.append(noisy(layers=4, planted=planted, share=0.53, converged=np.arange(200) > 5).rows)
    told = run.findings()
    assert [f.kind for f in told] == ["not_converged", "hurts", "hurts", "helping"]
    with answering(page, "findings", views.findings({"": Table.of(run)}, "", Range())):
        page.open(run="run_1")
    items = page.driver.find_elements(By.CSS_SELECTOR, "[data-testid=findings-list] > li")
    assert [item.get_attribute("data-kind") for item in items] == [f.kind for f in told]
    for item, finding in zip(items, told):
        assert f"Try: {finding.try_this}" in item.text
        assert finding.statement in item.text
    assert f"{layers[1]} hurts" in items[1].text  # Its name is text, whatever it is.
    assert f"{told[1].effect:+.2g} a step" in items[1].text
    assert "From 200 measured steps" in page.text("findings-note")
    assert not page.find("findings-more").is_displayed()
    page.click("findings-list", "[data-kind=hurts] button")
    assert page.hash()["p.lca.layer"] == layers[1]
    # The one that was clicked keeps the focus.
    pressed = page.js("return document.activeElement.getAttribute('aria-pressed')")
    assert (pressed, page.js("return document.activeElement.innerText")) == (
        "true",
        f"{layers[1]} hurts",
    )


def test_findings_follow_the_range(page):
    page.open(run="run_0")
    assert "In 6 of 60 steps loss or credit was not finite" in page.text("findings-list")
    page.open(run="run_0", start=1, stop=40)
    assert "here are 34" in page.text("findings-note")
    assert page.text("findings-list") == ""


def test_dragging_zooms_and_the_numbers_follow(page, history):
    page.open(run="run_1")
    page.drag("heatmap", 0.26, 0.49)
    shown = page.data("heatmap")
    assert (int(shown["start"]), int(shown["stop"])) == (STEPS // 4 + 1, STEPS // 2)
    part = history["train"].allocated[STEPS // 4 : STEPS // 2]
    np.testing.assert_allclose(page.credits(), part.sum(0), rtol=6e-3)
    assert page.find("start").get_attribute("value") == str(STEPS // 4 + 1)
    assert page.data("cumulative-chart")["start"] == shown["start"]
    assert page.hash()["p.lca.stop"] == str(STEPS // 2)

    page.drag("cumulative-chart", 0.03, 0.63)
    assert (page.data("heatmap")["start"], page.data("heatmap")["stop"]) == ("16", "25")
    page.js("scrollTo(0, 0)")
    ActionChains(page.driver).double_click(page.find("heatmap", ".hit")).perform()
    page.ready()
    assert page.data("heatmap")["stop"] == str(STEPS)
    assert "p.lca.stop" not in page.hash()


def test_steps_can_be_typed_and_moved_through_down_to_one(page, history):
    page.open(run="run_1", start=11, stop=20)
    page.click("pan-right")
    assert page.data("heatmap")["start"] == "16"
    page.click("zoom-out")
    assert (page.data("heatmap")["start"], page.data("heatmap")["stop"]) == ("11", "30")
    for testid in ("start", "stop"):
        field = page.find(testid)
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys("7" if testid == "start" else "7\n")
        page.ready()
    wait(lambda: page.data("heatmap")["stop"] == "7")
    page.ready()
    np.testing.assert_allclose(page.credits(), history["train"].allocated[6], rtol=6e-3)


def test_clicking_a_layer_shows_its_channels(page):
    page.open(run="run_1")
    assert "Click a layer" in page.text("channels-message")
    page.click("heatmap", "[data-name$=first]")
    shown = json.loads(page.data("channels-heatmap")["layers"])
    assert len(shown) == 16
    assert all(name.rpartition("/")[0].endswith("first") for name in shown)
    assert page.data("heatmap")["selected"].endswith("first")
    page.open(run="run_2", layer=shown[0].rpartition("/")[0])
    assert "LCACallback(neurons=True)" in page.text("channels-message")


def test_run_and_probe_can_be_switched(page, history):
    assert not np.allclose(history["train"].allocated, history["val"].allocated, rtol=0.1)
    page.open(run="run_1")
    Select(page.find("probe")).select_by_value("val")
    page.ready()
    np.testing.assert_allclose(page.credits(), history["val"].allocated.sum(0), rtol=6e-3)
    Select(page.find("run")).select_by_value("run_2")
    page.ready()
    np.testing.assert_allclose(page.credits(), history["other"].allocated.sum(0), rtol=6e-3)
    assert page.hash()["p.lca.run"] == "run_2"
    assert not page.find("probe").is_displayed()


def test_a_sent_link_restores_the_view(page):
    page.open(inside=True, run="run_1")
    page.drag("heatmap", 0.5, 0.75)
    page.click("heatmap", "[data-name$=last]")
    Select(page.find("probe")).select_by_value("val")
    page.ready()
    page.click("stack")
    link = page.js("return parent.location.href")
    before = [page.data(t) for t in ("heatmap", "channels-heatmap", "cumulative-chart")]
    page.driver.get("about:blank")
    page.driver.get(link)
    page.enter()
    assert [page.data(t) for t in ("heatmap", "channels-heatmap", "cumulative-chart")] == before
    assert page.data("cumulative-chart")["stacked"] == "true"
    assert page.find("probe").get_attribute("value") == "val"
    assert page.hash()["kept"] == "1"


def test_a_broken_link_says_so_or_falls_back(page):
    page.open(run="nowhere")
    assert "no run nowhere" in page.text("banner")
    page.open(run="run_1", probe="none", layer="gone", start="x", stop=-3, vs_run="nowhere")
    assert page.data("heatmap")["stop"] == str(STEPS)
    assert page.find("probe").get_attribute("value") == "train"


def test_two_probes_are_compared(page, history):
    page.open(run="run_1", layer=history["train"].groups[3])
    page.click("suggestion")
    assert page.find("versus").get_attribute("value") == '["run_1","val"]'
    assert page.find("compare-chart").is_displayed()
    maps = [page.data(f"compare-{part}") for part in ("a", "b", "difference")]
    assert {m["layers"] for m in maps} == {
        json.dumps(list(history["train"].groups)).replace(", ", ",")
    }
    assert maps[0]["limit"] == maps[1]["limit"]
    gap = np.sort(abs(history["val"].allocated - history["train"].allocated), axis=None)
    assert float(maps[2]["limit"]) == pytest.approx(gap[int(0.99 * gap.size)], rel=1e-4)


def test_runs_without_a_common_layer_are_told_so(page, logs):
    with another_run(page, logs, ["other.one", "other.two"]):
        page.open(run="run_1", vs_run="run_9", vs_probe="")
        assert "run_1 · train and run_9 have no layer in common" in page.text("compare-message")
        assert not page.find("compare-a").is_displayed()
    # Nor do they where a layer is looked for that only one has: it is not even asked.
    names = [f"net.{i}.attn" for i in range(50)]
    with another_run(page, logs, names):
        page.open(run="run_9", vs_run="run_2", vs_probe="", find="attn")
        told = "have no layer with “attn” in its name in common"
        assert f"run_9 and run_2 {told}" in page.text("compare-message")
        # Another choice is answered as ever.
        Select(page.find("run")).select_by_value("run_1")
        page.ready()
        Select(page.find("versus")).select_by_value('["run_2",""]')
        page.ready()
        assert page.find("compare-a").is_displayed()


def test_a_pressed_button_can_be_read_under_the_pointer(page):
    contrast = """
        const style = getComputedStyle(arguments[0]);
        const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
        const light = (paints) => {
          for (const paint of paints) {
            canvas.fillStyle = paint;
            canvas.fillRect(0, 0, 1, 1);
          }
          const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map(
            (c) => (c / 255 <= 0.04045 ? c / 3294.6 : ((c / 255 + 0.055) / 1.055) ** 2.4));
          return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05;
        };
        const ground = [getComputedStyle(document.body).backgroundColor, style.backgroundColor];
        const [a, b] = [light(ground), light([...ground, style.color])];
        return Math.max(a, b) / Math.min(a, b);
    """
    page.open(run="run_1")
    page.click("stack")
    for theme in ("light", "dark"):
        system_theme(page, theme)
        button = page.find("stack")
        ActionChains(page.driver).move_to_element(button).perform()
        assert page.js("return arguments[0].matches(':hover[aria-pressed=true]')", button)
        assert page.js(contrast, button) > 4.5
    system_theme(page, "light")


def system_theme(page, theme, media=""):
    """Makes the system light or dark, as it is to a page that stands alone."""
    features = [{"name": "prefers-color-scheme", "value": theme}]
    page.driver.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"media": media, "features": features}
    )
    wait(lambda: page.js("return document.documentElement.dataset.theme") == theme)
    page.ready()


def test_layers_that_overfit_stand_out(page, history):
    layers = history["train"].groups
    after = np.arange(200)[:, None] >= 80
    planted = {"train": [-1, -1, 1, -1], "val": np.where(after, [1, -1, 1, -1], [-1, -1, 1, -1])}
    tables = []
    for seed, credit in enumerate(planted.values()):
        run = History(layers, np.full(4, 1000))
        run.append(noisy(seed=seed, layers=4, planted=credit, phi=0).rows)
        tables.append(Table.of(run))
    answer = views.generalization(*tables, Range())
    with answering(page, "generalization", answer):
        page.open(run="run_1")
    assert page.find("generalization", "h2").text.endswith(f": {layers[0]} overfits")
    assert json.loads(page.data("pairs")["layers"]) == list(layers)
    # It has a red area; the other rows have none.
    red = """
        const {plotLeft, plotTop, plotWidth, rowHeight} = arguments[0].dataset;
        const canvas = arguments[0].querySelector("canvas");
        const pixels = canvas.getContext("2d").getImageData(
            plotLeft, Number(plotTop) + arguments[1] * rowHeight, plotWidth, rowHeight).data;
        let red = 0;
        for (let i = 0; i < pixels.length; i += 4) red += pixels[i] > pixels[i + 2] + 60;
        return red;
    """
    areas = [page.js(red, page.find("pairs"), row) for row in range(4)]
    assert areas[0] > 1000
    assert areas[1:] == [0, 0, 0]
    page.open(run="run_2")
    assert 'LCACallback(probe={"train": "train", "val": "val"})' in page.text(
        "generalization-message"
    )


@contextlib.contextmanager
def another_run(page, logs, names, **more):
    """Adds a run of noise with these layers, for a while."""
    run = noisy(steps=40, layers=len(names), **more)
    writer = board.RecordWriter(logs / "run_9", run.sizes, None, pytest.fail)
    try:
        said = {"probes": [None], "groups": names, "sizes": run.sizes.tolist(), "group_by": "layer"}
        writer.describe(said | {"settings": {}}, 0)
        writer.add(None, run.rows)
        writer.close()
        page.open(run="run_2")
        wait(lambda: "run_9" in page.text("run"), "the other run")
        yield History.load(logs / "run_9")
    finally:
        shutil.rmtree(logs / "run_9")


PARTS = ("ln_1", "attn_in", "attn_out", "ln_2", "mlp_in", "mlp_out")


def test_many_layers_are_blocks_that_open_and_are_found(page, logs):
    names = [f"net.h.{i}.{part}" for i in range(12) for part in PARTS]
    names = ["net.wte", *names, "head"]
    with another_run(page, logs, names) as history:
        page.open(run="run_9")
        blocks = [f"net.h.{i}.*" for i in range(12)]
        shown = ["net.*", "net.wte", "net.h.*", *blocks, "head"]
        assert json.loads(page.data("heatmap")["layers"]) == shown
        assert f"{len(names)} layers" in page.text("layers-note")
        allocated = float(re.search("LCA ([^,]+),", page.text("ledger-note"))[1].translate(MINUS))
        assert allocated == pytest.approx(history.allocated.sum(), rel=1e-4), "all layers"

        page.click("heatmap", "[data-name='net.h.3.*']")
        inside = [name for name in names if name.startswith("net.h.3.")]
        shown[shown.index("net.h.3.*") + 1 : shown.index("net.h.4.*")] = inside
        assert json.loads(page.data("heatmap")["layers"]) == shown
        opened = page.find("heatmap", "[data-name='net.h.3.*']").get_attribute("aria-expanded")
        folded = page.find("heatmap", "[data-name='net.h.4.*']").get_attribute("aria-expanded")
        assert (opened, folded) == ("true", "false")
        table, places = page.table(), [names.index(name) for name in inside]
        assert list(table) == shown
        told = float(table["net.h.3.*"][3].translate(MINUS))
        assert told == pytest.approx(history.allocated[:, places].sum(), rel=6e-3)
        assert json.loads(page.data("raster")["layers"]) == [
            name for name in shown if name not in ("net.*", "net.h.*", "net.h.3.*")
        ]
        # A layer within is chosen; its block folds from the keyboard.
        page.click("heatmap", f"[data-name='{inside[0]}']")
        assert page.hash()["p.lca.layer"] == inside[0]
        page.js("arguments[0].focus()", page.find("heatmap", "[data-name='net.h.3.*']"))
        ActionChains(page.driver).send_keys(Keys.ENTER).perform()
        page.ready()
        assert inside[0] not in json.loads(page.data("heatmap")["layers"])
        assert page.data("heatmap")["selected"] == "net.h.3.*", "its block stands for it"
        assert page.hash()["p.lca.layer"] == inside[0]

        field = page.find("find")
        field.send_keys("OUT  attn")
        found = [name for name in names if name.endswith("attn_out")]
        wait(lambda: json.loads(page.data("heatmap")["layers"]) == ["*out attn*", *found])
        assert f"12 layers of {len(names)} found" in page.text("layers-note")
        field.send_keys(" nowhere")
        wait(lambda: field.get_attribute("aria-invalid") == "true")
        page.ready()
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(Keys.DELETE)
        wait(lambda: "p.lca.find" not in page.hash())
        page.ready()
        page.click("every")
        assert json.loads(page.data("heatmap")["layers"]) == names
    page.open(run="run_1")
    assert not page.find("find").is_displayed(), "a few layers need no search"


def test_the_layer_that_learned_most_is_named_and_rows_are_sorted(page, logs):
    names = [f"net.h.{i}.{part}" for i in range(12) for part in PARTS] + ["head"]
    at = names.index("net.h.7.mlp_in")
    planted = np.zeros(len(names))
    planted[at] = -20
    with another_run(page, logs, names, planted=planted) as history:
        total = history.allocated.sum(0)
        assert total.argmin() == at
        page.open(run="run_9")
        # It lies in a folded block, and is named all the same.
        assert names[at] not in json.loads(page.data("heatmap")["layers"])
        assert page.text("layers-note").startswith(f"{names[at]} learned most: ")
        assert names[at] in page.text("verdict-layers")
        page.click("most")
        assert page.hash()["p.lca.layer"] == names[at]
        assert page.data("heatmap")["selected"] == "net.h.7.*"

        page.click("layers-sort")
        blocks = [f"net.h.{i}.*" for i in range(12)]
        sums = {b: total[i * 6 : i * 6 + 6].sum() for i, b in enumerate(blocks)}
        found = json.loads(page.data("heatmap")["layers"])
        inside = [name for name in found if name in sums]
        assert inside == sorted(blocks, key=sums.get)
        assert found.index("net.h.*") < found.index(inside[0]), "below the block that they are in"
        assert page.hash()["p.lca.sort"] == "credit"
        page.click("every")
        assert json.loads(page.data("heatmap")["layers"]) == [names[i] for i in total.argsort()]
        page.click("layers-sort")
        assert json.loads(page.data("heatmap")["layers"]) == names
    page.open(run="run_1", sort="credit")
    rows = "return [...document.querySelectorAll('#shares tbody tr')].map(row => row.dataset.name)"
    run = History.load(logs / "run_1", "train")
    assert page.js(rows) == [run.groups[i] for i in run.allocated.sum(0).argsort()]


def test_colours_that_clip_say_so_and_how_far_cells_go(page, history):
    page.open(run="run_1")
    credit = history["train"].allocated
    limit = float(page.data("heatmap")["limit"])
    scale = page.find("heatmap-scale")
    told = scale.get_attribute("aria-label").translate(MINUS)
    assert credit.min() < -limit
    assert credit.max() <= limit
    assert told == f"Colours: helps ≤ {-limit:.2g} to +{limit:.2g} hurts"
    ActionChains(page.driver).move_to_element(scale).perform()
    tooltip = page.text("tooltip").translate(MINUS)
    value = float(re.search("lowest cell\n(.*)", tooltip)[1])
    assert value == pytest.approx(credit.min(), rel=6e-3)
    value = float(re.search("highest cell\n(.*)", tooltip)[1])
    assert value == pytest.approx(credit.max(), rel=6e-3)
    beyond = (abs(credit) > limit).sum()
    assert f"{beyond} of {credit.size}" in tooltip
    # From the keyboard, too.
    page.js("arguments[0].blur(); document.querySelector('.tooltip').hidden = true", scale)
    page.js("arguments[0].focus()", scale)
    assert "lowest cell" in page.text("tooltip")
    page.js("arguments[0].blur()", scale)


def test_smoothing_is_asked_for_and_says_what_it_does(page):
    page.open(run="run_1")
    assert "mooth" not in page.text("helping-note")
    mean = page.text("helping-note")
    choice = Select(page.find("smooth"))
    assert choice.first_selected_option.text == "no"

    def told():
        hit = page.find("helping-chart", ".hit")
        ActionChains(page.driver).move_to_element(hit).perform()
        return page.text("tooltip")

    raw = told()
    choice.select_by_value("15")
    page.ready()
    assert page.hash()["p.lca.smooth"] == "15"
    note = page.text("helping-note")
    assert note.startswith("Smoothed: the strong lines are means over 15 bins (15 steps)")
    assert note.endswith(mean), "averages are as before"
    assert "network, smoothed" in told()
    assert told().startswith(raw.partition("weights that help")[0]), "and so are single values"
    page.open(run="run_1", smooth="7")
    assert "mooth" not in page.text("helping-note"), "no width that is offered"


def narrow(page, width):
    """Makes pages that are opened next as wide as a phone, or, with 0, as wide as before."""
    size = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": False}
    name = "setDeviceMetricsOverride" if width else "clearDeviceMetricsOverride"
    page.driver.execute_cdp_cmd(f"Emulation.{name}", size if width else {})


def test_nothing_is_cut_or_broken_on_a_phone(page, logs):
    names = [f"transformer.h.{i}.self_attention.{part}" for i in range(3) for part in PARTS]
    try:
        narrow(page, 390)
        for state in ({"run": "run_1"}, {"run": "run_1", "vs_run": "run_1", "vs_probe": "val"}):
            page.open(**state)
            check_narrow(page)
        with another_run(page, logs, names):
            page.open(run="run_9", layer=names[0])
            check_narrow(page)
            page.open(run="run_1")
    finally:
        narrow(page, 0)
    page.open(run="run_1")
    assert not page.find("layer-table").get_attribute("class"), "a wide page has tables"


def check_narrow(page):
    """Nothing sticks out; every name is whole, or breaks after a dot; legends are apart."""
    width = page.js("return document.documentElement.clientWidth")
    out = """
        return [...document.querySelectorAll("main *, #topbar *")]
          .filter((e) => e.offsetParent && e.getBoundingClientRect().right > arguments[0] + 0.5)
          .map((e) => e.outerHTML.slice(0, 200));"""
    assert page.js(out, width) == []
    scrolled = """
        return [...document.querySelectorAll(".scroll, .answer span")]
          .filter((e) => e.scrollWidth > e.clientWidth + 1 || e.scrollHeight > e.clientHeight + 1)
          .map((e) => e.outerHTML.slice(0, 200));"""
    assert page.js(scrolled) == []
    # Where a name takes several lines, each ends with a dot, or it would be longer than the page.
    broken = """
        const found = [];
        for (const button of document.querySelectorAll("tbody th button:not(.fold)")) {
          if (!button.offsetParent) continue;
          for (const text of button.childNodes) {
            if (text.nodeType !== Node.TEXT_NODE) continue;
            const range = document.createRange();
            range.selectNodeContents(text);
            const lines = new Set([...range.getClientRects()].map((r) => Math.round(r.top)));
            if (lines.size > 1 && !text.data.includes(" ")) found.push(text.data);
          }
        }
        return found;"""
    assert page.js(broken) == []
    # A legend lies within its picture, above the rows, and beside no title.
    for scale in page.driver.find_elements(By.CLASS_NAME, "scale"):
        if not scale.is_displayed():
            continue
        grid = scale.find_element(By.XPATH, "..")
        data = page.js("return {...arguments[0].dataset}", grid)
        left = scale.location["x"] - grid.location["x"]
        assert left >= 0
        assert left + scale.size["width"] <= int(data["plotLeft"]) + int(data["plotWidth"]) + 1
        titled = data["testid"].startswith("compare")
        assert int(data["plotTop"]) == (44 if titled else 26)


def test_dark_mode_is_followed(page):
    page.open(inside=True, run="run_1")
    background = "return getComputedStyle(document.body).backgroundColor"
    assert page.js(background) == "rgb(255, 255, 255)"
    light = page.row_color("heatmap", 2)
    page.js("parent.document.body.classList.add('dark-mode')")
    wait(lambda: page.js("return document.documentElement.dataset.theme") == "dark")
    assert page.js(background) == "rgb(48, 48, 48)"
    dark = page.row_color("heatmap", 2)
    assert sum(dark) < sum(light) - 150
    assert dark[0] > dark[2] + 20  # Still red.


def test_tensorboards_own_switch_of_the_theme_is_followed(page):
    page.open(inside=True, run="run_1", layer="")
    theme = "return document.documentElement.dataset.theme"

    def switch(name):
        page.driver.switch_to.default_content()
        page.driver.find_element(By.CSS_SELECTOR, "app-header-dark-mode-toggle button").click()
        choice = f"//button[contains(@class, 'mat-mdc-menu-item')][contains(., '{name}')]"
        wait(lambda: page.driver.find_elements(By.XPATH, choice), "the menu")[0].click()
        frame = page.driver.find_element(By.TAG_NAME, "iframe")
        page.driver.switch_to.frame(frame)

    assert page.js(theme) == "light"
    light = page.row_color("heatmap", 2)
    try:
        switch("Dark")
        wait(lambda: page.js(theme) == "dark", "the dark theme")
        page.ready()
        assert (
            page.js("return getComputedStyle(document.body).backgroundColor") == "rgb(48, 48, 48)"
        )
        assert sum(page.row_color("heatmap", 2)) < sum(light) - 150
    finally:
        switch("Light")
    wait(lambda: page.js(theme) == "light", "the light theme")
    page.ready()
    assert page.row_color("heatmap", 2) == light


def test_what_hurts_can_be_told_on_gray_paper(page):
    gray = """
        const grid = document.querySelector("[data-testid=heatmap]");
        const canvas = grid.querySelector("canvas");
        const { plotLeft, plotTop, plotWidth, rowHeight } = grid.dataset;
        const dark = (row) => {
          const pixels = canvas.getContext("2d").getImageData(
            plotLeft, Number(plotTop) + row * rowHeight, plotWidth, rowHeight).data;
          let found = 0;
          for (let i = 0; i < pixels.length; i += 4)
            found += 0.3 * pixels[i] + 0.59 * pixels[i + 1] + 0.11 * pixels[i + 2] < 60;
          return found / (pixels.length / 4);
        };
        return [document.documentElement.dataset.theme, dark(2), dark(3)];"""
    page.open(run="run_1")
    system_theme(page, "dark")
    # The browser takes what stands there as soon as it has told that it prints.
    theme, hurts, helps = page.js(f"dispatchEvent(new Event('beforeprint')); {gray}")
    assert theme == "light"
    assert hurts > 0.1, "row 2 hurts, and is hatched"
    assert helps < hurts / 2
    theme, hurts, _ = page.js(f"dispatchEvent(new Event('afterprint')); {gray}")
    assert theme == "dark"
    # So it is where a program asks for paper, and buttons are left out.
    features = [{"name": "prefers-color-scheme", "value": "dark"}]
    media = {"media": "print", "features": features}
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    wait(lambda: page.js("return document.documentElement.dataset.theme") == "light")
    page.ready()
    assert page.js(gray)[1] > 0.1
    assert not page.find("layers-png").is_displayed()
    bar = page.js("return getComputedStyle(document.querySelector('.bar')).printColorAdjust")
    assert bar == "exact"
    system_theme(page, "light")


def test_a_screen_reader_finds_its_way(page, history):
    page.open(run="run_1")
    tree = page.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    seen = [
        (node["role"]["value"], node.get("name", {}).get("value", ""))
        for node in tree
        if not node["ignored"]
    ]
    for landmark in ("banner", "main", "contentinfo"):
        assert [role for role, _ in seen].count(landmark) == 1, landmark
    assert ("heading", "Loss Change Allocation") in seen
    regions = [name for role, name in seen if role == "region"]
    assert {"How sure?", "Layers over time", "Cumulative LCA", "Layers in numbers"} <= set(regions)
    assert "" not in regions
    layer, total = history["train"].groups[3], history["train"].allocated[:, 3].sum()
    told = next(name for role, name in seen if role == "option" and name.startswith(layer))
    assert told.translate(MINUS) == f"{layer}: helps {total:.2g}"
    controls = ("button", "textbox", "searchbox", "combobox", "checkbox", "spinbutton", "img")
    assert [(role, name) for role, name in seen if role in controls and not name] == []
    tables = [name for role, name in seen if role == "table"]
    assert "Layers in numbers" in tables


def test_the_keyboard_skips_the_controls(page):
    page.open(run="run_1")
    ActionChains(page.driver).send_keys(Keys.TAB).perform()
    skip = page.driver.switch_to.active_element
    assert skip.text == "Skip to the results"
    assert skip.location["y"] >= 0
    skip.send_keys(Keys.ENTER)
    ActionChains(page.driver).send_keys(Keys.TAB).perform()
    assert page.js("return document.querySelector('main').contains(document.activeElement)")
    assert not page.js("return document.querySelector('#head').contains(document.activeElement)")


def test_a_layers_name_is_only_ever_text(page, history):
    evil = history["train"].groups[1]
    page.open(run="run_1", layer=evil)
    assert page.js("return document.images.length") == 0  # And no alert, which would end the test.
    assert (
        page.js("return [...document.querySelectorAll('.rows > div')].map(d => d.title)")[1] == evil
    )
    assert evil in page.table()
    assert page.find("channels", "h2").text == f"Channels of {evil}"


def test_the_keyboard_reaches_a_layer(page, history):
    page.open(run="run_1")
    page.js("document.querySelector('[data-testid=layers-png]').focus()")
    keys = ActionChains(page.driver)
    keys.send_keys(Keys.TAB).send_keys(Keys.ARROW_DOWN).send_keys(Keys.ARROW_DOWN).perform()
    focused = page.js("return document.activeElement.title")
    assert focused == history["train"].groups[2]
    outline = page.js("return getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    ActionChains(page.driver).send_keys(Keys.ENTER).perform()
    page.ready()
    assert page.data("heatmap")["selected"] == focused
    assert page.js("return document.activeElement.title") == focused
    ActionChains(page.driver).send_keys("+").perform()
    page.ready()
    assert page.data("heatmap")["start"] != "1"


def test_the_table_sorts(page):
    page.open(run="run_1")
    page.click("sort-credit")
    credits = page.credits()
    assert credits == sorted(credits)
    page.click("sort-credit")
    assert page.credits() == credits[::-1]
    head = page.find("layer-table", "th[data-key=credit]")
    assert head.get_attribute("aria-sort") == "descending"
    page.click("layer-table", "tbody tr:first-child button")
    assert page.data("heatmap")["selected"].endswith("planted")


def test_what_the_credit_is_made_of_stands_beside_it(page, history):
    page.open(run="run_1")
    read = """
        const choice = document.querySelector("[data-testid=breakdown]");
        choice.value = arguments[0];
        choice.dispatchEvent(new Event("change"));
        const table = document.querySelector("[data-testid=shares-table]");
        const texts = (row, which) => [...row.querySelectorAll(which)].map((e) => e.innerText);
        return [
          texts(table, "thead th"),
          [...table.querySelectorAll("tbody tr")].map((row) =>
            texts(row, "td.credit > :last-child")),
        ];"""
    for name, split in history["train"].breakdowns.items():
        heads, rows = page.driver.execute_script(read, name)
        assert heads == ["layer", *(n.replace("_", " ") for n in split.names), "LCA"]
        shown = [[float(text.replace("\N{MINUS SIGN}", "-")) for text in row] for row in rows]
        sums = split.allocated.sum(0)
        expected = np.concatenate([sums, sums.sum(1, keepdims=True)], 1)
        np.testing.assert_allclose(shown, expected, rtol=6e-3, atol=1e-7)
    page.open(run="run_2")
    assert "LCACallback(breakdown=True)" in page.text("shares-message")


def test_pointing_at_a_cell_names_it(page, history):
    page.open(run="run_1")
    ActionChains(page.driver).move_to_element(page.find("heatmap", ".hit")).perform()
    told = page.text("tooltip")
    groups = history["train"].groups
    row = next(i for i, g in enumerate(groups) if told.startswith(f"{g} · step "))
    step = int(told.split(" · step ")[1].split()[0])
    value = float(told.split("LCA\n")[1].split()[0].replace("\N{MINUS SIGN}", "-"))
    assert value == pytest.approx(history["train"].allocated[step - 1, row], rel=6e-3)


def test_steps_that_are_not_finite_are_left_out_and_counted(page, logs):
    history = History.load(logs / "run_0")
    finite = history.rows.finite
    broken = int((~finite).sum())
    assert 0 < broken < STEPS
    told = f"{broken} steps were not finite and are left out"
    page.open(run="run_0")
    assert told in page.text("verdict-trust")
    assert page.data("verdict-trust")["warn"] == "true"
    assert told in page.text("layers-note")
    assert f"In {broken} of {STEPS} steps" in page.text("ledger-note")
    np.testing.assert_allclose(page.credits(), history.allocated[finite].sum(0), rtol=6e-3)
    # Only these steps: nothing but grey in the heatmap, and no number.
    first = int(history.steps[~finite][0])
    page.open(run="run_0", start=first, stop=first + broken - 1, stack=1)
    red, green, blue = page.row_color("heatmap", 2)
    assert max(red, green, blue) - min(red, green, blue) < 15
    assert [row[3] for row in page.table().values()] == ["–"] * len(LAYERS)
    assert "No step is finite" in page.text("verdict-trust")


def test_an_error_is_shown_and_can_be_retried(page):
    page.driver.execute_cdp_cmd("Network.enable", {})
    page.driver.execute_cdp_cmd("Network.setBlockedURLs", {"urls": ["*/lca/helping*"]})
    page.open(run="run_1")
    assert "does not answer" in page.text("helping-message")
    assert page.find("heatmap").is_displayed()
    page.driver.execute_cdp_cmd("Network.setBlockedURLs", {"urls": []})
    page.click("helping", "[data-testid=retry]")
    assert page.find("helping-chart").is_displayed()
    page.driver.get_log("browser")  # The blocked request is an error that we made.


def test_pictures_and_tables_can_be_saved(page, history):
    page.open(run="run_1", start=5, stop=9)
    page.click("layers-png")
    picture = wait(lambda: next(page.driver.downloads.glob("lca-layers*.png"), None), "the file")
    assert picture.read_bytes().startswith(b"\x89PNG")
    with urllib.request.urlopen(page.find("csv").get_attribute("href"), timeout=PATIENCE) as reply:
        rows = reply.read().decode().splitlines()
    assert len(rows) == 1 + 5


def test_an_empty_directory_is_named_and_told_how_to_fill(driver, tmp_path):
    logs = tmp_path / 'it"s empty'
    logs.mkdir()
    with served(logs, 0) as root:
        page = Page(driver, root).open()
        assert f"No run with LCA data in {logs} yet" in page.text("banner")
        program = page.js("return arguments[0].textContent", page.find("snippet"))
        assert page.js("return document.documentElement.scrollWidth <= innerWidth")
        # As it is, from anywhere.
        command = [sys.executable, "-W", "ignore", "-c", program]
        run = subprocess.run(
            command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False
        )
        assert run.returncode == 0, run.stderr
        wait(lambda: page.js("return !document.querySelector('main').hidden"), "the first run")
        page.ready()
        wait(lambda: page.data("heatmap")["stop"] == "160", "all of its steps")
        page.ready()
        assert page.text("verdict-loss").startswith("The loss fell")
        assert list(page.table()) == ["first", "second"]


def test_new_steps_appear_by_themselves(page, logs):
    """The second run is copied in two parts; the whole run grows, a zoomed view stays."""
    source = next((logs / "run_2").glob("*tfevents*"))
    data = source.read_bytes()
    grown = logs / "run_3" / source.name
    grown.parent.mkdir()
    try:
        grown.write_bytes(data[: len(data) * 3 // 5])
        page.open(run="run_1")
        wait(lambda: "run_3" in page.text("run"), "the new run")
        Select(page.find("run")).select_by_value("run_3")
        page.ready()
        wait(lambda: not page.find("banner").is_displayed())
        page.ready()
        half = int(page.data("heatmap")["stop"])
        assert half < STEPS
        with grown.open("ab") as file:
            file.write(data[len(data) * 3 // 5 :])
        wait(lambda: page.data("heatmap")["stop"] == str(STEPS), "new steps")
        assert page.data("heatmap")["start"] == "1"
        assert page.text("updated").startswith("updated ")
    finally:
        shutil.rmtree(grown.parent)
