/** The answer in five seconds: did the loss fall, by which layers, together, and is it to be trusted? */

import { el } from "../lib/dom.js";
import { layerWords, lossWords, synchronyWords, trustWords } from "../lib/words.js";

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
    const text = warn ? `⚠ ${head}` : head;
    // What is the same need not be read out again.
    if (cell.head.textContent !== text) cell.head.textContent = text;
    if (cell.detail.textContent !== detail) cell.detail.textContent = detail;
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
