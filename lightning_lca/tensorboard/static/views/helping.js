/** How narrow the majority of helping weights is. */

import { Chart } from "../charts/chart.js";
import { extent, rule } from "../charts/marks.js";
import { el, fill } from "../lib/dom.js";
import { binAt, smoothed } from "../lib/edges.js";
import { count, percent, percentLabels, steps } from "../lib/format.js";
import { colors } from "../lib/theme.js";
import { Section } from "./section.js";

const WIDTHS = [5, 15, 45]; // Bins that lines may be smoothed over: so many lie around their middle.

/** That lines are smoothed, and what is not. */
function smoothWords(bins, edges) {
  const span = bins * (edges[1] - edges[0]);
  return (
    `Smoothed: the strong lines are means over ${count(bins)} bins (${count(span)} steps) around each point, ` +
    "the pale ones what was measured; averages and the values under the pointer are not smoothed. "
  );
}

export function helpingView(app) {
  const section = new Section(app.main, {
    id: "helping",
    title: "Share of weights that help",
    caption:
      "Of the weights that moved the loss, how many helped? Steps differ widely: “How sure?” tells whether the mean does.",
    ...app.sectionHooks("helping"),
  });
  const choice = el("select", { "data-testid": "smooth", "aria-label": "Smooth the lines" });
  fill(choice, [["", "no"], ...WIDTHS.map((n) => [String(n), `over ${n} bins`])], "");
  choice.addEventListener("change", () =>
    app.store.set({ smooth: choice.value ? Number(choice.value) : null }),
  );
  section.addTool(el("label", { class: "field" }, "Smooth ", choice));
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
      const width = WIDTHS.includes(state.smooth) ? state.smooth : null;
      choice.value = width ?? "";
      const measured = [{ values: network.share, color: colors.text }];
      // Dashes tell the two apart in gray.
      if (layer) measured.push({ values: layer.share, color: colors.selected, dash: [6, 3] });
      const strong = measured.map(({ values, ...line }) => ({
        ...line,
        values: width ? smoothed(values, width) : values,
        width: 1.75,
      }));
      const pale = measured.map(({ values, color }) => ({ values, color, width: 1, alpha: 0.3 }));
      const lines = width ? [...pale, ...strong] : strong;
      const means = [["network", network.mean, colors.text]];
      if (layer) means.push([name, layer.mean, colors.selected]);
      const names = means
        .filter(([, value]) => value !== null)
        .map(([text, value, color], i) => ({
          text: `${text} ${percent(value)}`,
          // An elided name must not take its digits along.
          short: [`${String(text).split(".").at(-1)} ${percent(value)}`, percent(value)],
          value,
          color,
          bold: true,
          rank: 10 - i,
        }));
      names.push({
        text: "as many hurt as help",
        short: ["as many hurt"],
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
        title: width ? "helping / moving, smoothed" : "helping / moving",
        labels: percentLabels,
        below: [rule(0.5, colors.muted, [4, 3])],
        names,
        describe(at) {
          const k = binAt(edges, at);
          const rows = [["network", percent(network.share[k])]];
          if (layer) rows.push([name, percent(layer.share[k])]);
          strong.forEach(({ values }, i) => {
            if (width) rows.push([`${means[i][0]}, smoothed`, percent(values[k])]);
          });
          rows.push([
            "weights that help / hurt",
            `${percent(network.helping[k])} / ${percent(network.hurting[k])}`,
          ]);
          return [steps(edges[k] + 1, edges[k + 1]), rows];
        },
      });
      const [, all] = means[0];
      chart.root.dataset.smoothed = String(width ?? "");
      section.note.textContent =
        all === null
          ? ""
          : (width ? smoothWords(width, edges) : "") +
            `On average ${percent(all)} of the network's moving weights helped` +
            (layer && means[1][1] !== null
              ? `, and ${percent(means[1][1])} of ${name}'s. `
              : ". ") +
            (layer ? "" : "Select a layer above to compare.");
    },
  };
}
