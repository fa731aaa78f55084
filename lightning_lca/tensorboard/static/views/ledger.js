/** Whether the credits add up to the true change of the loss: total, truth and what is left over. */

import { Chart } from "../charts/chart.js";
import { bars, extent, rule } from "../charts/marks.js";
import { binAt, end, nearestEdge, sumsOf } from "../lib/edges.js";
import { count, signed, steps } from "../lib/format.js";
import { colors } from "../lib/theme.js";
import { ledgerWords } from "../lib/words.js";
import { originToggle } from "./cumulative.js";
import { Section } from "./section.js";

export function ledgerView(app) {
  const section = new Section(app.main, {
    id: "ledger",
    title: "Do the credits add up?",
    caption:
      "All layers together should follow the true change of the loss. What they miss is the residual.",
    ...app.sectionHooks("bins"),
  });
  const drawOrigin = originToggle(app, section);
  const totals = new Chart(section.plot, {
    testid: "total-chart",
    label: "All layers and the true loss change",
    height: 170,
    act: app.act,
  });
  const rest = new Chart(section.plot, {
    testid: "residual-chart",
    label: "Residual per bin",
    height: 120,
    act: app.act,
  });
  return {
    section,
    source: "bins",
    also: "table",
    /** @param {BinsAnswer} bins */
    draw(bins, { state, table }) {
      drawOrigin(state);
      drawTotals(totals, bins, state.origin === "run");
      drawResidual(rest, bins);
      section.note.textContent = table ? ledgerWords(table) : "";
    },
  };
}

/**
 * All layers' LCA against the true change.
 * @param {Chart} chart
 * @param {BinsAnswer} bins
 * @param {boolean} sinceRun
 */
function drawTotals(chart, bins, sinceRun) {
  const { edges } = bins;
  const { total, truth } = sumsOf(bins, sinceRun);
  chart.update({
    x: edges,
    lines: [
      { values: truth, color: colors.text, width: 2 },
      { values: total, color: colors.hurts, width: 2, dash: [5, 5] },
    ],
    low: edges[0],
    high: edges.at(-1),
    y: extent([total, truth], { include: [0] }),
    title: "loss change",
    axis: false,
    below: [rule(0, colors.muted)],
    names: [
      { text: "true change", value: end(truth), color: colors.text, bold: true, rank: 2 },
      {
        text: "all layers' LCA",
        value: end(total),
        color: colors.hurts,
        ink: colors.hurtsText,
        bold: true,
        rank: 1,
      },
    ],
    describe(at) {
      const k = nearestEdge(edges, at);
      return [
        `after step ${count(edges[k])}`,
        [
          ["true change", signed(truth[k])],
          ["all layers' LCA", signed(total[k])],
        ],
      ];
    },
  });
}

/**
 * What the credits miss, per bin.
 * @param {Chart} chart
 * @param {BinsAnswer} bins
 */
function drawResidual(chart, { edges, closes, drift, beyond_tolerance: beyond, ...bins }) {
  // What is shared out over the weights is next to nothing afterwards: the raw one tells.
  const residual = closes ? bins.raw_residual : bins.residual;
  const title = closes ? "raw residual" : "residual";
  const missed = beyond.some(Boolean);
  chart.update({
    x: edges,
    lines: [],
    low: edges[0],
    high: edges.at(-1),
    y: extent([residual], { include: [0] }),
    title,
    above: [
      bars(edges, residual, (i) => (beyond[i] ? colors.warn : colors.muted)),
      rule(0, colors.frame),
    ],
    names: missed ? [{ text: "amber: over tolerance", short: ["over tolerance"], value: 0, color: colors.warn, rank: 1 }] : [],
    describe(at) {
      const k = binAt(edges, at);
      const rows = [
        [title, signed(residual[k])],
        ["drift", signed(drift[k])],
      ];
      if (beyond[k]) rows.push(["steps over tolerance", count(beyond[k])]);
      return [steps(edges[k] + 1, edges[k + 1]), rows];
    },
  });
}
