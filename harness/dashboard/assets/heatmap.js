// Every layer over steps as one picture; a click on a row says which layer it was.

import { element, isBrowsers, number } from "./format.js";

// Five anchors of the viridis palette (Nathaniel Smith and Stéfan van der Walt, CC0), in between them lines.
const PALETTE = [
  [68, 1, 84],
  [59, 82, 139],
  [33, 145, 140],
  [94, 201, 98],
  [253, 231, 37],
];
const NON_FINITE = [214, 0, 154];
const ZERO = [40, 40, 46]; // which has no logarithm, and is not the same as nothing measured
const MIN_ROW = 5;
const NAMED_ROW = 10; // pixels that a row has to have for its name
const MAX_HEIGHT = 560;
const TIP = "one row per parameter; a click shows its history";

function colour(share) {
  const place = Math.min(0.9999, Math.max(0, share)) * (PALETTE.length - 1);
  const at = Math.floor(place);
  return PALETTE[at].map((value, channel) => value + (place - at) * (PALETTE[at + 1][channel] - value));
}

export class HeatMap {
  constructor({ onpick }) {
    this.onpick = onpick;
    this.canvas = element("canvas", { class: "h-heat", tabindex: 0, role: "img", "aria-label": "statistic of every parameter over steps; arrows choose a row and a step, Enter shows the row's history", onkeydown: (event) => this.press(event) });
    this.mark = element("div", { class: "h-heat-mark", hidden: true });
    this.rows = element("div", { class: "h-heat-rows", "aria-hidden": "true" });
    this.scale = element("div", { class: "h-heat-scale" });
    this.tip = element("div", { class: "h-heat-tip", role: "status" }, TIP);
    this.node = element("div", { class: "h-heat-box" }, this.scale, element("div", { class: "h-heat-body" }, this.rows, element("div", { class: "h-heat-frame" }, this.canvas, this.mark)), this.tip);
    this.canvas.addEventListener("mousemove", (event) => this.showTip(this.placeOf(event)));
    this.canvas.addEventListener("click", (event) => {
      const place = this.placeOf(event);
      if (place) this.pick(place.row);
    });
  }

  clear() {
    this.view = null;
    this.picked = null;
    this.chosen = null;
    this.empty(TIP);
  }

  // Nothing of another run or of other steps stays; `words` say why.
  empty(words) {
    this.canvas.width = this.canvas.width; // which clears it
    this.canvas.style.height = 0;
    this.mark.hidden = true;
    this.rows.replaceChildren();
    this.scale.replaceChildren();
    this.tip.textContent = words;
  }

  // The layer that the address names; a row that arrows have marked since stays.
  choose(layer) {
    if (layer === this.chosen) return;
    this.chosen = this.picked = layer;
    if (this.view?.steps.length) this.markRow();
  }

  // The row that is marked, by the name of its layer: another statistic may have others.
  get row() {
    const at = this.view?.names.indexOf(this.picked) ?? -1;
    return at < 0 ? null : at;
  }

  set row(row) {
    this.picked = this.view.names[row];
  }

  draw(view) {
    this.view = view;
    const rows = view.names.length;
    const columns = view.steps.length;
    this.node.dataset.rows = rows;
    this.node.dataset.columns = columns;
    if (!rows || !columns) return this.empty(`no ${view.statistic} was measured in these steps`);
    if (!this.scale.firstChild) this.tip.textContent = TIP;
    const logs = view.values.map((row) => row.map((value) => (value > 0 ? Math.log10(value) : null)));
    let low = Infinity;
    let high = -Infinity;
    for (const row of logs) for (const value of row) if (value != null) (low = Math.min(low, value)), (high = Math.max(high, value));
    this.range = [low, high];
    this.canvas.width = columns;
    this.canvas.height = rows;
    const height = Math.min(MAX_HEIGHT, Math.max(rows * MIN_ROW, Math.min(rows * 14, 420)));
    this.canvas.style.height = `${height}px`;
    this.label(low, high, height);
    this.markRow();
    const context = this.canvas.getContext("2d");
    const image = context.createImageData(columns, rows);
    logs.forEach((row, y) =>
      row.forEach((value, x) => {
        const isZero = view.values[y][x] === 0;
        if (value != null || isZero) image.data.set([...(isZero ? ZERO : colour((value - low) / (high - low || 1))), 255], 4 * (y * columns + x));
      }),
    );
    view.nonfinite.forEach((places, y) => {
      for (const x of places) image.data.set([...NON_FINITE, 255], 4 * (y * columns + x));
    });
    context.putImageData(image, 0, 0);
  }

