/** Sentences: what the numbers say, for the band on top and the notes below the plots. */

import { count, number, percent, plural, restOf, signed, steps } from "./format.js";

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
export function layerWords(table) {
  const { helped, hurt, broken, true_change: change } = table;
  const hurting = hurt ? `${count(hurt)} hurt` : "none hurt";
  const told = ({ name: names, credit, share }) =>
    names
      .map((name, i) => {
        const part = change < 0 && credit[i] < 0 ? ` (${percent(share[i])})` : "";
        return `${name} ${signed(credit[i], 2)}${part}`;
      })
      .join(", ");
  const details = [];
  if (broken) details.push(`${plural(broken, "layer")} not finite`);
  if (hurt) details.push(`hurting most: ${told(table.most_hurtful)}`);
  if (helped) details.push(`helping most: ${told(table.most_helpful)}`);
  const head = `${helped ? plural(helped, "layer") : "No layer"} helped, ${hurting}`;
  return { head, detail: details.join(" · "), warn: broken > 0 };
}

/**
 * The layer that learned most: {name, words} that follow it; null where none did.
 * @param {TableAnswer} table
 */
export function mostWords({ most_helpful: most, true_change: change }) {
  if (!most.name.length) return null;
  const share = change < 0 ? ` (${percent(most.share[0])} of the loss change)` : "";
  return { name: most.name[0], words: ` learned most: ${signed(most.credit[0], 2)}${share}.` };
}

/**
 * How far the credits explain what happened: by the residuals of all steps against all credit.
 * @param {TableAnswer} table
 */
