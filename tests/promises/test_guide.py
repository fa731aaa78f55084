"""The guide tells the truth: its names, keys, code and pictures are those of the package."""

import ast
import importlib
import importlib.util
import inspect
import json
import pkgutil
import re
import subprocess
import sys
import typing
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from support import ROOT
from support.models import Classifier, pl, toy_loader
from support.processes import environment
from support.training import fit

import lightning_lca
from lightning_lca import History, LCACallback
from lightning_lca.cli.main import _parser
from lightning_lca.record import eventfile
from lightning_lca.record.tables import SCALARS, StepTable
from lightning_lca.reporting.scalars import Scalars

DOCS = ROOT / "lightning_lca" / "docs"
SITE = ROOT / ".ci" / "site"
PAGES = sorted(DOCS.rglob("*.md"))
LARGEST = 150_000  # Bytes of a picture.
QUESTIONS = 10


def page(name):
    return (DOCS / name).read_text()


def sections(text):
    """Cuts a page at its headings of the second level: {heading: text}."""
    found = re.split(r"^## (.+)$", text, flags=re.M)
    return dict(zip(found[1::2], found[2::2], strict=True))


def anchors(text):
    """The places of a page that a link may name, as GitHub and the site name them."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    headings = re.findall(r"^#+ (.+)$", prose, re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def links(text):
    """What a page links to beside pictures: (path, anchor); the path is empty for itself."""
    found = re.findall(r"(?<!!)\[[^]]*\]\((?!\w+:)([^)#\s]*)#?([^)\s]*)\)", text)
    return [(path, anchor) for path, anchor in found]


# -- the reference --------------------------------------------------------------------------------


def documented():
    """What the reference documents: {full name: value}."""
    text = "".join(path.read_text() for path in (DOCS / "reference").glob("*.md"))
    found = {}
    for name in re.findall(r"^\.\. (?:auto\w+|py:data):: (\S+)$", text, re.M):
        module, _, attribute = name.rpartition(".")
        found[name] = getattr(importlib.import_module(module), attribute)
    return found


def public_doors():
    """The modules of the package that say what is public in them: {module: names}."""
    found = {"lightning_lca": lightning_lca.__all__}
    for module in pkgutil.walk_packages(lightning_lca.__path__, "lightning_lca."):
        spec = module.module_finder.find_spec(module.name)
        if re.search(r"^__all__ = ", Path(spec.origin).read_text(), re.M):
            found[module.name] = importlib.import_module(module.name).__all__
    return found


def test_every_public_name_is_in_the_reference():
    found, doors = documented(), public_doors()
    assert {"lightning_lca.figures", "lightning_lca.replay"} <= doors.keys()
    for door, names in doors.items():
        for name in names:
            value = getattr(importlib.import_module(door), name)
            assert any(value is there or value == there for there in found.values()), name
    assert {f"lightning_lca.{name}" for name in lightning_lca.__all__} <= found.keys()


def test_every_column_of_a_history_is_in_the_reference():
    text = page("reference/history.md")
    members = re.search(r":: lightning_lca\.History\n.*\n +:members: (.+)", text)
    columns = {name for name, value in vars(History).items() if isinstance(value, property)}
    assert columns <= set(members[1].split(", "))


def test_every_argument_is_explained_where_it_is_typed():
    for name, value in documented().items():
        if inspect.isclass(value) and issubclass(value, BaseException):
            continue
        if not callable(value) or not inspect.getdoc(value) or typing.get_origin(value):
            continue
        if getattr(value, "_is_protocol", False):
            continue
        told = f"{inspect.getdoc(value)} {inspect.getdoc(getattr(value, '__init__', None))}"
        for argument in inspect.signature(value).parameters:
            if argument not in ("history", "kwargs"):
                assert re.search(rf"\b{argument}(:|``)", told), f"{name}: {argument}"


def test_every_argument_is_in_the_table_of_options():
    rows = re.findall(r"^\| (`.+?`) \|", page("reference/options.md"), re.M)
    told = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    arguments = set(inspect.signature(LCACallback).parameters)
    assert arguments <= told
    asked = re.findall(r"^\| `(.+?)` \|", (ROOT / "README.md").read_text(), re.M)
    assert asked
    assert {n for row in asked for n in re.findall(r"\b(\w+)=", row)} <= arguments


def test_every_scalar_is_in_the_table_of_keys(tmp_path):
    lca = fit(tmp_path, steps=4).lca
    scalars = Scalars(["conv1"], [lca.history.sizes[0]])
    one = {n: c[:, :1] if c.ndim > 1 else c for n, c in lca.history.rows.arrays.items()}
    scalars.update(StepTable.of_arrays(one))
    told = set(re.findall(r"^\| `([^`]+)` \|", page("reference/keys.md"), re.M))
    assert scalars.take().keys() <= told
    assert {"lca/summary", "lca_layer_credit/00 conv1"} <= told


def test_the_record_reads_as_its_page_says(tmp_path):
    arguments = {"neurons": True, "track_parameters": True, "breakdown": True}
    lca = fit(tmp_path, steps=6, **arguments).lca
    tags = dict(eventfile.read(lca.log_dir))
    text = page("reference/record.md")
    for name in [*json.loads(tags[eventfile.META]), *SCALARS]:
        assert f"`{name}`" in text, name
    tables = {tag.split("/")[1] for tag in tags} - {"meta"}
    assert tables == {"chunk", "parameters", "neurons", "weights"}
    for tag in tags.keys() - {eventfile.META}:
        part = tag.rpartition("/")[2]
        assert f"`{'split_{name}' if part.startswith('split_') else part}`" in text, tag
    # As the page says, and with nothing of the package.
    header, _, body = tags["lca/chunk/000000001/allocated"].partition(b"\n")
    told = json.loads(header)
    width = np.dtype(told["dtype"]).itemsize
    planes = np.frombuffer(zlib.decompress(body), np.uint8).reshape(width, -1)
    credit = np.ascontiguousarray(planes.T).view(told["dtype"]).reshape(told["shape"])
    assert np.allclose(credit, lca.history.allocated)


def test_every_command_and_option_is_told():
    text = page("reference/commands.md")
    (commands,) = (action.choices for action in _parser()._actions if action.choices)
    arguments = set(inspect.signature(LCACallback).parameters) | {"no_figures", "help", "h"}
    for name, parser in commands.items():
        assert f"`lightning-lca {name}" in text
        for option in (o for action in parser._actions for o in action.option_strings):
            plain = option.lstrip("-")
            assert plain in arguments or option.partition(".")[0] in text, f"{name} {option}"


# -- questions ------------------------------------------------------------------------------------


def test_ten_questions_lead_to_the_page_that_answers_them():
    assert ("faq.md", "") in links(page("index.md")), "one click from the first page"
    questions = sections(page("faq.md"))
    assert len(questions) == QUESTIONS
    for question, answer in questions.items():
        assert question.endswith("?")
        found = links(answer)
        assert found, f"{question} leads nowhere"
        for path, anchor in found:
            target = DOCS / path if path else DOCS / "faq.md"
            assert target.resolve().is_file(), path
            assert not anchor or anchor in anchors(target.read_text()), f"{path}#{anchor}"


# -- recipes --------------------------------------------------------------------------------------

RECIPES = sorted((ROOT / "examples" / "recipes").glob("*.py"))


def commands(script):
    """What the file says that runs it, but for what needs other packages: lists of arguments."""
    told = ast.get_docstring(ast.parse(script.read_text()), clean=False)
    lines = re.findall(r"^    python (\S+\.py.*)$", told, re.M)
    return [line.split("#")[0].split() for line in lines if "pip install" not in line]


def masked(text):
    """Lines of an output without its numbers, which differ from machine to machine."""
    lines = (re.sub(r"[+-]?\d[\d,.]*", "#", line).split() for line in text.splitlines())
    return [line for line in lines if line]


def printed(text):
    (block,) = re.findall(r"^It prints:\n+```text\n(.*?)^```", text, re.M | re.S) or [""]
    return block


def test_every_recipe_has_a_page_that_shows_it_and_is_listed():
    listed = {path for path, _ in links(page("recipes/index.md"))}
    for script in RECIPES:
        assert f"{script.stem}.md" in listed
        text = page(f"recipes/{script.stem}.md")
        assert f"../../../examples/recipes/{script.name}\n" in text
        assert commands(script), "how to run it"
        assert masked(printed(text))


@pytest.mark.slow
@pytest.mark.parametrize("script", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_prints_what_its_page_says(script, tmp_path):
    for number, command in enumerate(commands(script)):
        there = tmp_path / str(number)
        there.mkdir()
        arguments = [re.sub("^examples/", f"{ROOT}/examples/", part) for part in command]
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=there,
            env=environment(),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert masked(done.stdout) == masked(printed(page(f"recipes/{script.stem}.md")))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_a_logger_of_another_package_runs_or_says_what_is_missing(name, tmp_path):
    script = ROOT / "examples" / "recipes" / "loggers.py"
    done = subprocess.run(
        [sys.executable, script, name],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
    )
    if importlib.util.find_spec(name) is None:
        assert done.returncode == 1
        assert done.stderr == f"{name} is not installed: pip install {name}\n"
    else:
        assert done.returncode == 0, done.stderr
        assert re.search(r"^\w+Logger: \d\d scalars, lca/help, ", done.stdout, re.M)


# -- code and pictures ----------------------------------------------------------------------------


def blocks(text):
    """The code of a page that is no session of doctest, which pytest runs by itself."""
    return [b for b in re.findall(r"^```python\n(.*?)^```", text, re.M | re.S) if ">>>" not in b]


WITH_CODE = [path for path in [ROOT / "README.md", *PAGES] if blocks(path.read_text())]


@pytest.mark.parametrize("path", WITH_CODE, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_the_code_of_a_page_runs_from_top_to_bottom(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {
        "pl": pl,
        "model": Classifier(),
        "train_loader": toy_loader(),
    }
    for code in blocks(path.read_text()):
        exec(compile(code, path.name, "exec"), names)


@pytest.mark.parametrize("name", ["README.md", "examples/README.md"])
def test_every_link_of_what_github_shows_leads_somewhere(name):
    text = (ROOT / name).read_text()
    found = links(text)
    assert found
    for path, anchor in found:
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), path
        assert not anchor or anchor in anchors(target.read_text()), f"{path}#{anchor}"


def made():
    """The names of the pictures that the scripts of the site make, and one benchmark."""
    found = set()
    scripts = [SITE / f"{name}.py" for name in ("pictures", "screens", "trust")]
    for script in (*scripts, ROOT / "tests" / "benchmarks" / "long_run.py"):
        for node in ast.walk(ast.parse(script.read_text())):
            target = getattr(node, "target", None) or next(iter(getattr(node, "targets", [])), None)
            if getattr(target, "id", "") == "PICTURES":
                found |= {key.value for key in node.value.keys}
    return found


def test_every_picture_is_shown_is_small_and_is_made_by_a_script():
    shown = set()
    for path in PAGES:
        shown |= set(re.findall(r"(?<!examples/)images/([\w-]+)\.png", path.read_text()))
    there = {path.stem for path in (DOCS / "images").iterdir()}
    assert there == shown == made()
    assert not any("![](" in path.read_text() for path in PAGES), "what a picture shows, in words"
    for path in (DOCS / "images").iterdir():
        assert path.stat().st_size < LARGEST, path
