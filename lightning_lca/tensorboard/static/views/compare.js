/** Two probes of a run, or two runs, side by side: each, their difference, and one layer's sums. */

import { Chart } from "../charts/chart.js";
import { Heatmap, colorLimit } from "../charts/heatmap.js";
import { extent, rule } from "../charts/marks.js";
import { count, plural, signed } from "../lib/format.js";
import { added, end, nearestEdge, running } from "../lib/sums.js";
import { colors } from "../lib/theme.js";
import { binUnit, heatRows, rowHeight } from "./layers.js";
import { Section } from "./section.js";

/** What tells two measurements apart: the probe within a run, else the run (and probe). */
export function pairNames({ run, probe }, { run: otherRun, probe: otherProbe }) {
  if (run === otherRun) return [probe || "only probe", otherProbe || "only probe"];
  if (probe === otherProbe) return [run, otherRun];
  return [
    [run, probe],
    [otherRun, otherProbe],
  ].map((pair) => pair.filter(Boolean).join(" · "));
}

export function compareView(app) {
  const section = new Section(app.main, {
    id: "compare",
    title: "Comparison",
    caption: "Where a layer helps on one and hurts on the other, the two part.",
    ...app.sectionHooks("compare"),
  });
  const act = { ...app.act };
  const maps = ["a", "b", "difference"].map(
    (part) =>
      new Heatmap(section.plot, {
        testid: `compare-${part}`,
        label: "Layers in network order",
        act,
      }),
  );
  const sumsTitle = section.addSubtitle("");
  const chart = new Chart(section.plot, {
    testid: "compare-chart",
    label: "Cumulative LCA of both",
    height: 230,
    act,
  });
  return {
    section,
    source: "compare",
    also: "table",
    blocked({ other, choices }) {
      section.heading.textContent = "Comparison";
      if (other) return null;
      if (!choices.length)
        return 'Nothing to compare with yet: another run, or a second probe such as probe={"train": "train", "val": "val"}, appears here.';
      return [
        "Compare with another probe or run:",
        choices
          .slice(0, 6)
          .map(({ run, probe, text }) => [
            text,
            () => app.store.set({ vs_run: run, vs_probe: probe }),
            "suggestion",
          ]),
      ];
    },
    draw(data, { state, run, own, other, change }) {
      const { edges, layers, a, b, before_a: beforeA, before_b: beforeB } = data;
      const [nameA, nameB] = pairNames(own, other);
      section.heading.textContent = `Comparison: ${nameA} and ${nameB}`;
      const within = (last) => edges.slice(0, -1).map((edge) => (edge < last ? 1 : 0));
      const [measuredA, measuredB] = [within(run.last_step), within(other.last)];
      const both = measuredA.map((n, k) => n && measuredB[k]);
      const minus = (v, w) => (v === null || w === null ? null : v - w);
      const difference = b.map((row, i) => row.map((v, k) => (both[k] ? minus(v, a[i][k]) : 0)));
      const limit = colorLimit(a, b);
      const views = [
        [nameA, a, measuredA, limit, undefined],
        [nameB, b, measuredB, limit, undefined],
        [
          `${nameB} minus ${nameA}`,
          difference,
          both,
          colorLimit(difference),
          ["helps more", "hurts more"],
        ],
      ];
      views.forEach(([text, credit, measured, top, words], i) => {
        maps[i].update({
          title: text,
          rows: heatRows(layers, credit),
          edges,
          measured,
          low: edges[0],
          high: edges.at(-1),
          limit: top,
          unit: binUnit(edges),
          words,
          axis: i === 2,
          selected: state.layer,
          change: i === 0 ? change : null,
          rowHeight: rowHeight(layers.length, { room: 260, least: 3, most: 22 }),
        });
      });
      const chosen = layers.indexOf(state.layer);
      const whole = state.origin === "run";
      const sum = (credit, before) =>
        chosen >= 0
          ? running(credit[chosen], whole ? before[chosen] : 0)
          : added(
              credit.map((row, i) => running(row, whole ? before[i] : 0)),
              edges.length,
            );
      const until = (values, measured) =>
        values.map((v, k) => (k === 0 || measured[k - 1] ? v : null));
      const [sumA, sumB] = [until(sum(a, beforeA), measuredA), until(sum(b, beforeB), measuredB)];
      sumsTitle.textContent = `Cumulative LCA of ${chosen >= 0 ? state.layer : "all layers"}`;
      chart.update({
        x: edges,
        lines: [
          { values: sumA, color: colors.text, width: 2 },
          { values: sumB, color: colors.selected, width: 2, dash: [6, 3] },
        ],
        low: edges[0],
        high: edges.at(-1),
        y: extent([sumA, sumB]),
        title: "LCA (loss units)",
        below: [rule(0, colors.muted)],
        names: [
          { text: nameA, value: end(sumA), color: colors.text, bold: true, rank: 2 },
          { text: nameB, value: end(sumB), color: colors.selected, bold: true, rank: 1 },
        ],
        describe(at) {
          const k = nearestEdge(edges, at);
          return [
            `after step ${count(edges[k])}`,
            [
              [nameA, signed(sumA[k])],
              [nameB, signed(sumB[k])],
            ],
          ];
        },
      });
      const missing = [
        [data.only_a, nameA],
        [data.only_b, nameB],
      ].filter(([names]) => names.length);
      section.note.textContent = missing
        .map(
          ([names, where]) =>
            `${plural(names.length, "layer")} only in ${where}: ${names.slice(0, 5).join(", ")}${names.length > 5 ? ", …" : ""}.`,
        )
        .join(" ");
    },
  };
}
