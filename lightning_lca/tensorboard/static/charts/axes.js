/** What all plots share, so that steps stand below each other: margins and side labels. */

import { elide } from "../lib/format.js";
import { FONT } from "../lib/theme.js";

export const FONT_SMALL = `11px ${FONT}`;
export const FONT_BOLD = `bold 11px ${FONT}`;

/** Whether a page is that of a phone. */
export function isNarrow(width) {
  return width < 520;
}

/** The margins of every plot in a page of this width, in CSS pixels. */
export function margins(width) {
  const [left, right] = isNarrow(width) ? [94, 100] : [104, 112];
  return {
    left: Math.round(Math.min(168, Math.max(left, width * 0.14))),
    right: Math.round(Math.min(156, Math.max(right, width * 0.13))),
  };
}

/** Moves rising places apart to a gap, as little as needed, and into [top, bottom]. */
export function spread(places, top, bottom, gap) {
  const at = places.map((y) => Math.min(bottom - gap / 2, Math.max(top + gap / 2, y)));
  for (let pass = 0; pass < 60; pass++) {
    let moved = false;
    for (let i = 1; i < at.length; i++) {
      const overlap = gap - (at[i] - at[i - 1]);
      if (overlap > 0.01) {
        at[i - 1] -= overlap / 2;
        at[i] += overlap / 2;
        moved = true;
      }
    }
    for (let i = 0; i < at.length; i++) {
      const low = top + gap / 2 + i * gap;
      const high = bottom - gap / 2 - (at.length - 1 - i) * gap;
      at[i] = Math.min(high, Math.max(low, at[i]));
    }
    if (!moved) break;
  }
  return at;
}

/** Writes names beside a plot at their heights, moved apart where they would overlap. */
export function sideLabels(context, items, { x, width, top, bottom, gap = 14 }) {
  const room = Math.max(1, Math.floor((bottom - top) / gap));
  const kept = [...items].sort((a, b) => b.rank - a.rank).slice(0, room);
  kept.sort((a, b) => a.y - b.y);
  const at = spread(
    kept.map((item) => item.y),
    top,
    bottom,
    gap,
  );
  context.textAlign = "left";
  context.textBaseline = "middle";
  kept.forEach((item, i) => {
    context.strokeStyle = item.color;
    context.lineWidth = 1;
    context.globalAlpha = 0.6;
    context.beginPath();
    context.moveTo(x + 2, item.y);
    context.lineTo(x + 12, at[i]);
    context.stroke();
    context.globalAlpha = 1;
    context.fillStyle = item.ink ?? item.color;
    context.font = item.bold ? FONT_BOLD : FONT_SMALL;
    const measure = (t) => context.measureText(t).width;
    const texts = [item.text, ...(item.short ?? [])];
    const text = texts.find((t) => measure(t) <= width - 18) ?? texts.at(-1);
    context.fillText(elide(text, width - 18, measure), x + 15, at[i]);
  });
}
