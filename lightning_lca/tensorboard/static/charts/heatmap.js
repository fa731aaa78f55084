/** Credit by row and bin of steps: blue helps, red hurts. */

import { binAt } from "../lib/edges.js";
import { count, elide, number, percent, signed, steps } from "../lib/format.js";
import { colors, diverging, rgb } from "../lib/theme.js";
import { el } from "../lib/dom.js";
import { FONT_BOLD, FONT_SMALL, isNarrow } from "./axes.js";
import { Grid, TOP } from "./grid.js";
import { hideTooltip, showTooltip } from "./tooltip.js";

/** Rows of a heatmap with their sums; [L], [L][B], [L], and each one's part of the loss change. */
export function heatRows(rows, credit, totals, shares = {}) {
  return rows.map((row, i) => ({
    ...row,
    values: credit[i],
    total: totals[i],
    share: shares[row.name],
  }));
}

/** The lowest and the highest value of some cells, and how many lie beyond the ends of a scale. */
export function extremes(rows, limit) {
  let [low, high, beyond, cells] = [0, 0, 0, 0];
  for (const { values } of rows) {
    for (const v of values) {
      if (v === null) continue;
      cells += 1;
      if (v < low) low = v;
      if (v > high) high = v;
      if (Math.abs(v) > limit) beyond += 1;
    }
  }
  return { low, high, beyond, cells };
}

/** Draws slanting lines over areas of a box. */
function hatch(context, areas, { left, top, width, height }, color, every) {
  context.save();
  context.clip(areas);
  context.strokeStyle = color;
  context.lineWidth = 1;
  context.beginPath();
  for (let x = left - height; x < left + width; x += every) {
    context.moveTo(x, top + height);
    context.lineTo(x + height, top);
  }
  context.stroke();
  context.restore();
}

/**
 * Beside a grid's view it takes: rows with `values` [B], `total` and maybe `share` (of the true loss
 * change), `edges` [B + 1], `measured` [B] or null, `notFinite` [B] or null, `limit`, `unit` (what a
 * cell holds), `words` (of the two ends), `title` (where a page has several).
 */
export class Heatmap extends Grid {
  constructor(host, { testid, label, act }) {
    super(host, { testid, label, act });
    const beside = () => {
      const { left, bottom } = this.scaleBox.getBoundingClientRect();
      return { clientX: left, clientY: bottom };
    };
    this.scaleBox = el("div", {
      class: "scale",
      role: "img",
      tabindex: 0,
      "data-testid": `${testid}-scale`,
      on: {
        pointermove: (event) => this.tellScale(event),
        pointerleave: hideTooltip,
        focus: () => this.tellScale(beside()),
        blur: hideTooltip,
      },
    });
    this.root.append(this.scaleBox);
  }

  spoken({ name, total }) {
    return `${name}: ${total < 0 ? "helps" : total > 0 ? "hurts" : "LCA"} ${signed(total, 2)}`;
  }

  /** On a phone a title has a line of its own. */
  strip(width) {
    return isNarrow(width) && this.view.title ? TOP + 18 : TOP;
  }

  paint(context, ratio) {
    const { rows, rowHeight, edges, measured, limit, low, high } = this.view;
    const { left, top, width, height } = this.plot;
    context.fillStyle = colors.background;
    context.fillRect(left, top, width, height);
    if (measured) this.hatchGaps(context, measured);

    const columns = Math.round(width * ratio);
    const pack = ([r, g, b]) => ((255 << 24) | (b << 16) | (g << 8) | r) >>> 0;
    const image = new ImageData(columns, rows.length);
    const pixels = new Uint32Array(image.data.buffer);
    const bins = new Int32Array(columns);
    for (let c = 0; c < columns; c++)
      bins[c] = binAt(edges, low + ((c + 0.5) / columns) * (high - low));
    rows.forEach((row, i) => {
      const painted = row.values.map((v) =>
        pack(v === null ? rgb(colors.empty) : diverging(v, limit)),
      );
      for (let c = 0; c < columns; c++) {
        if (!measured || measured[bins[c]]) pixels[i * columns + c] = painted[bins[c]];
      }
    });
    const small = new OffscreenCanvas(columns, rows.length);
    small.getContext("2d").putImageData(image, 0, 0);
    context.imageSmoothingEnabled = false;
    context.drawImage(small, left, top, width, height);
    if (colors.hatch) this.hatchHurting(context);
    if (rowHeight >= 9) {
      context.fillStyle = colors.background;
      for (let i = 1; i < rows.length; i++)
        context.fillRect(left, top + i * rowHeight - 0.5, width, 1);
    }
    this.drawLegend(context);
    this.drawTotals(context);
    this.root.dataset.limit = limit;
    this.root.dataset.bins = edges.length - 1;
  }

