/** Puts the page together: the state asks the sources, and the sources' answers are drawn. */

import { margins } from "../charts/axes.js";
import { clampRange, panned, zoomed } from "../charts/zoom.js";
import { Source } from "../lib/api.js";
import { el } from "../lib/dom.js";
import { percent, steps } from "../lib/format.js";
import { MANY, isBlock, isFound } from "../lib/rows.js";
import { Runs } from "../lib/runs.js";
import { Store } from "../lib/state.js";
import { followTheme } from "../lib/theme.js";
import { channelsView } from "./channels.js";
import { compareView } from "./compare.js";
import { cumulativeView } from "./cumulative.js";
import { findingsView } from "./findings.js";
import { firstRun } from "./firstrun.js";
import { generalizationView } from "./generalization.js";
import { helpingView } from "./helping.js";
import { layersView } from "./layers.js";
import { ledgerView } from "./ledger.js";
import { sharesView } from "./shares.js";
import { synchronyView } from "./synchrony.js";
import { tableView } from "./table.js";
import { TopBar } from "./topbar.js";
import { Verdict } from "./verdict.js";

const PATIENCE = 120; // Milliseconds that the slower answers wait for the view to settle.
const CELLS = 200_000; // Of a heatmap, so that many layers take fewer bins.
const ROWS = 120; // Rows of folded layers, roughly.
const NAMES = [
  "bins",
  "table",
  "helping",
  "shares",
  "generalization",
  "synchrony",
  "findings",
  "channels",
  "compare",
];

/** The row that shows a layer: its own, or that of a block that it lies in. */
function rowOf(layer, run, bins) {
  if (!run || !bins || bins.layers.includes(layer)) return layer;
  return bins.layers[bins.row_of[run.layers.indexOf(layer)]] ?? layer;
}

/** Whether a run has layers that are looked for; it has where none are. */
function hasFound({ layers }, find) {
  return find === undefined || layers.some((name) => isFound(name, find));
}

/** The blocks that the address says are the other way than at first. */
function toggledOf({ toggle }) {
  try {
    const names = JSON.parse(toggle ?? "[]");
    return Array.isArray(names) ? names.filter((name) => typeof name === "string") : [];
  } catch {
    return []; // A broken link.
  }
}

export class App {
  constructor(parent) {
    this.store = new Store();
    this.runs = new Runs(
      () => this.store.state.live !== "0",
      (error, isNew) => this.onRuns(error, isNew),
    );
    this.sources = Object.fromEntries(
      NAMES.map((name) => [name, new Source(name, () => this.draw(name))]),
    );
    this.act = {
      onRange: (start, stop) => this.setRange(start, stop),
      onWhole: () => this.store.set({ start: null, stop: null }),
      onWheel: (kind, turn, at) => this.onWheel(kind, turn, at),
      onSelect: (layer) =>
        this.store.set({ layer: this.store.state.layer === layer ? null : layer }),
      onToggle: (block) => this.toggle(block),
    };
    this.waiting = new Set(); // Views to be drawn.
    this.main = el("main", { tabindex: -1 });
    const head = el(
      "header",
      { id: "head" },
      el("h1", { class: "offscreen" }, "Loss Change Allocation"),
      el(
        "button",
        { type: "button", class: "skip", on: { click: () => this.main.focus() } },
        "Skip to the results",
      ),
    );
    this.topbar = new TopBar(head, this);
    this.banner = el("div", {
      id: "banner",
      class: "message",
      role: "status",
      "data-testid": "banner",
      hidden: true,
    });
    this.footer = el("footer");
    parent.append(head, this.banner, this.main, this.footer);
    this.verdict = new Verdict(this.main);
    this.views = [
      findingsView,
      layersView,
      channelsView,
      cumulativeView,
      ledgerView,
      sharesView,
      generalizationView,
      helpingView,
      synchronyView,
      compareView,
      tableView,
    ].map((make) => make(this));
    this.showKeys();
  }

  /** Starts: the theme, the size, the first look for runs, and the next ones. */
  start() {
    followTheme((atOnce) => {
      this.draw();
      while (atOnce && this.waiting.size) this.drawNext();
    });
    this.store.listeners.push(() => this.refresh());
    new ResizeObserver(() => {
      clearTimeout(this.resizing);
      this.resizing = setTimeout(() => this.refresh(), 80);
    }).observe(this.main);
    this.runs.poll();
  }

