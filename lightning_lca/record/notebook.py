"""A history as a notebook shows it: the summary as a table with bars, in HTML.

It is read on light and on dark ground: text has the notebook's own colour, lines are half
transparent, and the bars' colours stand out from either. Nothing in it moves, loads or runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

import numpy as np

from lightning_lca.record import overfitting, summary
from lightning_lca.record.colours import EITHER
from lightning_lca.record.findings import Finding, find
from lightning_lca.record.sampling import of_run
from lightning_lca.record.summary import Ledger, Line

if TYPE_CHECKING:
    from lightning_lca.record.history import History

# Notebooks stripe tables and align their cells: two classes outweigh their rules.
_STYLE = f"""<style>
.lca {{font-size: 13px; line-height: 1.45; max-width: 1000px; overflow-x: auto; color: inherit}}
.lca h4 {{margin: 12px 0 4px; font-size: 14px; color: inherit}}
.lca p, .lca ul {{margin: 6px 0; max-width: 90ch}}
.lca table.lca-table {{border-collapse: collapse; margin: 4px 0 8px; font-size: 13px;
 color: inherit; background: none}}
.lca table.lca-table th, .lca table.lca-table td {{padding: 2px 8px; text-align: right;
 border: none; border-bottom: 1px solid rgba(128, 128, 128, .3); background: none;
 color: inherit; font-variant-numeric: tabular-nums; white-space: nowrap; max-width: none}}
.lca table.lca-table tr {{background: none}}
.lca table.lca-table .lca-name {{text-align: left; white-space: normal; overflow-wrap: anywhere;
 font-weight: normal; min-width: 5em; max-width: 28em}}
.lca table.lca-table .lca-note {{text-align: left; white-space: normal}}
.lca table.lca-table .lca-both {{text-align: center}}
.lca table.lca-table thead .lca-name, .lca table.lca-table thead th {{font-weight: 600}}
.lca .lca-bar {{position: relative; display: inline-block; width: 150px; height: 12px;
 vertical-align: middle}}
