"""The summary of many layers: the ten that matter, and the others in blocks that add up."""

import numpy as np
import pytest
from support.noise import SIZE, noisy
from support.records import command

from lightning_lca import History
from lightning_lca.record import overfitting, summary
from lightning_lca.record.tables import StepTable

PARTS = ("attn.qkv", "attn.out", "mlp.fc1", "mlp.fc2")
NAMES = ("embed", *(f"blocks.{i}.{part}" for i in range(24) for part in PARTS), "head")


def transformer(names=NAMES, group_by="layer", seed=0, **more):
    """A run of many layers, whose names have blocks."""
    drawn = noisy(seed, 60, layers=len(names), **more)
    history = History(names, drawn.sizes, group_by)
    history.append(drawn.rows)
    return history


def test_of_many_layers_ten_are_listed_and_the_others_add_up_by_block():
    run = transformer()
    credit = run.allocated.sum(0)
    most = sorted(np.argsort(-abs(credit))[:10])
    table = run.summary().partition("\n\n")[0].splitlines()
    names = [line.split("  ")[0] for line in table[1:]]
    assert names[:10] == [NAMES[i] for i in most], "those that moved the loss most, in order"
    assert 2 <= len(names[10:]) <= 30
    ledger = summary.Ledger.of(run, everything=False)
    listed = [place for row in ledger.shown.rows for place in row.layers]
    assert sorted(listed) == list(range(len(NAMES))), "each layer is in one row"
    for row, line in zip(ledger.shown.rows, ledger.lines):
        places = list(row.layers)
        assert line.credit == pytest.approx(credit[places].sum(), rel=1e-12)
        assert line.weights == SIZE * len(places)
        assert line.helping == pytest.approx(run.helping[:, places].mean())
        assert line.hurting == pytest.approx(run.hurting[:, places].mean())
        block = row.name.removesuffix("*").split(" … ")[0]
        if len(places) > 1 and "…" not in row.name:
            assert all(NAMES[place].startswith(block) for place in places), row
    assert sum(line.credit for line in ledger.lines) == pytest.approx(ledger.allocated)
    assert "The 10 of 98 layers that moved the loss most" in run.summary()
    assert "summary(all=True) lists each" in run.summary()


def test_asked_for_all_every_layer_has_its_row():
    run = transformer()
    text = run.summary(all=True)
    names = [line.split()[0] for line in text.splitlines()[1 : 1 + len(NAMES)]]
    assert names == list(NAMES)
    assert "by block" not in text
    ranks = [int(line.split()[-1]) for line in text.splitlines()[1 : 1 + len(NAMES)]]
    assert sorted(ranks) == list(range(1, 99))


@pytest.mark.parametrize("layers", [6, 40, 50])
def test_few_layers_and_names_without_blocks_are_listed_as_they_are(layers):
    run = noisy(steps=20, layers=layers)
    assert run.summary() == run.summary(all=True)


def test_neurons_are_folded_by_their_layer():
    names = [f"net.{layer}/{i}" for layer in (0, 2) for i in range(64)]
    text = transformer(names, "neuron").summary()
    blocks = [line.split("  ")[0] for line in text.splitlines() if line.startswith("net.")][10:]
    assert "The 10 of 128 neurons that moved the loss most" in text
    assert [b.split(" ")[0] for b in blocks] == ["net.0.*", "net.2.*"]
    assert sum(int(b.split("(")[1].rstrip(")")) for b in blocks) == 128 - 10


def test_breakdowns_and_data_errors_follow_the_rows():
    random = np.random.default_rng(5)
    values = {name: random.normal(size=(60, len(NAMES))) for name in ("signal", "noise")}
    drawn = noisy(1, 60, layers=len(NAMES), split={"part": values})
    history = History(NAMES, drawn.sizes, breakdowns={"part": ("signal", "noise")})
    history.split_into({"part": ("signal", "noise")}, 4)
    batches = drawn.rows.allocated[:, :, None] + random.normal(size=(60, len(NAMES), 4))
    columns = drawn.rows.arrays
    history.append(StepTable.of_arrays(columns | {"split_batch": batches}))
    ledger = summary.Ledger.of(history, everything=False)
    block = next(i for i, line in enumerate(ledger.lines) if line.groups > 1)
    places = list(ledger.shown.rows[block].layers)
    expected = [values[name][:, places].sum() for name in ("signal", "noise")]
    _, split = history.summary().split("LCA by what the optimizer's steps were made of:\n")
    label = ledger.lines[block].label
    (line,) = [line for line in split.splitlines() if line.startswith(f"{label} ")]
    assert [float(x) for x in line.removeprefix(label).split()] == pytest.approx(expected, abs=1e-4)
    sums = batches.sum(0)[places].sum(0)
    reach = 3.182446 * sums.std(ddof=1) / 2  # Student's t of 3 degrees of freedom.
    (line,) = [x for x in history.summary().splitlines() if x.startswith(f"{label} ")][:1]
    assert f"{reach:.4f}" in line


def test_the_text_tab_folds_too():
    text = summary.markdown(transformer())
    table = text[: text.index("\n\n")].splitlines()
    assert len(table) < 45
    assert "The LCA tab lists each" in text.replace("\\", "")


def test_train_against_validation_lists_the_most_telling():
    train, val = transformer(), transformer(seed=1)
    probes = {"train": train, "val": val}
    short = overfitting.text(probes).splitlines()
    assert len(short) == 12
    found = overfitting.Overfitting.of(train, val)
    told = [NAMES[i] for i in sorted(found.most_telling[:10])]
    assert [line.split()[0] for line in short[1:-1]] == told
    assert "The 10 most telling of 98 layers" in short[-1]
    assert len(overfitting.text(probes, everything=True).splitlines()) == 99


def test_the_command_line_lists_all_where_asked(tmp_path, capsys, monkeypatch):
    class One:
        lost, histories = 0, {"": transformer()}

    monkeypatch.setattr("lightning_lca.cli.main._runs", lambda logdir: {"": One})
    few = command(capsys, "summary", tmp_path)[1]
    everything = command(capsys, "summary", tmp_path, "--all")[1]
    assert few == One.histories[""].summary() + "\n"
    assert everything == One.histories[""].summary(all=True) + "\n"
    assert few != everything
