/** Rows of many layers: blocks that are open or folded. */

import { inOrder } from "./order.js";

export const MANY = 40; // Layers; of more, blocks are rows.

/** Whether a name may be that of a block: "module.*" or "first … last". */
export function isBlock(name) {
  return name !== null && (name.endsWith(".*") || name.includes(" … "));
}

/** Whether a layer's name has all words of a text. */
export function isFound(name, text) {
  const words = text.toLowerCase().split(/\s+/).filter(Boolean);
  return words.every((word) => name.toLowerCase().includes(word));
}

/** What both ends of a run of blocks begin with, but for the last of it: model. of model.h.0 … model.h.4. */
function prefixOfRun(name) {
  const [first, last] = name.split(" … ").map((end) => end.split("."));
  let same = 0;
  while (same < Math.min(first.length, last.length) - 1 && first[same] === last[same]) same++;
  const prefix = first.slice(0, Math.max(0, same - 1));
  return { prefix: prefix.map((part) => `${part}.`).join(""), rest: last.slice(same).join(".") };
}

/**
 * What a grid needs to know of rows: {name, label, depth, open}. Within a block names go without
 * what they share with it.
 * @param {{layers: string[], depth: number[], inside: number[], open: (boolean | null)[]}} answer
 */
export function treeRows({ layers, depth, inside, open }) {
  const prefixes = [""]; // Of what lies within the open blocks, by depth.
  return layers.map((name, i) => {
    const isRun = open[i] !== null && name.includes(" … ");
    const own = open[i] === null ? name : name.replace(/\.\*$/, "");
    const run = isRun ? prefixOfRun(name) : null;
    const prefix = run ? run.prefix : (prefixes[depth[i]] ?? "");
    prefixes[depth[i] + 1] = run || own === name ? prefix : `${own}.`;
    const first = run ? own.split(" … ")[0] : own;
    const cut = first.startsWith(prefix) && first !== prefix ? first.slice(prefix.length) : first;
    const short = run ? `${cut} … ${run.rest}` : cut;
    const label = open[i] === null ? short : `${short} (${inside[i]})`;
    return { name, label, depth: depth[i], open: open[i] };
  });
}

/**
 * The places of rows by their sums, the most helpful first; what lies within a block stays below it.
 * @param {number[]} depth
 * @param {(number | null)[]} totals
 */
export function placesByCredit(depth, totals) {
  const order = (first, stop) => {
    const starts = [];
    for (let i = first; i < stop; i++) if (depth[i] === depth[first]) starts.push(i);
    const spans = starts.map((start, k) => [start, starts[k + 1] ?? stop]);
    spans.sort(([a], [b]) => inOrder(totals[a], totals[b]));
    return spans.flatMap(([start, end]) => [
      start,
      ...(start + 1 < end ? order(start + 1, end) : []),
    ]);
  };
  return depth.length ? order(0, depth.length) : [];
}

/** Leaves out open blocks, whose layers follow: the places of the rows that add up. */
export function placesThatAddUp(open) {
  return open.map((_, i) => i).filter((i) => open[i] !== true);
}
