/** What each layer has done to the loss so far. */

import { Chart } from "../charts/chart.js";
import { extent, rule } from "../charts/marks.js";
import { end, nearestEdge, stacked, sumsOf } from "../lib/edges.js";
import { count, signed } from "../lib/format.js";
import { placesThatAddUp } from "../lib/rows.js";
import { colors, sequence } from "../lib/theme.js";
import { Section } from "./section.js";

/** A switch for all running sums: from the run's start, or from that of the range. */
export function originToggle(app, section) {
  const toggle = section.addToggle(
    `${section.root.id}-origin`,
    "Since the run's start",
    "Sums from the run's start, not the range's",
    (on) => app.store.set({ origin: on ? "run" : null }),
  );
  return ({ origin, start }) => {
    toggle.setAttribute("aria-pressed", origin === "run");
    toggle.hidden = start === null;
  };
}

export function cumulativeView(app) {
  const section = new Section(app.main, {
    id: "cumulative",
    title: "Cumulative LCA",
    caption: "What each layer has done to the loss so far: down is learning, up is un-learning.",
    ...app.sectionHooks("bins"),
  });
  const stack = section.addToggle("stack", "Stack", "Layers as areas on top of each other", (on) =>
    app.store.set({ stack: on ? "1" : null }),
  );
  const drawOrigin = originToggle(app, section);
  const chart = new Chart(section.plot, {
    testid: "cumulative-chart",
    label: "Cumulative LCA by layer",
    height: 320,
    act: app.act,
  });
  return {
    section,
    source: "bins",
    /** @param {BinsAnswer} answer */
    draw(answer, { state, row }) {
      const bins = withoutOpenBlocks(answer);
      const stacked = state.stack === "1";
      stack.setAttribute("aria-pressed", stacked);
      drawOrigin(state);
      const { sums, total, truth } = sumsOf(bins, state.origin === "run");
      const chosen = bins.layers.indexOf(row);
      const style = stacked
        ? asAreas(bins, sums, total, truth, chosen)
        : asLines(bins, sums, chosen);
      chart.update({
        x: bins.edges,
        low: bins.edges[0],
        high: bins.edges.at(-1),
        title: "LCA (loss units)",
        ...style,
      });
      chart.root.dataset.stacked = stacked;
    },
  };
}

/**
 * Only rows that add up.
 * @param {BinsAnswer} bins
 */
function withoutOpenBlocks(bins) {
  const places = placesThatAddUp(bins.open);
  const pick = (values) => places.map((i) => values[i]);
  return {
    ...bins,
    layers: pick(bins.layers),
    running: pick(bins.running),
    before: pick(bins.before),
  };
}

/** The names of the layers that did most, for better and for worse; more would be a tangle. */
function strongest(names, [helping, hurting] = names.length > 16 ? [8, 4] : [16, 16]) {
  const sorted = [...names].sort((a, b) => b.rank - a.rank);
  return [
    ...sorted.filter(({ hurts }) => !hurts).slice(0, helping),
    ...sorted.filter(({ hurts }) => hurts).slice(0, hurting),
  ];
}

/**
 * Helping layers blue, hurting ones red, the selected one in front.
 * @param {BinsAnswer} bins
 * @param {(number | null)[][]} sums
 * @param {number} chosen
 */
