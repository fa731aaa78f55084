/** Colours: blue helps, red hurts, as in the figures; a neutral white, or dark grey in dark mode. */

import * as shared from "../colours.js";
import { addressWindow } from "./state.js";

const LIGHT = {
  ...shared.LIGHT,
  hurtsText: "#b8391d", // Small letters need more contrast than areas.
  background: "#ffffff",
  text: "#1d2126",
  muted: "#59636e",
  grid: "#e9ecef",
  frame: "#c9cfd6",
  empty: "#d5dae0",
  neutral: "#ffffff",
  selected: "#8a2f9e",
  band: "rgba(95, 105, 118, 0.17)",
  faint: "#a9b1ba",
  warn: "#9a6700",
  hatch: "", // Of cells that hurt.
};
/** On paper, which may be gray: light, and what hurts is hatched. */
const PAPER = { ...LIGHT, hatch: "#1d2126" };
const DARK = {
  ...shared.DARK,
  hurtsText: shared.DARK.hurts,
  background: "#303030",
  text: "#f3f4f6",
  muted: "#b9c0c8",
  grid: "#434648",
  frame: "#63686d",
  empty: "#55595d",
  neutral: "#3d3d3d",
  selected: "#e8a5f5",
  band: "rgba(190, 198, 208, 0.2)",
  faint: "#7d838a",
  warn: "#f0b429",
  hatch: "",
};

export const FONT = '"Roboto", "Helvetica Neue", Arial, "Liberation Sans", sans-serif';

/** Whether TensorBoard, or the system when opened alone, is dark. */
function isDark() {
  const host = addressWindow();
  if (host !== window) return host.document.body.classList.contains("dark-mode");
  return window.matchMedia("(prefers-color-scheme: dark)").matches;
}

/** The colours of now. */
export let colors = LIGHT;

/**
 * Sets the colours, and calls back whenever they change: `onChange(whether there is no time)`, as the
 * browser takes what stands there when it prints.
 */
export function followTheme(onChange) {
  const paper = window.matchMedia("print");
  let printing = paper.matches;
  const apply = () => {
    const dark = isDark() && !printing;
    colors = printing ? PAPER : dark ? DARK : LIGHT;
    document.documentElement.dataset.theme = dark ? "dark" : "light";
    for (const [name, value] of Object.entries(colors)) {
      document.documentElement.style.setProperty(`--${name}`, value);
    }
  };
  apply();
  const changed = () => {
    const before = colors;
    apply();
    if (colors !== before) onChange(printing);
  };
  const print = (now) => {
    printing = now;
    changed();
  };
  window.addEventListener("beforeprint", () => print(true));
  window.addEventListener("afterprint", () => print(false));
  paper.addEventListener("change", ({ matches }) => print(matches));
  const host = addressWindow();
  if (host === window) {
    window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", changed);
  } else {
    new MutationObserver(changed).observe(host.document.body, { attributeFilter: ["class"] });
  }
}

/** sRGB #rrggbb -> [r, g, b] in 0..255. */
export function rgb(hex) {
  return [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
}

/** [r, g, b] in 0..255 -> OKLab, where equal steps look equal. */
function oklab(color) {
  const [r, g, b] = color.map((c) =>
    c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4,
  );
  const l = Math.cbrt(0.4122214708 * r + 0.5363325363 * g + 0.0514459929 * b);
  const m = Math.cbrt(0.2119034982 * r + 0.6806995451 * g + 0.1073969566 * b);
  const s = Math.cbrt(0.0883024619 * r + 0.2817188376 * g + 0.6299787005 * b);
  return [
    0.2104542553 * l + 0.793617785 * m - 0.0040720468 * s,
    1.9779984951 * l - 2.428592205 * m + 0.4505937099 * s,
    0.0259040371 * l + 0.7827717662 * m - 0.808675766 * s,
  ];
}

/**
 * OKLab -> [r, g, b] in 0..255.
 * @param {number[]} color
 */
function fromOklab([L, a, b]) {
  const l = (L + 0.3963377774 * a + 0.2158037573 * b) ** 3;
  const m = (L - 0.1055613458 * a - 0.0638541728 * b) ** 3;
  const s = (L - 0.0894841775 * a - 1.291485548 * b) ** 3;
  return [
    4.0767416621 * l - 3.3077115913 * m + 0.2309699292 * s,
    -1.2684380046 * l + 2.6097574011 * m - 0.3413193965 * s,
    -0.0041960863 * l - 0.7034186147 * m + 1.707614701 * s,
  ].map((c) => {
    const linear = Math.min(1, Math.max(0, c));
    return Math.round(
      255 * (linear <= 0.0031308 ? 12.92 * linear : 1.055 * linear ** (1 / 2.4) - 0.055),
    );
  });
}

/** `n` colours from one to another, [[r, g, b]]. */
function ramp(from, to, n) {
  const [a, b] = [oklab(rgb(from)), oklab(rgb(to))];
  return Array.from({ length: n }, (_, i) =>
    fromOklab(a.map((c, j) => c + ((b[j] - c) * i) / (n - 1))),
  );
}

const HALF = 128;
const tables = new Map();

/** The diverging table of the current colours: 2·128 + 1 entries, most helpful first. */
function table() {
  if (!tables.has(colors)) {
    const helps = ramp(colors.neutral, colors.helps, HALF + 1);
    const hurts = ramp(colors.neutral, colors.hurts, HALF + 1);
    tables.set(colors, [...helps.slice(1).reverse(), ...hurts]);
  }
  return tables.get(colors);
}

/** Credit -> [r, g, b] on a square-root scale that ends at ±limit. */
export function diverging(value, limit) {
  const size = limit > 0 ? Math.sqrt(Math.min(1, Math.abs(value) / limit)) : 0;
  return table()[HALF + Math.round(Math.sign(value) * size * HALF)];
}

/** Colours of n layers in network order, for areas side by side: dark to light, blind-safe. */
export function sequence(n) {
  const stops = ["#4b4a8f", "#3a6fa0", "#3f9a94", "#93b865", "#e8c24a"].map((c) => oklab(rgb(c)));
  return Array.from({ length: n }, (_, i) => {
    const at = n > 1 ? (i / (n - 1)) * (stops.length - 1) : 1;
    const k = Math.min(stops.length - 2, Math.floor(at));
    const [r, g, b] = fromOklab(stops[k].map((c, j) => c + (stops[k + 1][j] - c) * (at - k)));
    return `rgb(${r}, ${g}, ${b})`;
  });
}
