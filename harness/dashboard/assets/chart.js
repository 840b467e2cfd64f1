// One picture of some metrics over steps: bands, smoothing, marks for events and for values that are no numbers.

import { element, isBrowsers, number, tick } from "./format.js";

// As many as runs can be compared: none comes twice.
const COLOURS = ["#4269d0", "#efb118", "#ff725c", "#3ca951", "#a463f2", "#6cc5b0", "#9c6b4e", "#ff8ab7", "#97bbf5", "#7f7f17", "#d64a9e", "#8a8f98"];
const MARKS = {
  INCIDENT: "#e5484d",
  ROLLBACK: "#f76b15",
  FAULT: "#8e4ec6",
  ALERT: "#ffb224",
  STOP: "#889096",
  RESUME: "#3e63dd",
  CHECKPOINT_FAILED: "#e5484d",
  OUTLIER: "#b9bbc6",
  FINDING: "#f76b15",
};
const NON_FINITE = "#d6009a";
const HEIGHT = 200;
const CLOSE_PX = 5;
const LARGE = 1e9;
const SMALL = 1e-6;

export function colourOf(index) {
  return COLOURS[index % COLOURS.length];
}

// The events that are marked in pictures, each with its colour; `names` are what events are called.
export function marksOf(events, names) {
  const colours = new Map(Object.entries(MARKS).map(([key, colour]) => [names[key], colour]));
  return events
    .filter((event) => colours.has(event.name) && !event.abandoned)
    .map((event) => ({ ...event, colour: colours.get(event.name), isSolid: event.name === names.INCIDENT }));
}

// Exponential moving average without the bias towards its first value.
function smoothed(values, weight) {
  let mean = 0;
  let mass = 0;
  return values.map((value) => {
    if (value == null) return value;
    mean = weight * mean + (1 - weight) * value;
    mass = weight * mass + (1 - weight);
    return mean / mass;
  });
}

// Curves are drawn in units of a power of ten where their numbers are too large or too small for the axis.
function factorOf(curves) {
  let size = 0;
  for (const curve of curves)
    for (const values of [curve.high ?? curve.mean, curve.low ?? []]) for (const value of values) if (value != null) size = Math.max(size, Math.abs(value));
  return size === 0 || (size < LARGE && size > SMALL) ? 1 : 10 ** Math.floor(Math.log10(size));
}

// Pictures share the pointer; a zoom is of the one in which it was dragged.
function isMove(type) {
  return type === "mousemove" || type === "mouseleave";
}

function labelWidth(labels) {
  return 22 + 7 * Math.max(3, ...(labels ?? []).map((label) => label.length));
}

// To the next place that is not the same, on one side.
function distance(places, at, side) {
  let other = at + side;
  while (places[other] !== undefined && places[other] === places[at]) other += side;
  return places[other] === undefined ? Infinity : Math.abs(places[other] - places[at]);
}

function positive(values) {
  return values.map((value) => (value > 0 ? value : null));
}

// The steps, and from there the x, that belong to an event.
function placeOf(step, axis) {
  if (step == null || !axis || !axis.steps.length) return null;
  const { steps, x } = axis;
  let low = 0;
  let high = steps.length - 1;
  if (step < steps[0] || step > steps[high] + Math.max(1, steps[high] - steps[high - 1] || 1)) return null;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (steps[middle] <= step) low = middle;
    else high = middle - 1;
  }
  const next = Math.min(low + 1, steps.length - 1);
  const share = steps[next] > steps[low] ? Math.min(1, (step - steps[low]) / (steps[next] - steps[low])) : 0;
  return x[low] + share * (x[next] - x[low]);
}

// Pictures are drawn with the colours of the page, which change when the reader's screen turns dark.
const charts = new Set();
let wasDark = isDark();
new MutationObserver(() => {
  if (isDark() === wasDark) return;
  wasDark = isDark();
  charts.forEach((chart) => chart.last && chart.draw(...chart.last));
}).observe(document.body, { attributes: true, attributeFilter: ["class"] });