  /** Takes a list of runs, or why there is none. */
  onRuns(error, isNew) {
    const { updated } = this.topbar;
    const read = this.run?.read ?? 1;
    updated.textContent = error
      ? "no answer"
      : read < 1
        ? `reading ${percent(read, 0)}`
        : `updated ${new Date().toLocaleTimeString("en-GB")}`;
    updated.title = error ?? "";
    if (error && !this.runs.all) this.say(error, true);
    if (isNew) this.refresh();
  }

  /** The run that is shown. */
  get run() {
    return this.runs.find(this.store.state.run);
  }

  /** The steps shown and those there are; null before anything is known. */
  range() {
    const { run } = this;
    if (!run || run.error || !run.rows) return null;
    const { start, stop } = this.store.state;
    const { first_step: first, last_step: last } = run;
    return { start: start ?? first, stop: stop ?? last, first, last };
  }

  /** Opens a block, or folds it. */
  toggle(block) {
    const toggled = toggledOf(this.store.state);
    const others = toggled.filter((name) => name !== block);
    const now = others.length < toggled.length ? others : [...toggled, block];
    this.store.set({ toggle: now.length ? JSON.stringify(now) : null });
  }

  /** What the routes need to know of how layers are folded; nothing where each has a row. */
  folding() {
    const { find, every } = this.store.state;
    if (this.run.layers.length <= MANY) return {};
    if (find !== null && this.run.layers.some((name) => isFound(name, find))) return { find };
    return every === "1" ? {} : { fold: MANY, toggle: JSON.stringify(toggledOf(this.store.state)) };
  }

  setRange(start, stop) {
    const range = this.range();
    if (range) this.store.set(clampRange(start, stop, range.first, range.last));
  }

  onWheel(kind, turn, at) {
    const range = this.range();
    if (!range) return;
    const { start, stop } = range;
    this.setRange(
      ...(kind === "pan"
        ? panned(start, stop, 0.2 * turn)
        : zoomed(start, stop, turn > 0 ? 1.5 : 1 / 1.5, at)),
    );
  }

  /** Asks for what the state needs, and draws what is there. */
  refresh() {
    const { state } = this.store;
    const { run } = this;
    if (!this.runs.all) return;
    if (!run || run.error || !run.rows) {
      this.sayNoRun(run);
      return;
    }
    this.banner.hidden = true;
    this.main.hidden = this.footer.hidden = false;
    const probe = run.probes.includes(state.probe) ? state.probe : run.probes[0];
    const folding = this.folding();
    const isThere = run.layers.includes(state.layer) || ("fold" in folding && isBlock(state.layer));
    const layer = isThere ? state.layer : null;
    if (state.run !== run.name || state.probe !== probe || state.layer !== layer) {
      this.store.set({ run: run.name, probe, layer }); // And comes back here.
      return;
    }
    const width = this.main.clientWidth;
    if (width < 300) return;
    const { left, right } = margins(width);
    const inner = Math.floor((width - left - right) / 50) * 50;
    const rows = "fold" in folding ? ROWS : run.layers.length;
    const fitting = Math.max(100, Math.min(inner, 2000, Math.floor(CELLS / rows)));
    const common = { run: run.name, probe, start: state.start, stop: state.stop };
    // While a long record is being read, what takes longer is asked for at its beginning and its end.
    const settled = run.read < 1 ? "reading" : run.stamp;
    const want = (name, bins, extra = {}, version = settled, shown = {}) => {
      const source = this.sources[name];
      // An answer about something else must not stand under the new name.
      const about = JSON.stringify([run.name, probe, extra]);
      if (source.about !== about) source.reset();
      source.about = about;
      const asked = { ...common, bins, ...extra, ...shown };
      source.want(asked, version, name === "bins" ? 0 : PATIENCE);
    };
    want("bins", fitting, {}, run.stamp, folding);
    want("table", null, {}, run.stamp, folding);
    want("shares", null, {}, settled, folding);
    want("helping", Math.max(40, Math.floor(inner / 5)), { layer });
    want("synchrony", Math.max(40, Math.floor(inner / 3)), { strongest: state.strongest });
    want("findings", null);
    if (["train", "val"].every((name) => run.probes.includes(name)))
      want("generalization", Math.min(fitting, 500), { probe: null });
    else this.sources.generalization.reset();
    if (run.layers.includes(layer) && run.channels) want("channels", Math.min(fitting, 500), { layer });
    else this.sources.channels.reset();
    const other = state.vs_run === null ? null : this.runs.find(state.vs_run);
    const isComparable =
      other?.rows && other.probes.includes(state.vs_probe ?? "") && hasFound(other, folding.find);
    if (isComparable) {
      const pair = { run_b: other.name, probe_b: state.vs_probe };
      const version = `${settled} ${other.stamp}`;
      want("compare", Math.min(fitting, 600), pair, version, folding);
    } else this.sources.compare.reset();
    this.draw();
  }

