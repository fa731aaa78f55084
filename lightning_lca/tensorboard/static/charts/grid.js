/** Rows of names over a step axis: what the heatmap and the raster have in common. */

import { el } from "../lib/dom.js";
import { elide } from "../lib/format.js";
import { isBlock } from "../lib/rows.js";
import { colors } from "../lib/theme.js";
import { stepTicks } from "../lib/ticks.js";
import { FONT_BOLD, FONT_SMALL, margins } from "./axes.js";
import { hideTooltip, showTooltip } from "./tooltip.js";
import { cursor, zoomable } from "./zoom.js";

export const TOP = 26; // The strip with the legend.
const TICKS = 20;
const TITLE = 18;
const INDENT = 9; // Of what lies within a block, in CSS pixels.

/**
 * A canvas with rows. Subclasses paint cells.
 *
 * `update` takes a view: {rows: [{name, label}], low, high, rowHeight, selected, axis}, and what the
 * subclass needs; `label`, where the list of rows has another one now. Rows of a tree also have `depth` and `open`: true or false for a block, null for
 * another row. `act` has onRange(start, stop), onWhole(), onWheel(kind, turn, step), onSelect(name)
 * where rows can be chosen, and onToggle(name) where there are blocks.
 */
export class Grid {
  constructor(host, { testid, label, act }) {
    this.act = act;
    this.view = null;
    this.canvas = el("canvas", { "aria-hidden": "true" });
    this.hit = el("div", { class: "hit" });
    this.line = el("div", { class: "cursor-line", hidden: true });
    this.hover = el("div", { class: "row-hover", hidden: true });
    this.list = el("div", {
      class: "rows",
      role: act.onSelect ? "listbox" : "list",
      "aria-label": label,
      on: { keydown: (event) => this.onKey(event), click: (event) => this.onRowClick(event) },
    });
    this.root = el(
      "div",
      { class: "grid", "data-testid": testid },
      this.canvas,
      this.hover,
      this.list,
      this.hit,
      this.line,
    );
    host.append(this.root);
    zoomable(this.hit, () => this.scale(), {
      ...act,
      onClick: (x, y) => this.select(this.rowAt(y)),
      onMove: (step, x, y, event) => this.onMove(step, y, event),
      onLeave: () => this.onLeave(),
    });
    cursor.follow(this, (at) => this.showLine(at));
  }

  scale() {
    return { width: this.plot.width, low: this.view.low, high: this.view.high };
  }

  /** Step -> x in CSS pixels from the canvas's left edge. */
  x(step) {
    const { low, high } = this.view;
    return this.plot.left + ((step - low) / (high - low)) * this.plot.width;
  }

  rowAt(y) {
    const row = Math.floor(y / this.view.rowHeight);
    return row >= 0 && row < this.view.rows.length ? row : null;
  }

  update(view) {
    this.view = view;
    this.draw();
  }

  /** Draws again: after new data, a new size or other colours. */
  draw() {
    const width = Math.floor(this.root.clientWidth);
    if (!this.view || width < 300) return; // Hidden: TensorBoard shows another tab.
    const { rows, rowHeight, low, high, axis = true, selected } = this.view;
    const { left, right } = margins(width);
    const height = rows.length * rowHeight;
    const top = this.strip(width);
    this.plot = { left, top, width: width - left - right, height, right };
    const full = top + height + (axis ? TICKS + TITLE : 8);
    const ratio = window.devicePixelRatio || 1;
    this.root.style.height = `${full}px`;
    this.canvas.style.width = `${width}px`;
    this.canvas.style.height = `${full}px`;
    this.canvas.width = Math.round(width * ratio);
    this.canvas.height = Math.round(full * ratio);
    const context = this.canvas.getContext("2d");
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    this.paint(context, ratio);
    this.drawNames(context);
    if (axis) this.drawAxis(context);
    context.strokeStyle = colors.frame;
    context.lineWidth = 1;
    context.strokeRect(left - 0.5, top - 0.5, this.plot.width + 1, height + 1);
    this.place();
    Object.assign(this.root.dataset, {
      start: low + 1,
      stop: high,
      layers: JSON.stringify(rows.map((row) => row.name)),
      selected: selected ?? "",
      plotLeft: left,
      plotTop: top,
      plotWidth: this.plot.width,
      rowHeight,
    });
  }

