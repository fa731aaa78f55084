/** How names and values are ordered. */

/** Orders names with their numbers: version_2 before version_10. */
export const natural = new Intl.Collator("en", { numeric: true }).compare;

/** Orders two values; text by its numbers, missing ones last. */
export function inOrder(a, b, falling = false) {
  if (a === null || b === null) return Number(a === null) - Number(b === null);
  const order = typeof a === "string" ? natural(a, b) : a - b;
  return falling ? -order : order;
}
