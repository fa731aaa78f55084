import assert from "node:assert/strict";
import test from "node:test";

import { fromHash, toHash } from "../../../lightning_lca/tensorboard/static/lib/state.js";

test("what an address says is read back from it, and the rest of it stays", () => {
  const state = { ...fromHash(""), run: "a&b=c d", start: 3, stop: 9, layer: "net.<b>" };
  const hash = toHash("#lca&other=1&100%", state);
  assert.ok(hash.startsWith("#lca&other=1&100%&"));
  assert.deepEqual(fromHash(hash), state);
  assert.equal(toHash(hash, fromHash("")), "#lca&other=1&100%");
});

test("what makes no sense in an address takes its default", () => {
  for (const hash of [
    "#p.lca.start=x&p.lca.stop=4",
    "#p.lca.start=9&p.lca.stop=4",
    "#p.lca.start=-1&p.lca.stop=4",
    "#p.lca.start=5",
    "#p.lca.nothing=5&start=1&stop=2&p.lca.run",
    "#p.lca.start=%E0%A4%A&p.lca.stop=1",
  ]) {
    const { start, stop } = fromHash(hash);
    assert.deepEqual([start, stop], [null, null], hash);
  }
});
