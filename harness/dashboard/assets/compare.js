// Runs side by side, live: their curves on one axis, what was set differently, where they part.

import { allShown, show, shown, whenMoved } from "./address.js";
import { ask } from "./api.js";
import { Chart, colourOf } from "./chart.js";
import { badge, element, number, table, update } from "./format.js";
import { axisList, smoothingRange } from "./inputs.js";
import { repeat } from "./page.js";

const METRICS = ["TRAIN_LOSS", "VAL_LOSS", "GRAD_NORM", "LR", "TRAIN_ACCURACY", "TOKENS_PER_S"];

class Comparison extends HTMLElement {
  connectedCallback() {
    this.replaceChildren();
    this.charts = new Map();
    this.axis = axisList(() => this.note({ axis: this.axis.value }));
    this.smoothing = smoothingRange(() => this.note({ smoothing: this.smoothing.value }));
    this.baseline = element("select", { class: "h-input", "aria-label": "baseline", onchange: () => this.note({ baseline: this.baseline.value }) });
    this.choice = element("input", { class: "h-input", list: "h-metrics", placeholder: "add a metric", "aria-label": "another metric", onchange: () => this.add(this.choice.value.trim()) });
    this.options = element("datalist", { id: "h-metrics" });
    this.difference = element("input", { type: "checkbox", onchange: () => this.note({ difference: this.difference.checked ? "1" : null }) });
    this.reset = element("button", { class: "h-button", type: "button", onclick: () => this.zoom(null) }, "Whole runs");
    this.words = element("div", { class: "h-note", role: "status" });
    this.legend = element("div", { class: "h-bar h-colours" });
    this.about = element("div", {});
    this.grid = element("div", { class: "h-grid" });
    const bar = element(
      "div",
      { class: "h-bar" },
      this.axis,
      element("label", {}, "smoothing ", this.smoothing),
      element("label", {}, "baseline ", this.baseline),
      element("label", {}, this.difference, " less the baseline"),
      this.choice,
      this.options,
      this.reset,
    );
    this.append(element("section", { class: "h-compare" }, this.words, this.legend, bar, this.grid, this.about));
    this.addEventListener("harness-trouble", (event) => (this.words.textContent = event.detail));
    this.stopFollowing = whenMoved(() => this.follow());
    this.poll = repeat(this, 2500, () => this.refresh());
    this.follow();
  }

  disconnectedCallback() {
    this.poll.stop();
    this.stopFollowing();
    this.charts.forEach((chart) => chart.remove());
  }

  get runs() {
    return allShown("compare");
  }

  // What the address says is compared.
  follow() {
    this.axis.value = shown("axis") ?? "step";
    this.smoothing.value = shown("smoothing") ?? 0;
    this.difference.checked = shown("difference") === "1";
    const zoom = shown("compare-zoom");
    this.within = zoom && zoom.split("-").map(Number);
    this.reset.disabled = !this.within;
    this.poll?.soon();
  }

  note(values, options) {
    show(values, options);
    this.follow();
  }

  zoom(within) {
    this.note({ "compare-zoom": within && within.join("-") }, { isPlace: true });
  }

  add(metric) {
    if (!metric) return;
    this.choice.value = "";
    this.note({ metric: [...new Set([...allShown("metric"), metric])] });
  }

  async refresh() {
    const { runs } = this;
    if (runs.length < 2) {
      this.words.textContent = "choose two runs or more in the tab Runs, and press Compare there";
      for (const node of [this.legend, this.about, this.grid]) node.hidden = true;
      return;
    }
    for (const node of [this.legend, this.about, this.grid]) node.hidden = false;
    this.baseline.replaceChildren(...runs.map((run) => element("option", { value: run, selected: run === (shown("baseline") ?? runs[0]) }, run)));
    this.names ??= await ask("names");
    const metrics = [...METRICS.map((name) => this.names.metric[name]), ...allShown("metric")];
    await this.draw(runs, metrics);
    const key = runs.join("\n");
    if (this.told === key && Date.now() - this.toldAt < 10000) return;
    const answer = await ask("compare", { run: [this.baseline.value, ...runs.filter((run) => run !== this.baseline.value)] });
    this.told = key;
    this.toldAt = Date.now();
    this.words.textContent = "";
    this.render(answer);
  }

