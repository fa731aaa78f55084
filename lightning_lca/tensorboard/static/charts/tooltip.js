/** One tooltip for the page. */

import { el } from "../lib/dom.js";

let box = null;

/** Shows lines of text, or [term, value] pairs, beside the pointer. */
export function showTooltip(event, title, rows) {
  box ??= document.body.appendChild(
    el("div", { class: "tooltip", role: "tooltip", "data-testid": "tooltip" }),
  );
  box.replaceChildren(
    el("strong", {}, title),
    ...rows.map(([term, value]) => el("div", {}, el("span", {}, term), el("b", {}, value))),
  );
  box.hidden = false;
  const { offsetWidth: width, offsetHeight: height } = box;
  const right = event.clientX + 16 + width < document.documentElement.clientWidth;
  const below = event.clientY + 16 + height < window.innerHeight;
  box.style.left = `${right ? event.clientX + 16 : Math.max(4, event.clientX - width - 16)}px`;
  box.style.top = `${below ? event.clientY + 16 : Math.max(4, event.clientY - height - 12)}px`;
}

export function hideTooltip() {
  if (box) box.hidden = true;
}
