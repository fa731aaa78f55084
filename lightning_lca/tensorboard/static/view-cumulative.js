/** What each layer has done to the loss so far, and whether the credits add up to the true change. */

import { Chart, bars, extent, rule } from "./chart.js";
import { count, number, percent, signed, steps } from "./format.js";
import { binAt } from "./heatmap.js";
import { Section } from "./section.js";
import { colors, sequence } from "./theme.js";

/** Running sums at the edges, from `origin`; a bin that is not a number breaks the sum's line. */
export function running(credit, origin = 0) {
  let sum = origin;
  return [origin, ...credit.map((v) => (sum += v ?? 0))];
}

/** The true change of the loss at the edges since `from`; empty bins carry on. */
export function trueChange(loss, from) {
  let last = null;
  return loss.map((v) => {
    last = v ?? last;
    return last === null ? null : last - from;
  });
}

/** Adds lists of numbers element by element. */
export function added(lists, length) {
  return Array.from({ length }, (_, i) => lists.reduce((sum, list) => sum + list[i], 0));
}

/** Draws layers as areas: what helps below zero, what hurts above. */
function areas(xs, sums, palette) {
  return ({ context, x, y }) => {
    const low = new Array(xs.length).fill(0);
    const high = new Array(xs.length).fill(0);
    context.lineWidth = 0.75;
    context.strokeStyle = colors.background;
    sums.forEach((sum, l) => {
      for (const [base, part] of [
        [low, sum.map((v) => Math.min(0, v))],
        [high, sum.map((v) => Math.max(0, v))],
      ]) {
        if (part.every((v) => v === 0)) continue;
        context.fillStyle = palette[l];
        context.beginPath();
        xs.forEach((s, i) => context.lineTo(x(s), y(base[i] + part[i])));
        for (let i = xs.length - 1; i >= 0; i--) context.lineTo(x(xs[i]), y(base[i]));
        context.closePath();
        context.fill();
        context.stroke();
        part.forEach((v, i) => (base[i] += v));
      }
    });
  };
}

export function cumulativeView(app) {
  const section = new Section(app.main, {
    id: "cumulative",
    title: "Cumulative LCA",
    caption: "Down is learning, up is un-learning. All layers together should follow the true change of the loss.",
    ...app.sectionHooks("bins"),
  });
  const stack = section.addToggle("stack", "Stack", "Layers as areas on top of each other", (on) =>
    app.store.set({ stack: on ? "1" : null }),
  );
  const origin = section.addToggle("origin", "Since step 0", "Sums from the start of the run, not of the range", (on) =>
    app.store.set({ origin: on ? "run" : null }),
  );
  const chart = new Chart(section.plot, { testid: "cumulative-chart", label: "Cumulative LCA by layer", height: 330, act: app.act });
  const ledgerTitle = section.addSubtitle("What the credits leave unexplained");
  const ledger = new Chart(section.plot, { testid: "residual-chart", label: "Residual per bin", height: 120, act: app.act });
  return {
    section,
    source: "bins",
    draw(bins, { state, table }) {
      const { edges, layers, credit, before, residual, drift, unconverged } = bins;
      const whole = state.origin === "run";
      stack.setAttribute("aria-pressed", state.stack === "1");
      origin.setAttribute("aria-pressed", whole);
      origin.hidden = state.start === null;
      const sums = credit.map((row, i) => running(row, whole ? before[i] : 0));
      const total = added(sums, edges.length);
      const from = whole ? bins.loss_first : bins.loss.find((v) => v !== null);
      const truth = trueChange(bins.loss, from ?? 0);
      const chosen = layers.indexOf(state.layer);
      drawSums({ chart, edges, layers, sums, total, truth, chosen, stacked: state.stack === "1" });

      const spread = extent([residual], { include: [0] });
      ledger.update({
        x: edges,
        lines: [],
        low: edges[0],
        high: edges.at(-1),
        y: spread,
        title: "residual",
        format: (v) => number(v, 2),
        above: [bars(edges, residual, (i) => (unconverged[i] ? colors.warn : colors.muted)), rule(0, colors.frame)],
        describe(at) {
          const k = binAt(edges, at);
          const rows = [
            ["residual", signed(residual[k])],
            ["drift", signed(drift[k])],
          ];
          if (unconverged[k]) rows.push(["unconverged steps", count(unconverged[k])]);
          return [steps(edges[k] + 1, edges[k + 1]), rows];
        },
      });
      ledgerTitle.textContent = unconverged.some(Boolean)
        ? "What the credits leave unexplained (amber: steps beyond the tolerance)"
        : "What the credits leave unexplained";
      section.note.textContent = table ? ledgerWords(table) : "";
    },
  };
}