  // The curves of all runs, each run asked once for all metrics.
  async draw(runs, metrics) {
    const [first, last] = this.within ?? [];
    const ask1 = (run) => ask("curves", { run, name: metrics, axis: this.axis.value, first, last }).catch(() => null);
    const answers = await Promise.all(runs.map(ask1));
    for (const metric of new Set(metrics)) this.drawOne(metric, runs, answers);
    for (const [metric, chart] of this.charts)
      if (!metrics.includes(metric)) {
        chart.remove();
        this.charts.delete(metric);
      }
  }

  drawOne(metric, runs, answers) {
    const view = { xs: [], curves: {}, axis: this.axis.value };
    answers.forEach((answer, index) => {
      const curve = answer?.curves[metric];
      if (curve && answer.xs[curve.x].x.length) view.curves[runs[index]] = { ...curve, x: view.xs.push(answer.xs[curve.x]) - 1 };
    });
    if (this.difference.checked) subtract(view, this.baseline.value);
    const lines = runs.map((run, index) => ({ name: run, label: run, colour: colourOf(index) }));
    const key = runs.join("\n");
    let chart = this.charts.get(metric);
    if (chart && chart.node.dataset.runs !== key) {
      chart.remove();
      chart = null;
    }
    if (!chart) {
      chart = new Chart({ title: metric, lines }, { onzoom: (range) => this.zoom(range), sync: "compare" });
      chart.node.dataset.runs = key;
      chart.node.addEventListener("dblclick", () => this.zoom(null));
      this.charts.set(metric, chart);
      this.grid.append(chart.node);
    }
    chart.draw(view, [], { smoothing: Number(this.smoothing.value) });
  }

  render(answer) {
    const partings = answer.partings.map((parting) => {
      const [first, second] = parting.runs;
      if (parting.error) return element("p", {}, `${first} and ${second}: ${parting.error}`);
      if (parting.num_common === 0) return element("p", {}, `${first} and ${second} have no step in common`);
      if (parting.step == null) return element("p", {}, `${first} and ${second} are equal, bit for bit, on all ${parting.num_common} steps that both have`);
      const values = parting.values.map((value) => String(value)).join(" and ");
      return element("p", { class: "h-parting" }, `${first} and ${second} part at step ${parting.step}: ${parting.metric} is ${values}`);
    });
    const order = [this.baseline.value, ...this.runs.filter((run) => run !== this.baseline.value)];
    const swatches = this.runs.map((run, index) => element("span", { class: "h-swatch" }, element("i", { style: `background:${colourOf(index)}` }), run, " ", badge(answer.states[order.indexOf(run)] ?? "gone")));
    const shownAs = (value) => (value === undefined || value === null ? "–" : value);
    const rows = answer.settings.map(({ name, values }) => [name, ...values.map(shownAs)]);
    const last = answer.metrics.map(({ name, values }) => [name, ...values.map(number)]);
    this.options.replaceChildren(...answer.metrics.map(({ name }) => element("option", { value: name })));
    update(this.legend, element("div", { class: "h-bar h-colours" }, swatches));
    const about = element(
      "div",
      {},
      ...partings,
      element("details", { open: true }, element("summary", {}, "settings that differ"), rows.length ? table(["setting", ...order], rows) : "none"),
      element("details", {}, element("summary", {}, "last values"), table(["metric", ...order], last)),
    );
    update(this.about, about);
  }
}

// Takes the baseline's values at the same x from all others; what it has no value for is left out.
function subtract(view, baseline) {
  const base = view.curves[baseline];
  if (!base) return;
  const at = new Map(view.xs[base.x].x.map((x, index) => [x, base.mean[index]]));
  for (const [run, curve] of Object.entries(view.curves)) {
    const { x } = view.xs[curve.x];
    const mean = curve.mean.map((value, index) => (value == null || at.get(x[index]) == null ? null : value - at.get(x[index])));
    view.curves[run] = { ...curve, mean, low: null, high: null };
  }
}

customElements.define("harness-compare", Comparison);
