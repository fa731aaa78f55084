/** The layers of the range as a table, sorted by any column. */

import { el } from "../lib/dom.js";
import { count, percent, signed } from "../lib/format.js";
import { inOrder } from "../lib/order.js";
import { Section } from "./section.js";

const COLUMNS = [
  { key: "order", title: "#", text: (row) => count(row.order), hint: "Place in the network" },
  { key: "name", title: "layer", text: (row) => row.name },
  { key: "size", title: "weights", text: (row) => count(row.size) },
  {
    key: "credit",
    title: "LCA",
    text: (row) => signed(row.credit),
    hint: "In units of the loss; negative helped",
  },
  {
    key: "share",
    title: "share",
    text: (row) => percent(row.share),
    hint: "Of the true loss change",
  },
  {
    key: "helping",
    title: "helping",
    text: (row) => percent(row.helping),
    hint: "Mean fraction of weights that helped in a step",
  },
  {
    key: "hurting",
    title: "hurting",
    text: (row) => percent(row.hurting),
    hint: "Mean fraction of weights that hurt in a step",
  },
];

export function tableView(app) {
  const section = new Section(app.main, {
    id: "table",
    title: "Layers in numbers",
    caption: "Over the steps shown. The rest of a layer's weights was idle.",
    ...app.sectionHooks("table"),
  });
  section.png.remove();
  let sort = { key: "order", falling: false };
  /** @type {[TableAnswer, object]} */
  let latest = null;
  const heads = COLUMNS.map(({ key, title, hint }) => {
    const button = el(
      "button",
      { type: "button", title: hint ?? "", "data-testid": `sort-${key}` },
      title,
    );
    button.addEventListener("click", () => {
      sort = { key, falling: sort.key === key ? !sort.falling : false };
      draw(...latest);
    });
    return el("th", { scope: "col", "data-key": key }, button);
  });
  const body = el("tbody");
  section.plot.append(
    el("table", { "data-testid": "layer-table" }, el("thead", {}, el("tr", {}, ...heads)), body),
  );
  section.plot.classList.add("scroll");

  /** @param {TableAnswer} data */
  function draw(data, context) {
    latest = [data, context];
    const active = /** @type {HTMLElement} */ (document.activeElement);
    const focused = body.contains(active) ? active.title : null;
    const rows = data.layers.map((row, i) => ({ ...row, order: i + 1 }));
    rows.sort((a, b) => inOrder(a[sort.key], b[sort.key], sort.falling) || a.order - b.order);
    const most = Math.max(...rows.map((row) => Math.abs(row.credit ?? 0)), Number.MIN_VALUE);
    heads.forEach((head, i) => {
      const sorted = COLUMNS[i].key === sort.key;
      head.setAttribute("aria-sort", sorted ? (sort.falling ? "descending" : "ascending") : "none");
    });
    body.replaceChildren(
      ...rows.map((row) => {
        const chosen = row.name === context.state.layer;
        const cells = COLUMNS.map(({ key, text }) => {
          if (key === "name") {
            const select = el(
              "button",
              { type: "button", "aria-pressed": chosen, title: row.name },
              row.name,
            );
            select.addEventListener("click", () => app.act.onSelect(row.name));
            return el("th", { scope: "row" }, select);
          }
          if (key !== "credit") return el("td", {}, text(row));
          const bar = el("span", { class: row.credit < 0 ? "bar helps" : "bar hurts" });
          bar.style.width = `${(46 * Math.abs(row.credit ?? 0)) / most}%`;
          return el(
            "td",
            { class: "credit" },
            el("span", { class: "track" }, bar),
            el("span", {}, text(row)),
          );
        });
        return el("tr", { "data-name": row.name, "data-selected": chosen }, ...cells);
      }),
    );
    if (focused !== null)
      [...body.querySelectorAll("button")]
        .find(({ title }) => title === focused)
        ?.focus({ preventScroll: true });
  }
  return { section, source: "table", draw };
}