.lca .lca-short {{width: 90px}}
.lca .lca-bar span {{position: absolute; top: 0; height: 12px}}
.lca .lca-helps {{background: {EITHER["helps"]}}}
.lca .lca-hurts {{background: {EITHER["hurts"]}}}
.lca .lca-bar .lca-axis {{top: -3px; height: 18px; width: 1px; background: rgba(128, 128, 128, .8)}}
.lca .lca-bar .lca-reach {{top: 5px; height: 2px; background: currentColor; opacity: .75}}
.lca .lca-figure {{width: 640px; max-width: 100%; height: auto; border-radius: 4px}}
.lca .lca-key {{display: inline-block; width: 9px; height: 9px}}
</style>"""


def html(history: History, findings: Sequence[Finding] = ()) -> str:
    """Draws the table with bars, the ledger below it, and the most important findings.

    Args:
        history: What was measured.
        findings: Most important first.
    """
    return document([*table(history), *sure(history, findings)])


def of_probes(histories: Mapping[str | None, History], *, finds: bool = True) -> list[str]:
    """Draws the tables of all probes, one below the other, and what they show together.

    Args:
        histories: By probe; the name of a single one is None.
        finds: Looks for findings, which takes its time in long runs.
    """
    parts = []
    for name, history in histories.items():
        parts += heading("" if name is None else f"probe {name!r}")
        parts += table(history)
        parts += sure(history, history.findings()) if finds else []
    if finds and (told := overfitting.text(histories)):
        parts += [*heading("train against validation"), f"<pre>{_text(told)}</pre>"]
    if finds and (found := find(histories, about=())):
        parts += [*heading("probes 'train' and 'val' together"), *_sure(summary.how_sure(found))]
    return parts


def document(parts: Iterable[str]) -> str:
    """Puts parts together that have this look."""
    return "\n".join(['<div class="lca">', _STYLE, *parts, "</div>"])


def message(text: str) -> str:
    """Draws a line of text."""
    return document([f"<p>{_text(text)}</p>"])


def heading(title: str) -> list[str]:
    """A line above a part, if there is one."""
    return [f"<h4>{_text(title)}</h4>"] if title else []


def table(history: History) -> list[str]:
    """Draws the table with bars, and the ledger below it.

    Args:
        history: What was measured.
    """
    if not len(history):
        return ["<p>LCA: no step was measured yet.</p>"]
    with np.errstate(over="ignore", invalid="ignore"):  # Sums of large numbers may be infinite.
        ledger = Ledger.of(history, everything=False)
        data = of_run(history, ledger.shown)
    reach = [0.0] * len(ledger.lines) if data is None else data.reach.tolist()
    limit = max((abs(x.credit) for x in ledger.lines if np.isfinite(x.credit)), default=0.0)
    between = "" if data is None else "<th>± data</th>"
    head = (
        f'<th class="lca-name">layer</th><th>weights</th><th>LCA</th>{between}'
        f"<th class='lca-both'>{_key('helps')} helps &nbsp; {_key('hurts')} hurts</th>"
        "<th>share</th>"
        "<th>helping</th><th>of its weights</th><th>hurting</th><th>rank</th>"
    )
    rows = []
    for line, half in zip(ledger.lines, reach, strict=True):
        over = "" if data is None else f"<td>{ledger.show(half, 4, sign='')}</td>"
        rows.append(
            f'<th class="lca-name" scope="row">{_text(line.label)}</th><td>{line.weights:,}</td>'
            f"<td>{ledger.show(line.credit, 4)}</td>{over}<td>{_bar(line.credit, half, limit)}</td>"
            f"<td>{summary.percent(line.share)}</td><td>{line.helping:.1%}</td>"
            f"<td>{_majority(line)}</td><td>{line.hurting:.1%}</td><td>{line.rank or '–'}</td>"
        )
    trust = ledger.trust
    notes = [summary.SIGN, *([] if data is None else [summary.about_data(data)]), *trust.remarks]
    if ledger.folds:
        notes.insert(0, summary.folding(history, "print(….summary(all=True))"))
    split = [part for name in history.breakdowns for part in _split(history, name, ledger)]
    return [
        _table(head, rows),
        *_ledger(ledger),
        *split,
        *(f"<p>{_text(note)}</p>" for note in notes),
    ]


def sure(history: History, findings: Sequence[Finding]) -> list[str]:
    """Draws the most important findings, and what to try; nothing where no step was measured.

    Args:
        history: What they were looked for in.
        findings: Most important first.
    """
    return _sure(summary.how_sure(findings, int(history.finite.sum()))) if len(history) else []


def _sure(lines: Sequence[str]) -> list[str]:
    first, *items = lines
    listed = [_text(item.removeprefix("- ")).replace("\n  ", "<br>") for item in items]
    return [
        f"<p>{_text(first)}</p>",
        *([f"<ul>{''.join(f'<li>{item}</li>' for item in listed)}</ul>"] if listed else []),
    ]


def _ledger(ledger: Ledger) -> list[str]:
    trust = ledger.trust
    lines = [
        (
            "true loss change",
            ledger.show(ledger.change),
            f"{' → '.join(ledger.ends)}, {trust.measured} measured steps",
        ),
        ("allocated", ledger.show(ledger.allocated), "sum of the LCA above"),
        (
            "residual",
            ledger.show(ledger.residual),
            f"Σ|residual| is {ledger.unexplained} of Σ|LCA|; largest in one step "
            f"{ledger.largest:.2g}",
        ),
        ("drift", ledger.show(ledger.drift), trust.cause_of_drift),
        (
            "unconverged",
            str(trust.unconverged),
            f"of {trust.measured} steps (beyond the tolerance, if one was set, or not finite)",
        ),
    ]
    rows = [
        f'<th class="lca-name" scope="row">{name}</th><td>{value}</td>'
        f'<td class="lca-note">{_text(note)}</td>'
        for name, value, note in lines
    ]
    return [_table("", rows)]


def _split(history: History, name: str, ledger: Ledger) -> list[str]:
    """Draws the shares of a breakdown as a table."""
    sums = summary.shares_of(history, name)
    if sums is None:
        return []
    shares = history.breakdowns[name].names
    labels = [*(_text(line.label) for line in ledger.lines), "<b>all</b>"]
    head = '<th class="lca-name">layer</th>' + "".join(f"<th>{_text(s)}</th>" for s in shares)
    rows = [
        f'<th class="lca-name" scope="row">{label}</th>'
        + "".join(f"<td>{ledger.show(value, 4)}</td>" for value in values)
        for label, values in zip(labels, [*ledger.shown.sums(sums.T).T, sums.sum(0)], strict=True)
    ]
    return [*heading(f"{summary.title_of(name)}:"), _table(head, rows)]


def _table(head: str, rows: Iterable[str]) -> str:
    head = f"<thead><tr>{head}</tr></thead>" if head else ""
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f'<table class="lca-table">{head}<tbody>{body}</tbody></table>'


def _bar(credit: float, reach: float, limit: float) -> str:
    """Draws credit to the left (helps) or right (hurts) of the middle, and its interval."""
    size, half = _part(credit, limit), _part(reach, limit)
    start = 50 - size if credit < 0 else 50.0
    what = "helps" if credit < 0 else "hurts"
    spans = f'<span class="lca-{what}" style="left:{start:.1f}%;width:{size:.1f}%"></span>'
    if half:
        middle = start if credit < 0 else start + size
        low, high = max(middle - half, 0), min(middle + half, 100)
        spans += f'<span class="lca-reach" style="left:{low:.1f}%;width:{high - low:.1f}%"></span>'
    axis = '<span class="lca-axis" style="left:50%"></span>'
    return f'<span class="lca-bar" aria-hidden="true">{axis}{spans}</span>'


def _majority(line: Line) -> str:
    """Draws the fractions of weights that help, from the left, and that hurt, from the right."""
    help_, hurt = _part(line.helping, 1) * 2, _part(line.hurting, 1) * 2
    return (
        '<span class="lca-bar lca-short" aria-hidden="true">'
        f'<span class="lca-helps" style="left:0;width:{help_:.1f}%"></span>'
        f'<span class="lca-hurts" style="left:{100 - hurt:.1f}%;width:{hurt:.1f}%"></span>'
        '<span class="lca-axis" style="left:50%"></span></span>'
    )


def _part(value: float, limit: float) -> float:
    """How far a bar reaches, in per cent of its place, of which it has half."""
    if not limit or np.isnan(value):
        return 0.0
    return 50 * min(abs(value) / limit, 1.0)


def _key(what: str) -> str:
    return f'<span class="lca-key lca-{what}" aria-hidden="true"></span>'


def _text(text: str) -> str:
    """Shows a text as what it is, whatever a layer is called."""
    return escape("\n".join(map(summary.printable, text.split("\n"))))
