"""What a record may hold that is damaged, or made to harm."""

import json
import zlib

import numpy as np

from lightning_lca.record import eventfile
from support.records import description, packed

DEEP = b"[" * 20_000 + b"]" * 20_000
HUGE = 10**18
ZEROS = zlib.compress(bytes(1000))
BOMB = zlib.compress(bytes(2**28), 9)
STEMS = {"neurons": {"stems": [["conv", 10**9]]}}

# What is said of a session, and what the error says.
DESCRIPTIONS = {
    "empty": (b"", "no JSON"),
    "deep": (DEEP, "nested too deep"),
    "deep settings": (description(settings={"a": json.loads("[" * 50 + "]" * 50)}), "levels deep"),
    "deep object": (b'{"a":' * 10_000 + b"1" + b"}" * 10_000, "nested too deep"),
    "no object": (b"[1]", "a list of 1"),
    "not text": (b"\xff\xfe", "no JSON"),
    "long number": (b'{"version": ' + b"9" * 10_000 + b"}", "no JSON"),
    "later version": (description(version=2), "Update lightning_lca"),
    "odd version": (description(version="1"), "version is '1'"),
    "no probes": (description(probes=...), "no 'probes'"),
    "no groups": (description(groups=...), "no 'groups'"),
    "no sizes": (description(sizes=...), "no 'sizes'"),
    "no first step": (description(first_step=...), "no 'first_step'"),
    "empty probes": (description(probes=[]), "no probe"),
    "empty groups": (description(groups=[], sizes=[]), "no group"),
    "probes of numbers": (description(probes=[3]), "probes holds 3"),
    "probes of lists": (description(probes=[["train"]]), "a list of 1"),
    "probes of text": (description(probes="train"), "expected a list"),
    "probes twice": (description(probes=["a", "a"]), "'a' twice"),
    "probes twice unnamed": (description(probes=[None, ""]), "twice"),
    "very many lists": (b'{"probes": [' + b"[]," * 10**6 + b"1]}", "far more memory"),
    "groups of lists": (description(groups=[[["conv"]], "head"]), "a list of 1"),
    "groups of numbers": (description(groups=[1, 2]), "groups holds 1"),
    "groups twice": (description(groups=["conv", "conv"]), "'conv' twice"),
    "half a surrogate": (description(groups=["\ud800", "head"]), "groups holds"),
    "long name": (description(groups=["x" * 20_000, "head"]), "10,000 characters"),
    "fewer sizes": (description(sizes=[1]), "2 groups and 1 sizes"),
    "negative size": (description(sizes=[-1, 7]), "sizes holds -1"),
    "huge size": (description(sizes=[10**30, 7]), "sizes holds"),
    "fraction of a weight": (description(sizes=[1.5, 7]), "sizes holds 1.5"),
    "true weight": (description(sizes=[True, 7]), "sizes holds True"),
    "infinite size": (description(sizes=[float("inf"), 7]), "sizes holds None"),
    "first step infinite": (description(first_step=float("inf")), "first_step holds None"),
    "first step beyond floats": (
        description(first_step=0).replace(b'"first_step": 0', b'"first_step": 1e999'),
        "first_step holds None",
    ),
    "first step negative": (description(first_step=-1), "first_step holds -1"),
    "first step huge": (description(first_step=HUGE), "first_step holds"),
    "first step text": (description(first_step="0"), "first_step holds '0'"),
    "group_by": (description(group_by=["layer"]), "group_by is"),
    "callback": (description(callback=3), "callback is 3"),
    "settings": (description(settings=[1]), "settings is"),
    "odd setting": (description(settings={"every_n_steps": "two"}), "every_n_steps is 'two'"),
    "layers": (description(layers=["a"]), "2 groups and 1 layers"),
    "windows": (description(windows=[1]), "windows is"),
    "kinds": (
        description(windows={"parameters": {"names": ["a", "b"], "kinds": ["bias"]}}),
        "2 parameters and 1 kinds",
    ),
    "stems": (description(windows={"neurons": {"stems": [["conv"]]}}), "stems hold"),
    "negative neurons": (description(windows={"neurons": {"stems": [["a", -5]]}}), "stems holds"),
    "index": (
        description(windows={"weights": {"indices": {"w": [9]}, "of": 9}}, shapes={"w": [3, 3]}),
        "outside its shape",
    ),
    "shape": (
        description(windows={"weights": {"indices": {"w": [9]}, "of": 9}}, shapes={}),
        "no shape",
    ),
    "huge shape": (
        description(
            windows={"weights": {"indices": {"w": [9]}, "of": 9}}, shapes={"w": [10**15] * 9}
        ),
        "outside its shape",
    ),
}


