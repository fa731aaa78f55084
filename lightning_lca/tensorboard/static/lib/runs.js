/** Which runs there are, looked for now and then. */

import { Source } from "./api.js";
import { natural } from "./order.js";

const POLL = 3000; // Milliseconds between looks,
const READING = 200; // and while the server is still reading a long record.

/** The list of runs; `all` is null until the first answer. */
export class Runs {
  /** `isLive()` tells whether to go on looking, `onAnswer(error or null, whether new)` is told. */
  constructor(isLive, onAnswer) {
    /** @type {RunsAnswer["runs"] | null} */
    this.all = null;
    /** @type {string | null} */
    this.directory = null; // What TensorBoard reads.
    this.isLive = isLive;
    this.onAnswer = onAnswer;
    this.listing = new Source("runs", ({ data, error }) => this.take(data, error));
  }

  /** Hidden behind another tab of the browser, or of TensorBoard, which makes the frame flat. */
  get hidden() {
    return document.hidden || window.innerHeight === 0;
  }

  /** Looks, and again in a while; never twice at once. */
  poll() {
    const due = !this.all || this.isLive() || this.all.some(({ read }) => read < 1);
    if (due && !this.hidden && !this.listing.busy) this.listing.want({}, Date.now());
    const isReading = this.all?.some(({ read }) => read < 1) && !this.hidden;
    setTimeout(() => this.poll(), isReading ? READING : this.all?.length ? POLL : POLL / 2);
  }

  /**
   * @param {RunsAnswer | null} data
   * @param {string | null} error
   */
  take(data, error) {
    if (error) {
      this.onAnswer(error, false);
      return;
    }
    const before = JSON.stringify(this.all);
    this.directory = data.directory;
    this.all = [...data.runs].sort((a, b) => natural(a.name, b.name));
    this.onAnswer(null, JSON.stringify(this.all) !== before);
  }

  /** The run of this name, or the latest where none is asked for. */
  find(name) {
    return name === null ? this.all?.at(-1) : this.all?.find((run) => run.name === name);
  }

  /** What else there is to compare with: the run's other probes, then other runs. */
  others(run, probe) {
    const choice = (r, p, text) => ({ run: r.name, probe: p, text, last: r.last_step });
    const own = run.probes
      .filter((p) => p !== probe)
      .map((p) => choice(run, p, `probe ${p || "–"}`));
    const others = this.all
      .filter((r) => r !== run && !r.error && r.rows)
      .flatMap((r) =>
        r.probes.map((p) => choice(r, p, r.probes.length > 1 ? `${r.name} · ${p}` : r.name)),
      );
    others.sort((a, b) => Number(b.probe === probe) - Number(a.probe === probe)); // The same probe first.
    return [...own, ...others];
  }
}
