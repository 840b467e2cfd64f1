// What is shown, as the address of the page: a reload, the back button and a link show the same again.

const listeners = new Set();

function read() {
  const found = {};
  for (const [name, value] of new URLSearchParams(location.hash.slice(1))) (found[name] ??= []).push(value);
  return found;
}

// The first value under a name; null if there is none.
export function shown(name) {
  return read()[name]?.[0] ?? null;
}

export function allShown(name) {
  return read()[name] ?? [];
}

// Puts values into the address: texts, numbers, lists of them; null takes a name away. With `isPlace` the back button
// leads to what was shown before.
export function show(values, { isPlace = false } = {}) {
  const now = read();
  for (const [name, value] of Object.entries(values)) now[name] = value == null ? [] : [value].flat().map(String);
  const hash = new URLSearchParams(Object.entries(now).flatMap(([name, all]) => all.map((one) => [name, one]))).toString();
  if (hash === location.hash.slice(1)) return;
  history[isPlace ? "pushState" : "replaceState"](history.state, "", hash ? `#${hash}` : location.pathname + location.search);
}

// Calls `work` when the back button, or a link within the page, has changed the address.
export function whenMoved(work) {
  listeners.add(work);
  return () => listeners.delete(work);
}

window.addEventListener("popstate", () => listeners.forEach((work) => work()));