function explainedWords({ unexplained, is_large: large, closes }) {
  if (unexplained === null) return large ? "The credits do not add up" : "The credits add up";
  if (unexplained === 0) return "The credits add up";
  if (closes && Number.isFinite(unexplained)) {
    return `The rule explains ${restOf(unexplained)}, the rest is shared out`;
  }
  return unexplained < 1
    ? `The credits explain ${restOf(unexplained)}`
    : "The credits do not explain the change";
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
  const { rows, residual, drift, unexplained, closes, not_finite: broken, beyond_tolerance: beyond } =
    table;
  if (!rows) return { head: "Nothing to add up", detail: "" };
  const head = broken === rows ? "No step is finite" : explainedWords(table);
  const details = [];
  const share = unexplained === null ? "" : `${percent(unexplained)} of all credit`;
  // What a rule shares out is next to nothing afterwards: the raw ones tell.
  if (share && closes) details.push(`raw residuals ${share}`);
  details.push(share && !closes ? `residuals ${share}, sum ${signed(residual)}` : `residual ${signed(residual)}`);
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
  const which = table.closes ? "Raw residuals, which are shared out over the weights," : "Residuals of all steps";
  const share = unexplained === null ? "" : ` ${which} are ${percent(unexplained)} of all credit.`;
  return [
    `True change ${signed(change, 5)}${equals} LCA ${signed(allocated, 5)}, residual ${signed(residual)}, ` +
      `drift ${signed(drift)}.${share} Largest ${table.closes ? "raw residual" : "residual"} of one step: ${number(table.largest_residual, 2)}.`,
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
  const { layers, moments, pairs, pairs_null_mean: mean, p_pairs: p } = data;
  const unknown = "Learning together: unknown";
  if (layers.length < 2)
    return { together: null, head: unknown, words: "One layer has no other to learn with." };
  if (!moments)
    return { together: null, head: unknown, words: "No moment of learning lies in these steps." };
  // The excess: with many layers a count of pairs is large whatever the layers do.
  const often = pairs < mean ? "less often" : "more often";
  const facts = mean
    ? `Layers peak on the same step ${percent(Math.abs(pairs / mean - 1), 0)} ${often} than by chance`
    : `Layers peak on the same step ${pairs ? "where by chance they never would" : "at no time"}`;
  return p < 0.05
    ? { together: true, head: "Layers learn together", words: `${facts} (${pWords(data)}).` }
    : {
        together: false,
        head: "No sign of learning together",
        words: `${facts} (${pWords(data)}).`,
      };
}

/**
 * What chance alone would give, and how many moments have company, as sentences.
 * @param {SynchronyAnswer} data
 */
export function sharedWords(data) {
  const { synchronized, moments, null_low: low, null_high: high, pairs_null_mean: mean } = data;
  const over = (value) => `${value < mean ? "" : "+"}${percent(value / mean - 1, 0)}`;
  const alone = mean
    ? `Chance alone gives ${over(data.pairs_null_low)} to ${over(data.pairs_null_high)}. `
    : "";
  const chance = `${count(Math.round(low))}–${count(Math.round(high))}`;
  return `${alone}${count(synchronized)} of ${count(moments)} moments are shared with at least one other layer; chance would give ${chance}.`;
}

/**
 * Who learns for the training data alone: {head, words}.
 * @param {GeneralizationAnswer} data
 */
export function generalizationWords({
  layers,
  measured,
  verdict,
  most_telling: order,
  total_train: train,
  total_val: val,
}) {
  const sum = (values) => values.reduce((total, v) => total + (v ?? 0), 0);
  const overfit = verdict.filter((v) => v === "overfits").length;
  const worst = layers[order[0]];
  const head = !measured
    ? "no measured step here"
    : !overfit
      ? "no layer overfits"
      : overfit === 1
        ? `${worst} overfits`
        : `${count(overfit)} of ${plural(layers.length, "layer")} overfit, ${worst} most`;
  return {
    head,
    words:
      `All layers over ${plural(measured, "step")}: train ${signed(sum(train))}, ` +
      `validation ${signed(sum(val))}. It is a sign, for this run and these probes, and no test: “How sure?” has one.`,
  };
}

const HEADS = {
  residual: (where) => `The sign of ${where} is open`,
  not_converged: () => "Some steps are not measured well",
  overfits: (where) => `${where} overfits`,
  hurts: (where) => `${where} hurts`,
  curvature: (where) => `${where} steps too far`,
  against_gradient: (where) => `${where} moves up the gradient`,
  momentum: (where) => `Momentum hurts in ${where}`,
  weight_decay: (where) => `Weight decay hurts in ${where}`,
  never_moves: (where) => (where === "network" ? "Many weights never move" : `${where} never moves`),
  synchrony: () => "Layers learn together",
};
const DOUBTS = ["residual", "not_converged", "never_moves"];
const SHARES = ["never_moves", "not_converged"];

/**
 * Finding i in a glance: {head, mood, size}; the mood is "doubt", "hurts" or "good to know".
 * @param {FindingsAnswer} data
 * @param {number} i
 */
export function findingWords({ kind: kinds, where, effect, low, high, p: ps }, i) {
  const kind = kinds[i];
  const head =
    kind === "helping"
      ? `${effect[i] > 0 ? "Most" : "Fewer than half of the"} weights help`
      : HEADS[kind](where[i]);
  const mood = DOUBTS.includes(kind)
    ? "doubt"
    : kind === "synchrony" || (kind === "helping" && effect[i] > 0)
      ? "good"
      : "hurts";
  const show = (value) =>
    kind === "helping"
      ? percent(0.5 + value)
      : kind === "synchrony"
        ? `${value < 0 ? "" : "+"}${percent(value, 0)}`
        : signed(value, 2);
  if (low[i] === null || ps[i] === null)
    return { head, mood, size: SHARES.includes(kind) ? percent(effect[i]) : "" };
  const unit = { helping: "", synchrony: " over chance" }[kind] ?? " a step";
  const size = `${show(effect[i])}${unit} (${show(low[i])} to ${show(high[i])}, ${smallP(ps[i])})`;
  return { head, mood, size };
}

function smallP(p) {
  return p < 0.001 ? "p < 0.001" : `p = ${Number(p.toPrecision(2))}`;
}

/**
 * What the list of findings rests on, in a line.
 * @param {FindingsAnswer} data
 */
export function sureWords({ kind, steps: measured, least, level }) {
  if (measured < least)
    return `Findings need ${count(least)} finite measured steps or more; here are ${count(measured)}.`;
  const tests = `noise gives a finding in about ${percent(level, 0)} of runs`;
  return kind.length
    ? `From ${count(measured)} measured steps. Each p is corrected for all tests: ${tests}.`
    : `Nothing in these ${count(measured)} measured steps is beyond chance (${tests}).`;
}
