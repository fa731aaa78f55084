import assert from "node:assert/strict";
import test from "node:test";

import {
  layerWords,
  ledgerWords,
  leftOut,
  lossWords,
  mostWords,
  pairNames,
  sharedWords,
  sureWords,
  synchronyWords,
  findingWords,
  generalizationWords,
  trustWords,
} from "../../../lightning_lca/tensorboard/static/lib/words.js";

const TABLE = {
  helped: 2,
  hurt: 1,
  broken: 0,
  most_helpful: { name: ["a", "b"], credit: [-3, -2], share: [0.75, 0.5] },
  most_hurtful: { name: ["c"], credit: [1], share: [-0.25] },
  true_change: -4,
  allocated: -4,
  residual: 0.001,
  drift: 0,
  rows: 10,
  not_finite: 0,
  beyond_tolerance: 0,
  unexplained: 0.0002,
  is_large: false,
  largest_residual: 0.001,
  remarks: [],
};
const told = (change) => trustWords({ ...TABLE, ...change }, 0);
const plain = (text) => text.replaceAll("\u2212", "-").replaceAll("\u202f", " ");

test("two measurements are named by what tells them apart", () => {
  const pair = (run, probe) => ({ run, probe });
  assert.deepEqual(pairNames(pair("r", "train"), pair("r", "val")), ["train", "val"]);
  assert.deepEqual(pairNames(pair("r", ""), pair("r", "val")), ["only probe", "val"]);
  assert.deepEqual(pairNames(pair("r", "val"), pair("s", "val")), ["r", "s"]);
  assert.deepEqual(pairNames(pair("r", ""), pair("s", "val")), ["r", "s · val"]);
});

test("the verdict says how the loss moved, and where", () => {
  const bins = { edges: [0, 5, 10], loss: [1.5, null, 0.25] };
  const words = lossWords({ true_change: -1.25, rows: 10 }, bins);
  assert.equal(words.head, "The loss fell by 1.250");
  assert.equal(words.detail, "1.5000 → 0.2500 · Steps 1–10");
  assert.match(lossWords({ true_change: 2, rows: 5 }, bins).head, /rose by 2/);
  assert.match(lossWords({ true_change: 2, rows: 5 }, bins).detail, /5 measured/);
  assert.equal(lossWords({ true_change: null, rows: 5 }, bins).warn, true);
  assert.equal(lossWords({ true_change: null, rows: 0 }, bins).head, "No measured step here");
});

test("the verdict names the layers that did most, with their served shares", () => {
  const { head, detail, warn } = layerWords(TABLE);
  assert.equal(head, "2 layers helped, 1 hurt");
  assert.match(plain(detail), /hurting most: c \+1.0 · helping most: a -3.0 \(75.0 %\), b -2.0 \(50.0 %\)/);
  assert.equal(warn, false);
  assert.equal(layerWords({ ...TABLE, helped: 0, hurt: 0, broken: 3 }).warn, true);
});

test("trust follows the served share, and all is never said where something is left", () => {
  assert.equal(plain(told({}).head), "The credits explain 99.98 %");
  assert.equal(told({}).warn, false);
  assert.equal(plain(told({ unexplained: 0.00059 }).head), "The credits explain 99.94 %");
  assert.equal(plain(told({ unexplained: 0.0321 }).head), "The credits explain 96.8 %");
  assert.equal(plain(told({ unexplained: 0.00001 }).head), "The credits explain > 99.99 %");
  assert.equal(told({ unexplained: 0 }).head, "The credits add up");
  assert.equal(told({ unexplained: null }).head, "The credits add up");
  assert.equal(told({ unexplained: null, is_large: true, remarks: ["x"] }).head, "The credits do not add up");
  assert.equal(told({ unexplained: 1.5 }).head, "The credits do not explain the change");
});

test("the layer that learned most is named, with its part of a loss that fell", () => {
  const told = (change) => mostWords({ ...TABLE, ...change });
  assert.equal(told({}).name, "a");
  assert.equal(plain(told({}).words), " learned most: -3.0 (75.0 % of the loss change).");
  assert.equal(plain(told({ true_change: 1 }).words), " learned most: -3.0.");
  assert.equal(told({ most_helpful: { name: [], credit: [], share: [] } }), null);
});

test("what is explained and what is left over add up to all, wherever they are written", () => {
  for (const unexplained of [0.00006, 0.00099, 0.001, 0.0010001, 0.0099, 0.00999, 0.0321, 0.2, 0.99]) {
    const table = { ...TABLE, unexplained };
    const { head, detail } = trustWords(table, 0);
    const [, explained] = plain(head).match(/explain ([\d.]+) %/);
    const [, left] = plain(detail).match(/^residuals ([\d.]+) % of all credit/);
    const [, noted] = plain(ledgerWords(table)).match(/are ([\d.]+) % of all credit/);
    assert.equal(left, noted);
    assert.equal((Number(explained) + Number(left)).toFixed(6), "100.000000");
  }
  assert.match(told({ unexplained: 0.00001 }).detail, /^residuals < 0.01/);
  assert.match(told({ unexplained: 0.02, closes: true }).detail, /^raw residuals 2.0/);
});

test("whether a residual is large is the server's to say, and so is the remedy", () => {
  const large = told({ unexplained: 0.5, is_large: true, remarks: ["The residual is large. Do X."] });
  assert.equal(large.warn, true);
  assert.match(large.detail, /The residual is large. Do X.$/);
  assert.equal(told({ unexplained: 0.5 }).warn, false);
});

