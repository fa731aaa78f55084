/** What the steps shown tell beyond chance, the most important on top, and what to do about it. */

import { el } from "../lib/dom.js";
import { findingWords, sureWords } from "../lib/words.js";
import { Section } from "./section.js";

const FIRST = 5; // Findings that are shown before the reader asks for more.

export function findingsView(app) {
  const section = new Section(app.main, {
    id: "findings",
    title: "How sure?",
    caption:
      "What the steps shown tell beyond chance, most important first, and what to try. It is about this run only.",
    ...app.sectionHooks("findings"),
  });
  section.png.remove();
  const first = el("ol", { class: "findings", "data-testid": "findings-list" });
  const rest = el("ol", { class: "findings", start: FIRST + 1 });
  const summary = el("summary");
  const more = el("details", { "data-testid": "findings-more", hidden: true }, summary, rest);
  section.plot.append(first, more);
  /** @type {FindingsAnswer} */
  let shown = null;
  return {
    section,
    source: "findings",
    /** @param {FindingsAnswer} data */
    draw(data, { state }) {
      if (data !== shown) {
        const items = data.kind.map((_, i) => item(app, data, i));
        first.replaceChildren(...items.slice(0, FIRST));
        rest.replaceChildren(...items.slice(FIRST));
        more.hidden = items.length <= FIRST;
        summary.textContent = `${items.length - FIRST} more`;
        section.note.textContent = sureWords(data);
        shown = data;
      }
      for (const button of section.plot.querySelectorAll("button"))
        button.setAttribute("aria-pressed", String(button.dataset.layer === state.layer));
    },
  };
}

/**
 * One finding: a headline with its size, what was found, what to try.
 * @param {FindingsAnswer} data
 * @param {number} i
 */
function item(app, data, i) {
  const { head, mood, size } = findingWords(data, i);
  const layer = data.layer[i];
  const name =
    layer === null
      ? el("strong", {}, head)
      : el(
          "button",
          { type: "button", title: `Select ${layer}`, "data-layer": layer },
          head,
        );
  if (layer !== null) name.addEventListener("click", () => app.act.onSelect(layer));
  return el(
    "li",
    { "data-kind": data.kind[i], "data-mood": mood },
    el("div", { class: "head" }, name, el("span", { class: "size" }, size)),
    el("p", { class: "try" }, `Try: ${data.try_this[i]}`),
    el("p", { class: "statement" }, data.statement[i]),
  );
}
