/** Inside one layer: its channels over time, the most helpful first. */

import { Heatmap, heatRows } from "../charts/heatmap.js";
import { count, plural } from "../lib/format.js";
import { isBlock } from "../lib/rows.js";
import { rowHeight } from "./layers.js";
import { Section } from "./section.js";

export function channelsView(app) {
  const section = new Section(app.main, {
    id: "channels",
    title: "Channels",
    caption:
      "The selected layer from within: the most helpful channel at the top, the most hurting at the bottom.",
    ...app.sectionHooks("channels"),
  });
  const map = new Heatmap(section.plot, {
    testid: "channels-heatmap",
    label: "Channels by LCA",
    act: { ...app.act, onSelect: null },
  });
  return {
    section,
    source: "channels",
    /** Why there is nothing to show, if so. */
    blocked({ state, run }) {
      section.heading.textContent = state.layer ? `Channels of ${state.layer}` : "Channels";
      if (!run.channels)
        return "This record has no channels. Train with LCACallback(neurons=True) to see inside each layer.";
      if (isBlock(state.layer) && !run.layers.includes(state.layer))
        return "A block is selected. Click one of its layers to see its channels.";
      return state.layer
        ? null
        : "Click a layer above to see its channels (its neurons, for a linear layer).";
    },
    /** @param {ChannelsAnswer} data */
    draw(data) {
      const { layer, edges, channels, credit, total, helped, hurt, shown, of } = data;
      const label = (name) => (name.startsWith(`${layer}/`) ? name.slice(layer.length + 1) : name);
      map.update({
        rows: heatRows(
          channels.map((name) => ({ name, label: label(name) })),
          credit,
          total,
        ),
        edges,
        measured: null,
        low: edges[0],
        high: edges.at(-1),
        limit: data.limit,
        unit: data.unit,
        selected: null,
        rowHeight: rowHeight(channels.length, { room: 480, least: 3, most: 18 }),
      });
      const cut =
        shown < of
          ? ` Of ${count(of)} channels, the ${count(shown)} that helped or hurt most are shown.`
          : "";
      section.note.textContent = `${plural(helped, "channel")} helped, ${count(hurt)} hurt over these steps.${cut}`;
    },
  };
}
