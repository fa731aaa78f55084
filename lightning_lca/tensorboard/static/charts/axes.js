/** What all plots share, so that steps stand below each other: margins, ticks and side labels. */

import { count, elide, number } from "../lib/format.js";
import { FONT } from "../lib/theme.js";

export const FONT_SMALL = `11px ${FONT}`;
export const FONT_BOLD = `bold 11px ${FONT}`;

/** The margins of every plot in a page of this width, in CSS pixels. */
export function margins(width) {
  return {
    left: Math.round(Math.min(168, Math.max(104, width * 0.14))),
    right: Math.round(Math.min(156, Math.max(112, width * 0.13))),
  };
}

/** Round steps of about the wanted number in [low, high]. */
export function niceStep(span, wanted) {
  const rough = span / Math.max(1, wanted);
  const power = 10 ** Math.floor(Math.log10(rough));
  return power * [1, 2, 5, 10].find((m) => m * power >= rough * 0.999);
}

/** Ticks of the step axis: {at, label}; the cell of step s lies between s − 1 and s. */
export function stepTicks(low, high, pixels) {
  const label = 16 + 6.5 * count(high).length;
  const cell = pixels / (high - low);
  if (cell >= label) {
    return Array.from({ length: high - low }, (_, i) => ({
      at: low + i + 0.5,
      label: count(low + i + 1),
    }));
  }
  const every = Math.max(1, niceStep(high - low, Math.min(12, pixels / Math.max(label, 60))));
  const ticks = [];
  for (let s = Math.max(every, Math.ceil(low / every) * every); s <= high; s += every) {
    ticks.push({ at: cell > 8 ? s - 0.5 : s, label: count(s) });
  }
  return ticks;
}

/** Round values between two bounds. */
export function valueTicks(low, high, wanted) {
  const every = niceStep(high - low, wanted);
  const ticks = [];
  for (let k = Math.ceil(low / every - 1e-9); k * every <= high + every * 1e-9; k++)
    ticks.push(k * every);
  return ticks;
}

/** Ticks as text with the decimals that their distance needs: -1.0, -0.5, 0. */
export function tickLabels(ticks) {
  if (ticks.length < 2) return ticks.map((v) => number(v, 2));
  const every = Math.abs(ticks[1] - ticks[0]);
  const most = Math.max(...ticks.map(Math.abs));
  const tiny = most < 1e-3 || most >= 1e6;
  const unit = tiny ? 10 ** Math.floor(Math.log10(most)) : 1;
  const places = Math.max(0, -Math.floor(Math.log10((every / unit) * 1.0001)));
  return ticks.map((v) => {
    if (Math.abs(v) < every / 1e6) return "0";
    const text = (v / unit).toFixed(places) + (tiny ? `e${Math.round(Math.log10(unit))}` : "");
    return text.replaceAll("-", "\u2212");
  });
}

/** Writes names beside a plot at their heights, moved apart where they would overlap. */
export function sideLabels(context, items, { x, width, top, bottom, gap = 14 }) {
  const room = Math.max(1, Math.floor((bottom - top) / gap));
  const kept = [...items].sort((a, b) => b.rank - a.rank).slice(0, room);
  kept.sort((a, b) => a.y - b.y);
  const at = kept.map((item) => Math.min(bottom - gap / 2, Math.max(top + gap / 2, item.y)));
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
    context.fillText(
      elide(item.text, width - 18, (t) => context.measureText(t).width),
      x + 15,
      at[i],
    );
  });
}
