import assert from "node:assert/strict";
import test from "node:test";

import {
  count,
  elide,
  number,
  percent,
  percentLabels,
  plural,
  signed,
  steps,
} from "../../../lightning_lca/tensorboard/static/lib/format.js";
import { inOrder, natural } from "../../../lightning_lca/tensorboard/static/lib/order.js";

const plain = (text) => text.replaceAll("\u2212", "-").replaceAll("\u202f", " ");

test("numbers keep their significant digits at every size, and absence is a dash", () => {
  const shown = [0.92213, -0.92213, 0, 1.2e-6, 123456.7, 2.5e7].map((v) => plain(number(v)));
  assert.deepEqual(shown, ["0.922", "-0.922", "0", "1.20e-6", "123457", "2.50e7"]);
  assert.deepEqual([null, undefined, NaN, Infinity].map((v) => number(v)), ["–", "–", "–", "–"]);
  assert.deepEqual([signed(0.5, 2), plain(signed(-0.5, 2)), signed(0)], ["+0.50", "-0.50", "0"]);
});

test("a share that is there never reads as none", () => {
  const shown = [0, 1e-6, 0.001, 0.368, 1.2, -0.25, null].map((v) => plain(percent(v)));
  assert.deepEqual(shown, ["0.00 %", "< 0.01 %", "0.10 %", "36.8 %", "120 %", "-25.0 %", "–"]);
  assert.deepEqual(percentLabels([0.49, 0.495, 0.5]).map(plain), ["49.0 %", "49.5 %", "50.0 %"]);
});

test("counts and ranges of steps read as words", () => {
  assert.equal(count(12345), "12,345");
  assert.equal(plural(1, "layer"), "1 layer");
  assert.equal(plural(6, "layer"), "6 layers");
  assert.equal(steps(7, 7), "step 7");
  assert.equal(steps(1, 2300), "steps 1–2,300");
});

test("names are shortened from the left, and still tell layers apart", () => {
  const width = (text) => text.length;
  assert.equal(elide("conv1", 12, width), "conv1");
  assert.equal(elide("encoder.layers.10.self_attn", 16, width), "e.l.10.self_attn");
  assert.equal(elide("transformer.h.10.mlp.c_fc", 13, width), "t.h.10.m.c_fc");
  assert.equal(elide("transformer.h.10.mlp.c_fc", 12, width), "…h.10.m.c_fc");
  assert.equal(elide("transformer.h.10.mlp.c_fc", 11, width), "…10.m.c_fc");
  assert.equal(elide("a_very_long_name", 9, width).length, 9);
  const [a, b] = ["10", "11"].map((n) => elide(`encoder.layers.${n}.self_attention.q`, 12, width));
  assert.notEqual(a, b);
  assert.ok(a.length <= 12);
});

test("names are ordered by their numbers, and missing values come last either way", () => {
  assert.deepEqual(["v10", "v2"].sort(natural), ["v2", "v10"]);
  const ordered = (falling) => [2, null, -1, 0].sort((a, b) => inOrder(a, b, falling));
  assert.deepEqual(ordered(false), [-1, 0, 2, null]);
  assert.deepEqual(ordered(true), [2, 0, -1, null]);
});