function asLines({ edges, layers }, sums, chosen) {
  const hurts = (sum) => end(sum) > sum[0];
  const sign = (sum) => (hurts(sum) ? colors.hurts : colors.helps);
  const lines = sums.map((values, i) => ({
    values,
    color: i === chosen ? colors.selected : sign(values),
    width: i === chosen ? 3 : 1.5,
    alpha: i === chosen || chosen < 0 ? 0.9 : 0.4,
  }));
  if (chosen >= 0) lines.push(lines.splice(chosen, 1)[0]);
  return {
    lines,
    y: extent(sums, { include: [0] }),
    below: [rule(0, colors.muted)],
    names: strongest(
      layers.map((text, i) => ({
        text,
        value: end(sums[i]),
        hurts: hurts(sums[i]),
        color: i === chosen ? colors.selected : sign(sums[i]),
        ink: i !== chosen && hurts(sums[i]) ? colors.hurtsText : undefined,
        bold: i === chosen,
        rank: i === chosen ? Infinity : Math.abs(end(sums[i]) - sums[i][0]),
      })),
    ),
    describe(at, value) {
      const k = nearestEdge(edges, at);
      const off = (i) => Math.abs(sums[i][k] - value);
      const near = sums.reduce((best, _, i) => (off(i) < off(best) ? i : best), 0);
      const told = [...new Set(chosen < 0 ? [near] : [near, chosen])];
      return [`after step ${count(edges[k])}`, told.map((i) => [layers[i], signed(sums[i][k])])];
    },
  };
}

/**
 * Layers on top of each other in network order, helpful ones down, and what they amount to.
 * @param {BinsAnswer} bins
 * @param {(number | null)[][]} sums
 * @param {(number | null)[]} total
 * @param {(number | null)[]} truth
 * @param {number} chosen
 */
function asAreas({ edges, layers }, sums, total, truth, chosen) {
  const palette = sequence(layers.length);
  if (chosen >= 0) palette[chosen] = colors.selected;
  // Where no layer has a sum, areas go straight on to the next edge.
  const known = edges.map((_, k) => k).filter((k) => total[k] !== null);
  const at = known.map((k) => edges[k]);
  const side = (keep) => stacked(sums.map((sum) => known.map((k) => keep(0, sum[k]))));
  const [below, above] = [side(Math.min), side(Math.max)];
  const heights = middles(sums.map(end));
  return {
    lines: [{ values: truth, color: colors.text, width: 2 }],
    y: extent([below.at(-1), above.at(-1), truth], { include: [0] }),
    below: [areas(at, below, palette), areas(at, above, palette), rule(0, colors.muted)],
    names: [
      ...strongest(
        layers.map((text, i) => ({
          text,
          value: heights[i],
          hurts: end(sums[i]) > 0,
          color: palette[i],
          ink: i === chosen ? colors.selected : colors.text,
          bold: i === chosen,
          rank: i === chosen ? Infinity : Math.abs(end(sums[i])),
        })),
      ),
      {
        text: "true loss change",
        short: ["true change"],
        value: end(truth),
        color: colors.text,
        bold: true,
        rank: Infinity,
      },
    ],
    describe(step, value) {
      const k = nearestEdge(edges, step);
      const near = nearestEdge(at, step);
      const tops = value < 0 ? below : above;
      const inside = tops.findIndex((top) => Math.abs(top[near]) >= Math.abs(value));
      const layer = inside >= 0 ? [[layers[inside], signed(sums[inside][k])]] : [];
      return [
        `after step ${count(edges[k])}`,
        [...layer, ["all layers", signed(total[k])], ["true loss change", signed(truth[k])]],
      ];
    },
  };
}

/** Draws lists of one sign on top of each other, given the far side of each. */
function areas(xs, tops, palette) {
  return ({ context, x, y }) => {
    context.lineWidth = 0.75;
    context.strokeStyle = colors.background;
    tops.forEach((top, l) => {
      const base = tops[l - 1] ?? top.map(() => 0);
      if (top.every((v, i) => v === base[i])) return;
      context.fillStyle = palette[l];
      context.beginPath();
      xs.forEach((s, i) => context.lineTo(x(s), y(top[i])));
      for (let i = xs.length - 1; i >= 0; i--) context.lineTo(x(xs[i]), y(base[i]));
      context.closePath();
      context.fill();
      context.stroke();
    });
  };
}

/** The middle of each layer's area at the right end. */
function middles(ends) {
  let [low, high] = [0, 0];
  return ends.map((v) => (v < 0 ? (low += v) : (high += v)) - v / 2);
}