/** The ledger of the range in a line. */
function ledgerWords({ true_change: change, allocated, residual, drift, largest_residual: largest }) {
  const share = change ? ` (${percent(Math.abs(residual / change))} of the change)` : "";
  return (
    `True change ${signed(change, 5)} = LCA ${signed(allocated, 5)}, residual ${signed(residual)}${share}, ` +
    `drift ${signed(drift)}. Largest residual of one step: ${number(largest, 2)}.`
  );
}

function drawSums({ chart, edges, layers, sums, total, truth, chosen, stacked }) {
  const palette = sequence(layers.length);
  const end = (list) => list.findLast((v) => v !== null) ?? 0;
  const sign = (sum) => (end(sum) - sum[0] > 0 ? colors.hurts : colors.helps);
  const lines = stacked
    ? []
    : sums.map((values, i) => ({
        values,
        color: i === chosen ? colors.selected : sign(values),
        width: i === chosen ? 3 : 1.25,
        alpha: i === chosen || chosen < 0 ? 0.9 : 0.35,
      }));
  if (chosen >= 0 && !stacked) lines.push(lines.splice(chosen, 1)[0]); // On top.
  lines.push({ values: total, color: colors.muted, width: 1.5, dash: [4, 3] });
  lines.push({ values: truth, color: colors.text, width: 2 });
  const bounds = stacked
    ? [added(sums.map((s) => s.map((v) => Math.min(0, v))), edges.length), added(sums.map((s) => s.map((v) => Math.max(0, v))), edges.length)]
    : sums;
  const heights = stacked ? stackedEnds(sums.map(end)) : sums.map(end);
  const labels = layers.map((text, i) => ({
    text,
    value: heights[i],
    color: i === chosen ? colors.selected : stacked ? palette[i] : sign(sums[i]),
    bold: i === chosen,
    rank: i === chosen ? Infinity : Math.abs(end(sums[i]) - sums[i][0]),
  }));
  labels.push({ text: "true loss change", value: end(truth), color: colors.text, bold: true, rank: Infinity });
  if (Math.abs(end(total) - end(truth)) > 0.02 * Math.abs(end(truth))) {
    labels.push({ text: "all layers", value: end(total), color: colors.muted, rank: 1e300 });
  }
  chart.update({
    x: edges,
    lines,
    low: edges[0],
    high: edges.at(-1),
    y: extent([...bounds, total, truth]),
    title: "LCA (loss units)",
    format: (v) => number(v, 2),
    below: stacked ? [areas(edges, sums, palette), rule(0, colors.muted)] : [rule(0, colors.muted)],
    labels,
    describe(at, value) {
      const k = at - edges[0] < edges[1] - at ? 0 : binAt(edges, at) + 1;
      const near = sums.reduce((best, sum, i) => (Math.abs(sum[k] - value) < Math.abs(sums[best][k] - value) ? i : best), 0);
      const rows = [
        ["all layers", signed(total[k])],
        ["true loss change", signed(truth[k])],
      ];
      const named = [...new Set(stacked ? [] : [near]), ...(chosen >= 0 && (stacked || chosen !== near) ? [chosen] : [])];
      return [`after step ${count(edges[k])}`, [...named.map((i) => [layers[i], signed(sums[i][k])]), ...rows]];
    },
  });
  chart.root.dataset.stacked = stacked;
}

/** Middle of each layer's area at the right end. */
function stackedEnds(ends) {
  let [low, high] = [0, 0];
  return ends.map((v) => {
    if (v < 0) return (low += v) - v / 2;
    return (high += v) - v / 2;
  });
}
