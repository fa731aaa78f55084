/** For whom layers learn: each one's sums on training and on validation data, and who overfits. */

import { Pairs } from "../charts/pairs.js";
import { count, signed } from "../lib/format.js";
import { generalizationWords } from "../lib/words.js";
import { rowHeight } from "./layers.js";
import { Section } from "./section.js";

const MOST = 12; // Layers shown; more would be a tangle.
const TITLE = "Train against validation";

export function generalizationView(app) {
  const section = new Section(app.main, {
    id: "generalization",
    title: TITLE,
    caption:
      "A row is a layer: its LCA on training and on validation data so far, each row on a scale of its own. Down is learning; red is overfitting.",
    ...app.sectionHooks("generalization"),
  });
  const pairs = new Pairs(section.plot, {
    testid: "pairs",
    label: "Layers in network order",
    act: app.act,
  });
  return {
    section,
    source: "generalization",
    blocked({ run }) {
      section.heading.textContent = TITLE;
      return ["train", "val"].every((probe) => run.probes.includes(probe))
        ? null
        : 'This run has no two probes to compare. Train with LCACallback(probe={"train": "train", "val": "val"}) to see which layers overfit.';
    },
    /** @param {GeneralizationAnswer} data */
    draw(data, { state }) {
      const { edges, layers } = data;
      const { head, words } = generalizationWords(data);
      section.heading.textContent = `${TITLE}: ${head}`;
      const shown = data.most_telling.slice(0, MOST);
      const chosen = layers.indexOf(state.layer);
      if (chosen >= 0 && !shown.includes(chosen)) shown.splice(-1, 1, chosen);
      pairs.update({
        rows: shown
          .sort((a, b) => a - b)
          .map((i) => ({
            name: layers[i],
            label: layers[i],
            train: data.train[i],
            val: data.val[i],
            since: data.since[i],
            verdict: data.verdict[i],
            short: signed(data.since[i] === null ? data.total_val[i] : data.given_back[i], 2),
            detail:
              data.since[i] === null
                ? `val ${signed(data.total_val[i], 2)}`
                : `${signed(data.given_back[i], 2)} since ${count(data.since[i])}`,
          })),
        edges,
        low: edges[0],
        high: edges.at(-1),
        selected: state.layer,
        rowHeight: rowHeight(shown.length, { room: 340, least: 46, most: 80 }),
      });
      const cut =
        shown.length < layers.length
          ? ` Of ${count(layers.length)} layers, the ${count(shown.length)} most telling are shown.`
          : "";
      section.note.textContent = `${words}${cut}`;
    },
  };
}
