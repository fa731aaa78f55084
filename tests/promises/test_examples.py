"""The examples and the README's code, run as a reader would."""

import re
import subprocess
import sys

import pytest
from support import ROOT
from support.processes import environment

from lightning_lca import History


def run(script, *arguments):
    return subprocess.run(
        [sys.executable, ROOT / "examples" / script, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment(),
    )


def is_png(path):
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5_000


def numbers(line):
    return [float(n) for n in re.findall(r"[+-]?\d+\.\d+", line)]


def test_every_example_has_a_section_with_its_command_and_a_small_picture():
    text = (ROOT / "examples" / "README.md").read_text()
    sections = dict(re.findall(r"^## (\w+)\.py\n(.*?)(?=^## |\Z)", text, re.M | re.S))
    assert sections.keys() == {path.stem for path in (ROOT / "examples").glob("*.py")}
    for name, section in sections.items():
        assert f"python examples/{name}.py" in section
        (picture,) = re.findall(r"!\[[^]]+\]\((images/.*?)\)", section)
        assert picture == f"images/{name}.png"
        assert is_png(ROOT / "examples" / picture)
        assert (ROOT / "examples" / picture).stat().st_size < 120_000
        assert "does not show" in section


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
    way, cost, data = result.stderr.strip().splitlines()  # Nothing else scrolls by.
    assert re.match(r"LCA: the loss on the probe is evaluated from a recording", way)
    assert re.match(r"LCA: \d probe gradients first", cost)
    assert re.match(r"LCA: the 256 examples of the probe tell the sign", data)


@pytest.mark.slow
def test_what_to_do_about_a_layer_is_compared_seed_by_seed(tmp_path):
    result = run("freeze_or_slow.py", "--quick", "--out", tmp_path / "freeze.png")
    assert result.returncode == 0, result.stderr
    assert is_png(tmp_path / "freeze.png")
    assert re.match(r"The layer that helped least, in 2 runs: \w+ \(\d\)", result.stdout)
    rows = re.findall(r"^(\S.*?) +(\d\.\d+) ± \d\.\d+", result.stdout, re.M)
    names = [name for name, _ in rows]
    assert names == [
        "baseline",
        "frozen from the start",
        "10x smaller rate",
        "10x smaller, best layer",
        "momentum 0.8",
        "LCAFreeze",
    ]
    losses = dict(rows)
    assert len({losses[n] for n in names[:5]}) == 5, "each way trains differently"


@pytest.mark.slow
def test_observations_of_a_net_per_optimizer(tmp_path):
    picture = tmp_path / "observations.png"
    result = run("observations.py", "--quick", "--data", tmp_path, "--out", picture)
    assert result.returncode == 0, result.stderr
    assert "scikit-learn's digits: 2 seeds, 60 steps" in result.stdout
    rows = dict(re.findall(r"^mlp +(SGD|Adam)\b.*?( -\d.*)$", result.stdout, re.M))
    for row in rows.values():
        change, _, helping, spread = numbers(row)[:4]
        assert change < -0.1
        assert 50 < helping < 100
        assert 0 < spread < 25
    assert rows.keys() == {"SGD", "Adam"}
    assert is_png(picture)


@pytest.mark.slow
def test_stopped_weights_have_no_credit_and_the_ledger_closes(tmp_path):
    result = run("pruning.py", "--quick", "--out", tmp_path / "pruning.png")
    assert result.returncode == 0, result.stderr
    rows = re.findall(r"^epoch (\d) +(\d+)% +(\S+) +(\S+) +(\S+) ", result.stdout, re.M)
    assert [int(left) for _, left, *_ in rows] == [100, 50, 20, 10, 10] * 2
    assert all(float(stopped) == 0 for *_, stopped in rows)
    ledgers = re.findall(r"^true loss change (.*) drift$", result.stdout, re.M)
    for change, *booked in map(numbers, ledgers):
        assert sum(booked) == pytest.approx(change, abs=2e-4), "four printed numbers"
    pruned, frozen = (numbers(ledger)[-1] for ledger in ledgers)
    assert abs(pruned) > 1e-3, "what pruning itself does is drift"
    assert frozen == 0
    assert is_png(tmp_path / "pruning.png")


@pytest.mark.slow
def test_the_phase_diagram_crosses_out_runs_that_blow_up(tmp_path):
    options = ("--rates", 0.1, 10, "--decays", 1e-4, 1, "--seeds", 1, "--steps", 40)
    picture = tmp_path / "edge.png"
    result = run("edge_of_chaos.py", *options, "--data", tmp_path, "--out", picture)
    assert result.returncode == 0, result.stderr
    rows = re.findall(r"^ +(0\.1|10) +(0\.0001|1) +(.*)$", result.stdout, re.M)
    cells = {(float(rate), float(decay)): row for rate, decay, row in rows}
    assert len(cells) == 4
    for row in cells.values():
        shares = numbers(row)[1::2]
        if "blew up: 1 of 1" in row:
            assert not numbers(row), "no share of a run that blew up"
        else:
            assert sum(map(abs, shares)) == pytest.approx(100, abs=0.5), "one decimal each"
    # Decay by rate times decay = 10 turns every weight round and grows it at every step.
    assert "blew up: 1 of 1" in cells[10, 1]
    assert "blew up" not in cells[0.1, 1e-4]
    assert is_png(picture)


@pytest.mark.slow
def test_what_layers_pay_for_sparsity_adds_up(tmp_path):
    picture = tmp_path / "compressibility.png"
    result = run("compressibility.py", "--quick", "--data", tmp_path, "--out", picture)
    assert result.returncode == 0, result.stderr
    rows = re.findall(r"^fc(\d) (.*)$", result.stdout, re.M)
    assert [layer for layer, _ in rows] == ["1", "2", "3"]
    for _, row in rows:
        entropy, sparsity, without, _, paid = numbers(row)[:10:2]
        assert sparsity < 0, "the penalty falls"
        assert paid == pytest.approx(entropy - without, abs=2e-3), "three printed numbers"
        start, end = map(float, re.search(r"(0\.\d+) to (0\.\d+)", row).groups())
        assert end < start
    assert is_png(picture)


@pytest.mark.slow
def test_the_loop_without_lightning_closes_its_ledger(tmp_path):
    result = run("plain_torch.py", "--out", tmp_path / "plain.png")
    assert result.returncode == 0, result.stderr
    assert is_png(tmp_path / "plain.png")
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