  /** Marks bins without a measured step. */
  hatchGaps(context, measured) {
    const { edges } = this.view;
    const { top, height } = this.plot;
    const areas = new Path2D();
    measured.forEach((n, k) => {
      if (!n) areas.rect(this.x(edges[k]), top, this.x(edges[k + 1]) - this.x(edges[k]), height);
    });
    hatch(context, areas, this.plot, colors.empty, 6);
  }

  /** Marks cells that hurt by more than a paleness, where colours may be gray. */
  hatchHurting(context) {
    const { rows, rowHeight, edges, limit } = this.view;
    const areas = new Path2D();
    rows.forEach(({ values }, i) =>
      values.forEach((v, k) => {
        if (v === null || v < limit / 50) return;
        const x = this.x(edges[k]);
        areas.rect(x, this.plot.top + i * rowHeight, this.x(edges[k + 1]) - x, rowHeight);
      }),
    );
    hatch(context, areas, this.plot, colors.hatch, 4);
  }

  drawLegend(context) {
    const { limit, unit, title, words = ["helps", "hurts"] } = this.view;
    const { left, top, width } = this.plot;
    const y = top - 18;
    context.font = FONT_SMALL;
    context.textBaseline = "middle";
    context.fillStyle = colors.muted;
    context.textAlign = "right";
    const measure = (text) => context.measureText(text).width;
    const [lowEnd, highEnd] = this.scaleEnds();
    const barRoom = (ends) => left + width - 24 - measure(ends[0]) - measure(ends[1]);
    const worded = [`${words[0]}  ${lowEnd}`, `${highEnd}  ${words[1]}`];
    const ends = barRoom(worded) >= 40 ? worded : [lowEnd, highEnd];
    const bar = Math.floor(Math.max(20, Math.min(132, barRoom(ends))));
    const x = Math.round(left + width - measure(ends[1]) - 8 - bar);
    this.placeScale(x - 8 - measure(ends[0]), y, left + width, worded);
    for (let i = 0; i < bar; i++) {
      const at = (2 * i) / (bar - 1) - 1;
      const [r, g, b] = diverging(at * Math.abs(at), 1);
      context.fillStyle = `rgb(${r}, ${g}, ${b})`;
      context.fillRect(x + i, y, 1, 10);
    }
    if (colors.hatch) {
      const hurts = new Path2D();
      hurts.rect(x + bar * 0.57, y, bar * 0.43, 10);
      hatch(context, hurts, { left: x, top: y, width: bar, height: 10 }, colors.hatch, 4);
    }
    context.strokeStyle = colors.frame;
    context.lineWidth = 1;
    context.strokeRect(x - 0.5, y - 0.5, bar + 1, 11);
    context.fillStyle = colors.muted;
    context.fillText(ends[0], x - 8, y + 5.5);
    context.textAlign = "left";
    context.fillText(ends[1], x + bar + 8, y + 5.5);
    let from = left;
    if (title) {
      context.font = FONT_BOLD;
      context.fillStyle = colors.text;
      const isAbove = top > TOP;
      const name = elide(title, isAbove ? left + width : width * 0.4, measure);
      context.fillText(name, isAbove ? 0 : left, isAbove ? y - 12.5 : y + 5.5);
      if (!isAbove) from += measure(name) + 14;
      context.font = FONT_SMALL;
      context.fillStyle = colors.muted;
    }
    const room = x - 16 - measure(ends[0]) - from;
    const texts = [
      `LCA ${unit}, in units of the loss; square-root scale`,
      `LCA ${unit}; square-root scale`,
      `LCA ${unit}`,
    ];
    const fits = texts.find((text) => measure(text) < room);
    if (fits) context.fillText(fits, from, y + 5.5);
    context.fillText("sum", left + width + 14, y + 5.5);
  }

