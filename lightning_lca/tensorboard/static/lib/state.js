/** What the page shows, kept in the address so that a link restores it. */

const PREFIX = "p.lca."; // TensorBoard's convention for the data of a plugin in the hash.
const DEFAULTS = {
  run: null,
  probe: null,
  start: null, // First and last step; both null = the whole run, as it grows.
  stop: null,
  layer: null,
  vs_run: null, // What to compare with.
  vs_probe: null,
  strongest: null, // Moments of learning per layer.
  stack: null, // "1": cumulative LCA as areas.
  origin: null, // "run": cumulative LCA since the run's start, not the range's.
  toggle: null, // Blocks that are open where they would be folded, or the other way: a list in JSON.
  find: null, // Only layers whose names have these words.
  sort: null, // "credit": rows by their sums, not in network order.
  smooth: null, // Bins over which the share of helping weights is smoothed.
  every: null, // "1": a row for every layer, however many.
  tall: null, // "1": a label for every layer, however many.
  live: null, // "0": no polling.
};
const NUMBERS = new Set(["start", "stop", "strongest", "smooth"]);

/** The window whose address the user sees: TensorBoard's, or our own when opened alone. */
export function addressWindow() {
  try {
    if (window.parent.location.origin === window.location.origin) return window.parent;
  } catch {
    // A frame of another origin: its address is not ours to read.
  }
  return window;
}

/** Splits the hash at its separators; [[raw part, key or null, value]]. */
function parts(hash) {
  return hash
    .replace(/^#/, "")
    .split("&")
    .filter((part) => part !== "")
    .map((part) => {
      const at = part.indexOf("=");
      if (at < 0) return [part, null, null];
      try {
        return [
          part,
          decodeURIComponent(part.slice(0, at)),
          decodeURIComponent(part.slice(at + 1)),
        ];
      } catch {
        return [part, null, null]; // A stray per cent sign.
      }
    });
}

/** Reads our keys of a hash; what is missing or malformed takes its default. */
export function fromHash(hash) {
  const state = { ...DEFAULTS };
  for (const [, key, value] of parts(hash)) {
    const name = key?.startsWith(PREFIX) ? key.slice(PREFIX.length) : null;
    if (name === null || !(name in DEFAULTS)) continue;
    if (!NUMBERS.has(name)) state[name] = value;
    else if (/^\d{1,15}$/.test(value)) state[name] = Number(value);
  }
  if (state.start === null || state.stop === null || state.start > state.stop) {
    state.start = state.stop = null;
  }
  return state;
}

/** Puts our keys into a hash and leaves the rest of it as it is. */
export function toHash(hash, state) {
  const others = parts(hash).filter(([, key]) => !key?.startsWith(PREFIX));
  const ours = Object.entries(state)
    .filter(([, value]) => value !== null)
    .map(([name, value]) => `${PREFIX}${name}=${encodeURIComponent(value)}`);
  return "#" + [...others.map(([part]) => part), ...ours].join("&");
}

/** The state with its listeners: `set` changes it, the address and tells everyone. */
export class Store {
  constructor() {
    this.window = addressWindow();
    this.state = fromHash(this.window.location.hash);
    this.listeners = [];
    // A link pasted over the address of an open page.
    this.window.addEventListener("hashchange", () => {
      const read = fromHash(this.window.location.hash);
      const bare = Object.keys(DEFAULTS).every((name) => read[name] === DEFAULTS[name]);
      if (!bare && Object.keys(DEFAULTS).some((name) => read[name] !== this.state[name])) {
        this.state = read;
        this.tell();
      }
    });
  }

  set(change) {
    const changed = Object.keys(change).some((name) => this.state[name] !== change[name]);
    if (!changed) return;
    this.state = { ...this.state, ...change };
    this.write();
    this.tell();
  }

  /** Writes the address without a step in the browser's history. */
  write() {
    const { history, location } = this.window;
    const hash = toHash(location.hash, this.state);
    if (hash !== location.hash) history.replaceState(history.state, "", hash);
  }

  tell() {
    for (const listener of this.listeners) listener(this.state);
  }
}
