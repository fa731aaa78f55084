"""Blocks of layers: what is a row, that rows add up, and what a search finds."""

from dataclasses import replace

import numpy as np
import pytest
from support.noise import noisy
from support.routes import Store

from lightning_lca import History
from lightning_lca.record.layers import Layers
from lightning_lca.record.tree import FOUND, Folded, Tree
from lightning_lca.tensorboard.query import QueryError

PARTS = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")


def gpt(blocks):
    inside = [f"net.h.{i}.{part}" for i in range(blocks) for part in PARTS]
    return ["net.wte", "net.wpe", *inside, "net.ln_f", "head"]


SHAPES = {
    "gpt of 12": gpt(12),
    "gpt of 48": gpt(48),
    "flat": [f"layer_{i:04d}" for i in range(2000)],
    "many blocks": [f"model.blocks.{i // 10}.{i % 10}" for i in range(2000)],
    "a layer that holds layers": ["a", *(f"a.b.{i}" for i in range(30)), *"cdefghijklmno", "a.z"],
    "odd names": ["", ".", "..", "a.", ".a", "a..b", *(f"<b>.{i}" for i in range(40)), "é.ü"],
    "deep": [".".join("x" * 3000), *(f"x.{'y.' * 200}{i}" for i in range(60))],
}


def shown(rows):
    """Marks open blocks, folded ones and layers: [(depth, mark, name)]."""
    return [(row.depth, {None: " ", True: "-", False: "+"}[row.is_open], row.name) for row in rows]


def toggles(tree):
    """Some states of a tree: as it is at first, some blocks the other way, everything open."""
    blocks = [row.name for row in tree.rows(40) if row.is_open is not None]
    yield ()
    yield blocks[::2]
    opened = []
    for _ in range(8):
        opened += [row.name for row in tree.rows(40, opened) if row.is_open is False]
    yield opened


@pytest.mark.parametrize("names", SHAPES.values(), ids=SHAPES.keys())
def test_every_layer_lies_in_one_row_and_open_blocks_hold_what_follows(names):
    tree = Tree(names)
    for toggled in toggles(tree):
        rows = tree.rows(40, toggled)
        assert sorted(p for row in rows if not row.is_open for p in row.layers) == [
            *range(len(names))
        ]
        assert len({row.name for row in rows}) == len(rows)
        for i, row in enumerate(rows):
            inside = []
            for later in rows[i + 1 :]:
                if later.depth <= row.depth:
                    break
                inside += later.layers if later.depth == row.depth + 1 else ()
            assert sorted(inside) == (sorted(row.layers) if row.is_open else [])
            if row.is_open is None:
                assert row.layers == (names.index(row.name),)
            else:
                assert tree.block(row.name) == row.layers
    assert all(row.is_open is not False for row in rows), "the last state is all open"
    assert tree.block("nothing") is None


def test_at_first_as_many_blocks_are_open_as_fit():
    assert [row.name for row in Tree(gpt(6)).rows(40)] == gpt(6), "few layers have a row each"
    few = shown(Tree(gpt(12)).rows(40))
    assert few[:4] == [
        (0, "-", "net.*"),
        (1, " ", "net.wte"),
        (1, " ", "net.wpe"),
        (1, "-", "net.h.*"),
    ]
    assert few[4:16] == [(2, "+", f"net.h.{i}.*") for i in range(12)]
    assert few[16:] == [(1, " ", "net.ln_f"), (0, " ", "head")]
    # Six rows would tell nothing: then the blocks are shown, more than fit as they may be.
    assert len(Tree(gpt(48)).rows(40)) == 6 + 48
    flat = shown(Tree(SHAPES["flat"]).rows(40))
    assert len(flat) == 40
    assert flat[1] == (0, "+", "layer_0050 … layer_0099")
    many = shown(Tree(SHAPES["many blocks"]).rows(40, ["model.blocks.5 … model.blocks.9"]))
    assert len(many) == 40 + 5
    assert many[1:3] == [(0, "-", "model.blocks.5 … model.blocks.9"), (1, "+", "model.blocks.5.*")]


def test_a_search_lists_layers_below_their_sum():
    tree = Tree(gpt(12))
    head, *rows = tree.find("C_proj  1")
    assert [row.name for row in rows] == [
        f"net.h.{i}.{part}.c_proj" for i in (1, 10, 11) for part in ("attn", "mlp")
    ]
    assert (head.name, head.is_open) == ("*c_proj 1*", True)
    assert head.layers == tuple(place for row in rows for place in row.layers)
    assert tree.find("nowhere") == []
    many = Tree(SHAPES["flat"]).find("layer")
    assert (len(many), len(many[0].layers)) == (1 + FOUND, 2000)


