"""What a history shows in a notebook: the summary's numbers, bars to scale, on any ground."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest
from support.noise import noisy

from lightning_lca import History
from lightning_lca.record.colours import EITHER
from lightning_lca.record.sampling import of_run
from lightning_lca.record.summary import Ledger
from lightning_lca.record.tables import StepTable


class Page(HTMLParser):
    """Reads tables and bars back, and refuses tags that are not closed."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.bars, self.open, self.tags, self.words = [], [], [], [], []
        self.bar = {}
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag in ("br", "img"):
            return
        self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag == "span":
            kind = dict(attributes).get("class", "")
            if kind.startswith("lca-bar"):
                self.bar = {}
                self.bars += [self.bar] if kind == "lca-bar" else []
            elif kind in ("lca-helps", "lca-hurts", "lca-reach"):
                self.bar[kind] = dict(attributes)["style"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.words.append(data)
        if {"td", "th"} & {*self.open}:
            self.tables[-1][-1][-1] += data

    @property
    def text(self):
        return " ".join(self.words)


def width(style):
    return float(re.search(r"width:([\d.]+)%", style)[1])


def test_the_table_has_the_numbers_of_the_summary_and_bars_to_scale():
    run = noisy(planted=[-2, -1, 0, 0, 0, 1])
    page = Page(run._repr_html_())
    head, *rows = page.tables[0]
    assert head[:3] == ["layer", "weights", "LCA"]
    ledger = Ledger.of(run)
    bars = page.bars
    largest = max(abs(line.credit) for line in ledger.lines)
    for row, bar, line in zip(rows, bars, ledger.lines, strict=True):
        assert row[:3] == [line.name, f"{line.weights:,}", f"{line.credit:+.4f}"]
        assert row[4:6] == [f"{line.share:.1%}", f"{line.helping:.1%}"]
        assert row[7:] == [f"{line.hurting:.1%}", str(line.rank)]
        (kind,) = bar
        assert kind == ("lca-helps" if line.credit < 0 else "lca-hurts")
        assert width(bar[kind]) == pytest.approx(50 * abs(line.credit) / largest, abs=0.06)
        left = float(re.search(r"left:([\d.]+)%", bar[kind])[1])
        assert left == pytest.approx(50 if line.credit > 0 else 50 - width(bar[kind]), abs=0.11)
    sums = dict(row[:2] for row in page.tables[1])
    assert sums["true loss change"] == f"{ledger.change:+.6f}"
    assert sums["allocated"] == f"{ledger.allocated:+.6f}"
    for line in run.summary().split("How sure")[1].splitlines()[1:]:
        assert line.lstrip("- ").removeprefix("  ").strip() in page.text


def test_an_interval_over_data_lies_around_the_end_of_its_bar():
    run = noisy(planted=-1.0)
    draws = np.random.default_rng(3).normal(0, 0.01, (len(run), 6, 8))
    shares = run.allocated[:, :, None] + draws - draws.mean(2, keepdims=True)
    run.split_into({}, 8)
    run._parts = [StepTable.of_arrays(run._parts[0].arrays | {"split_batch": shares})]
    page = Page(run._repr_html_())
    assert page.tables[0][0][3] == "± data"
    limit = np.abs(run.allocated.sum(0)).max()
    for bar, reach, credit in zip(page.bars, of_run(run).reach, run.allocated.sum(0), strict=True):
        left = float(re.search(r"left:([\d.]+)%", bar["lca-reach"])[1])
        ends = 50 + 50 * (credit - reach) / limit, 50 + 50 * (credit + reach) / limit
        assert left == pytest.approx(max(ends[0], 0), abs=0.11)
        assert left + width(bar["lca-reach"]) == pytest.approx(ends[1], abs=0.11)


@pytest.mark.parametrize("ground", ["#ffffff", "#383838", "#1e1e1e", "#111111"])
def test_bars_stand_out_from_light_and_from_dark_ground(ground):
    """A contrast of 3, as WCAG asks for what is drawn; text has the notebook's own colour."""
    for colour in EITHER.values():
        low, high = sorted((luminance(colour), luminance(ground)))
        assert (high + 0.05) / (low + 0.05) >= 3
    html = noisy()._repr_html_()
    named = {c for c in re.findall(r"#[0-9a-fA-F]{3,6}\b", html)}
    assert named == {*EITHER.values()}, "no other colour, which would be lost on some ground"
    assert not re.search(r"(?<!-)color: (?!inherit)", html)


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return np.dot(linear, [0.2126, 0.7152, 0.0722])


def test_whatever_a_layer_is_called_is_shown_as_text():
    evil = "<script>alert(1)</script>"
    drawn = noisy(60, planted=3.0, layers=2)
    run = History([evil, 'a"&\x1b[2J'], drawn.sizes)
    run.append(drawn.rows)
    page = Page(run._repr_html_())
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.tables[0][1][0] == evil
    assert page.tables[0][2][0] == 'a"&\\x1b[2J'
    for _, attributes in page.tags:
        assert not {name for name in attributes if name.startswith("on") or name in ("src", "href")}


def test_numbers_that_are_not_finite_leave_a_table_that_reads():
    run = noisy(steps=60)
    rows = run.rows
    allocated = rows.allocated.copy()
    allocated[5], allocated[:, 2] = np.nan, 0
    run._parts = [StepTable.of_arrays(rows.arrays | {"allocated": allocated})]
    page = Page(run._repr_html_())
    assert len(page.tables[0]) == 7
    assert "nan" not in "".join(style for bar in page.bars for style in bar.values())
    assert "In 1 of 60 steps loss or credit was not finite" in page.text


def test_many_layers_are_folded_and_nothing_measured_is_said():
    names = [f"blocks.{i}.{part}" for i in range(30) for part in ("a", "b")]
    drawn = noisy(layers=60, steps=20)
    run = History(names, drawn.sizes)
    assert Page(run._repr_html_()).text.strip() == "LCA: no step was measured yet."
    assert repr(run) == "<History of 0 steps x 60 groups>"
    run.append(drawn.rows)
    page = Page(run._repr_html_())
    assert len(page.tables[0]) < 45
    assert "The 10 of 60 layers that moved the loss most" in page.text
    assert repr(run).startswith("<History of 20 steps x 60 groups, loss 2 to ")
