/** Saves a part's canvases, as they stand on the page, as one picture with its title. */

import { el } from "../lib/dom.js";
import { FONT, colors } from "../lib/theme.js";

const PAD = 16;
const HEAD = 44;

/** Saves a blob under a name. */
function save(blob, name) {
  const url = URL.createObjectURL(blob);
  const link = el("a", { href: url, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

/** Draws the plot's canvases and subtitles below a title, and saves them. */
export function savePng(plot, title, about) {
  const area = plot.getBoundingClientRect();
  const ratio = window.devicePixelRatio || 1; // That of the canvases: nothing is blurred.
  const canvas = document.createElement("canvas");
  canvas.width = (area.width + 2 * PAD) * ratio;
  canvas.height = (area.height + HEAD + 2 * PAD) * ratio;
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  context.fillStyle = colors.background;
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.fillStyle = colors.text;
  context.textBaseline = "top";
  context.font = `bold 15px ${FONT}`;
  context.fillText(title, PAD, PAD);
  context.fillStyle = colors.muted;
  context.font = `12px ${FONT}`;
  context.fillText(about, PAD, PAD + 20);
  /** @returns {[number, number, number, number]} */
  const at = (node) => {
    const box = node.getBoundingClientRect();
    return [box.left - area.left + PAD, box.top - area.top + PAD + HEAD, box.width, box.height];
  };
  for (const node of plot.querySelectorAll("canvas")) {
    if (node.offsetParent) context.drawImage(node, ...at(node));
  }
  context.fillStyle = colors.text;
  context.font = `bold 12px ${FONT}`;
  for (const node of plot.querySelectorAll("h3")) {
    const [x, y] = at(node);
    context.fillText(node.textContent, x + parseFloat(node.style.paddingLeft || 0), y + 4);
  }
  canvas.toBlob((blob) =>
    save(blob, `lca ${title}.png`.toLowerCase().replaceAll(/[^a-z0-9.]+/g, "-")),
  );
}
