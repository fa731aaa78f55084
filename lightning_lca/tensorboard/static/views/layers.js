/** Which layers help or hurt, and when: layers × steps, in network order. */

import { Heatmap, heatRows } from "../charts/heatmap.js";
import { breakable, el } from "../lib/dom.js";
import { count, plural } from "../lib/format.js";
import { MANY, placesByCredit, treeRows } from "../lib/rows.js";
import { leftOut, mostWords } from "../lib/words.js";
import { Section } from "./section.js";

const LABEL = "Layers in network order";

/** Height of a row, so that few layers are easy to hit and many still fit. */
export function rowHeight(rows, { room = 720, least = 6, most = 30, tall = false } = {}) {
  const fitting = Math.floor(room / Math.max(1, rows));
  return Math.min(most, Math.max(tall ? 14 : least, fitting));
}

/** A switch for the rows' order, in all parts that have it. */
export function sortToggle(app, section) {
  const toggle = section.addToggle(
    `${section.root.id}-sort`,
    "Sort by LCA",
    "The most helpful rows first, within each block; else in network order",
    (on) => app.store.set({ sort: on ? "credit" : null }),
  );
  /** The places of the rows in the order that is asked for. */
  return ({ sort }, depth, totals) => {
    toggle.setAttribute("aria-pressed", String(sort === "credit"));
    return sort === "credit" ? placesByCredit(depth, totals) : depth.map((_, i) => i);
  };
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
  const drawOrder = sortToggle(app, section);
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
    label: LABEL,
    act: app.act,
  });
  const most = el("button", { type: "button", class: "named", "data-testid": "most" });
  most.addEventListener("click", () => app.act.onSelect(most.title));
  const learned = el("span");
  const others = el("span");
  section.note.append(most, learned, others);

  /**
   * Names the layer that learned most, in whatever block it lies.
   * @param {TableAnswer | null} table
   */
  function drawMost(table, { layer }) {
    const told = table && mostWords(table);
    most.hidden = !told;
    learned.textContent = told ? `${told.words} ` : "";
    most.setAttribute("aria-pressed", String(Boolean(told) && told.name === layer));
    if (!told || most.title === told.name) return;
    most.title = told.name;
    most.replaceChildren(...breakable(told.name));
  }

  return {
    section,
    source: "bins",
    also: "table",
    /** @param {BinsAnswer} bins */
    draw(bins, { state, run, row, shares, table }) {
      const { edges, layers, credit, total, measured, not_finite: notFinite } = bins;
      const isTree = bins.open.some((open) => open !== null);
      every.hidden = run.layers.length <= MANY || state.find !== null;
      every.setAttribute("aria-pressed", state.every === "1");
      tall.hidden = isTree || rowHeight(layers.length) >= 13;
      tall.setAttribute("aria-pressed", state.tall === "1");
      const rows = heatRows(treeRows(bins), credit, total, shares);
      map.update({
        rows: drawOrder(state, bins.depth, total).map((i) => rows[i]),
        label: state.sort === "credit" ? "Layers, the most helpful first" : LABEL,
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
      drawMost(table, state);
      others.textContent = [
        empty
          ? `Hatched: ${plural(empty, "bin")} of ${count(measured.length)} without a measured step.`
          : "",
        broken ? `${leftOut(broken)}; grey: bins with no other step.` : "",
        isTree ? foldedWords(bins, run.layers.length, state.find) : "",
      ]
        .filter(Boolean)
        .join(" ");
    },
  };
}
