/** A part of the page: heading, what it shows, tools, the plot, a note, and its errors. */

import { margins } from "../charts/axes.js";
import { savePng } from "../charts/png.js";
import { el } from "../lib/dom.js";

export class Section {
  /** `about()` gives the run and steps that a saved picture names. */
  constructor(parent, { id, title, caption, about, onRetry }) {
    this.title = title;
    this.tools = el("div", { class: "tools" });
    this.plot = el("div", { class: "plot" });
    this.note = el("p", { id: `${id}-note`, class: "note", "data-testid": `${id}-note` });
    this.message = el("div", { class: "message", "data-testid": `${id}-message`, hidden: true });
    this.onRetry = onRetry;
    this.heading = el("h2", { id: `${id}-title` }, title);
    this.caption = el("p", { class: "caption" }, caption);
    this.root = el(
      "section",
      { id, "data-testid": id, "aria-labelledby": `${id}-title` },
      el("header", {}, el("div", {}, this.heading, this.caption), this.tools),
      this.message,
      this.plot,
      this.note,
    );
    this.png = el(
      "button",
      {
        type: "button",
        "data-testid": `${id}-png`,
        title: `Save “${title}” as a picture`,
        on: { click: () => savePng(this.plot, this.heading.textContent, about()) },
      },
      "PNG",
    );
    this.tools.append(this.png);
    parent.append(this.root);
  }

  /** Adds a control before the PNG button. */
  addTool(node) {
    this.tools.insertBefore(node, this.png);
    return node;
  }

  /** A two-state button; `onChange(pressed)`. */
  addToggle(testid, text, title, onChange) {
    const button = el(
      "button",
      { type: "button", "data-testid": testid, title, "aria-pressed": "false" },
      text,
    );
    button.addEventListener("click", () =>
      onChange(button.getAttribute("aria-pressed") !== "true"),
    );
    return this.addTool(button);
  }

  /** Shows the plot. */
  show() {
    this.message.hidden = true;
    this.plot.hidden = this.note.hidden = this.tools.hidden = false;
    this.png.disabled = false;
    // A picture is told by its label, and by the words below it.
    for (const picture of this.plot.querySelectorAll(".chart"))
      picture.setAttribute("aria-describedby", this.note.id);
  }

  /** Shows words in place of the plot, with buttons, [[text, click, test id]]. */
  say(text, { error = false, buttons = [] } = {}) {
    this.plot.hidden = this.note.hidden = this.tools.hidden = true;
    this.png.disabled = true;
    this.message.hidden = false;
    const said = JSON.stringify([text, error, buttons]);
    if (this.said === said) return; // Nobody wants a button to change under the pointer.
    this.said = said;
    this.message.classList.toggle("error", error);
    this.message.setAttribute("role", error ? "alert" : "note");
    this.message.replaceChildren(
      el("p", {}, text),
      ...buttons.map(([label, click, testid]) =>
        el("button", { type: "button", "data-testid": testid, on: { click } }, label),
      ),
    );
  }

  /** Shows an error, which can be retried. */
  fail(text) {
    this.say(text, { error: true, buttons: [["Retry", this.onRetry, "retry"]] });
  }

  /** A subtitle within the plot, aligned with the plots' left edge; for several plots in a part. */
  addSubtitle(text) {
    const node = el("h3", {}, text);
    this.plot.append(node);
    const align = () => (node.style.paddingLeft = `${margins(this.plot.clientWidth).left}px`);
    new ResizeObserver(align).observe(this.plot);
    return node;
  }
}
