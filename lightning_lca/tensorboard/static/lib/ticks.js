/** Where ticks stand, and what they say. */

import { count, number } from "./format.js";

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