function isDark() {
  return document.body.classList.contains("dark");
}

// Values between two gaps, through which no line leads. `undefined` is where another curve has a value and this one has not.
function lonely(u, index) {
  const values = u.data[index];
  const known = [...values.keys()].filter((at) => values[at] !== undefined);
  return known.filter((at, place) => values[at] != null && values[known[place - 1]] == null && values[known[place + 1]] == null);
}

export class Chart {
  // plot: { title, lines: [{ name, label }], log, threshold: { value, label } }; onzoom(range), null for all of it.
  constructor(plot, { onzoom, sync = "run", log = false }) {
    this.plot = plot;
    this.onzoom = onzoom;
    this.sync = sync;
    this.log = log || plot.log || false;
    this.marks = [];
    this.nonfinite = [];
    this.key = "";
    this.body = element("div", { class: "h-chart-body", tabindex: 0, role: "group", "aria-label": `${plot.title}; arrows move along it, + and - zoom, Escape shows all of it`, onkeydown: (event) => this.press(event), ondblclick: () => this.onzoom(null) });
    this.gaps = element("span", { class: "h-note h-gaps" });
    this.toggle = element("button", { class: "h-mini", type: "button", title: "logarithmic scale", onclick: () => this.setLog(!this.log) }, "log");
    this.node = element(
      "figure",
      { class: "h-chart", "data-plot": plot.title },
      element("figcaption", {}, element("span", {}, plot.title), this.gaps, this.toggle),
      this.body,
    );
    this.observer = new ResizeObserver(() => this.u && this.u.setSize({ width: this.width(), height: HEIGHT }));
    this.observer.observe(this.node);
    charts.add(this);
  }

  get names() {
    return this.plot.lines.map((line) => line.name);
  }

  width() {
    return Math.max(220, this.body.clientWidth);
  }

  setLog(log) {
    this.log = log;
    if (this.last) this.draw(...this.last);
  }

  // view: the server's answer about curves. marks: those of the run's events. options: { smoothing }.
  draw(view, marks, options) {
    this.last = [view, marks, options];
    const present = this.plot.lines.filter((line) => view.xs[(view.curves[line.name] || {}).x]?.x.length);
    this.node.classList.toggle("h-empty", present.length === 0);
    const numGaps = this.log ? present.reduce((sum, line) => sum + view.curves[line.name].mean.filter((value) => value != null && value <= 0).length, 0) : 0;
    this.gaps.textContent = numGaps ? `left out without a logarithm: ${numGaps}` : "";
    this.toggle.classList.toggle("h-on", this.log);
    this.toggle.setAttribute("aria-pressed", this.log);
    if (!present.length) {
      this.clear();
      return;
    }
    this.factor = factorOf(present.map((line) => view.curves[line.name]));
    const { series, bands, tables } = this.plotData(view, present, options);
    const data = window.uPlot.join(tables);
    const axis = view.xs[view.curves[present[0].name].x];
    this.marks = marks.map((mark) => ({ ...mark, x: placeOf(mark.step, axis) })).filter((mark) => mark.x != null).sort((a, b) => a.x - b.x);
    this.nonfinite = present.flatMap((line) => {
      const curve = view.curves[line.name];
      return curve.nonfinite.map(([at, nan, inf]) => ({ x: view.xs[curve.x].x[at], nan, inf, label: line.label }));
    });
    this.axis = axis;
    const key = JSON.stringify([series.map((one) => one.label), this.log, view.axis, isDark()]);
    if (key !== this.key || !this.u) {
      this.clear();
      this.key = key;
      this.u = new window.uPlot(this.options(series, bands, view.axis), data, this.body);
    } else {
      this.u.setData(data);
    }
    this.node.dataset.points = Math.max(...present.map((line) => view.xs[view.curves[line.name].x].x.length));
    this.node.dataset.first = axis.steps[0];
    this.node.dataset.last = axis.steps[axis.steps.length - 1];
    this.node.dataset.nonfinite = this.nonfinite.length;
    this.node.dataset.marks = this.marks.length;
  }

