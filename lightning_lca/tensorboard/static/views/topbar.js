/** The controls that stay in sight: run, probe, steps, comparison, live reload and links. */

import { clampRange, panned, zoomed } from "../charts/zoom.js";
import { route } from "../lib/api.js";
import { el, fill } from "../lib/dom.js";
import { MANY, isFound } from "../lib/rows.js";

const TYPING = 250; // Milliseconds after which a word is looked for.

/** A labelled control. */
function field(text, ...nodes) {
  return el("label", { class: "field" }, el("span", {}, text), ...nodes);
}

export class TopBar {
  constructor(parent, app) {
    this.app = app;
    const { store } = app;
    const select = (testid, change) => {
      const node = el("select", { "data-testid": testid });
      node.addEventListener("change", () => change(node.value));
      return node;
    };
    const button = (testid, text, title, click) =>
      el(
        "button",
        { type: "button", "data-testid": testid, title, "aria-label": title, on: { click } },
        text,
      );
    this.run = select("run", (run) =>
      store.set({ run, probe: null, start: null, stop: null, vs_run: null, vs_probe: null }),
    );
    this.probe = select("probe", (probe) => store.set({ probe, vs_run: null, vs_probe: null }));
    this.versus = select("versus", (value) => {
      const [run, probe] = value ? JSON.parse(value) : [null, null];
      store.set({ vs_run: run, vs_probe: probe });
    });
    const number = (testid, label) =>
      el("input", {
        type: "number",
        "data-testid": testid,
        "aria-label": label,
        on: { change: () => this.readSteps() },
      });
    this.start = number("start", "First step");
    this.stop = number("stop", "Last step");
    const move = (change) => () => {
      const range = app.range();
      if (range) store.set(clampRange(...change(range.start, range.stop), range.first, range.last));
    };
    this.whole = button("whole", "Whole run", "Show the whole run (double click on any plot)", () =>
      app.act.onWhole(),
    );
    this.moves = el(
      "span",
      { class: "group", role: "group", "aria-label": "Move through the steps" },
      button(
        "pan-left",
        "◀",
        "Earlier steps",
        move((a, b) => panned(a, b, -0.5)),
      ),
      button(
        "zoom-in",
        "+",
        "Zoom in",
        move((a, b) => zoomed(a, b, 0.5)),
      ),
      button(
        "zoom-out",
        "−",
        "Zoom out",
        move((a, b) => zoomed(a, b, 2)),
      ),
      button(
        "pan-right",
        "▶",
        "Later steps",
        move((a, b) => panned(a, b, 0.5)),
      ),
    );
    this.find = el("input", {
      type: "search",
      "data-testid": "find",
      "aria-label": "Find layers",
      placeholder: "part of a name",
    });
    this.find.addEventListener("input", () => {
      clearTimeout(this.typing);
      this.typing = setTimeout(() => store.set({ find: this.find.value.trim() || null }), TYPING);
    });
    this.findField = field("Find", this.find);
    this.live = el("input", { type: "checkbox", "data-testid": "live" });
    this.live.addEventListener("change", () => store.set({ live: this.live.checked ? null : "0" }));
    this.updated = el("span", { class: "updated", "data-testid": "updated" });
    this.csv = el(
      "a",
      {
        class: "button",
        "data-testid": "csv",
        download: true,
        title: "Every measured step of the range, as CSV",
      },
      "CSV",
    );
    this.copy = button("copy-link", "Copy link", "Copy a link to this very view", () =>
      this.copyLink(),
    );
    this.probeField = field("Probe", this.probe);
    this.root = el(
      "div",
      { id: "topbar", role: "group", "aria-label": "What to show" },
      field("Run", this.run),
      this.probeField,
      el("span", { class: "field" }, el("span", {}, "Steps"), this.start, "–", this.stop),
      this.moves,
      this.whole,
      field("Compare with", this.versus),
      this.findField,
      el(
        "span",
        { class: "status" },
        el(
          "label",
          { class: "field", title: "Look for new steps every few seconds" },
          this.live,
          el("span", {}, "Live"),
        ),
        this.updated,
        this.csv,
        this.copy,
      ),
    );
    parent.append(this.root);
  }

  /** Takes the two inputs; what makes no sense is put back. */
  readSteps() {
    const range = this.app.range();
    const [a, b] = [this.start, this.stop].map((node) => Math.round(Number(node.value)));
    if (
      range &&
      Number.isFinite(a) &&
      Number.isFinite(b) &&
      a <= b &&
      b >= range.first &&
      a <= range.last
    ) {
      const [from, to] = [Math.max(a, range.first), Math.min(b, range.last)];
      this.app.store.set(clampRange(from, to, range.first, range.last));
    }
    this.drawSteps();
  }

  drawSteps() {
    const range = this.app.range();
    if (!range) return;
    for (const [node, value] of [
      [this.start, range.start],
      [this.stop, range.stop],
    ]) {
      if (document.activeElement !== node || node.dataset.shown !== String(value))
        node.value = value;
      node.dataset.shown = value;
      node.min = range.first;
      node.max = range.last;
    }
    this.whole.disabled = range.start === range.first && range.stop === range.last;
  }

  draw({ state, runs, run, choices }) {
    this.root.classList.toggle("bare", !run);
    const names = runs.map(({ name }) => [name, name]);
    fill(this.run, names, run?.name ?? "");
    this.probeField.hidden = !run || run.probes.length < 2;
    if (run)
      fill(
        this.probe,
        run.probes.map((p) => [p, p || "–"]),
        state.probe ?? run.probes[0],
      );
    const versus = choices.map((c) => [JSON.stringify([c.run, c.probe]), c.text]);
    fill(
      this.versus,
      [["", "nothing"], ...versus],
      state.vs_run === null ? "" : JSON.stringify([state.vs_run, state.vs_probe ?? ""]),
    );
    this.versus.disabled = !versus.length;
    this.findField.hidden = !run || run.layers.length <= MANY;
    if (document.activeElement !== this.find) this.find.value = state.find ?? "";
    const isVain = run && state.find !== null && !run.layers.some((n) => isFound(n, state.find));
    this.find.setAttribute("aria-invalid", String(Boolean(isVain)));
    this.find.title = isVain ? "No layer has such a name" : "Layers whose names have these words";
    this.live.checked = state.live !== "0";
    if (run) {
      const { start, stop } = state;
      this.csv.href = route("export", {
        run: run.name,
        probe: state.probe ?? run.probes[0],
        start,
        stop,
      }).href;
    }
    this.drawSteps();
  }

  /** Copies the address, and says so. */
  async copyLink() {
    this.app.store.write();
    const { href } = this.app.store.window.location;
    let done = true;
    try {
      await navigator.clipboard.writeText(href);
    } catch {
      // Without https there is no clipboard but this one.
      const area = el("textarea", { class: "offscreen" }, href);
      document.body.append(area);
      area.select();
      done = document.execCommand("copy");
      area.remove();
    }
    this.copy.textContent = done ? "Copied" : "Copy the address bar";
    setTimeout(() => (this.copy.textContent = "Copy link"), 2000);
  }
}
