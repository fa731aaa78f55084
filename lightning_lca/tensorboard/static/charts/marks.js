/** What charts are drawn of beside lines, and the range that their values take. */

/** The range of some values with a little air; [lists of numbers or null]. */
export function extent(lists, { include = [], air = 0.06 } = {}) {
  let [low, high] = [Infinity, -Infinity];
  for (const list of [...lists, include]) {
    for (const v of list) {
      if (v === null || v === undefined) continue;
      if (v < low) low = v;
      if (v > high) high = v;
    }
  }
  if (low > high) return [-1, 1];
  if (low === high) return [low - (Math.abs(low) || 1) * 0.1, high + (Math.abs(high) || 1) * 0.1];
  const by = (high - low) * air;
  return [low - by, high + by];
}

/** Draws a filled band: low and high value i hold from edge i to edge i + 1; null breaks it. */
export function steppedBand(edges, lows, highs, color) {
  return ({ context, x, y }) => {
    context.fillStyle = color;
    lows.forEach((low, i) => {
      if (low === null || highs[i] === null) return;
      const [left, right] = [Math.round(x(edges[i])), Math.round(x(edges[i + 1]))]; // Without seams.
      context.fillRect(left, y(highs[i]), right - left, y(low) - y(highs[i]));
    });
  };
}

/** Draws bars from zero, value i from edge i to edge i + 1; `color(i)`. */
export function bars(edges, values, color) {
  return ({ context, x, y }) => {
    values.forEach((v, i) => {
      if (!v) return;
      const left = x(edges[i]);
      const width = x(edges[i + 1]) - left;
      context.fillStyle = color(i);
      context.fillRect(
        left,
        y(Math.max(0, v)),
        Math.max(1, width - (width > 4 ? 1 : 0)),
        Math.max(0.5, Math.abs(y(0) - y(v))),
      );
    });
  };
}

/** Draws a horizontal line. */
export function rule(value, color, dash = []) {
  return ({ context, x, y }) => {
    context.strokeStyle = color;
    context.lineWidth = 1;
    context.setLineDash(dash);
    context.beginPath();
    context.moveTo(x(-1e12), Math.round(y(value)) + 0.5);
    context.lineTo(x(1e12), Math.round(y(value)) + 0.5);
    context.stroke();
    context.setLineDash([]);
  };
}
