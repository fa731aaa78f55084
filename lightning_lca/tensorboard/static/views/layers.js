/** Which layers help or hurt, and when: layers × steps, in network order. */

import { Heatmap, heatRows } from "../charts/heatmap.js";
import { count, plural } from "../lib/format.js";
import { leftOut } from "../lib/words.js";
import { Section } from "./section.js";

/** Height of a row, so that few layers are easy to hit and many still fit. */
export function rowHeight(rows, { room = 720, least = 6, most = 30, tall = false } = {}) {
  const fitting = Math.floor(room / Math.max(1, rows));
  return Math.min(most, Math.max(tall ? 14 : least, fitting));
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
    /** @param {BinsAnswer} bins */
    draw(bins, { state, shares }) {
      const { edges, layers, credit, total, measured, not_finite: notFinite } = bins;
      tall.hidden = rowHeight(layers.length) >= 13;
      tall.setAttribute("aria-pressed", state.tall === "1");
      map.update({
        rows: heatRows(layers, credit, total, { shares }),
        edges,
        measured,
        notFinite,
        low: edges[0],
        high: edges.at(-1),
        limit: bins.limit,
        unit: bins.unit,
        selected: state.layer,
        rowHeight: rowHeight(layers.length, { tall: state.tall === "1" }),
      });
      const empty = measured.filter((n) => !n).length;
      const broken = notFinite.reduce((sum, n) => sum + n, 0);
      section.note.textContent = [
        empty
          ? `Hatched: ${plural(empty, "bin")} of ${count(measured.length)} without a measured step.`
          : "",
        broken ? `${leftOut(broken)}; grey: bins with no other step.` : "",
      ].join(" ");
    },
  };
}
