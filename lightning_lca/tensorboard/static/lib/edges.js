/** What lies at edges and in bins of steps: finding places, running sums, areas on top of each other. */

/** The bin that holds a position on the step axis; edges ascend. */
export function binAt(edges, at) {
  let low = 0;
  let high = edges.length - 2;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (edges[middle] < at) low = middle;
    else high = middle - 1;
  }
  return low;
}

/** The edge nearest to a position on the step axis. */
export function nearestEdge(edges, at) {
  let best = 0;
  edges.forEach((edge, k) => {
    if (Math.abs(edge - at) < Math.abs(edges[best] - at)) best = k;
  });
  return best;
}

/** The last value that is there; 0 if there is none. */
export function end(list) {
  return list.findLast((v) => v !== null) ?? 0;
}

/**
 * A running sum that starts from what came before it; gaps stay.
 * @param {number | null} before
 * @param {(number | null)[]} sums
 */
export function startingFrom(before, sums) {
  return before ? sums.map((v) => (v === null ? null : v + before)) : sums;
}

/**
 * Running sums since the run's start or the range's: {sums [L][B + 1], total, truth [B + 1]}.
 * @param {BinsAnswer} bins
 * @param {boolean} sinceRun
 */
export function sumsOf(bins, sinceRun) {
  const from = (before, sums) => startingFrom(sinceRun ? before : 0, sums);
  return {
    sums: bins.running.map((sums, i) => from(bins.before[i], sums)),
    total: from(bins.before_total, bins.running_total),
    truth: from(bins.before_truth, bins.running_truth),
  };
}

/**
 * Means over `width` values around each, an odd number; fewer at the ends and beside gaps, which stay.
 * @param {(number | null)[]} values
 * @param {number} width
 */
export function smoothed(values, width) {
  const reach = Math.floor(width / 2);
  return values.map((value, k) => {
    if (value === null) return null;
    const near = values.slice(Math.max(0, k - reach), k + reach + 1).filter((v) => v !== null);
    return near.reduce((sum, v) => sum + v, 0) / near.length;
  });
}

/** Puts lists of one sign on top of each other: where each one's far side is; [L][n] -> [L][n]. */
export function stacked(lists) {
  const tops = [];
  for (const list of lists) tops.push(list.map((v, k) => v + (tops.at(-1)?.[k] ?? 0)));
  return tops;
}