  /** What the views need to know beside their own data. */
  context() {
    const { state } = this.store;
    const { run, sources } = this;
    const table = sources.table.data;
    const bins = sources.bins.data;
    const choices = run && !run.error ? this.runs.others(run, state.probe) : [];
    const other =
      choices.find((c) => c.run === state.vs_run && c.probe === (state.vs_probe ?? "")) ?? null;
    return {
      state,
      run,
      runs: this.runs.all ?? [],
      table,
      bins,
      row: rowOf(state.layer, run, bins),
      synchrony: sources.synchrony.data,
      shares: Object.fromEntries((table?.layers ?? []).map(({ name, share }) => [name, share])),
      choices,
      own: { run: state.run, probe: state.probe },
      other,
      isFoundInOther: !other || hasFound(this.runs.find(other.run), this.folding().find),
    };
  }

  /** Draws what is there: everything, or what shows one source. */
  draw(name = null) {
    if (!this.runs.all) return;
    const context = this.context();
    this.topbar.draw(context);
    if (this.main.hidden || !context.run) return;
    this.verdict.draw(context);
    const due = this.views.filter((view) => {
      const { busy } = this.sources[view.source];
      view.section.root.setAttribute("aria-busy", busy);
      // What waits for an answer is drawn with it.
      return name ? [view.source, view.also].includes(name) : !busy;
    });
    this.waiting = new Set([...due, ...this.waiting]); // What is new comes first.
    this.drawNext();
  }

  /** Draws the view that has waited longest; the browser may show it before the next one. */
  drawNext() {
    const [view] = this.waiting;
    if (view) {
      this.waiting.delete(view);
      if (!this.main.hidden && this.run) this.drawView(view, this.context());
    }
    clearTimeout(this.drawing);
    if (this.waiting.size) this.drawing = setTimeout(() => this.drawNext());
    const isBusy = Object.values(this.sources).some((source) => source.busy);
    document.documentElement.dataset.ready = String(!isBusy && !this.waiting.size);
  }

  drawView(view, context) {
    const { data, error } = this.sources[view.source];
    const blocked = view.blocked?.(context);
    if (blocked) {
      const [text, buttons] = [blocked].flat();
      view.section.say(text, { buttons });
    } else if (error) view.section.fail(error);
    else if (data) {
      view.section.show();
      view.draw(data, context);
    }
  }

  /** Shows words in place of the whole page. */
  say(text, error = false, ...children) {
    this.main.hidden = this.footer.hidden = true;
    this.banner.hidden = false;
    this.banner.classList.toggle("error", error);
    this.banner.replaceChildren(el("p", {}, text), ...children);
    this.waiting.clear(); // Nothing of it is shown.
    clearTimeout(this.drawing);
    document.documentElement.dataset.ready = "true";
    this.topbar.draw(this.context());
  }

  sayNoRun(run) {
    if (run?.error) this.say(`Run ${run.name} cannot be shown. ${run.error}`, true);
    else if (run?.read < 1) this.say(`Run ${run.name} is being read.`);
    else if (run)
      this.say(
        `Run ${run.name} has no measured step yet. They appear here as soon as the first are written.`,
      );
    else if (this.runs.all.length)
      this.say(
        `There is no run ${this.store.state.run} here yet. TensorBoard may still be reading the logs; ` +
          "otherwise choose a run above.",
      );
    else {
      this.say(
        `No run with LCA data in ${this.runs.directory ?? "the log directory"} yet. TensorBoard may still be reading it. ` +
          "Otherwise add LCACallback() to the callbacks of a Trainer that logs there, or run this to see a first one:",
        false,
        el("pre", { tabindex: 0, "data-testid": "snippet" }, firstRun(this.runs.directory)),
      );
    }
  }

  /** What each part of the page needs of the whole. */
  sectionHooks(source) {
    return {
      about: () => {
        const range = this.range();
        const { run, probe } = this.store.state;
        return [run, probe && `probe ${probe}`, range && steps(range.start, range.stop)]
          .filter(Boolean)
          .join(" · ");
      },
      onRetry: () => {
        this.sources[source].retry();
        this.refresh();
      },
    };
  }

  showKeys() {
    this.footer.append(
      "Drag: zoom · double click: whole run · Ctrl + wheel: zoom · Shift + wheel: move · " +
        "on a layer's name: ↑ ↓ to go, Enter to select, ← → to move, + − to zoom, 0 for the whole run. " +
        "LCA: the loss change that a layer's motion caused, in units of the loss; negative helped.",
    );
  }
}
