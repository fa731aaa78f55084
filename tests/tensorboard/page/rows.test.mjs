import assert from "node:assert/strict";
import test from "node:test";

import {
  isBlock,
  isFound,
  placesByCredit,
  placesThatAddUp,
  treeRows,
} from "../../../lightning_lca/tensorboard/static/lib/rows.js";

test("within a block names go without what they share with it", () => {
  const rows = treeRows({
    layers: ["net.*", "net.wte", "net.h.*", "net.h.0.*", "net.h.1.*", "net.h.1.ln", "head", "a.b"],
    depth: [0, 1, 1, 2, 2, 3, 0, 0],
    inside: [9, 1, 7, 6, 1, 1, 1, 1],
    open: [true, null, true, false, true, null, null, null],
  });
  assert.deepEqual(
    rows.map(({ label }) => label),
    ["net (9)", "wte", "h (7)", "0 (6)", "1 (1)", "ln", "head", "a.b"],
  );
  assert.deepEqual(
    rows.map(({ name }) => name)[3],
    "net.h.0.*",
  );
});

test("runs of neighbours are told by their ends", () => {
  const rows = treeRows({
    layers: ["model.h.0 … model.h.4", "model.h.5 … model.h.9", "model.h.5.*", "l_00 … l_49", "l_00"],
    depth: [0, 0, 1, 0, 1],
    inside: [50, 50, 10, 50, 1],
    open: [false, true, false, true, null],
  });
  assert.deepEqual(
    rows.map(({ label }) => label),
    ["h.0 … 4 (50)", "h.5 … 9 (50)", "h.5 (10)", "l_00 … l_49 (50)", "l_00"],
  );
});

test("layers keep their names, however odd", () => {
  const layers = ["", ".", "a.*", "x … y", "<b>"];
  const flat = (value) => layers.map(() => value);
  const rows = treeRows({ layers, depth: flat(0), inside: flat(1), open: flat(null) });
  assert.deepEqual(
    rows.map(({ label }) => label),
    layers,
  );
});

test("what adds up are layers and folded blocks", () => {
  assert.deepEqual(placesThatAddUp([true, null, false, true, null]), [1, 2, 4]);
});

test("a search takes all words, in any case", () => {
  assert.ok(isFound("net.h.10.C_proj", " c_PROJ  10 "));
  assert.ok(!isFound("net.h.10.c_proj", "c_proj 2"));
  assert.ok(isBlock("a.*") && isBlock("a.0 … a.4") && !isBlock("a.b") && !isBlock(null));
});

test("rows by credit stay within their blocks, the most helpful first, unknown sums last", () => {
  //             net.*  a  h.*  h.1  h.2  head  broken
  const depth = [0, 1, 1, 2, 2, 0, 0];
  const totals = [-1, -0.1, -0.9, -0.4, -0.5, -3, null];
  assert.deepEqual(placesByCredit(depth, totals), [5, 0, 2, 4, 3, 1, 6]);
  assert.deepEqual(placesByCredit([0, 0, 0], [0.5, -1, 0]), [1, 2, 0]);
  assert.deepEqual(placesByCredit([], []), []);
});
