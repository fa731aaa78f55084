/** Sentences: what the numbers say, for the band on top and the notes below the plots. */

import { count, number, percent, plural, signed, steps } from "./format.js";

/** What tells two measurements apart: the probe within a run, else the run (and probe). */
export function pairNames({ run, probe }, { run: otherRun, probe: otherProbe }) {
  if (run === otherRun) return [probe || "only probe", otherProbe || "only probe"];
  if (probe === otherProbe) return [run, otherRun];
  return [
    [run, probe],
    [otherRun, otherProbe],
  ].map((pair) => pair.filter(Boolean).join(" · "));
}

/** A loss with a fixed number of decimals, so that two can be compared at a glance. */
function lossText(value) {
  return Math.abs(value) >= 1e-3 && Math.abs(value) < 1000
    ? value.toFixed(4).replace("-", "\u2212")
    : number(value, 4);
}

/**
 * How the loss moved; {head, detail}.
 * @param {TableAnswer} table
 * @param {BinsAnswer} bins
 */
export function lossWords(table, { loss, edges }) {
  const { true_change: change, rows } = table;
  const [first, last] = [edges[0] + 1, edges.at(-1)];
  const where = steps(first, last);
  const told = `${where[0].toUpperCase()}${where.slice(1)}`;
  const measured = rows === last - first + 1 ? "" : ` · ${count(rows)} measured`;
  if (!rows) return { head: "No measured step here", detail: told, warn: true };
  const known = loss.filter((v) => v !== null);
  const ends = known.length > 1 ? `${lossText(known[0])} → ${lossText(known.at(-1))} · ` : "";
  if (change === null)
    return { head: "The loss is not a finite number", detail: `${told}${measured}`, warn: true };
  const head = change
    ? `The loss ${change < 0 ? "fell" : "rose"} by ${number(Math.abs(change), 4)}`
    : "The loss stayed as it was";
  return { head, detail: `${ends}${told}${measured}`, warn: false };
}

/**
 * Which layers helped and which hurt.
 * @param {TableAnswer} table
 */
export function layerWords({ layers, true_change: change }) {
  const helped = layers.filter((l) => l.credit < 0).sort((a, b) => a.credit - b.credit);
  const hurt = layers.filter((l) => l.credit > 0).sort((a, b) => b.credit - a.credit);
  const broken = layers.filter((l) => l.credit === null).length;
  const hurting = hurt.length ? `${count(hurt.length)} hurt` : "none hurt";
  const part = (l) => (change < 0 && l.credit < 0 ? ` (${percent(l.share, 0)})` : "");
  const told = (l) => `${l.name} ${signed(l.credit, 2)}${part(l)}`;
  const details = [];
  if (broken) details.push(`${plural(broken, "layer")} not finite`);
  if (hurt.length) details.push(`hurting most: ${hurt.slice(0, 2).map(told).join(", ")}`);
  if (helped.length) details.push(`helping most: ${helped.slice(0, 2).map(told).join(", ")}`);
  const head = `${helped.length ? plural(helped.length, "layer") : "No layer"} helped, ${hurting}`;
  return { head, detail: details.join(" · "), warn: broken > 0 };
}

/**
 * How far the credits explain what happened: by the residuals of all steps against all credit.
 * @param {TableAnswer} table
 */
function explainedWords({ unexplained, is_large: large }) {
  if (unexplained === null) return large ? "The credits do not add up" : "The credits add up";
  if (unexplained === 0) return "The credits add up";
  const explained = 1 - unexplained;
  if (explained <= 0) return "The credits do not explain the change";
  // Never rounded up to all of it.
  if (explained >= 0.9995) return "The credits explain > 99.9\u202f%";
  return `The credits explain ${percent(Math.floor(explained * 1000) / 1000, 1)}`;
}

/** "3 steps were not finite and are left out". */
export function leftOut(steps) {
  return steps === 1
    ? "1 step was not finite and is left out"
    : `${plural(steps, "step")} were not finite and are left out`;
}

/**
 * Whether the credits can be trusted.
 * @param {TableAnswer} table
 * @param {number} lost
 */
export function trustWords(table, lost) {
  const { rows, residual, drift, not_finite: broken, beyond_tolerance: beyond } = table;
  if (!rows) return { head: "Nothing to add up", detail: "" };
  const head = broken === rows ? "No step is finite" : explainedWords(table);
  const details = [`residual ${signed(residual)}`];
  if (drift) details.push(`drift ${signed(drift)}`);
  if (broken) details.push(leftOut(broken));
  if (beyond) details.push(`${count(beyond)} of ${plural(rows, "step")} beyond the tolerance`);
  if (lost) details.push(`${plural(lost, "chunk")} of the record could not be read`);
  if (table.is_large) details.push(table.remarks[0]);
  return {
    head,
    detail: details.join(" · "),
    warn: table.is_large || broken > 0 || beyond > 0 || lost > 0,
  };
}

/**
 * The ledger of the range in a line, and what a reader must be told.
 * @param {TableAnswer} table
 */
export function ledgerWords(table) {
  const { true_change: change, allocated, residual, drift, unexplained, remarks } = table;
  // What is left out is missing from the sums, but not from the change.
  const equals = table.not_finite ? "; of the finite steps:" : " =";
  const share =
    unexplained === null ? "" : ` Residuals of all steps are ${percent(unexplained)} of all credit.`;
  return [
    `True change ${signed(change, 5)}${equals} LCA ${signed(allocated, 5)}, residual ${signed(residual)}, ` +
      `drift ${signed(drift)}.${share} Largest residual of one step: ${number(table.largest_residual, 2)}.`,
    ...remarks,
  ].join(" ");
}

/** "p < 0.001" where no draw came near, else "p = 0.03". */
function pWords({ p_pairs: p, draws }) {
  return p <= 1.001 / (draws + 1)
    ? `p < ${number(1.001 / (draws + 1), 1)}`
    : `p = ${Number(p.toPrecision(2))}`;
}

/**
 * What the moments say: {together: true, false or null, head, words}. Pairs of layers decide: with
 * many layers nearly every moment has company by chance, but not that of so many.
 * @param {SynchronyAnswer} data
 */
export function synchronyWords(data) {
  const { layers, moments, pairs, pairs_null_low: low, pairs_null_high: high, p_pairs: p } = data;
  const unknown = "Learning together: unknown";
  if (layers.length < 2)
    return { together: null, head: unknown, words: "One layer has no other to learn with." };
  if (!moments)
    return { together: null, head: unknown, words: "No moment of learning lies in these steps." };
  const chance =
    low === high ? count(Math.round(low)) : `${count(Math.round(low))}–${count(Math.round(high))}`;
  const facts = `Two layers peak on the same step ${count(pairs)} times; chance would give ${chance}`;
  return p < 0.05
    ? { together: true, head: "Layers learn together", words: `${facts} (${pWords(data)}).` }
    : {
        together: false,
        head: "No sign of learning together",
        words: `${facts} (${pWords(data)}).`,
      };
}

/**
 * How many moments have company, as a sentence.
 * @param {SynchronyAnswer} data
 */
export function sharedWords({ synchronized, moments, null_low: low, null_high: high }) {
  const chance = `${count(Math.round(low))}–${count(Math.round(high))}`;
  return `${count(synchronized)} of ${count(moments)} moments are shared with at least one other layer; chance would give ${chance}.`;
}
