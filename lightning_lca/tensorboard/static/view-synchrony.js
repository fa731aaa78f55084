/** Whether layers learn at the same moments, more often than chance would have it. */

import { Chart, bars, extent, rule, steppedBand } from "./chart.js";
import { el } from "./dom.js";
import { count, number, percent, steps } from "./format.js";
import { binAt } from "./heatmap.js";
import { Raster } from "./raster.js";
import { Section } from "./section.js";
import { colors } from "./theme.js";
import { rowHeight } from "./view-layers.js";

/** "p < 0.001" where no draw came near, else "p = 0.03". */
export function pWords({ p_value: p, draws }) {
  return p <= 1.001 / (draws + 1) ? `p < ${number(1.001 / (draws + 1), 1)}` : `p = ${number(p, 2)}`;
}

/** What the count of shared moments says: {together: true, false or null, words}. */
export function synchronyWords(data) {
  const { synchronized, moments, null_low: low, null_high: high, layers } = data;
  if (layers.length < 2) return { together: null, words: "One layer alone has none to learn with." };
  if (!moments) return { together: null, words: "No moment of learning lies in these steps." };
  const range = low === high ? number(low) : `${count(Math.round(low))} to ${count(Math.round(high))}`;
  const facts = `${count(synchronized)} of ${count(moments)} moments are shared; chance would give ${range}`;
  if (data.p_value < 0.05) return { together: true, words: `${facts}: layers learn together (${pWords(data)}).` };
  return { together: false, words: `${facts}: no more than chance (${pWords(data)}).` };
}

export function synchronyView(app) {
  const section = new Section(app.main, {
    id: "synchrony",
    title: "Do layers learn together?",
    caption: "A moment of learning is a step where a layer's LCA dips below its neighbours'; here are the strongest of each layer.",
    ...app.sectionHooks("synchrony"),
  });
  const strongest = el("input", { type: "number", min: 1, max: 1000, value: 20, "data-testid": "strongest", "aria-label": "Moments per layer" });
  strongest.addEventListener("change", () => {
    const value = Math.round(Number(strongest.value));
    app.store.set({ strongest: value >= 1 && value <= 1000 && value !== 20 ? value : null });
    strongest.value = app.store.state.strongest ?? 20;
  });
  section.addTool(el("label", { class: "field" }, "strongest ", strongest, " per layer"));
  const raster = new Raster(section.plot, { testid: "raster", label: "Layers in network order", act: app.act });
  const chart = new Chart(section.plot, { testid: "synchrony-chart", label: "Layers with a moment at once", height: 170, act: app.act });
  return {
    section,
    source: "synchrony",
    draw(data, { state }) {
      if (document.activeElement !== strongest) strongest.value = state.strongest ?? 20;
      const { edges, layers } = data;
      const [low, high] = [edges[0], edges.at(-1)];
      raster.update({
        rows: layers.map((name) => ({ name, label: name })),
        moments: data.raster,
        low,
        high,
        axis: false,
        selected: state.layer,
        rowHeight: rowHeight(layers.length, { room: 320, least: 3, most: 20 }),
      });
      chart.update(data.expected ? perStep(data) : perBin(data));
      const { words, together } = synchronyWords(data);
      section.note.textContent = words;
      section.note.dataset.together = together;
    },
  };
}

/** Every bin is one measured step: how many layers had a moment there. */
function perStep({ edges, layers, coincidences, band, expected }) {
  return {
    x: edges,
    lines: [],
    low: edges[0],
    high: edges.at(-1),
    y: [0, Math.max(3, extent([coincidences, band])[1])],
    title: "layers at once",
    format: (v) => (Number.isInteger(v) ? count(v) : ""),
    below: [steppedBand(edges, band.map((v) => (v === null ? null : 0)), band, colors.band)],
    above: [bars(edges, coincidences, (i) => (coincidences[i] > band[i] && coincidences[i] > 1 ? colors.helps : colors.faint))],
    labels: [{ text: "grey: within chance", value: 0.5, color: colors.muted, rank: 1 }],
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

/** Many steps to a bin: how often more layers than by chance had a moment. */
function perBin({ edges, rate, rate_null: chance, rate_high: high }) {
  return {
    x: edges,
    lines: [],
    low: edges[0],
    high: edges.at(-1),
    y: [0, extent([rate, high], { include: [0] })[1] || 0.01],
    title: "share of steps",
    format: (v) => percent(v, v && v < 0.01 ? 2 : v < 0.1 ? 1 : 0),
    below: [steppedBand(edges, high.map((v) => (v === null ? null : 0)), high, colors.band)],
    above: [bars(edges, rate, (i) => (rate[i] > high[i] ? colors.helps : colors.faint)), rule(0, colors.frame)],
    labels: [{ text: "grey: within chance", value: 0, color: colors.muted, rank: 1 }],
    describe(at) {
      const k = binAt(edges, at);
      return [
        steps(edges[k] + 1, edges[k + 1]),
        [
          ["steps with unusually many layers", percent(rate[k])],
          ["by chance", `${percent(chance[k])} (up to ${percent(high[k])})`],
        ],
      ];
    },
  };
}
