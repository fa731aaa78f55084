/** How narrow the majority of helping weights is. */

import { Chart } from "../charts/chart.js";
import { extent, rule } from "../charts/marks.js";
import { binAt } from "../lib/edges.js";
import { percent, percentLabels, steps } from "../lib/format.js";
import { colors } from "../lib/theme.js";
import { Section } from "./section.js";

export function helpingView(app) {
  const section = new Section(app.main, {
    id: "helping",
    title: "Share of weights that help",
    caption:
      "Of the weights that moved the loss, how many helped? Steps differ widely: “How sure?” tells whether the mean does.",
    ...app.sectionHooks("helping"),
  });
  const chart = new Chart(section.plot, {
    testid: "helping-chart",
    label: "Share of helping weights",
    height: 220,
    act: app.act,
  });
  return {
    section,
    source: "helping",
    /** @param {HelpingAnswer} answer */
    draw({ edges, network, layer }, { state }) {
      const middle = edges.slice(1).map((e, i) => (e + edges[i]) / 2);
      const name = layer ? state.layer : null;
      const lines = [{ values: network.share, color: colors.text, width: 1.75 }];
      if (layer) lines.push({ values: layer.share, color: colors.selected, width: 1.75 });
      const means = [["network", network.mean, colors.text]];
      if (layer) means.push([name, layer.mean, colors.selected]);
      const names = means
        .filter(([, value]) => value !== null)
        .map(([text, value, color], i) => ({
          text: `${text} ${percent(value)}`,
          value,
          color,
          bold: true,
          rank: 10 - i,
        }));
      names.push({
        text: "as many hurt as help",
        value: 0.5,
        color: colors.muted,
        bold: false,
        rank: 1,
      });
      chart.update({
        x: middle,
        lines,
        low: edges[0],
        high: edges.at(-1),
        y: extent(
          lines.map((l) => l.values),
          { include: [0.49, 0.51], air: 0.1 },
        ),
        title: "helping / moving",
        labels: percentLabels,
        below: [rule(0.5, colors.muted, [4, 3])],
        names,
        describe(at) {
          const k = binAt(edges, at);
          const rows = [["network", percent(network.share[k])]];
          if (layer) rows.push([name, percent(layer.share[k])]);
          rows.push([
            "weights that help / hurt",
            `${percent(network.helping[k])} / ${percent(network.hurting[k])}`,
          ]);
          return [steps(edges[k] + 1, edges[k + 1]), rows];
        },
      });
      const [, all] = means[0];
      section.note.textContent =
        all === null
          ? ""
          : `On average ${percent(all)} of the network's moving weights helped` +
            (layer && means[1][1] !== null
              ? `, and ${percent(means[1][1])} of ${name}'s. `
              : ". ") +
            (layer ? "" : "Select a layer above to compare.");
    },
  };
}
