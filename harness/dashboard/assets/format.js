// Numbers, times and small pieces of a page. Text goes in as text, never as HTML: names are not to be trusted.

export function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "class") node.className = value;
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value != null) node.setAttribute(name, value);
  }
  node.append(...children.flat().filter((child) => child != null));
  return node;
}

export function number(value) {
  if (value == null) return "–";
  if (!Number.isFinite(value)) return String(value);
  const size = Math.abs(value);
  if (value === 0) return "0";
  if (Number.isInteger(value) && size < 1e6) return value.toLocaleString("en");
  if (size >= 1e15 || size < 1e-3) return value.toExponential(2);
  for (const [unit, letter] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e4, "k"]])
    if (size >= unit) return (value / (unit === 1e4 ? 1e3 : unit)).toPrecision(3) + letter;
  return value.toPrecision(4).replace(/(\.\d*?)0+$/, "$1").replace(/\.$/, "");
}

// For the ticks of an axis: as few characters as tell them apart.
export function tick(value) {
  const size = Math.abs(value);
  if (size >= 1e4 && size < 1e6) return `${Number((value / 1e3).toPrecision(4))}k`;
  if (size !== 0 && (size < 1e-3 || size >= 1e15)) return Number(value.toPrecision(4)).toExponential().replace("e+", "e");
  return number(value);
}

// Makes a node like a fresh one, changing only what differs: what is under the pointer, has the focus or is selected stays
// itself. Children that have one are known by their `data-key`; handlers stay those of the node that was there first.
export function update(node, fresh) {
  if (node.nodeType !== fresh.nodeType || node.nodeName !== fresh.nodeName) {
    node.replaceWith(fresh);
    return fresh;
  }
  if (node.nodeType === Node.TEXT_NODE) {
    if (node.data !== fresh.data) node.data = fresh.data;
    return node;
  }
  const isReaders = (name) => name === "open"; // what was unfolded stays so
  for (const { name } of [...node.attributes]) if (!fresh.hasAttribute(name) && !isReaders(name)) node.removeAttribute(name);
  for (const { name, value } of fresh.attributes) if (node.getAttribute(name) !== value && !isReaders(name)) node.setAttribute(name, value);
  updateChildren(node, [...fresh.childNodes]);
  return node;
}

function updateChildren(parent, fresh) {
  const keyOf = (child) => child.dataset?.key;
  const keyed = new Map([...parent.childNodes].filter(keyOf).map((child) => [keyOf(child), child]));
  const unkeyed = [...parent.childNodes].filter((child) => !keyOf(child));
  const there = fresh.map((child) => {
    const known = keyOf(child) ? keyed.get(keyOf(child)) : unkeyed.shift();
    keyed.delete(keyOf(child));
    return known;
  });
  // What goes, goes first: then the rest mostly lies in its place, and a move would take the focus away.
  const kept = new Set(there);
  for (const child of [...parent.childNodes]) if (!kept.has(child)) child.remove();
  fresh.forEach((child, index) => {
    const now = there[index] ? update(there[index], child) : child;
    if (parent.childNodes[index] !== now) parent.insertBefore(now, parent.childNodes[index] ?? null);
  });
}

// Keys that are the browser's own: its zoom, its way back.
export function isBrowsers(event) {
  return event.ctrlKey || event.metaKey || event.altKey;
}

export function bytes(value) {
  if (value == null) return "–";
  const unit = value >= 1e9 ? [1e9, "GB"] : value >= 1e6 ? [1e6, "MB"] : [1e3, "kB"];
  return (value / unit[0]).toPrecision(3) + " " + unit[1];
}

export function duration(seconds) {
  if (seconds == null || !Number.isFinite(seconds)) return "–";
  const s = Math.max(0, Math.round(seconds));
  if (s < 60) return `${s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min ${s % 60} s`;
  if (s < 86400) return `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min`;
  return `${Math.floor(s / 86400)} d ${Math.floor((s % 86400) / 3600)} h`;
}

export function clock(time) {
  if (time == null) return "–";
  return new Date(time * 1000).toLocaleString("sv").replace("T", " ");
}

export function ago(seconds) {
  return seconds < 2 ? "now" : `${duration(seconds)} ago`;
}

export function badge(state) {
  return element("span", { class: `h-state h-${state}` }, state);
}

export function table(heads, rows, attributes = {}) {
  return element(
    "div",
    { class: "h-scroll", tabindex: 0 },
    element(
      "table",
      { class: "h-table", ...attributes },
      element("thead", {}, element("tr", {}, heads.map((head) => element("th", {}, head)))),
      element(
        "tbody",
        {},
        rows.map((row) => element("tr", {}, row.map((cell) => element("td", {}, cell)))),
      ),
    ),
  );
}
