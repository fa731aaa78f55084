/** Whether layers learn at the same moments, more often than chance would have it. */

import { Chart } from "../charts/chart.js";
import { bars, extent, rule, steppedBand } from "../charts/marks.js";
import { Raster } from "../charts/raster.js";
import { el } from "../lib/dom.js";
import { binAt } from "../lib/edges.js";
import { count, number, steps } from "../lib/format.js";
import { placesThatAddUp, treeRows } from "../lib/rows.js";
import { colors } from "../lib/theme.js";
import { sharedWords, synchronyWords } from "../lib/words.js";
import { rowHeight } from "./layers.js";
import { Section } from "./section.js";

export function synchronyView(app) {
  const section = new Section(app.main, {
    id: "synchrony",
    title: "Do layers learn together?",
    caption:
      "A moment of learning is a step where a layer's LCA dips below its neighbours'; here are the strongest of each layer.",
    ...app.sectionHooks("synchrony"),
  });
  const strongest = el("input", {
    type: "number",
    min: 1,
    max: 1000,
    value: 20,
    "data-testid": "strongest",
    "aria-label": "Moments per layer",
  });
  strongest.addEventListener("change", () => {
    const value = Math.round(Number(strongest.value));
    app.store.set({ strongest: value >= 1 && value <= 1000 && value !== 20 ? value : null });
    strongest.value = app.store.state.strongest ?? 20;
  });
  section.addTool(el("label", { class: "field" }, "strongest ", strongest, " per layer"));
  const raster = new Raster(section.plot, {
    testid: "raster",
    label: "Layers in network order",
    act: app.act,
  });
  const chart = new Chart(section.plot, {
    testid: "synchrony-chart",
    label: "Layers with a moment at once",
    height: 170,
    act: app.act,
  });
  return {
    section,
    source: "synchrony",
    also: "bins",
    blocked({ run }) {
      return run.layers.length < 2 ? "One layer has no other to learn with." : null;
    },
    /** @param {SynchronyAnswer} data */
    draw(data, { state, bins, row }) {
      if (document.activeElement !== strongest) strongest.value = state.strongest ?? 20;
      const { edges } = data;
      const [low, high] = [edges[0], edges.at(-1)];
      const { rows, rowOf, isTree } = rasterRows(data, bins);
      raster.update({
        rows,
        moments: data.raster
          .map(([layer, step], i) => [rowOf[layer], step, data.raster_at_once[i]])
          .filter(([row]) => row >= 0),
        low,
        high,
        axis: false,
        selected: row,
        rowHeight: rowHeight(rows.length, { room: 320, least: isTree ? 14 : 3, most: 20 }),
      });
      chart.update(data.expected ? perStep(data) : perBin(data));
      const { words, together, head } = synchronyWords(data);
      section.note.textContent =
        together === null ? words : `${head}. ${words} ${sharedWords(data)}`;
      section.note.dataset.together = together;
    },
  };
}

/**
 * The raster's rows, those of the heatmap but for open blocks, and the row of every layer.
 * @param {SynchronyAnswer} data
 * @param {BinsAnswer | null} bins
 */
function rasterRows({ layers, moments_by_layer: all, shared_by_layer: shared }, bins) {
  const isTree = bins?.row_of.length === layers.length && bins.open.some((o) => o !== null);
  const places = isTree ? placesThatAddUp(bins.open) : layers.map((_, i) => i);
  const listed = isTree ? treeRows(bins) : layers.map((name) => ({ name, label: name }));
  const rows = places.map((i) => ({ ...listed[i], all: 0, shared: 0 }));
  const row = new Map(places.map((place, i) => [place, i]));
  const rowOf = layers.map((_, i) => row.get(isTree ? bins.row_of[i] : i) ?? -1);
  rowOf.forEach((r, layer) => {
    if (r < 0) return;
    rows[r].all += all[layer];
    rows[r].shared += shared[layer];
  });
  return { rows, rowOf, isTree };
}

/**
 * Every bin is one measured step: how many layers had a moment there.
 * @param {SynchronyAnswer} answer
 */
function perStep({ edges, layers, coincidences, band, expected }) {
  return {
    x: edges,
    lines: [],
    low: edges[0],
    high: edges.at(-1),
    y: [0, Math.max(3, extent([coincidences, band])[1])],
    title: "layers at once",
    labels: (ticks) => ticks.map((v) => (Number.isInteger(v) ? count(Math.abs(v)) : "")),
    below: [
      steppedBand(
        edges,
        band.map((v) => (v === null ? null : 0)),
        band,
        colors.band,
      ),
    ],
    above: [
      bars(edges, coincidences, (i) =>
        coincidences[i] > band[i] && coincidences[i] > 1 ? colors.helps : colors.faint,
      ),
    ],
    names: [{ text: "grey: within chance", short: ["grey: chance"], value: 0.5, color: colors.muted, rank: 1 }],
    describe(at) {
      const k = binAt(edges, at);
      return [
        `step ${count(edges[k + 1])}`,
        [
          ["layers with a moment", `${count(coincidences[k])} of ${count(layers.length)}`],
          ["by chance", `${number(expected[k], 2)} (up to ${number(band[k], 2)})`],
        ],
      ];
    },
  };
}

/**
 * Many steps to a bin: how many pairs of layers had a moment on the same step.
 * @param {SynchronyAnswer} answer
 */
function perBin({ edges, rate, rate_null: chance, rate_high: high }) {
  return {
    x: edges,
    lines: [],
    low: edges[0],
    high: edges.at(-1),
    y: [0, extent([rate, high], { include: [0] })[1] || 0.01],
    title: "pairs per step",
    below: [
      steppedBand(
        edges,
        high.map((v) => (v === null ? null : 0)),
        high,
        colors.band,
      ),
    ],
    above: [
      bars(edges, rate, (i) => (rate[i] > high[i] ? colors.helps : colors.faint)),
      rule(0, colors.frame),
    ],
    names: [{ text: "grey: within chance", short: ["grey: chance"], value: 0, color: colors.muted, rank: 1 }],
    describe(at) {
      const k = binAt(edges, at);
      return [
        steps(edges[k] + 1, edges[k + 1]),
        [
          ["pairs of layers per step", number(rate[k], 2)],
          ["by chance", `${number(chance[k], 2)} (up to ${number(high[k], 2)})`],
        ],
      ];
    },
  };
}
