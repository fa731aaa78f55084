import assert from "node:assert/strict";
import test from "node:test";

import { DARK, LIGHT } from "../../../lightning_lca/tensorboard/static/colours.js";
import {
  colors,
  diverging,
  rgb,
  sequence,
} from "../../../lightning_lca/tensorboard/static/lib/theme.js";

test("the page takes the colours that the figures have", () => {
  assert.equal(colors.helps, LIGHT.helps);
  assert.equal(colors.hurts, LIGHT.hurts);
  assert.deepEqual(Object.keys(DARK), Object.keys(LIGHT));
});

test("the scale goes from full blue over white to full red, and ends at the limit", () => {
  assert.deepEqual(diverging(-2, 2), rgb(LIGHT.helps));
  assert.deepEqual(diverging(2, 2), rgb(LIGHT.hurts));
  assert.deepEqual(diverging(0, 2), [255, 255, 255]);
  assert.deepEqual(diverging(99, 2), diverging(2, 2));
  assert.deepEqual(diverging(0, 0), [255, 255, 255]);
});

test("small credit can be seen: the scale is that of square roots", () => {
  const lightness = (color) => color.reduce((sum, c) => sum + c, 0);
  const [none, some, most] = [0, -0.04, -1].map((v) => lightness(diverging(v, 1)));
  assert.ok((none - some) / (none - most) > 0.1);
  const fifth = diverging(-0.04, 1);
  const [white, blue] = [diverging(0, 1), diverging(-1, 1)];
  fifth.forEach((c, i) => assert.ok(Math.min(white[i], blue[i]) <= c && c <= white[i]));
});

test("layers in network order have colours of their own", () => {
  for (const n of [1, 2, 5, 40]) {
    const made = sequence(n);
    assert.equal(new Set(made).size, n);
    for (const color of made) assert.match(color, /^rgb\(\d+, \d+, \d+\)$/);
  }
});
