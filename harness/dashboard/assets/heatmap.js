// Every layer over steps as one picture; a click on a row says which layer it was.

import { element, number } from "./format.js";

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
const MAX_HEIGHT = 560;

function colour(share) {
  const place = Math.min(0.9999, Math.max(0, share)) * (PALETTE.length - 1);
  const at = Math.floor(place);
  return PALETTE[at].map((value, channel) => value + (place - at) * (PALETTE[at + 1][channel] - value));
}

export class HeatMap {
  constructor({ onpick }) {
    this.onpick = onpick;
    this.canvas = element("canvas", { class: "h-heat" });
    this.tip = element("div", { class: "h-heat-tip" }, "one row per parameter; a click shows its history");
    this.node = element("div", { class: "h-heat-box" }, this.canvas, this.tip);
    this.canvas.addEventListener("mousemove", (event) => this.showTip(event));
    this.canvas.addEventListener("click", (event) => {
      const place = this.placeOf(event);
      if (place) this.onpick(this.view.names[place.row]);
    });
  }

  draw(view) {
    this.view = view;
    const rows = view.names.length;
    const columns = view.steps.length;
    this.node.dataset.rows = rows;
    this.node.dataset.columns = columns;
    if (!rows || !columns) return;
    const logs = view.values.map((row) => row.map((value) => (value > 0 ? Math.log10(value) : null)));
    let low = Infinity;
    let high = -Infinity;
    for (const row of logs) for (const value of row) if (value != null) (low = Math.min(low, value)), (high = Math.max(high, value));
    this.range = [low, high];
    this.canvas.width = columns;
    this.canvas.height = rows;
    this.canvas.style.height = `${Math.min(MAX_HEIGHT, Math.max(rows * MIN_ROW, Math.min(rows * 14, 320)))}px`;
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

  placeOf(event) {
    if (!this.view || !this.view.names.length) return null;
    const box = this.canvas.getBoundingClientRect();
    const row = Math.floor(((event.clientY - box.top) / box.height) * this.view.names.length);
    const column = Math.floor(((event.clientX - box.left) / box.width) * this.view.steps.length);
    return this.view.names[row] === undefined || this.view.steps[column] === undefined ? null : { row, column };
  }

  showTip(event) {
    const place = this.placeOf(event);
    if (!place) return;
    const { names, steps, values, nonfinite, statistic } = this.view;
    const value = nonfinite[place.row].includes(place.column) ? "not finite" : number(values[place.row][place.column]);
    this.tip.textContent = `${names[place.row]}, step ${steps[place.column]}: ${statistic} ${value}`;
  }
}
