/** Two running sums in every row, and what they say: a layer on training and on validation data. */

import { nearestEdge } from "../lib/edges.js";
import { count, elide, signed } from "../lib/format.js";
import { colors } from "../lib/theme.js";
import { FONT_BOLD, FONT_SMALL } from "./axes.js";
import { Grid } from "./grid.js";
import { extent } from "./marks.js";

const FILL = 0.55; // How dense an area is painted.
const AIR = 5; // Above and below the lines of a row.

/** The colour of a verdict's words. */
const ink = (verdict) =>
  ({ overfits: colors.hurtsText, "hurts both": colors.hurtsText, "helps both": colors.helps })[
    verdict
  ] ?? colors.muted;

/**
 * Beside a grid's view it takes `edges` [B + 1], and rows with `train` and `val` [B + 1], `verdict`,
 * `detail` (in words; `short` where they have no room), and `since` (the step from which the layer
 * overfits, or null).
 */
export class Pairs extends Grid {
  paint(context) {
    const { rows, rowHeight } = this.view;
    const { left, top, width, height } = this.plot;
    context.fillStyle = colors.background;
    context.fillRect(left, top, width, height);
    context.save();
    context.beginPath();
    context.rect(left, top, width, height);
    context.clip();
    rows.forEach((row, i) => this.drawRow(context, row, top + i * rowHeight));
    context.restore();
    this.drawLegend(context);
    rows.forEach((row, i) => this.drawVerdict(context, row, top + (i + 0.5) * rowHeight));
  }

  /** Draws one layer between its own lowest and highest value. */
  drawRow(context, { train, val, since }, top) {
    const { edges, rowHeight } = this.view;
    const { left, width } = this.plot;
    const [low, high] = extent([train, val], { include: [0], air: 0 });
    const y = (v) => top + AIR + ((high - v) / (high - low)) * (rowHeight - 2 * AIR);
    context.lineWidth = 1;
    context.strokeStyle = colors.frame;
    context.beginPath();
    context.moveTo(left, Math.round(top) + 0.5);
    context.lineTo(left + width, Math.round(top) + 0.5);
    context.stroke();
    context.strokeStyle = colors.grid;
    context.beginPath();
    context.moveTo(left, Math.round(y(0)) + 0.5);
    context.lineTo(left + width, Math.round(y(0)) + 0.5);
    context.stroke();
    if (since !== null) this.drawGivenBack(context, val, since, y, top);
    for (const [values, color] of [
      [train, colors.faint],
      [val, colors.text],
    ]) {
      context.strokeStyle = color;
      context.lineWidth = 1.75;
      context.lineJoin = "round";
      context.beginPath();
      values.forEach((v, k) => v !== null && context.lineTo(this.x(edges[k]), y(v)));
      context.stroke();
    }
  }

  /** Fills what lies above the lowest point of the validation line since it was there. */
  drawGivenBack(context, val, since, y, top) {
    const { edges, rowHeight } = this.view;
    const after = edges.map((_, k) => k).filter((k) => edges[k] >= since && val[k] !== null);
    if (!after.length) return;
    const base = y(Math.min(...val.filter((v) => v !== null)));
    context.fillStyle = colors.hurts;
    context.globalAlpha = FILL;
    context.beginPath();
    context.moveTo(this.x(since), base);
    for (const k of after) context.lineTo(this.x(edges[k]), y(val[k]));
    context.lineTo(this.x(edges[after.at(-1)]), base);
    context.closePath();
    context.fill();
    context.globalAlpha = 1;
    context.fillRect(Math.round(this.x(since)), top + 1, 1, rowHeight - 1);
  }

  spoken({ name, verdict, detail }) {
    return `${name}: ${verdict}, ${detail}`;
  }

  drawLegend(context) {
    const roomy = this.plot.width > 290;
    const line = { width: 14, height: 2 };
    const area = { width: 14, height: 10, alpha: FILL };
    this.drawKey(context, [
      { ...line, color: colors.faint, text: "train" },
      { ...line, color: colors.text, text: roomy ? "validation" : "val" },
      { ...area, color: colors.hurts, text: roomy ? "given back on validation" : "given back" },
    ]);
  }

  drawVerdict(context, { verdict, detail, short }, y) {
    const { left, width, right } = this.plot;
    const x = left + width + 14;
    const write = (text, at, font, color) => {
      context.font = font;
      context.fillStyle = color;
      context.fillText(
        elide(text, right - 16, (t) => context.measureText(t).width),
        x,
        at,
      );
    };
    context.textAlign = "left";
    context.textBaseline = "middle";
    write(verdict, y - 7, FONT_BOLD, ink(verdict));
    context.font = FONT_SMALL;
    const fits = context.measureText(detail).width <= right - 16;
    write(fits ? detail : short, y + 8, FONT_SMALL, colors.muted);
  }

  describe(i, at) {
    const { rows, edges } = this.view;
    const { name, train, val, verdict, since } = rows[i];
    const k = nearestEdge(edges, at);
    const told = since === null ? verdict : `${verdict} since step ${count(since)}`;
    return [
      `${name} · after step ${count(edges[k])}`,
      [
        ["train", signed(train[k])],
        ["validation", signed(val[k])],
        ["in the whole view", told],
      ],
    ];
  }
}