  // The row whose history is shown.
  pick(row) {
    this.row = row;
    this.chosen = this.picked;
    this.markRow();
    this.onpick(this.view.names[row]);
  }

  press(event) {
    if (!this.view?.names.length || !this.view.steps.length || isBrowsers(event)) return;
    if (event.key === "Enter" && this.row != null) return this.pick(this.row);
    const by = { ArrowDown: [1, 0], ArrowUp: [-1, 0], ArrowRight: [0, 1], ArrowLeft: [0, -1] }[event.key];
    if (!by) return;
    event.preventDefault();
    const moved = (from, step, length) => Math.min(length - 1, Math.max(0, from + step));
    const { names, steps } = this.view;
    this.row = this.row == null ? (by[0] < 0 ? names.length - 1 : 0) : moved(this.row, by[0], names.length);
    this.column = moved(this.column ?? steps.length - 1, by[1], steps.length);
    this.markRow();
    this.showTip({ row: this.row, column: this.column });
  }

  markRow() {
    const rows = this.view.names.length;
    this.mark.hidden = this.row == null;
    this.mark.style.top = `${(100 * (this.row ?? 0)) / rows}%`;
    this.mark.style.height = `${100 / rows}%`;
  }

  // What colours mean, and which row is whose where there is room for names.
  label(low, high, height) {
    const { names, statistic } = this.view;
    const shades = [0, 0.25, 0.5, 0.75, 1].map((share) => `rgb(${colour(share).map(Math.round).join(",")})`);
    const bar = element("i", { class: "h-heat-bar" });
    bar.style.background = `linear-gradient(90deg, ${shades.join(",")})`;
    const swatch = (rgb) => {
      const one = element("i", { class: "h-heat-swatch" });
      one.style.background = `rgb(${rgb.join(",")})`;
      return one;
    };
    const ends = Number.isFinite(low) ? [number(10 ** low), bar, `${number(10 ** high)} (logarithmic)`] : ["no value above zero"];
    this.scale.replaceChildren(element("span", {}, `${statistic}: `), ...ends, swatch(ZERO), "zero", swatch(NON_FINITE), "not finite");
    // Where rows are lower than their names, only every second, or third, is named.
    const each = Math.ceil(NAMED_ROW / (height / names.length));
    const named = names.map((name, row) => [name, row]).filter(([, row]) => row % each === 0);
    this.rows.replaceChildren(...named.map(([name, row]) => element("span", { title: name, style: `grid-row: ${row + 1} / span ${Math.min(each, names.length - row)}` }, name)));
    this.rows.style.gridTemplateRows = `repeat(${names.length}, minmax(0, 1fr))`;
    this.rows.style.height = `${height}px`;
  }

  placeOf(event) {
    if (!this.view || !this.view.names.length) return null;
    const box = this.canvas.getBoundingClientRect();
    const row = Math.floor(((event.clientY - box.top) / box.height) * this.view.names.length);
    const column = Math.floor(((event.clientX - box.left) / box.width) * this.view.steps.length);
    return this.view.names[row] === undefined || this.view.steps[column] === undefined ? null : { row, column };
  }

  showTip(place) {
    if (!place) return;
    this.column = place.column;
    const { names, steps, values, nonfinite, statistic } = this.view;
    const value = nonfinite[place.row].includes(place.column) ? "not finite" : number(values[place.row][place.column]);
    this.tip.textContent = `${names[place.row]}, step ${steps[place.column]}: ${statistic} ${value}`;
  }
}
