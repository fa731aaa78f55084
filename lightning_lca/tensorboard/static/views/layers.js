/** Which layers help or hurt, and when: layers × steps, in network order. */

import { Heatmap, colorLimit } from "../charts/heatmap.js";
import { count, plural } from "../lib/format.js";
import { Section } from "./section.js";

/** What a cell holds, in words: bins of one width, of which only the last may be narrower. */
export function binUnit(edges) {
  const width = edges[1] - edges[0];
  return width === 1 ? "per step" : `per ${count(width)} steps`;
}

/** Height of a row, so that few layers are easy to hit and many still fit. */
export function rowHeight(rows, { room = 720, least = 6, most = 30, tall = false } = {}) {
  const fitting = Math.floor(room / Math.max(1, rows));
  return Math.min(most, Math.max(tall ? 14 : least, fitting));
}

/** Rows of a heatmap with their sums; [names], [L][B], [true sums] where the server tells them. */
export function heatRows(names, credit, totals = null, label = (name) => name) {
  return names.map((name, i) => ({
    name,
    label: label(name),
    values: credit[i],
    total: totals
      ? totals[i]
      : credit[i].reduce((sum, v) => (v === null || sum === null ? null : sum + v), 0),
  }));
}

export function layersView(app) {
  const section = new Section(app.main, {
    id: "layers",
    title: "Layers over time",
    caption:
      "Blue steps lowered the loss, red ones raised it. Drag to zoom, click a layer to look inside.",
    ...app.sectionHooks("bins"),
  });
  const tall = section.addToggle(
    "tall",
    "Label every layer",
    "Makes rows tall enough for a name each",
    (on) => app.store.set({ tall: on ? "1" : null }),
  );
  const map = new Heatmap(section.plot, {
    testid: "heatmap",
    label: "Layers in network order",
    act: app.act,
  });
  return {
    section,
    source: "bins",
    also: "table",
    draw(bins, { state, table }) {
      const { edges, layers, credit, measured } = bins;
      tall.hidden = rowHeight(layers.length) >= 13;
      tall.setAttribute("aria-pressed", state.tall === "1");
      map.update({
        rows: heatRows(layers, credit),
        edges,
        measured,
        low: edges[0],
        high: edges.at(-1),
        limit: colorLimit(credit),
        unit: binUnit(edges),
        selected: state.layer,
        change: table?.true_change,
        rowHeight: rowHeight(layers.length, { tall: state.tall === "1" }),
      });
      const empty = measured.filter((n) => !n).length;
      const broken = credit.flat().filter((v) => v === null).length;
      section.note.textContent = [
        empty
          ? `Hatched: ${plural(empty, "bin")} of ${count(measured.length)} without a measured step.`
          : "",
        broken ? `Grey: ${plural(broken, "cell")} whose credit is not a finite number.` : "",
      ].join(" ");
    },
  };
}