test("steps that are left out, beyond the tolerance, or lost are counted", () => {
  const broken = told({ not_finite: 3 });
  assert.match(broken.detail, /3 steps were not finite and are left out/);
  assert.equal(broken.warn, true);
  assert.equal(told({ not_finite: 10, unexplained: null }).head, "No step is finite");
  assert.match(told({ beyond_tolerance: 2 }).detail, /2 of 10 steps beyond the tolerance/);
  assert.match(trustWords(TABLE, 2).detail, /2 chunks of the record could not be read/);
  assert.equal(leftOut(1), "1 step was not finite and is left out");
  assert.deepEqual(told({ rows: 0 }), { head: "Nothing to add up", detail: "" });
});

test("the ledger is an equation only where no step is left out of it", () => {
  assert.match(plain(ledgerWords(TABLE)), /^True change -4.0000 = LCA -4.0000, residual \+0.00100/);
  assert.match(plain(ledgerWords(TABLE)), /Residuals of all steps are 0.02 % of all credit/);
  const partial = ledgerWords({ ...TABLE, not_finite: 1, remarks: ["In 1 of 10 steps …"] });
  assert.doesNotMatch(partial, / = /);
  assert.match(partial, /In 1 of 10 steps …$/);
});

test("layers learn together where pairs are more than chance gives", () => {
  const data = {
    layers: ["a", "b"],
    moments: 40,
    synchronized: 30,
    null_low: 4.2,
    null_high: 9.8,
    pairs: 15,
    pairs_null_mean: 10,
    pairs_null_low: 8,
    pairs_null_high: 12,
    p_pairs: 1 / 1001,
    draws: 1000,
  };
  assert.deepEqual(synchronyWords(data), {
    together: true,
    head: "Layers learn together",
    words: "Layers peak on the same step 50\u202f% more often than by chance (p < 0.001).",
  });
  assert.equal(synchronyWords({ ...data, p_pairs: 0.31 }).together, false);
  assert.match(synchronyWords({ ...data, p_pairs: 0.314 }).words, /\(p = 0.31\)/);
  assert.equal(synchronyWords({ ...data, layers: ["a"] }).together, null);
  assert.equal(synchronyWords({ ...data, moments: 0 }).together, null);
  assert.match(synchronyWords({ ...data, pairs: 8 }).words, /peak .* 20\u202f% less often than/);
  assert.match(
    sharedWords(data),
    /^Chance alone gives \u221220\u202f% to \+20\u202f%. 30 of 40 moments /,
  );
  assert.match(sharedWords(data), /moments .* chance would give 4–10.$/);
});

test("a finding has a headline and its size at a glance", () => {
  const data = {
    kind: ["hurts", "helping", "synchrony", "residual", "never_moves"],
    where: ["conv2", "network", "network", "fc", "network"],
    effect: [0.0031, 0.012, 0.4, 3, 0.31],
    low: [0.001, 0.002, 0.3, null, null],
    high: [0.0052, 0.02, 0.5, null, null],
    p: [0.004, 0.0001, 0.03, null, null],
  };
  const told = data.kind.map((_, i) => findingWords(data, i));
  assert.deepEqual(told[0], {
    head: "conv2 hurts",
    mood: "hurts",
    size: "+0.0031 a step (+0.0010 to +0.0052, p = 0.004)",
  });
  assert.equal(told[1].size, "51.2\u202f% (50.2\u202f% to 52.0\u202f%, p < 0.001)");
  assert.match(told[2].size, /^\+40\u202f% over chance \(\+30\u202f% to \+50\u202f%/);
  assert.deepEqual(told[3], { head: "The sign of fc is open", mood: "doubt", size: "" });
  assert.equal(told[4].size, "31.0\u202f%");
  const fewer = { ...data, effect: [0, -0.01] };
  assert.deepEqual(
    [findingWords(fewer, 1).head, findingWords(fewer, 1).mood],
    ["Fewer than half of the weights help", "hurts"],
  );
});

test("no finding is told apart from too few steps to find one", () => {
  const data = { kind: [], steps: 230, least: 50, level: 0.05 };
  assert.match(sureWords(data), /^Nothing in these 230 measured steps is beyond chance/);
  assert.match(sureWords({ ...data, steps: 49 }), /^Findings need 50 .* here are 49\.$/);
  assert.match(sureWords({ ...data, kind: ["hurts"] }), /^From 230 .* about 5\u202f% of runs/);
});

test("who overfits is named, and what all layers did together", () => {
  const data = {
    layers: ["a", "b", "c"],
    measured: 200,
    verdict: ["helps both", "overfits", "overfits"],
    most_telling: [2, 1, 0],
    total_train: [-1, -0.5, null],
    total_val: [-0.75, 0.25, 1],
  };
  const told = (change) => generalizationWords({ ...data, ...change });
  assert.equal(told({}).head, "2 of 3 layers overfit, c most");
  assert.match(plain(told({}).words), /over 200 steps: train -1.50, validation \+0.500\./);
  assert.equal(told({ verdict: ["helps both", "helps both", "overfits"] }).head, "c overfits");
  assert.equal(told({ verdict: ["helps both"] }).head, "no layer overfits");
  assert.equal(told({ measured: 0 }).head, "no measured step here");
});