  plotData(view, present, { smoothing }) {
    const scaled = this.factor === 1 ? (values) => values : (values) => values.map((value) => (value == null ? value : value / this.factor));
    const scale = this.log ? (values) => scaled(positive(values)) : scaled;
    const series = [{ label: view.axis }];
    const bands = [];
    const tables = [];
    present.forEach((line, index) => {
      const colour = line.colour || colourOf(index);
      const curve = view.curves[line.name];
      const columns = [view.xs[curve.x].x];
      const width = 1.5;
      if (curve.high) {
        bands.push({ series: [series.length, series.length + 1], fill: colour + "33" });
        for (const [side, values] of [["max", curve.high], ["min", curve.low]]) {
          series.push({ label: `${line.label} ${side}`, stroke: colour + "66", width: 0.5, points: { show: false } });
          columns.push(scale(values));
        }
      }
      const sparse = curve.mean.length < 60;
      if (smoothing > 0) {
        series.push({ label: `${line.label} raw`, stroke: colour + "55", width: 1, points: { show: false } });
        columns.push(scale(curve.mean));
      }
      series.push({ label: line.label, stroke: colour, width, points: { show: sparse, size: 4, fill: colour, filter: (u, at, isShown) => (isShown ? null : lonely(u, at)) } });
      columns.push(scale(smoothing > 0 ? smoothed(curve.mean, smoothing) : curve.mean));
      tables.push(columns);
    });
    return { series, bands, tables };
  }

  options(series, bands, axis) {
    const style = getComputedStyle(this.node);
    const ink = style.getPropertyValue("--h-faint").trim() || "#888";
    const grid = { stroke: style.getPropertyValue("--h-grid").trim() || "#8883", width: 1 };
    const marks = series.map((one) => ({ ...one, value: (u, value) => number(value == null ? value : value * this.factor) }));
    marks[0].value = (u, value) => (value == null ? "–" : this.xText(value, axis));
    return {
      width: this.width(),
      height: HEIGHT,
      series: marks,
      bands,
      scales: { x: { time: axis === "clock" }, y: { distr: this.log ? 3 : 1 } },
      axes: [
        { stroke: ink, grid, ticks: grid, size: 28, values: axis === "clock" ? undefined : (u, ticks) => ticks.map((value) => this.xText(value, axis)) },
        { stroke: ink, grid, ticks: grid, size: (u, values) => labelWidth(values), values: (u, ticks) => ticks.map((value) => (value == null ? "" : tick(value * this.factor))) },
      ],
      cursor: { sync: { key: this.sync, filters: { pub: isMove } }, drag: { x: true, y: false, setScale: false } },
      legend: { live: true },
      hooks: { draw: [(u) => this.paint(u)], setSelect: [(u) => this.zoom(u)], setCursor: [(u) => this.showTip(u)] },
    };
  }

  xText(value, axis) {
    return axis === "hours" ? `${tick(value)} h` : axis === "clock" ? new Date(value * 1000).toLocaleTimeString() : tick(value);
  }

