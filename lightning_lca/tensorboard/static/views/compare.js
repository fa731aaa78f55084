/** Two probes of a run, or two runs, side by side: each, their difference, and one layer's sums. */

import { Chart } from "../charts/chart.js";
import { Heatmap, heatRows } from "../charts/heatmap.js";
import { extent, rule } from "../charts/marks.js";
import { end, nearestEdge, startingFrom } from "../lib/edges.js";
import { count, plural, signed } from "../lib/format.js";
import { treeRows } from "../lib/rows.js";
import { colors } from "../lib/theme.js";
import { pairNames } from "../lib/words.js";
import { rowHeight } from "./layers.js";
import { Section } from "./section.js";

/** Why there is nothing to compare. */
function noneInCommon(nameA, nameB, find) {
  const what = find === null ? "layer" : `layer with “${find}” in its name`;
  return `${nameA} and ${nameB} have no ${what} in common. Choose another one above.`;
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
    blocked({ own, other, choices, state, isFoundInOther }) {
      section.heading.textContent = "Comparison";
      if (!isFoundInOther) return noneInCommon(...pairNames(own, other), state.find);
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
    /** @param {CompareAnswer} data */
    draw(data, { state, row, own, other, shares }) {
      const { edges, layers, measured_a: measuredA, measured_b: measuredB } = data;
      const [nameA, nameB] = pairNames(own, other);
      section.heading.textContent = `Comparison: ${nameA} and ${nameB}`;
      if (!layers.length) {
        section.say(noneInCommon(nameA, nameB, state.find));
        return;
      }
      const rows = treeRows(data);
      const isTree = rows.some(({ open }) => open !== null);
      const common = {
        edges,
        low: edges[0],
        high: edges.at(-1),
        unit: data.unit,
        selected: row,
        rowHeight: rowHeight(layers.length, { room: 260, least: isTree ? 14 : 3, most: 22 }),
      };
      const [a, b, difference] = maps;
      a.update({
        ...common,
        title: nameA,
        rows: heatRows(rows, data.a, data.total_a, shares),
        measured: measuredA,
        limit: data.limit,
        axis: false,
      });
      b.update({
        ...common,
        title: nameB,
        rows: heatRows(rows, data.b, data.total_b),
        measured: measuredB,
        limit: data.limit,
        axis: false,
      });
      difference.update({
        ...common,
        title: `${nameB} minus ${nameA}`,
        rows: heatRows(rows, data.difference, data.total_difference),
        measured: measuredA.map((n, k) => Math.min(n, measuredB[k])),
        limit: data.limit_difference,
        words: ["helps more", "hurts more"],
      });
      const chosen = layers.indexOf(row);
      const sums = (letter) => {
        const part = (name) =>
          chosen >= 0 ? data[`${name}_${letter}`][chosen] : data[`${name}_total_${letter}`];
        return startingFrom(state.origin === "run" ? part("before") : 0, part("running"));
      };
      const [sumA, sumB] = [sums("a"), sums("b")];
      sumsTitle.textContent = `Cumulative LCA of ${chosen >= 0 ? row : "all layers"}`;
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