def test_the_sum_of_a_block_is_exact():
    names = gpt(12)
    tree, within = Tree(names), Layers.of([name for name in names for _ in range(2)])
    whole = np.random.default_rng(0).integers(-(2**23), 2**23, (5, 2 * len(names)))
    for values in (whole * 2.0**-20, whole):
        for rows in (tree.rows(40), tree.rows(40, ["net.h.3.*", "net.*"]), tree.find("attn")):
            folded = Folded(tuple(rows), within)
            total = folded.sums(values)
            for i, row in enumerate(rows):
                columns = folded.columns(i)
                assert columns.tolist() == sorted(2 * p + k for p in row.layers for k in (0, 1))
                assert np.array_equal(total[:, i], values[:, columns].sum(1))


# -- routes ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run():
    """Credits of which any sum is exact."""
    names = gpt(12)
    made = noisy(steps=300, layers=len(names))
    whole = np.random.default_rng(1).integers(-(2**23), 2**23, (300, len(names)))
    history = History(names, made.sizes)
    history.append(replace(made.rows, allocated=whole * 2.0**-20))
    return history


def test_a_blocks_bins_are_the_exact_sums_of_its_layers(run):
    store, names = Store(run=run), list(run.groups)
    every = store.ask("bins", run="run", bins=7)
    assert (every["layers"], set(every["depth"]), set(every["open"])) == (names, {0}, {None})
    assert every["row_of"] == [*range(len(names))]
    for more in ({}, {"toggle": '["net.h.3.*"]'}, {"find": "attn"}):
        answer = store.ask("bins", run="run", bins=7, fold=40, **more)
        tree = Tree(names)
        rows = tree.find("attn") if "find" in more else tree.rows(40, ["net.h.3.*"] * bool(more))
        assert answer["layers"] == [row.name for row in rows]
        assert answer["inside"] == [len(row.layers) for row in rows]
        for field in ("credit", "running"):
            wanted = np.array([np.array(every[field])[[*row.layers]].sum(0) for row in rows])
            assert np.array_equal(answer[field], wanted)
        for field in ("total", "before", "sizes"):
            wanted = [np.array(every[field])[[*row.layers]].sum() for row in rows]
            assert np.array_equal(answer[field], wanted)
        # What is not about a row is the same, whatever is shown.
        about = {"layers", "depth", "inside", "open", "row_of", "limit"}
        about |= {"credit", "running", "total", "before", "sizes"}
        assert {k: v for k, v in answer.items() if k not in about} == {
            k: v for k, v in every.items() if k not in about
        }
        for place, row in enumerate(answer["row_of"]):
            holding = [i for i, r in enumerate(rows) if place in r.layers]
            assert row == (max(holding, key=lambda i: rows[i].depth) if holding else -1)


def test_table_comparison_and_helping_know_blocks(run):
    store = Store(run=run)
    every = store.ask("table", run="run")
    folded = store.ask("table", run="run", fold=40)
    inside = Tree(run.groups).block("net.h.3.*")
    (row,) = (layer for layer in folded["layers"] if layer["name"] == "net.h.3.*")
    assert (row["inside"], row["open"], row["depth"]) == (6, False, 2)
    assert row["credit"] == sum(every["layers"][place]["credit"] for place in inside)
    assert row["size"] == sum(every["layers"][place]["size"] for place in inside)
    assert {k: v for k, v in folded.items() if k != "layers"} == {
        k: v for k, v in every.items() if k != "layers"
    }
    credits = [layer["credit"] for layer in every["layers"]]
    assert (every["helped"], every["hurt"]) == (
        sum(c < 0 for c in credits),
        sum(c > 0 for c in credits),
    )
    assert every["most_helpful"]["credit"] == sorted(credits)[:2]
    assert every["most_hurtful"]["credit"] == sorted(credits)[:-3:-1]
    compared = store.ask("compare", run="run", run_b="run", fold=40)
    assert compared["layers"] == [layer["name"] for layer in folded["layers"]]
    assert compared["total_a"] == [layer["credit"] for layer in folded["layers"]]
    block = store.ask("helping", run="run", layer="net.h.3.*")["layer"]
    helped = (
        run.rows.helping[:, inside].sum() / (run.rows.helping + run.rows.hurting)[:, inside].sum()
    )
    assert block["mean"] == helped


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"find": "nowhere"}, "No layer's name has 'nowhere'"),
        ({"fold": "2001"}, "fold must be"),
        ({"toggle": "net"}, "toggle must be a list of names in JSON"),
        ({"toggle": "[1]"}, "toggle must be a list of names"),
        ({"toggle": '{"a": 1}'}, "toggle must be a list of names"),
        ({"toggle": "[" * 100_000}, "toggle must be a list of names"),
    ],
    ids=["no such layer", "too many", "a text", "numbers", "an object", "too deep"],
)
def test_what_cannot_be_folded_is_told(run, more, why):
    with pytest.raises(QueryError, match=why):
        Store(run=run).ask("bins", run="run", **more)
