import assert from "node:assert/strict";
import test from "node:test";

import { margins, spread } from "../../../lightning_lca/tensorboard/static/charts/axes.js";
import { extremes } from "../../../lightning_lca/tensorboard/static/charts/heatmap.js";
import { extent } from "../../../lightning_lca/tensorboard/static/charts/marks.js";
import {
  clampRange,
  panned,
  zoomed,
} from "../../../lightning_lca/tensorboard/static/charts/zoom.js";
import {
  niceStep,
  stepTicks,
  tickLabels,
  valueTicks,
} from "../../../lightning_lca/tensorboard/static/lib/ticks.js";

const plain = (texts) => texts.map((text) => text.replaceAll("\u2212", "-"));

test("ticks stand at 1, 2 or 5 times a power of ten", () => {
  assert.deepEqual([0.7, 7, 23, 90, 1100].map((span) => niceStep(span, 5)), [0.2, 2, 5, 20, 500]);
  assert.deepEqual(valueTicks(-0.3, 0.21, 5), [-0.2, 0, 0.2]);
});

test("labels have the decimals that tell neighbours apart", () => {
  assert.deepEqual(plain(tickLabels([-1, -0.5, 0])), ["-1.0", "-0.5", "0"]);
  assert.deepEqual(plain(tickLabels([-2e-5, 0, 2e-5])), ["-2e-5", "0", "2e-5"]);
  assert.deepEqual(plain(tickLabels([0.25])), ["0.25"]);
});

test("where every step has room each has its tick, in the middle of its cell", () => {
  assert.deepEqual(stepTicks(4, 7, 300), [
    { at: 4.5, label: "5" },
    { at: 5.5, label: "6" },
    { at: 6.5, label: "7" },
  ]);
});

test("of many steps round ones are named, within the range and not too close", () => {
  for (const [low, high, pixels] of [
    [0, 400, 600],
    [37, 1203, 900],
    [99_000, 100_000, 300],
  ]) {
    const ticks = stepTicks(low, high, pixels);
    assert.ok(ticks.length >= 2 && ticks.length <= 13);
    for (const { at } of ticks) assert.ok(at >= low && at <= high);
    const widths = ticks.slice(1).map(({ at }, i) => ((at - ticks[i].at) / (high - low)) * pixels);
    assert.ok(Math.min(...widths) >= 40, `${low} to ${high}: ${Math.min(...widths)} pixels`);
  }
});

test("labels beside a plot are moved apart, in their order and inside", () => {
  const places = spread([10, 11, 12, 90], 0, 100, 14);
  places.slice(1).forEach((y, i) => assert.ok(y - places[i] >= 13.9));
  assert.ok(places[0] >= 7 && places.at(-1) <= 93);
  assert.deepEqual(spread([20, 60], 0, 100, 14), [20, 60]);
});

test("a plot's range has some air, and is a range even of one value", () => {
  assert.deepEqual(extent([[0, null, 10]], { air: 0.1 }), [-1, 11]);
  assert.deepEqual(extent([[5]], { air: 0 }), [4.5, 5.5]);
  assert.deepEqual(extent([[null]]), [-1, 1]);
});

test("zooming keeps the step under the pointer, and ranges stay within the run", () => {
  assert.deepEqual(zoomed(1, 100, 0.5, 1), [1, 50]);
  assert.deepEqual(zoomed(1, 100, 0.5, 100), [51, 100]);
  assert.deepEqual(zoomed(7, 7, 0.5), [7, 7]);
  assert.deepEqual(panned(11, 20, -0.5), [6, 15]);
  assert.deepEqual(clampRange(-4, 5, 1, 100), { start: 1, stop: 10 });
  assert.deepEqual(clampRange(95, 104, 1, 100), { start: 91, stop: 100 });
  assert.deepEqual(clampRange(-50, 500, 1, 100), { start: null, stop: null });
});

test("a narrow page has narrow margins", () => {
  const [narrow, wide] = [margins(400), margins(2000)];
  assert.deepEqual([narrow.left, narrow.right], [94, 100]);
  assert.deepEqual([wide.left, wide.right], [168, 156]);
});

test("how far the cells of a heatmap go is told beside where its colours end", () => {
  const rows = [{ values: [-3, 0.5, null] }, { values: [0, 1, -1] }];
  assert.deepEqual(extremes(rows, 1), { low: -3, high: 1, beyond: 1, cells: 5 });
  assert.deepEqual(extremes([], 0), { low: 0, high: 0, beyond: 0, cells: 0 });
});
