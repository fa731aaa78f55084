/** Lines over the step axis, by uPlot, with the margins of all plots. */

import { el } from "../lib/dom.js";
import { colors } from "../lib/theme.js";
import { stepTicks, tickLabels, valueTicks } from "../lib/ticks.js";
import uPlot from "../vendor/uPlot.esm.js";
import { FONT_SMALL, margins, sideLabels } from "./axes.js";
import { hideTooltip, showTooltip } from "./tooltip.js";
import { cursor, zoomable } from "./zoom.js";

const YAXIS = 76; // Ticks and title of the y axis.
const XAXIS = 38; // Of the step axis.
const AIR = 8; // Above a plot, and below one without a step axis.

/**
 * A chart. `update` takes a view: {x, lines: [{values, color, width, dash, alpha}], low, high (steps),
 * y: [low, high], title (of the y axis), labels ([y] -> [text]), below: [draw(chart)], above:
 * [draw(chart)], names: [{text, short: [texts for less room], value, color, bold,
 * rank}], describe(position) -> [title, rows],
 * axis: whether the step axis has numbers}.
 */
export class Chart {
  constructor(host, { testid, label, height, act }) {
    this.height = height;
    this.view = null;
    this.plot = null;
    this.root = el("div", {
      class: "chart",
      role: "img",
      "aria-label": label,
      "data-testid": testid,
    });
    this.root.style.height = `${height}px`;
    this.hit = el("div", { class: "hit" }); // Outlives the plots, so that a drag does.
    this.root.append(this.hit);
    host.append(this.root);
    zoomable(this.hit, () => this.scale(), {
      ...act,
      onMove: (at, x, y, event) => this.onMove(at, y, event),
      onLeave: () => {
        cursor.move(null, this);
        this.showLine(null);
        hideTooltip();
      },
    });
    cursor.follow(this, (at) => this.showLine(at));
  }

  scale() {
    return { width: this.hit.clientWidth, low: this.view.low, high: this.view.high };
  }

  update(view) {
    this.view = view;
    this.draw();
  }

  draw() {
    const width = Math.floor(this.root.clientWidth);
    if (width < 300) return; // Hidden: TensorBoard shows another tab.
    const { x, lines, low, high, y, title, labels = tickLabels, axis = true } = this.view;
    const { left, right } = margins(width);
    const inner = width - left - right;
    const ticks = stepTicks(low, high, inner);
    const line = {
      stroke: colors.muted,
      font: FONT_SMALL,
      grid: { stroke: colors.grid, width: 1 },
    };
    this.margins = { left, right };
    this.plot?.destroy();
    this.plot = new uPlot(
      {
        width,
        height: this.height,
        padding: [AIR, right, axis ? 0 : AIR, left - YAXIS],
        legend: { show: false },
        cursor: {
          x: true,
          y: false,
          drag: { x: false, y: false },
          points: { show: false },
          bind: silent(),
        },
        scales: { x: { time: false, range: () => [low, high] }, y: { range: () => y } },
        axes: [
          {
            ...line,
            show: axis,
            label: "optimizer step",
            labelFont: FONT_SMALL,
            labelSize: 18,
            labelGap: 0,
            size: XAXIS - 18,
            gap: 4,
            ticks: { stroke: colors.frame, size: 4 },
            grid: { show: false },
            splits: () => ticks.map((tick) => tick.at),
            values: () => ticks.map((tick) => tick.label),
          },
          {
            ...line,
            size: YAXIS - 18,
            label: title,
            labelFont: FONT_SMALL,
            labelSize: 18,
            labelGap: 0,
            gap: 6,
            ticks: { show: false },
            splits: () => valueTicks(y[0], y[1], (this.height - 30) / 32),
            values: (_, splits) => labels(splits),
          },
        ],
        series: [
          {},
          ...lines.map((l) => ({
            stroke: l.color,
            width: l.width ?? 1.5,
            dash: l.dash,
            alpha: l.alpha ?? 1,
            spanGaps: l.spanGaps ?? false,
            points: { show: x.length <= 40 || lonely, size: 4, fill: l.color },
          })),
        ],
        hooks: {
          drawAxes: [(u) => this.paint(u, this.view.below)],
          draw: [
            (u) => {
              this.paint(u, this.view.above);
              this.drawFrame(u);
              this.drawLabels(u);
            },
          ],
        },
      },
      [x, ...lines.map((l) => l.values)],
      this.root,
    );
    const room = this.height - AIR - (axis ? XAXIS : AIR);
    Object.assign(this.hit.style, {
      left: `${left}px`,
      top: `${AIR}px`,
      width: `${inner}px`,
      height: `${room}px`,
    });
    this.root.append(this.hit); // In front.
    Object.assign(this.root.dataset, {
      start: low + 1,
      stop: high,
      plotLeft: left,
      plotWidth: inner,
    });
  }

  /** Runs the view's own drawing in CSS pixels, clipped to the plot. */
  paint(u, draws = []) {
    const context = u.ctx;
    const ratio = uPlot.pxRatio;
    context.save();
    context.beginPath();
    context.rect(u.bbox.left, u.bbox.top, u.bbox.width, u.bbox.height);
    context.clip();
    context.scale(ratio, ratio);
    const tools = {
      context,
      x: (step) => u.valToPos(step, "x", true) / ratio,
      y: (value) => u.valToPos(value, "y", true) / ratio,
    };
    for (const draw of draws) draw(tools);
    context.restore();
  }

  drawFrame(u) {
    const { left, top, width, height } = u.bbox;
    u.ctx.save();
    u.ctx.strokeStyle = colors.frame;
    u.ctx.lineWidth = uPlot.pxRatio;
    u.ctx.setLineDash([]);
    u.ctx.strokeRect(left, top, width, height);
    u.ctx.restore();
  }

  drawLabels(u) {
    const context = u.ctx;
    const ratio = uPlot.pxRatio;
    const { left, top, width, height } = u.bbox;
    context.save();
    context.scale(ratio, ratio);
    const items = (this.view.names ?? []).map((label) => ({
      ...label,
      y: Math.min(top + height, Math.max(top, u.valToPos(label.value, "y", true))) / ratio,
    }));
    sideLabels(context, items, {
      x: (left + width) / ratio,
      width: this.margins.right,
      top: top / ratio,
      bottom: (top + height) / ratio,
    });
    context.restore();
  }

  onMove(at, y, event) {
    cursor.move(at, this);
    this.showLine(at);
    const told = this.view.describe?.(at, this.plot.posToVal(y, "y"));
    if (told) showTooltip(event, ...told);
  }

  showLine(at) {
    if (!this.plot) return;
    const outside = at === null || at < this.view.low || at > this.view.high;
    this.plot.setCursor({ left: outside ? -10 : this.plot.valToPos(at, "x"), top: 0 }, false);
  }
}

/** uPlot's own listeners are all off: `zoomable` does what they would do. */
function silent() {
  const names = [
    "mousedown",
    "mouseup",
    "click",
    "dblclick",
    "mousemove",
    "mouseleave",
    "mouseenter",
  ];
  return Object.fromEntries(names.map((name) => [name, () => null]));
}

/** Shows points only where a value has no neighbours to be joined to. */
function lonely(u, series) {
  const values = u.data[series];
  return values.some((v, i) => v !== null && values[i - 1] == null && values[i + 1] == null);
}
