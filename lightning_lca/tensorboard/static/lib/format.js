/** Numbers and names as people read them. */

const MINUS = "\u2212";
const grouped = new Intl.NumberFormat("en-US"); // Ten times as fast as toLocaleString.
const NARROW = "\u202f"; // Between a number and its unit.

/** A number with some significant digits: 0.922, 1.2e−6, – for none. */
export function number(value, digits = 3) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  const text =
    size < 1e-4 || size >= 1e6 ? value.toExponential(digits - 1) : value.toPrecision(digits);
  const plain = text.includes("e+") && size < 1e6 ? Math.round(value).toString() : text;
  return plain.replace("e+", "e").replaceAll("-", MINUS);
}

/** The same with its sign. */
export function signed(value, digits = 3) {
  return value > 0 ? `+${number(value, digits)}` : number(value, digits);
}

/** A step or a count: 12,345. */
export function count(value) {
  return value === null || value === undefined ? "–" : grouped.format(value);
}

/** The decimals of a percentage: 0.10, 36.8, 120. */
function placesOf(value) {
  const size = Math.abs(value);
  return size < 1 ? 2 : size < 100 ? 1 : 0;
}

/** A fraction as a percentage: 0.10 %, 36.8 %, 120 %. */
export function percent(fraction, digits = null) {
  if (fraction === null || fraction === undefined || !Number.isFinite(fraction)) return "–";
  const value = fraction * 100;
  if (value && Math.abs(value) < 0.005 && digits === null) return `< 0.01${NARROW}%`;
  return `${value.toFixed(digits ?? placesOf(value)).replace("-", MINUS)}${NARROW}%`;
}

/** What a fraction leaves of all, so that the two add up as they are written: 0.10 % and 99.90 %. */
export function restOf(fraction) {
  const value = fraction * 100;
  if (value && Math.abs(value) < 0.005) return `> 99.99${NARROW}%`;
  const places = placesOf(value);
  return percent(1 - Number(value.toFixed(places)) / 100, places);
}

/** Ticks of fractions as percentages with the places that their distance needs. */
export function percentLabels(ticks) {
  const every = ticks.length > 1 ? ticks[1] - ticks[0] : 1;
  const places = Math.max(0, -Math.floor(Math.log10(every * 100.01)));
  return ticks.map((v) => percent(v, places));
}

/** "1 layer", "6 layers". */
export function plural(n, word) {
  return `${count(n)} ${word}${n === 1 ? "" : "s"}`;
}

/** "step 7" or "steps 1–230". */
export function steps(first, last) {
  return first === last ? `step ${count(first)}` : `steps ${count(first)}–${count(last)}`;
}

/**
 * Shortens a name until it fits: first the words of its path to their initials, from the left, as
 * numbers and the end tell layers apart (e.l.10.self_attn); then without what stands before the first
 * number (…10.self_attn); then by an ellipsis in the middle.
 */
export function elide(text, width, measure) {
  const words = text.split(".");
  for (let i = 0; measure(words.join(".")) > width && i < words.length - 1; i++) {
    if (!/^\d*$/.test(words[i])) words[i] = words[i].slice(0, 1);
  }
  text = words.join(".");
  if (measure(text) <= width) return text;
  const first = words.findIndex((word) => /^\d+$/.test(word));
  for (let i = 1; i <= first; i++) {
    const end = `…${words.slice(i).join(".")}`;
    if (measure(end) <= width) return end;
  }
  let low = 1;
  let high = text.length;
  const cut = (n) =>
    text.slice(0, Math.floor(n * 0.4)) + "…" + text.slice(text.length - Math.ceil(n * 0.6));
  while (low < high) {
    const middle = Math.ceil((low + high) / 2);
    if (measure(cut(middle)) <= width) low = middle;
    else high = middle - 1;
  }
  return cut(low);
}
