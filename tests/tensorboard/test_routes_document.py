"""docs/routes.md says what the routes take and answer."""

from dataclasses import replace

import numpy as np
import pytest
from support.routes import Store, fields, parameters
from support.training import fit

from lightning_lca.record.history import History
from lightning_lca.tensorboard.query import QueryError
from lightning_lca.tensorboard.routes import ANSWERS, Download

KINDS = {"int": int, "float": float, "text": str, "bool": bool, "object": dict}
VALUES = {"run": "a", "layer": "net.2", "run_b": "b"}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Two runs, the second one with steps that are not finite; each is the other's validation."""
    history = fit(tmp_path_factory.mktemp("run"), steps=20, neurons=True, breakdown=True)
    history = history.lca.history
    names = {name: split.names for name, split in history.breakdowns.items()}
    broken = History(history.groups, history.sizes, breakdowns=names)
    residual = np.where(np.arange(len(history)) < 7, np.nan, history.residual)
    broken.append(replace(history.rows, residual=residual, converged=np.isfinite(residual)))
    return Store(a={"train": history, "val": broken}, b={"train": broken, "val": history})


def needed(route):
    return {name: VALUES[name] for name, free in parameters()[route].items() if not free}


def ask(store, route, **more):
    return store.ask(route, **(needed(route) | more))


def check(value, kind, null, shape, sizes):
    if shape and not (value is None and null):
        assert isinstance(value, list)
        if shape[0] != "*":
            letter, _, more = shape[0].partition(" + ")
            wanted = int(letter) if letter.isdigit() else None
            size = len(value) - int(more or 0)
            assert size == (wanted or sizes.setdefault(letter, size)), shape
        for part in value:
            check(part, kind, null, shape[1:], sizes)
    elif value is None:
        assert null
    else:
        # JSON has one kind of number: a float may be a whole one. But True is no int.
        allowed = (int, float) if kind == "float" else KINDS[kind]
        assert isinstance(value, allowed)
        assert kind in ("bool", "object") or not isinstance(value, bool)


def places(value, path):
    """Finds the values of a path such as `runs[].name`."""
    head, _, rest = path.partition(".")
    found = value[head.removesuffix("[]")]
    if not rest:
        return [found]
    return [x for part in (found if head.endswith("[]") else [found]) for x in places(part, rest)]


def paths(value, prefix=""):
    for name, part in value.items():
        if isinstance(part, dict) and name != "settings":
            yield from paths(part, f"{prefix}{name}.")
        elif isinstance(part, list) and part and isinstance(part[0], dict):
            yield from paths(part[0], f"{prefix}{name}[].")
        else:
            yield prefix + name


def test_every_route_is_documented():
    assert parameters().keys() == ANSWERS.keys()
    assert fields().keys() == ANSWERS.keys() - {"export"}


@pytest.mark.parametrize("route", ANSWERS)
def test_a_route_takes_the_parameters_that_are_told(store, route):
    told = parameters()[route]
    with pytest.raises(QueryError, match="Unknown parameter") as error:
        ask(store, route, nothing="1")
    known = str(error.value).partition("This route takes ")[2].rstrip(".")
    assert set(known.split(", ")) - {"none"} == told.keys()
    for missing in needed(route):
        given = {name: value for name, value in needed(route).items() if name != missing}
        with pytest.raises(QueryError, match=f"{missing} is missing"):
            store.ask(route, **given)


RANGES = [{}, {"bins": "3"}, {"start": "1", "stop": "5"}, {"stop": "400", "bins": "39"}]
FOLDED = [{"fold": "1"}, {"fold": "2", "toggle": '["net.*"]'}, {"find": "net"}]


ASKED = [
    (route, span)
    for route in sorted(ANSWERS.keys() - {"export"})
    for span in [*RANGES, *(FOLDED if "fold" in parameters()[route] else [])]
]


@pytest.mark.parametrize("run", ["a", "b"])
@pytest.mark.parametrize(("route", "span"), ASKED, ids=str)
def test_a_route_answers_with_the_fields_that_are_told(store, route, run, span):
    more = {} if route == "runs" else {"run": run, **span}
    if route == "helping":
        more["layer"] = "net.2"
    if route == "channels":
        more["run"] = "a"  # The other one has none.
    answer = ask(store, route, **more)
    told, sizes = fields()[route], {}
    assert sorted(paths(answer)) == sorted(told)
    for path, (kind, null, shape) in told.items():
        for value in places(answer, path):
            check(value, kind, null, shape, {} if "[]" in path else sizes)


def test_no_layer_is_no_field_of_it(store):
    assert ask(store, "helping")["layer"] is None


def test_the_export_is_a_file(store):
    assert isinstance(ask(store, "export"), Download)
