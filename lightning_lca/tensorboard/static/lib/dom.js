/** Elements without HTML strings: text is always text. */

/** Makes an element. Attributes by name, `on` for listeners, children as nodes or text. */
export function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "on") {
      for (const [event, listener] of Object.entries(value)) node.addEventListener(event, listener);
    } else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) {
      node.setAttribute(name, value);
    }
  }
  node.append(...children);
  return node;
}

/** A name that breaks after its dots, and nowhere else. */
export function breakable(name) {
  return name
    .split(/(?<=\.)/)
    .flatMap((part, i) => (i ? [document.createElement("wbr"), part] : [part]));
}

/** Replaces the options of a select, [[value, text]], unless they are the same; keeps focus. */
export function fill(select, options, value) {
  const key = JSON.stringify(options);
  if (select.dataset.options !== key) {
    select.replaceChildren(...options.map(([v, text]) => el("option", { value: v }, text)));
    select.dataset.options = key;
  }
  select.value = value;
}
