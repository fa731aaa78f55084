/** How every plot lets one choose steps: drag, double click, wheel with a key, and a shared cursor. */

/** Limits a range to the run; whole runs are null, so that they grow. */
export function clampRange(start, stop, first, last) {
  const width = Math.min(stop - start, last - first);
  const from = Math.max(first, Math.min(start, last - width));
  const to = from + width;
  return from <= first && to >= last ? { start: null, stop: null } : { start: from, stop: to };
}

/** Zooms by a factor about a step (by default the middle). */
export function zoomed(start, stop, factor, about = (start + stop) / 2) {
  const size = stop - start + 1;
  const wanted = Math.max(1, Math.round(size * factor));
  const share = (about - start + 0.5) / size;
  const from = Math.round(about - share * wanted + 0.5);
  return [from, from + wanted - 1];
}

/** Moves by a fraction of the range's length. */
export function panned(start, stop, fraction) {
  const by = Math.sign(fraction) * Math.max(1, Math.round((stop - start + 1) * Math.abs(fraction)));
  return [start + by, stop + by];
}

/** The step that the pointer is at, shown as a line in all plots. */
export const cursor = {
  listeners: new Set(),
  move(at, source) {
    for (const listener of this.listeners) if (listener.source !== source) listener(at);
  },
  follow(source, listener) {
    listener.source = source;
    this.listeners.add(listener);
  },
};

/** Chooses steps over an element whose x axis `scale()` gives: {left, width, low, high}. */
export function zoomable(layer, scale, { onRange, onWhole, onClick, onMove, onLeave, onWheel }) {
  const box = document.createElement("div");
  box.className = "drag";
  box.hidden = true;
  layer.append(box);
  let from = null;
  const stepAt = (x) => {
    const { width, low, high } = scale();
    return low + (Math.min(width, Math.max(0, x)) / width) * (high - low);
  };
  const local = (event) => {
    const area = layer.getBoundingClientRect();
    return [event.clientX - area.left, event.clientY - area.top];
  };
  layer.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    layer.setPointerCapture(event.pointerId);
    from = local(event);
  });
  layer.addEventListener("pointermove", (event) => {
    const [x, y] = local(event);
    if (from && Math.abs(x - from[0]) > 4) {
      const width = scale().width;
      const [a, b] = [from[0], x].map((v) => Math.min(width, Math.max(0, v))).sort((p, q) => p - q);
      box.hidden = false;
      box.style.left = `${a}px`;
      box.style.width = `${b - a}px`;
    }
    onMove(stepAt(x), x, y, event);
  });
  const end = (event) => {
    if (!from) return;
    const [x, y] = local(event);
    const dragged = !box.hidden;
    const start = from[0];
    from = null;
    box.hidden = true;
    if (event.type === "pointercancel") return;
    if (dragged) {
      const [a, b] = [stepAt(start), stepAt(x)].sort((p, q) => p - q);
      onRange(Math.floor(a) + 1, Math.max(Math.floor(a) + 1, Math.ceil(b)));
    } else onClick?.(x, y);
  };
  layer.addEventListener("pointerup", end);
  layer.addEventListener("pointercancel", end);
  layer.addEventListener("pointerleave", () => from ?? onLeave());
  layer.addEventListener("dblclick", onWhole);
  layer.addEventListener(
    "wheel",
    (event) => {
      // The plain wheel scrolls the page.
      if (!event.ctrlKey && !event.metaKey && !event.shiftKey) return;
      event.preventDefault();
      const turn = event.deltaY || event.deltaX;
      if (turn) onWheel(event.shiftKey ? "pan" : "zoom", Math.sign(turn), stepAt(local(event)[0]));
    },
    { passive: false },
  );
}
