"""Routes without TensorBoard around them, and what docs/routes.md says of them."""

import re
from pathlib import Path

from werkzeug.datastructures import MultiDict

import lightning_lca
from lightning_lca.tensorboard.answers import plain
from lightning_lca.tensorboard.query import Query
from lightning_lca.tensorboard.routes import ANSWERS
from lightning_lca.tensorboard.snapshot import Run, Table

DOCUMENT = Path(lightning_lca.__file__).parent / "docs" / "routes.md"
_TYPES = {"int": "number", "float": "number", "text": "string", "bool": "boolean"}


class _Source:
    """TensorBoard's data provider, of which only the directory is asked."""

    def directory(self):
        return "/logs"


class Store:
    """Runs by name, made of a history, or of one for each probe."""

    def __init__(self, **histories):
        self.runs = {}
        for name, probes in histories.items():
            probes = probes if isinstance(probes, dict) else {"": probes}
            tables = {probe: Table.of(one, name, probe) for probe, one in probes.items()}
            self.runs[name] = Run(name, "1", tables, {}, 0)

    def run(self, source, name):
        return self.runs[name]

    def describe(self, source):
        return [run.describe() for run in self.runs.values()]

    def ask(self, route, **parameters):
        """Gives the route's answer; parameters are as in an address."""
        texts = {name: str(value) for name, value in parameters.items()}
        answer = ANSWERS[route](self, _Source(), Query(MultiDict(texts)))
        return plain(answer) if isinstance(answer, dict) else answer


def _cells(line):
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def parameters():
    """Reads what every route takes: {route: {parameter: whether it may be left out}}."""
    table = DOCUMENT.read_text(encoding="utf-8").split("\n## ")[0]
    rows = [_cells(line) for line in table.splitlines() if line.startswith("| `")]
    return {
        route.strip("`"): {name: mark == "?" for name, mark in re.findall(r"`(\w+)(\??)`", takes)}
        for route, takes, _ in rows
    }


def fields():
    """Reads what every route answers with: {route: {field: (type, whether null, shape)}}.

    A shape is a list of sizes as text, "B + 1", outermost first; a field's path is as in the table.
    """
    answers = {}
    for part in DOCUMENT.read_text(encoding="utf-8").split("\n## ")[1:]:
        title, _, text = part.partition("\n")
        if "| field |" not in text:
            continue
        answers[title] = {}
        for line in text.splitlines():
            if line.startswith("| `"):
                field, kind, shape, _ = _cells(line)
                sizes = [size.strip() for size in shape.strip("[]").split(",")] if shape else []
                answers[title][field.strip("`")] = (kind.rstrip("?"), kind.endswith("?"), sizes)
    return answers


def declarations():
    """Writes the answers as types that the page knows without an import: BinsAnswer, …."""
    text = []
    for route, answer in fields().items():
        tree = {}
        for path, (kind, null, shape) in answer.items():
            *parents, leaf = path.split(".")
            place = tree
            for parent in parents:
                place = place.setdefault(parent, {})
            element = _TYPES.get(kind, "Record<string, unknown>")
            element = f"({element} | null)" if null else element
            place[leaf] = element + "[]" * len(shape)
        text.append(f"type {route.title()}Answer = {_type(tree)};\n")
    return "\n".join(text)


def _type(tree, indent="  "):
    lines = []
    for name, kind in tree.items():
        written = kind if isinstance(kind, str) else _type(kind, indent + "  ")
        if name == "layer" and not isinstance(kind, str):
            written += " | null"
        lines.append(f"{indent}{name.removesuffix('[]')}: {written}{'[]' * name.endswith('[]')};")
    return "{\n" + "\n".join(lines) + f"\n{indent[2:]}}}"
