"""Takes the pictures of the LCA tab that the guide shows: of a real TensorBoard, by Chromium.

python .ci/site/screens.py            all of them, a minute once the runs are there
python .ci/site/screens.py ledger     the ones named
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from io import BytesIO
from typing import Any

from PIL import Image
from runs import ROOT, RUNS, run, shrink
from selenium import webdriver

sys.path.insert(0, str(ROOT / "tests"))
from support.processes import environment, tensorboard

WIDTH = 1000
FROM_TOP = "from_top"  # Of the page, to the end of the part.
# What is shown of which page: (part of it, state in the address).
PICTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "tab": ("#layers", {"run": "digits", FROM_TOP: 1}),
    "tab_findings": ("#findings", {"run": "too_much_momentum"}),
    "tab_layers": ("#layers", {"run": "digits"}),
    "tab_layers_hurts": ("#layers", {"run": "too_much_momentum"}),
    "tab_channels": ("#channels", {"run": "digits", "layer": "conv2"}),
    "tab_cumulative": ("#cumulative", {"run": "digits"}),
    "tab_ledger": ("#ledger", {"run": "digits"}),
    "tab_ledger_chords": ("#ledger", {"run": "chords"}),
    "tab_shares": ("#shares", {"run": "too_much_momentum"}),
    "tab_generalization": ("#generalization", {"run": "few_images"}),
    "tab_helping": ("#helping", {"run": "digits", "layer": "conv2"}),
    "tab_synchrony": ("#synchrony", {"run": "digits"}),
    "tab_compare": ("#compare", {"run": "digits", "vs_run": "digits", "vs_probe": "val"}),
    "tab_table": ("#table", {"run": "digits"}),
}
NEEDED = ("digits", "too_much_momentum", "chords", "few_images")


def browser() -> webdriver.Chrome:
    """Starts Chromium without a window."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or sys.exit("There is no chromium.")
    for flag in ("--headless", "--no-sandbox", "--disable-gpu", f"--window-size={WIDTH},1200"):
        options.add_argument(flag)
    return webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))


def until(condition: Any, what: str) -> Any:
    """Waits for something, at most two minutes."""
    for _ in range(1200):
        if found := condition():
            return found
        time.sleep(0.1)
    sys.exit(f"Waited in vain for {what}.")


def rows(root: str) -> dict[str, int]:
    """Asks TensorBoard how many steps of each run it has read."""
    try:
        with urllib.request.urlopen(f"{root}data/plugin/lca/runs", timeout=20) as reply:
            return {r["name"]: r["rows"] for r in json.load(reply)["runs"] if r["read"] == 1}
    except OSError:
        return {}


def shown(driver: webdriver.Chrome, root: str, part: str, state: dict[str, Any]) -> Image.Image:
    """Opens the tab in some state, and takes a part of it."""
    asked = "".join(
        f"&p.lca.{k}={urllib.parse.quote(str(v))}" for k, v in state.items() if k != FROM_TOP
    )
    driver.get("about:blank")
    driver.get(f"{root}data/plugin_entry.html?name=lca#lca&kept=1{asked}")
    ready = "return document.documentElement.dataset.ready === 'true'"
    until(lambda: driver.execute_script(ready), "the page")
    # Rows of words need more room than plots.
    width = 1250 if part == "#shares" else WIDTH
    height = driver.execute_script("return document.documentElement.scrollHeight")
    driver.set_window_size(width, max(600, height + 200))
    time.sleep(0.6)
    until(lambda: driver.execute_script(ready), "the page")
    whole = Image.open(BytesIO(driver.get_screenshot_as_png()))
    top, bottom = driver.execute_script(
        "const box = document.querySelector(arguments[0]).getBoundingClientRect();"
        "return [box.top, box.bottom]",
        part,
    )
    start = 0 if FROM_TOP in state else int(top) - 8
    return whole.crop((0, start, width - 15, int(bottom) + 8))


def main() -> None:
    for name in NEEDED:
        run(name)
    command, port = tensorboard(RUNS)
    root = f"http://localhost:{port}/"
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment()
    )
    driver = browser()
    try:
        until(lambda: set(NEEDED) <= rows(root).keys(), "the runs")
        for name in sys.argv[1:] or PICTURES:
            shrink(shown(driver, root, *PICTURES[name]), name)
    finally:
        driver.quit()
        process.terminate()
        process.wait()


if __name__ == "__main__":
    main()
