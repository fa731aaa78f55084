/** The layers of the range as a table, sorted by any column. */

import { breakable, el } from "../lib/dom.js";
import { count, percent, signed } from "../lib/format.js";
import { inOrder } from "../lib/order.js";
import { isBlock, treeRows } from "../lib/rows.js";
import { fitting } from "./fitting.js";
import { Section } from "./section.js";

/** The button that opens or folds a block; none for a layer. */
function blockToggle(app, { name, open }) {
  if (open === null || !isBlock(name)) return [];
  const text = open ? "▾" : "▸";
  const label = open ? `Fold ${name}` : `Open ${name}`;
  const button = el(
    "button",
    { type: "button", class: "fold", "aria-expanded": String(open), "aria-label": label },
    text,
  );
  button.addEventListener("click", () => app.act.onToggle(name));
  return [button];
}

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
  const table = el(
    "table",
    { "data-testid": "layer-table", "aria-labelledby": "table-title" },
    el("thead", {}, el("tr", {}, ...heads)),
    body,
  );
  section.plot.append(table);
  section.plot.classList.add("scroll");
  const fit = fitting(table);

  /** @param {TableAnswer} data */
  function draw(data, context) {
    latest = [data, context];
    const active = /** @type {HTMLElement} */ (document.activeElement);
    const focused = body.contains(active) ? [active.closest("tr").dataset.name, active.className] : null;
    const labels = treeRows({
      layers: data.layers.map(({ name }) => name),
      depth: data.layers.map(({ depth }) => depth),
      inside: data.layers.map(({ inside }) => inside),
      open: data.layers.map(({ open }) => open),
    });
    const isTree = sort.key === "order" && !sort.falling;
    const rows = data.layers
      .map((row, i) => ({ ...row, order: i + 1, label: isTree ? labels[i].label : row.name }))
      // What lies within an open block stands by itself where rows are sorted.
      .filter(({ open }) => isTree || open !== true);
    rows.sort((a, b) => inOrder(a[sort.key], b[sort.key], sort.falling) || a.order - b.order);
    const adding = rows.filter(({ open }) => open !== true);
    const most = Math.max(...adding.map((row) => Math.abs(row.credit ?? 0)), Number.MIN_VALUE);
    heads.forEach((head, i) => {
      const sorted = COLUMNS[i].key === sort.key;
      head.setAttribute("aria-sort", sorted ? (sort.falling ? "descending" : "ascending") : "none");
    });
    body.replaceChildren(
      ...rows.map((row) => {
        const chosen = row.name === context.row;
        const cells = COLUMNS.map(({ key, title, text }) => {
          if (key === "name") {
            const select = el(
              "button",
              { type: "button", "aria-pressed": chosen, title: row.name },
              ...breakable(row.label),
            );
            select.addEventListener("click", () => app.act.onSelect(row.name));
            const head = el("th", { scope: "row" }, ...blockToggle(app, row), select);
            head.style.paddingLeft = `${8 + (isTree ? 14 * row.depth : 0)}px`;
            return head;
          }
          if (key !== "credit") return el("td", { "data-title": title }, text(row));
          const bar = el("span", { class: row.credit < 0 ? "bar helps" : "bar hurts" });
          // An open block has none: what it holds would be too small to be seen beside it.
          const size = row.open === true ? 0 : Math.abs(row.credit ?? 0);
          bar.style.width = `${(46 * size) / most}%`;
          return el(
            "td",
            { class: "credit", "data-title": title },
            el("span", { class: "track" }, bar),
            el("span", {}, text(row)),
          );
        });
        return el("tr", { "data-name": row.name, "data-selected": chosen }, ...cells);
      }),
    );
    fit();
    if (focused) {
      const [name, kind] = focused;
      [...body.querySelectorAll("button")]
        .find((one) => one.closest("tr").dataset.name === name && one.className === kind)
        ?.focus({ preventScroll: true });
    }
  }
  return { section, source: "table", draw };
}