  /** The height of what stands above the rows. */
  strip(_width) {
    return TOP;
  }

  /** Paints the cells: a subclass's own. */
  paint(_context, _ratio) {
    throw new Error("A grid paints its own cells.");
  }

  /** Tells of the cell at a row and a place on the step axis: [title, [[term, value]]]. */
  describe(_row, _at) {
    return ["", []];
  }

  /** Explains colours in the strip above the rows: a swatch and a text each. */
  drawKey(context, swatches) {
    const y = this.plot.top - 13;
    context.font = FONT_SMALL;
    context.textAlign = "left";
    context.textBaseline = "middle";
    let x = this.plot.left;
    for (const { color, text, width, height, alpha = 1 } of swatches) {
      context.fillStyle = color;
      context.globalAlpha = alpha;
      context.fillRect(x, y - height / 2, width, height);
      context.globalAlpha = 1;
      context.fillStyle = colors.muted;
      context.fillText(text, x + width + 5, y);
      x += context.measureText(text).width + width + 22;
    }
    return y;
  }

  drawNames(context) {
    const { rows, rowHeight, selected } = this.view;
    const { left, top } = this.plot;
    const every = Math.ceil(13 / rowHeight);
    const chosen = rows.findIndex((row) => row.name === selected);
    const isTree = this.isTree();
    context.textAlign = isTree ? "left" : "right";
    context.textBaseline = "middle";
    rows.forEach((row, i) => {
      const near = chosen >= 0 && i !== chosen && Math.abs(i - chosen) * rowHeight < 13;
      if (i !== chosen && (i % every || near)) return;
      context.font = i === chosen ? FONT_BOLD : FONT_SMALL;
      context.fillStyle = i === chosen ? colors.selected : colors.text;
      const y = top + (i + 0.5) * rowHeight + 0.5;
      const measure = (t) => context.measureText(t).width;
      if (!isTree) {
        context.fillText(elide(row.label, left - 18, measure), left - 8, y);
        return;
      }
      const x = 4 + INDENT * row.depth;
      if (typeof row.open === "boolean") context.fillText(row.open ? "▾" : "▸", x, y);
      context.fillText(elide(row.label, left - x - 19, measure), x + 11, y);
    });
    if (chosen >= 0) {
      context.strokeStyle = colors.selected;
      context.lineWidth = 2;
      context.strokeRect(left - 1, top + chosen * rowHeight, this.plot.width + 2, rowHeight);
    }
  }

  drawAxis(context) {
    const { low, high } = this.view;
    const { left, top, width, height } = this.plot;
    context.font = FONT_SMALL;
    context.textAlign = "center";
    context.textBaseline = "top";
    context.strokeStyle = colors.frame;
    context.fillStyle = colors.muted;
    context.lineWidth = 1;
    for (const { at, label } of stepTicks(low, high, width)) {
      const x = Math.round(this.x(at)) + 0.5;
      context.beginPath();
      context.moveTo(x, top + height);
      context.lineTo(x, top + height + 5);
      context.stroke();
      context.fillText(label, x, top + height + 7);
    }
    context.fillText("optimizer step", left + width / 2, top + height + TICKS + 2);
  }