# Parts of the second of three chunks, and what is said of it.
CHUNKS = {
    "steps nan": {"steps": np.full(8, np.nan)},
    "steps text": {"steps": packed("<U4", [8], ZEROS)},
    "steps objects": {"steps": packed("|O", [8], ZEROS)},
    "steps fractions": {"steps": np.arange(9.0, 17)},
    "steps true": {"steps": np.ones(8, bool)},
    "steps falling": {"steps": np.arange(16, 8, -1)},
    "steps equal": {"steps": np.full(8, 9)},
    "steps negative": {"steps": np.arange(-8, 0)},
    "steps huge": {"steps": np.arange(2**62, 2**62 + 8)},
    "steps beyond int64": {"steps": np.arange(2**63, 2**63 + 8, dtype=np.uint64)},
    "steps elsewhere": {"steps": np.arange(10, 18)},
    "steps wide": {"steps": np.arange(9, 17)[:, None]},
    "steps 0-d": {"steps": np.array(9)},
    "allocated 0-d": {"allocated": np.array(1.0)},
    "allocated flat": {"allocated": np.zeros(16, np.float32)},
    "allocated whole": {"allocated": np.zeros((8, 2), np.int32)},
    "allocated of more groups": {"allocated": np.zeros((8, 3), np.float32)},
    "allocated of fewer rows": {"allocated": np.zeros((7, 2), np.float32)},
    "counts of floats": {"helping": np.zeros((8, 2))},
    "counts negative": {"idle": np.full((8, 2), -1, np.int8)},
    "scalars nan": {"scalars": np.full((8, 8), np.nan)},
    "scalars infinite": {"scalars": np.full((8, 8), np.inf)},
    "scalars huge": {"scalars": np.full((8, 8), 1e300)},
    "scalars of more columns": {"scalars": np.zeros((8, 9))},
    "dtype <": {"steps": packed("8i8", [8], ZEROS)},
    "dtype structured": {"steps": packed("i4,i4", [8], ZEROS)},
    "dtype subarray": {"steps": packed("(1000000,1000000)f8", [8], ZEROS)},
    "dtype void": {"steps": packed("|V1000000000", [8], ZEROS)},
    "dtype text": {"steps": packed("<U1000000000", [1], ZEROS)},
    "dtype time": {"steps": packed("<M8[ns]", [8], ZEROS)},
    "dtype unknown": {"steps": packed("{", [8], ZEROS)},
    "dtype a list": {"steps": packed([["a", "<f4"]], [8], ZEROS)},
    "dtype a number": {"steps": packed(4, [8], ZEROS)},
    "dtype nothing": {"steps": packed(None, [8], ZEROS)},
    "dtype empty": {"steps": packed("", [8], ZEROS)},
    "dtype complex": {"allocated": packed("<c16", [8, 2], zlib.compress(bytes(256)))},
    "shape negative": {"steps": packed("<i8", [-8], ZEROS)},
    "shape text": {"steps": packed("<i8", ["8"], ZEROS)},
    "shape true": {"steps": packed("<i8", [True], ZEROS)},
    "shape fraction": {"steps": packed("<i8", [8.0], ZEROS)},
    "shape no list": {"steps": packed("<i8", 8, ZEROS)},
    "shape an object": {"steps": packed("<i8", {"8": 8}, ZEROS)},
    "shape nested": {"steps": packed("<i8", [[8]], ZEROS)},
    "shape huge": {"steps": packed("<i8", [2**60], ZEROS)},
    "shape beyond int64": {"steps": packed("<i8", [10**30], ZEROS)},
    "shape of none": {"steps": packed("<i8", [0], b"")},
    "shape of many": {"steps": packed("<i8", [1] * 100, ZEROS)},
    "more than declared": {"steps": packed("<i8", [8], BOMB)},
    "gigabytes declared": {"steps": packed("<i8", [2**25], BOMB)},
    "many rows": {"steps": packed("<i8", [2**21], zlib.compress(bytes(2**24), 9))},
    "less than declared": {"steps": packed("<i8", [9], zlib.compress(bytes(64)))},
    "rest behind": {"steps": packed("<i8", [8], zlib.compress(bytes(64)) + b"more")},
    "cut": {"steps": eventfile.pack(np.arange(9, 17))[:-3]},
    "no body": {"steps": packed("<i8", [8], b"")},
    "no header": {"steps": ZEROS},
    "no newline": {"steps": b'{"dtype": "<i8"}'},
    "deep header": {"steps": DEEP},
    "deep short header": {"steps": b"[" * 500 + b"\n"},
    "header a list": {"steps": b"[]\n" + ZEROS},
    "empty": {"steps": b""},
}


def window(table="neurons", first=8, width=4, **changed):
    parts = {"span": np.array([[8, 8]]), "allocated": np.ones((1, width), np.float32)} | changed
    return {
        str(eventfile.Tag(table, first, "", n)): p if isinstance(p, bytes) else eventfile.pack(p)
        for n, p in parts.items()
    }
