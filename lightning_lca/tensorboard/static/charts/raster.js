/** Moments of learning: a mark per layer and step; those that layers share stand out. */

import { count, plural } from "../lib/format.js";
import { colors } from "../lib/theme.js";
import { FONT_SMALL } from "./axes.js";
import { Grid } from "./grid.js";

/**
 * Beside a grid's view it takes `moments` [[row, step, layers with a moment at that step]], and rows
 * with `all` and `shared`, their numbers of moments.
 */
export class Raster extends Grid {
  paint(context) {
    const { rows, rowHeight, moments, low, high } = this.view;
    const { left, top, width } = this.plot;
    context.fillStyle = colors.background;
    context.fillRect(left, top, width, this.plot.height);
    context.strokeStyle = colors.grid;
    context.lineWidth = 1;
    context.beginPath();
    for (let i = 1; rowHeight >= 6 && i < rows.length; i++) {
      context.moveTo(left, Math.round(top + i * rowHeight) + 0.5);
      context.lineTo(left + width, Math.round(top + i * rowHeight) + 0.5);
    }
    context.stroke();
    const cell = width / (high - low);
    const mark = Math.max(1.5, Math.min(cell * 0.8, 14));
    for (const shared of [false, true]) {
      context.fillStyle = shared ? colors.helps : colors.faint;
      for (const [row, step, layers] of moments) {
        if (layers > 1 !== shared) continue;
        context.fillRect(
          this.x(step - 0.5) - mark / 2,
          top + row * rowHeight + 0.5,
          mark,
          Math.max(1, rowHeight - 1),
        );
      }
    }
    this.drawLegend(context);
    this.drawCounts(context);
    this.root.dataset.moments = moments.length;
  }

  spoken({ name, shared, all }) {
    return `${name}: ${shared} of ${plural(all, "moment")} shared`;
  }

  drawLegend(context) {
    const { left, width } = this.plot;
    const roomy = width > 290;
    const mark = { width: 3, height: 10 };
    const y = this.drawKey(context, [
      { ...mark, color: colors.helps, text: roomy ? "shared with another layer" : "shared" },
      { ...mark, color: colors.faint, text: roomy ? "of this layer alone" : "alone" },
    ]);
    context.fillText("shared", left + width + 14, y);
  }

  /** How many of each layer's moments are shared, at the right. */
  drawCounts(context) {
    const { rows, rowHeight } = this.view;
    if (rowHeight < 12) return;
    const { left, top, width } = this.plot;
    context.textAlign = "left";
    context.textBaseline = "middle";
    context.fillStyle = colors.text;
    context.font = FONT_SMALL;
    rows.forEach(({ all, shared }, i) => {
      context.fillText(
        `${shared} of ${all}`,
        left + width + 14,
        top + (i + 0.5) * rowHeight + 0.5,
      );
    });
  }

  describe(row, at) {
    const { rows, moments } = this.view;
    const step = Math.ceil(at);
    const reach = Math.max(1, ((this.view.high - this.view.low) / this.plot.width) * 4);
    const near = moments
      .filter(([r, s]) => r === row && Math.abs(s - 0.5 - at) <= reach)
      .sort((a, b) => Math.abs(a[1] - at) - Math.abs(b[1] - at))[0];
    if (!near) return [`${rows[row].name} · step ${count(step)}`, [["", "no moment of learning"]]];
    const others = near[2] - 1;
    const shared = others ? `shared with ${plural(others, "other layer")}` : "of this layer alone";
    return [`${rows[row].name} · step ${count(near[1])}`, [["moment of learning", shared]]];
  }
}
