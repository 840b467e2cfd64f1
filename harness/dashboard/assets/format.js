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

// For the ticks of an axis, where there is room for five characters.
export function tick(value) {
  return Math.abs(value) >= 1e4 && Math.abs(value) < 1e6 ? `${Number((value / 1e3).toPrecision(3))}k` : number(value);
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

export function badge(state) {
  return element("span", { class: `h-state h-${state}` }, state);
}

export function table(heads, rows, attributes = {}) {
  return element(
    "div",
    { class: "h-scroll" },
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