  /** The ends of the scale; where cells lie beyond one, it says so. */
  scaleEnds() {
    const { rows, limit } = this.view;
    const { low, high } = extremes(rows, limit);
    return [
      `${low < -limit ? "≤ " : ""}${number(-limit, 2)}`,
      `${high > limit ? "≥ " : ""}${signed(limit, 2)}`,
    ];
  }

  /** Lays what tells of the scale over its drawing. */
  placeScale(x, y, right, ends) {
    Object.assign(this.scaleBox.style, {
      left: `${x}px`,
      top: `${y - 4}px`,
      width: `${right - x}px`,
      height: "18px",
    });
    this.scaleBox.setAttribute("aria-label", `Colours: ${ends.join(" to ")}`.replaceAll("  ", " "));
  }

  /** Tells where the colours end, and how far the cells go. */
  tellScale(event) {
    const { rows, limit, unit } = this.view;
    const { low, high, beyond, cells } = extremes(rows, limit);
    showTooltip(event, `LCA ${unit}, in units of the loss; square-root scale`, [
      ["colours end at", `±${number(limit)}`],
      ["lowest cell", signed(low)],
      ["highest cell", signed(high)],
      ["cells beyond the ends", `${count(beyond)} of ${count(cells)}`],
    ]);
  }

  /** Bars of each row's sum at the right. */
  drawTotals(context) {
    const { rows, rowHeight } = this.view;
    const { left, top, width, right } = this.plot;
    const text = rowHeight >= 12;
    const room = right - 14 - (text ? 58 : 6);
    // An open block has no bar: what it holds would be too small to be seen beside it.
    const totals = rows.map((row) => (row.open === true ? 0 : (row.total ?? 0)));
    const low = Math.min(0, ...totals);
    const high = Math.max(0, ...totals);
    if (low === high) return;
    const zero = left + width + 14 + (room * -low) / (high - low);
    const thick = Math.max(1, Math.min(12, rowHeight * 0.62));
    context.font = FONT_SMALL;
    context.textBaseline = "middle";
    rows.forEach((row, i) => {
      const y = top + (i + 0.5) * rowHeight;
      const length = (room * totals[i]) / (high - low);
      context.fillStyle = totals[i] < 0 ? colors.helps : colors.hurts;
      context.fillRect(zero, y - thick / 2, length, thick);
      if (!text) return;
      context.fillStyle = row.open === true ? colors.muted : colors.text;
      context.textAlign = "right";
      context.fillText(
        row.total === null ? "–" : signed(row.total, 2),
        left + width + right - 2,
        y + 0.5,
      );
    });
    context.strokeStyle = colors.frame;
    context.beginPath();
    context.moveTo(Math.round(zero) + 0.5, top);
    context.lineTo(Math.round(zero) + 0.5, top + rows.length * rowHeight);
    context.stroke();
  }

  describe(i, at) {
    const { rows, edges, measured, notFinite } = this.view;
    const bin = binAt(edges, at);
    const row = rows[i];
    const value = row.values[bin];
    const lines = [];
    if (measured && !measured[bin]) lines.push(["", "no measured step"]);
    else
      lines.push([
        "LCA",
        value === null
          ? "not finite"
          : `${signed(value)} ${value < 0 ? "helps" : value > 0 ? "hurts" : ""}`,
      ]);
    if (Math.abs(value ?? 0) > this.view.limit)
      lines.push(["colours end at", `±${number(this.view.limit)}`]);
    if (measured?.[bin] > 1) lines.push(["measured steps", count(measured[bin])]);
    if (notFinite?.[bin]) lines.push(["left out, not finite", count(notFinite[bin])]);
    lines.push(["in the whole view", signed(row.total)]);
    if (row.share !== undefined && row.share !== null)
      lines.push(["share of the loss change", percent(row.share)]);
    return [`${row.name} · ${steps(edges[bin] + 1, edges[bin + 1])}`, lines];
  }
}