  paint(u) {
    const { ctx, bbox } = u;
    ctx.save();
    ctx.beginPath();
    ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
    ctx.clip();
    const ratio = window.devicePixelRatio || 1;
    ctx.lineWidth = ratio;
    // Lines so close that they would paint the picture over are ticks on its lower edge.
    const places = this.marks.map((mark) => Math.round(u.valToPos(mark.x, "x", true)));
    const isClose = (at) => Math.min(distance(places, at, -1), distance(places, at, 1)) < CLOSE_PX * ratio;
    this.marks.forEach((mark, at) => {
      const isTick = isClose(at);
      ctx.strokeStyle = mark.colour + "aa";
      ctx.setLineDash(mark.isSolid || isTick ? [] : [4 * ratio, 4 * ratio]);
      ctx.beginPath();
      ctx.moveTo(places[at], isTick ? bbox.top + bbox.height - 8 * ratio : bbox.top);
      ctx.lineTo(places[at], bbox.top + bbox.height);
      ctx.stroke();
    });
    ctx.setLineDash([]);
    if (this.plot.threshold && this.plot.threshold.value != null) {
      const y = Math.round(u.valToPos(this.plot.threshold.value / this.factor, "y", true));
      ctx.strokeStyle = MARKS.INCIDENT + "88";
      ctx.setLineDash([2 * ratio, 3 * ratio]);
      ctx.beginPath();
      ctx.moveTo(bbox.left, y);
      ctx.lineTo(bbox.left + bbox.width, y);
      ctx.stroke();
    }
    ctx.fillStyle = NON_FINITE;
    for (const point of this.nonfinite) {
      const x = u.valToPos(point.x, "x", true);
      const size = 5 * ratio;
      ctx.beginPath();
      ctx.moveTo(x - size, bbox.top);
      ctx.lineTo(x + size, bbox.top);
      ctx.lineTo(x, bbox.top + 1.6 * size);
      ctx.fill();
    }
    ctx.restore();
  }

  // What is marked under the pointer, as the chart's title.
  showTip(u) {
    const left = u.cursor.left;
    const near = (x) => left >= 0 && Math.abs(u.valToPos(x, "x") - left) < 5;
    const texts = [
      ...this.marks.filter((mark) => near(mark.x)).map((mark) => `${mark.name} at step ${mark.step}: ${mark.text}`),
      ...this.nonfinite.filter((point) => near(point.x)).map((point) => `${point.label}: ${point.nan == null ? "not finite" : `${point.nan} NaN, ${point.inf} infinite`}`),
    ];
    u.over.title = texts.slice(0, 6).join("\n");
  }

  // Moves the cursor by arrows; the legend tells the values there.
  press(event) {
    const { u } = this;
    if (!u || isBrowsers(event)) return;
    if (event.key === "Escape") this.onzoom(null);
    if ("+-".includes(event.key)) this.zoomBy(event.key === "+" ? 0.5 : 2);
    const by = { ArrowRight: 1, ArrowLeft: -1, PageDown: 20, PageUp: -20 }[event.key];
    if (!by) return;
    event.preventDefault();
    const at = Math.min(u.data[0].length - 1, Math.max(0, (u.cursor.idx ?? (by > 0 ? -1 : u.data[0].length)) + by));
    u.setCursor({ left: u.valToPos(u.data[0][at], "x"), top: u.over.clientHeight / 2 });
  }

  // Shows so many times the steps that are shown, around the cursor.
  zoomBy(times) {
    const { steps } = this.axis;
    const [first, last] = [steps[0], steps[steps.length - 1]];
    const x = this.u.data[0][this.u.cursor.idx ?? Math.floor(this.u.data[0].length / 2)];
    const half = Math.max(1, (times * (last - first)) / 2);
    const centre = this.stepAt(x);
    this.onzoom([Math.max(0, Math.floor(centre - half)), Math.ceil(centre + half)]);
  }

  // The step that belongs to a place on the axis.
  stepAt(value) {
    const index = this.axis.x.findIndex((one) => one >= value);
    return this.axis.steps[index < 0 ? this.axis.steps.length - 1 : index];
  }

  zoom(u) {
    if (u.select.width < 4) return;
    const from = u.posToIdx(u.select.left);
    const to = u.posToIdx(u.select.left + u.select.width);
    const x = u.data[0];
    u.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false);
    const first = this.stepAt(x[from]);
    this.onzoom([first, Math.max(this.stepAt(x[to]), first + 1)]);
  }

  clear() {
    if (this.u) this.u.destroy();
    this.u = null;
    this.key = "";
  }

  remove() {
    this.observer.disconnect();
    charts.delete(this);
    this.clear();
    this.node.remove();
  }
}
