/** Tables that are never cut: where columns have no room, each row becomes a card. */

/** Looks, now and whenever the room changes, whether a table fits; returns what looks again. */
export function fitting(table) {
  const room = table.parentElement;
  let seen = 0;
  const look = () => {
    seen = room.clientWidth;
    table.classList.remove("cards");
    table.classList.toggle("cards", room.scrollWidth > room.clientWidth);
  };
  new ResizeObserver(() => room.clientWidth !== seen && look()).observe(room);
  return look;
}
