"""The examples and the README's code, run as a reader would."""

import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from support import ROOT
from support.processes import environment
from torch import nn

from lightning_lca import History


def run(script, *arguments):
    return subprocess.run(
        [sys.executable, ROOT / "examples" / script, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment(),
    )


@pytest.mark.slow
@pytest.mark.parametrize(("tolerance", "share"), [(None, 0.01), (1e-4, 0.001)])
def test_digits_keeps_its_promise_on_the_residual(tmp_path, tolerance, share):
    options = ["--tolerance", tolerance] if tolerance else []
    result = run("digits.py", "--log-dir", tmp_path, *options)
    assert result.returncode == 0, result.stderr
    history = History.load(tmp_path / "version_0")
    change = history.loss_after[-1] - history.loss_before[0]
    assert change < -2
    assert abs(history.residual.sum()) <= share * abs(change)
    if tolerance:
        beyond = abs(history.residual) > tolerance * (1 + 1e-4)
        assert not (beyond & history.converged).any()
    assert re.search(r"^true loss change   -2\.\d+", result.stdout, re.M)
    assert f"tensorboard --logdir {tmp_path}" in result.stdout
    way, cost = result.stderr.strip().splitlines()  # Nothing else scrolls by.
    assert re.match(r"LCA: the loss on the probe is evaluated from a recording", way)
    assert re.match(r"LCA: \d probe gradients first", cost)


@pytest.mark.slow
def test_what_to_do_about_a_layer_is_compared_seed_by_seed():
    result = run("freeze_or_slow.py", "--quick")
    assert result.returncode == 0, result.stderr
    assert re.match(r"The layer that helped least, in 2 runs: \w+ \(\d\)", result.stdout)
    rows = re.findall(r"^(\S.*?) +(\d\.\d+) ± \d\.\d+", result.stdout, re.M)
    names = [name for name, _ in rows]
    assert names == [
        "baseline",
        "frozen from the start",
        "10x smaller rate",
        "momentum 0.8",
        "LCAFreeze",
    ]
    losses = dict(rows)
    assert len({losses[n] for n in names[:4]}) == 4, "each way trains differently"


@pytest.mark.slow
def test_the_loop_without_lightning_closes_its_ledger():
    result = run("plain_torch.py")
    assert result.returncode == 0, result.stderr
    number = {
        key: float(re.search(rf"{key}\s+([+-]\d+\.\d+)", result.stdout)[1])
        for key in ("true loss change", "allocated", "residual")
    }
    booked = number["allocated"] + number["residual"]
    assert booked == pytest.approx(number["true loss change"], abs=3e-6)
    assert abs(number["residual"]) < 0.01 * abs(number["true loss change"])


@pytest.mark.slow
def test_fashion_mnist_without_its_data_says_where_to_get_them(tmp_path):
    result = run("fashion_mnist.py", "--data", tmp_path)
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    assert str(tmp_path) in result.stderr
    assert "train-images-idx3-ubyte" in result.stderr
    assert "--download" in result.stderr


def test_the_readmes_loop_without_lightning_runs():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    (code,) = [block for block in blocks if "def field" in block]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    x, y = torch.randn(20, 6), torch.randint(3, (20,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    F.cross_entropy(model(x), y).backward()
    names = {"torch": torch, "F": F, "model": model, "x": x, "y": y, "optimizer": optimizer}
    exec(code, names)
    allocation = names["allocation"]
    change = allocation.loss_after - allocation.loss_before
    assert change < 0
    assert abs(allocation.residual) < 1e-3 * abs(change)
