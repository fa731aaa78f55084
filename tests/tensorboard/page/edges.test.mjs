import assert from "node:assert/strict";
import test from "node:test";

import {
  binAt,
  end,
  nearestEdge,
  smoothed,
  stacked,
  startingFrom,
  sumsOf,
} from "../../../lightning_lca/tensorboard/static/lib/edges.js";

const EDGES = [0, 5, 10, 12];

test("a position lies in the bin that ends at or after it", () => {
  const bins = [0.1, 5, 5.1, 10, 11, 12, 99, -3].map((at) => binAt(EDGES, at));
  assert.deepEqual(bins, [0, 0, 1, 1, 2, 2, 2, 0]);
});

test("the nearest edge is found on both sides, and beyond the ends", () => {
  const found = [-9, 2, 3, 11.5, 50].map((at) => nearestEdge(EDGES, at));
  assert.deepEqual(found, [0, 0, 1, 3, 3]);
});

test("the end of a line is its last known value", () => {
  assert.equal(end([0, -1, null]), -1);
  assert.equal(end([null]), 0);
});

test("sums start from what came before, and gaps stay gaps", () => {
  assert.deepEqual(startingFrom(-2, [0, null, 1]), [-2, null, -1]);
  const bins = {
    running: [[0, -1, null]],
    running_total: [0, -1, null],
    running_truth: [0, -1.5, -2],
    before: [-4],
    before_total: -4,
    before_truth: null, // The run began with a loss that was not finite.
  };
  assert.deepEqual(sumsOf(bins, false), {
    sums: [[0, -1, null]],
    total: [0, -1, null],
    truth: [0, -1.5, -2],
  });
  assert.deepEqual(sumsOf(bins, true), {
    sums: [[-4, -5, null]],
    total: [-4, -5, null],
    truth: [0, -1.5, -2],
  });
});

test("areas stand on top of each other", () => {
  const lists = [[1, 2], [0, 0], [3, 1]];
  assert.deepEqual(stacked(lists), [[1, 2], [1, 2], [4, 3]]);
  assert.deepEqual(stacked([]), []);
});

test("a smoothed line is a mean of what lies around, and gaps stay gaps", () => {
  assert.deepEqual(smoothed([0, 3, 6, 3, 0], 3), [1.5, 3, 4, 3, 1.5]);
  assert.deepEqual(smoothed([1, null, 3, 5], 3), [1, null, 4, 4]);
  assert.deepEqual(smoothed([1, 2], 45), [1.5, 1.5]);
});
