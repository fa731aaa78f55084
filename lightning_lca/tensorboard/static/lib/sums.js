/** Running sums over bins, at their edges. */

/** Running sum of a layer's credit at the edges, from `origin`; bins without a number add nothing. */
export function running(credit, origin = 0) {
  let sum = origin;
  return [origin, ...credit.map((v) => (sum += v ?? 0))];
}

/** The true change of the loss at the edges since `from`; empty bins carry on. */
export function trueChange(loss, from) {
  let last = null;
  return loss.map((v) => {
    last = v ?? last;
    return last === null ? null : last - from;
  });
}

/** Adds lists of numbers of one length, element by element. */
export function added(lists, length) {
  return Array.from({ length }, (_, i) => lists.reduce((sum, list) => sum + list[i], 0));
}

/** The last value that is there. */
export function end(list) {
  return list.findLast((v) => v !== null) ?? 0;
}

/** The edge nearest to a position on the step axis. */
export function nearestEdge(edges, at) {
  let best = 0;
  edges.forEach((edge, k) => {
    if (Math.abs(edge - at) < Math.abs(edges[best] - at)) best = k;
  });
  return best;
}

/** What a view of sums starts from: the run's start or the range's. {sums [L][B + 1], total, truth}. */
export function sumsOf({ edges, credit, before, loss, loss_first: first }, sinceRun) {
  const sums = credit.map((row, i) => running(row, sinceRun ? (before[i] ?? 0) : 0));
  const from = sinceRun ? first : loss.find((v) => v !== null);
  return { sums, total: added(sums, edges.length), truth: trueChange(loss, from ?? 0) };
}
