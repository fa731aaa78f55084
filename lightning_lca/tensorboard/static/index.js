/** What TensorBoard loads for the LCA tab. */

import { el } from "./lib/dom.js";
import { App } from "./views/app.js";

/** Loads a style sheet of ours; layout must not start before. */
function style(name) {
  return new Promise((done) => {
    const href = new URL(name, import.meta.url).href;
    document.head.append(el("link", { rel: "stylesheet", href, on: { load: done, error: done } }));
  });
}

/** Fills TensorBoard's frame. */
export async function render() {
  document.title = "LCA";
  document.documentElement.lang = "en";
  await Promise.all([style("vendor/uPlot.min.css"), style("style.css")]);
  new App(document.body).start();
}