  /** Lays the layers for pointer and keyboard over the drawing. */
  place() {
    const { left, top, width, height } = this.plot;
    const { rows, rowHeight, selected } = this.view;
    Object.assign(this.hit.style, {
      left: `${left}px`,
      top: `${top}px`,
      width: `${width}px`,
      height: `${height}px`,
    });
    Object.assign(this.list.style, { top: `${top}px`, width: `${left}px` });
    Object.assign(this.line.style, { top: `${top}px`, height: `${height}px` });
    while (this.list.childElementCount > rows.length) this.list.lastChild.remove();
    while (this.list.childElementCount < rows.length) {
      this.list.append(el("div"));
    }
    const isTree = this.isTree();
    this.list.setAttribute("role", isTree ? "tree" : this.act.onSelect ? "listbox" : "list");
    if (this.view.label) this.list.setAttribute("aria-label", this.view.label);
    const entry = Math.max(
      0,
      rows.findIndex((row) => row.name === selected),
    );
    rows.forEach((row, i) => {
      const node = this.list.children[i];
      node.setAttribute("role", isTree ? "treeitem" : this.act.onSelect ? "option" : "listitem");
      if (isTree) node.setAttribute("aria-level", row.depth + 1);
      else node.removeAttribute("aria-level");
      if (typeof row.open === "boolean") node.setAttribute("aria-expanded", row.open);
      else node.removeAttribute("aria-expanded");
      node.style.height = `${rowHeight}px`;
      node.title = row.name;
      node.dataset.name = row.name;
      node.setAttribute("aria-label", this.spoken(row));
      if (!this.act.onSelect) return;
      node.setAttribute("aria-selected", row.name === selected);
      // One stop of the Tab key; the arrows move within.
      if (!this.list.contains(document.activeElement)) node.tabIndex = i === entry ? 0 : -1;
    });
    if (this.act.onSelect && !this.list.querySelector("[tabindex='0']"))
      this.list.children[entry].tabIndex = 0;
  }

  /** What a screen reader says of a row. */
  spoken({ name }) {
    return name;
  }

  select(row) {
    if (row !== null && row >= 0) this.act.onSelect?.(this.view.rows[row].name);
  }

  /** Whether some rows are blocks of others. */
  isTree() {
    return this.view.rows.some(({ open }) => typeof open === "boolean");
  }

  /** Opens or folds a block; selects another row. */
  enter(row) {
    if (row < 0) return;
    const { name, open } = this.view.rows[row];
    if (typeof open === "boolean" && isBlock(name)) this.act.onToggle?.(name);
    else this.select(row);
  }

  onRowClick(event) {
    this.enter([...this.list.children].indexOf(event.target));
  }

  onKey(event) {
    if (!this.act.onSelect || event.ctrlKey || event.metaKey || event.altKey) return;
    const nodes = [...this.list.children];
    const at = nodes.indexOf(document.activeElement);
    const focus = (i) => {
      const next = Math.min(nodes.length - 1, Math.max(0, i));
      nodes.forEach((node, j) => (node.tabIndex = j === next ? 0 : -1));
      nodes[next].focus();
    };
    const keys = {
      ArrowUp: () => focus(at - 1),
      ArrowDown: () => focus(at + 1),
      PageUp: () => focus(at - 10),
      PageDown: () => focus(at + 10),
      Home: () => focus(0),
      End: () => focus(nodes.length - 1),
      Enter: () => this.enter(at),
      " ": () => this.select(at),
      ArrowLeft: () => this.act.onWheel("pan", -1),
      ArrowRight: () => this.act.onWheel("pan", 1),
      "+": () => this.act.onWheel("zoom", -1),
      "-": () => this.act.onWheel("zoom", 1),
      0: () => this.act.onWhole(),
    };
    if (!keys[event.key]) return;
    event.preventDefault();
    keys[event.key]();
  }

  onMove(step, y, event) {
    const row = this.rowAt(y);
    cursor.move(step, this);
    this.showLine(step);
    this.hover.hidden = row === null;
    if (row === null) return;
    const { left, top, width } = this.plot;
    Object.assign(this.hover.style, {
      left: `${left}px`,
      width: `${width}px`,
      top: `${top + row * this.view.rowHeight}px`,
      height: `${this.view.rowHeight}px`,
    });
    const [title, rows] = this.describe(row, step);
    showTooltip(event, title, rows);
  }

  onLeave() {
    cursor.move(null, this);
    this.showLine(null);
    this.hover.hidden = true;
    hideTooltip();
  }

  showLine(at) {
    const outside = at === null || !this.plot || at < this.view.low || at > this.view.high;
    this.line.hidden = outside;
    if (!outside) this.line.style.left = `${this.x(at)}px`;
  }
}
