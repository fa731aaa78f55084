/** Which layers help or hurt, and when: layers × steps, in network order. */

import { Heatmap, heatRows } from "../charts/heatmap.js";
import { count, plural } from "../lib/format.js";
import { MANY, treeRows } from "../lib/rows.js";
import { leftOut } from "../lib/words.js";
import { Section } from "./section.js";

/** Height of a row, so that few layers are easy to hit and many still fit. */
export function rowHeight(rows, { room = 720, least = 6, most = 30, tall = false } = {}) {
  const fitting = Math.floor(room / Math.max(1, rows));
  return Math.min(most, Math.max(tall ? 14 : least, fitting));
}

/**
 * What is folded, or found.
 * @param {BinsAnswer} bins
 * @param {number} layers
 * @param {string | null} find
 */
function foldedWords({ inside, open }, layers, find) {
  if (find === null)
    return `${count(layers)} layers: a block's row is their exact sum; click its name to open or fold it.`;
  const listed = open.filter((o) => o === null).length;
  const more = inside[0] > listed ? `, of which ${count(listed)} are listed` : "";
  return `${plural(inside[0], "layer")} of ${count(layers)} found${more}; the first row is their exact sum.`;
}

export function layersView(app) {
  const section = new Section(app.main, {
    id: "layers",
    title: "Layers over time",
    caption:
      "Blue steps lowered the loss, red ones raised it. Drag to zoom, click a layer to look inside.",
    ...app.sectionHooks("bins"),
  });
  const every = section.addToggle(
    "every",
    "Every layer",
    "A row for each layer, without blocks",
    (on) => app.store.set({ every: on ? "1" : null }),
  );
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
    draw(bins, { state, run, row, shares }) {
      const { edges, layers, credit, total, measured, not_finite: notFinite } = bins;
      const isTree = bins.open.some((open) => open !== null);
      every.hidden = run.layers.length <= MANY || state.find !== null;
      every.setAttribute("aria-pressed", state.every === "1");
      tall.hidden = isTree || rowHeight(layers.length) >= 13;
      tall.setAttribute("aria-pressed", state.tall === "1");
      map.update({
        rows: heatRows(treeRows(bins), credit, total, shares),
        edges,
        measured,
        notFinite,
        low: edges[0],
        high: edges.at(-1),
        limit: bins.limit,
        unit: bins.unit,
        selected: row,
        rowHeight: rowHeight(layers.length, { tall: isTree || state.tall === "1" }),
      });
      const empty = measured.filter((n) => !n).length;
      const broken = notFinite.reduce((sum, n) => sum + n, 0);
      section.note.textContent = [
        empty
          ? `Hatched: ${plural(empty, "bin")} of ${count(measured.length)} without a measured step.`
          : "",
        broken ? `${leftOut(broken)}; grey: bins with no other step.` : "",
        isTree ? foldedWords(bins, run.layers.length, state.find) : "",
      ].join(" ");
    },
  };
}
