/** The answer in five seconds: did the loss fall, by which layers, together, and is it to be trusted? */

import { el } from "../lib/dom.js";
import { count, number, percent, plural, signed, steps } from "../lib/format.js";
import { synchronyWords } from "./synchrony.js";

/** Residual above this share of the true change deserves a warning. */
const LARGE = 0.01;

/** A loss with a fixed number of decimals, so that two can be compared at a glance. */
function lossText(value) {
  return Math.abs(value) >= 1e-3 && Math.abs(value) < 1000
    ? value.toFixed(4).replace("-", "\u2212")
    : number(value, 4);
}

/** How the loss moved; {head, detail}. */
export function lossWords(table, { loss, edges }) {
  const { true_change: change, rows } = table;
  const [first, last] = [edges[0] + 1, edges.at(-1)];
  const where = steps(first, last);
  const told = `${where[0].toUpperCase()}${where.slice(1)}`;
  const measured = rows === last - first + 1 ? "" : ` · ${count(rows)} measured`;
  if (!rows) return { head: "No measured step here", detail: told, warn: true };
  const known = loss.filter((v) => v !== null);
  const ends = known.length > 1 ? `${lossText(known[0])} → ${lossText(known.at(-1))} · ` : "";
  if (change === null)
    return { head: "The loss is not a finite number", detail: `${told}${measured}`, warn: true };
  const head = change
    ? `The loss ${change < 0 ? "fell" : "rose"} by ${number(Math.abs(change), 4)}`
    : "The loss stayed as it was";
  return { head, detail: `${ends}${told}${measured}`, warn: false };
}

/** Which layers helped and which hurt. */
export function layerWords({ layers, true_change: change }) {
  const helped = layers.filter((l) => l.credit < 0).sort((a, b) => a.credit - b.credit);
  const hurt = layers.filter((l) => l.credit > 0).sort((a, b) => b.credit - a.credit);
  const broken = layers.filter((l) => l.credit === null).length;
  const hurting = hurt.length ? `${count(hurt.length)} hurt` : "none hurt";
  const part = (l) => (change < 0 && l.credit < 0 ? ` (${percent(l.credit / change, 0)})` : "");
  const told = (l) => `${l.name} ${signed(l.credit, 2)}${part(l)}`;
  const details = [];
  if (broken) details.push(`${plural(broken, "layer")} not finite`);
  if (hurt.length) details.push(`hurting most: ${hurt.slice(0, 2).map(told).join(", ")}`);
  if (helped.length) details.push(`helping most: ${helped.slice(0, 2).map(told).join(", ")}`);
  const head = `${helped.length ? plural(helped.length, "layer") : "No layer"} helped, ${hurting}`;
  return { head, detail: details.join(" · "), warn: broken > 0 };
}

/** Whether the credits can be trusted. */
export function trustWords(table, lost) {
  const { true_change: change, allocated, residual, drift, rows, unconverged } = table;
  if (!rows) return { head: "Nothing to add up", detail: "" };
  const share = change ? Math.abs(residual / change) : null;
  const broken = allocated === null || residual === null;
  const large = share === null ? Math.abs(residual ?? Infinity) > 1e-9 : share > LARGE;
  const explained = share === null ? null : Math.max(0, 1 - share);
  let head = "The credits add up";
  if (broken) head = "Some numbers are not finite";
  else if (explained === 0) head = "The credits do not explain the change";
  else if (explained !== null && residual) {
    // Never rounded up to all of it.
    head =
      explained >= 0.9995
        ? "The credits explain > 99.9 %"
        : `The credits explain ${percent(Math.floor(explained * 1000) / 1000, 1)}`;
  } else if (large) head = "The credits do not add up";
  const details = [`residual ${signed(residual)}`];
  if (drift && change && Math.abs(drift / change) > 0.001) details.push(`drift ${signed(drift)}`);
  if (unconverged)
    details.push(`${count(unconverged)} of ${plural(rows, "step")} beyond the tolerance`);
  if (lost) details.push(`${plural(lost, "chunk")} of the record could not be read`);
  if (large) details.push("set a tolerance, or lower every_n_steps");
  return {
    head,
    detail: details.join(" · "),
    warn: large || broken || unconverged > 0 || lost > 0,
  };
}

/** The band with the four answers. */
export class Verdict {
  constructor(parent) {
    this.cells = Object.fromEntries(
      ["loss", "layers", "together", "trust"].map((key) => {
        const head = el("strong");
        const detail = el("span");
        return [
          key,
          {
            root: el("div", { class: "answer", "data-testid": `verdict-${key}` }, head, detail),
            head,
            detail,
          },
        ];
      }),
    );
    this.root = el(
      "div",
      { id: "verdict", role: "status", "data-testid": "verdict" },
      ...Object.values(this.cells).map((cell) => cell.root),
    );
    parent.append(this.root);
  }

  put(key, { head, detail, warn = false }) {
    const cell = this.cells[key];
    cell.head.textContent = warn ? `⚠ ${head}` : head;
    cell.detail.textContent = detail;
    cell.root.title = detail;
    cell.root.dataset.warn = warn;
  }

  /** Fills in what is known so far. */
  draw({ run, table, bins, synchrony }) {
    if (table && bins) this.put("loss", lossWords(table, bins));
    if (table) {
      this.put("layers", layerWords(table));
      this.put("trust", trustWords(table, run.lost));
    }
    if (synchrony) {
      const { head, words } = synchronyWords(synchrony);
      this.put("together", { head, detail: words });
    }
  }
}
