/** What the credit of every layer is made of: the shares of a breakdown, side by side. */

import { breakable, el } from "../lib/dom.js";
import { count, signed } from "../lib/format.js";
import { placesThatAddUp, treeRows } from "../lib/rows.js";
import { fitting } from "./fitting.js";
import { sortToggle } from "./layers.js";
import { Section } from "./section.js";

const WORDS = {
  part: "What the optimizer's steps were made of",
  order: "What the gradient foretold, and what curvature changed",
};

export function sharesView(app) {
  const section = new Section(app.main, {
    id: "shares",
    title: "Why: what is the credit made of?",
    caption:
      "Shares add up to the LCA in the last column. All bars have one scale; blue helped, red hurt.",
    ...app.sectionHooks("shares"),
  });
  const drawOrder = sortToggle(app, section);
  section.png.remove();
  let chosen = null;
  /** @type {[SharesAnswer, object]} */
  let latest = null;
  const choice = el("select", { "data-testid": "breakdown", "aria-label": "Breakdown" });
  choice.addEventListener("change", () => {
    chosen = choice.value;
    draw(...latest);
  });
  section.tools.append(el("label", { class: "field" }, "by ", choice));
  const head = el("thead");
  const body = el("tbody");
  const table = el(
    "table",
    { "data-testid": "shares-table", "aria-labelledby": "shares-title" },
    head,
    body,
  );
  section.plot.append(table);
  section.plot.classList.add("scroll");
  const fit = fitting(table);

  function cell(value, title, scale) {
    const bar = el("span", { class: value < 0 ? "bar helps" : "bar hurts" });
    bar.style.width = `${46 * Math.abs(value ?? 0) * scale}%`;
    const text = el(title === "LCA" ? "b" : "span", {}, signed(value));
    const track = el("span", { class: "track" }, bar);
    return el("td", { class: "credit", "data-title": title }, track, text);
  }

  /** @param {SharesAnswer} data */
  function draw(data, context) {
    latest = [data, context];
    const names = data.breakdowns.map(({ name }) => name);
    if (!names.includes(chosen)) chosen = names[0];
    choice.replaceChildren(
      ...names.map((name) => el("option", { value: name, selected: name === chosen }, name)),
    );
    choice.value = chosen;
    const { shares, credit, total, measured } = data.breakdowns.find(({ name }) => name === chosen);
    const most = Math.max(
      ...placesThatAddUp(data.open).flatMap((i) =>
        [...credit[i], data.credit[i]].map((v) => Math.abs(v ?? 0)),
      ),
      Number.MIN_VALUE,
    );
    const rows = treeRows(data);
    const titles = [...shares.map((share) => share.replaceAll("_", " ")), "LCA"];
    head.replaceChildren(
      el(
        "tr",
        {},
        el("th", { scope: "col", "data-key": "name" }, "layer"),
        ...titles.map((title) => el("th", { scope: "col" }, title)),
      ),
    );
    body.replaceChildren(
      ...drawOrder(context.state, data.depth, data.credit).map((i) => {
        const name = data.layers[i];
        const pressed = name === context.row;
        const { label, depth } = rows[i];
        const select = el(
          "button",
          { type: "button", "aria-pressed": pressed, title: name },
          ...breakable(label),
        );
        // An open block has no bar: what it holds would be too small to be seen beside it.
        const scale = data.open[i] === true ? 0 : 1 / most;
        select.addEventListener("click", () => app.act.onSelect(name));
        return el(
          "tr",
          { "data-name": name, "data-selected": pressed },
          el("th", { scope: "row", style: `padding-left: ${8 + 14 * depth}px` }, select),
          ...[...credit[i], data.credit[i]].map((value, k) => cell(value, titles[k], scale)),
        );
      }),
    );
    fit();
    const sums = shares.map((share, k) => `${share.replaceAll("_", " ")} ${signed(total[k])}`);
    section.note.textContent =
      `${WORDS[chosen] ?? chosen}, over ${count(measured)} measured steps: ` + sums.join(", ") + ".";
  }
  return {
    section,
    source: "shares",
    blocked({ run }) {
      return run.settings?.breakdown?.length
        ? null
        : "This run has no breakdown. Train with LCACallback(breakdown=True) to see which part of a step hurt.";
    },
    draw,
  };
}
