/** The server's routes: one request at a time per source, and stale answers are dropped. */

/** The address of a route; the base works under any path prefix. This file lies one folder below. */
export function route(name, params = {}) {
  const url = new URL(`../${name}`, import.meta.url);
  for (const [key, value] of Object.entries(params)) {
    if (value !== null && value !== undefined) url.searchParams.set(key, value);
  }
  return url;
}

const COLUMNS = "application/x-lca-columns";

/**
 * Reads an answer whose numbers came as bytes: the length of the JSON, the JSON, and float64 numbers.
 * Arrays become nested lists, with null for what is not finite.
 * @param {ArrayBuffer} bytes
 */
export function fromColumns(bytes) {
  const length = new DataView(bytes).getUint32(0, true);
  const text = new TextDecoder().decode(new Uint8Array(bytes, 4, length));
  const numbers = new Float64Array(bytes, 4 + length);
  const list = (at, shape) => {
    const [size, ...inner] = shape;
    const step = inner.reduce((a, b) => a * b, 1);
    return inner.length
      ? Array.from({ length: size }, (_, i) => list(at + i * step, inner))
      : Array.from(numbers.subarray(at, at + size), (v) => (Number.isFinite(v) ? v : null));
  };
  const { answer, arrays } = JSON.parse(text);
  for (const [path, at, shape] of arrays)
    path.slice(0, -1).reduce((part, key) => part[key], answer)[path.at(-1)] = list(at, shape);
  return answer;
}

/** Fetches an answer; an Error carries the server's own words. */
export async function fetchAnswer(url, signal) {
  let answer;
  try {
    answer = await fetch(url, { signal, headers: { Accept: `${COLUMNS}, application/json` } });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("TensorBoard does not answer. Is it still running?");
  }
  let body;
  try {
    const isColumns = answer.headers.get("Content-Type")?.startsWith(COLUMNS);
    body = isColumns ? fromColumns(await answer.arrayBuffer()) : await answer.json();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error(`TensorBoard answered ${answer.status} without data for ${url.pathname}.`);
  }
  if (!answer.ok) throw new Error(body.error ?? `TensorBoard answered ${answer.status}.`);
  return body;
}

/** One route's latest answer. `want` asks for it unless it is there or on its way already. */
export class Source {
  constructor(name, onChange) {
    this.name = name;
    this.onChange = onChange;
    this.about = null; // A note of whoever asks: what the answer is about.
    this.reset();
  }

  /** Forgets the answer and what is on its way. */
  reset() {
    this.controller?.abort();
    this.controller = null;
    this.wanted = null;
    this.data = null;
    this.error = null;
  }

  get busy() {
    return this.controller !== null;
  }

  /**
   * Asks for the route with these parameters. `version` tells when old answers are outdated. What
   * is wanted again within `delay` milliseconds, as by a turning wheel, is never asked for.
   */
  async want(params, version, delay = 0) {
    const url = route(this.name, params);
    const wanted = `${url.href} ${version}`;
    if (wanted === this.wanted) return;
    this.controller?.abort();
    const controller = new AbortController();
    this.controller = controller;
    this.wanted = wanted;
    if (delay) await new Promise((done) => setTimeout(done, delay));
    if (this.controller !== controller) return;
    try {
      const data = await fetchAnswer(url, controller.signal);
      if (this.controller !== controller) return;
      this.data = data;
      this.error = null;
    } catch (error) {
      if (this.controller !== controller) return;
      this.error = error.message;
    }
    this.controller = null;
    this.onChange(this);
  }

  /** Asks again after an error. */
  retry() {
    this.wanted = null;
  }
}
