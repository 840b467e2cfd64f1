// Two or more runs: their curves on one axis, what was set differently, where they part.

import { ask } from "./api.js";
import { Chart } from "./chart.js";
import { element, number, table } from "./format.js";

const METRICS = ["TRAIN_LOSS", "VAL_LOSS", "GRAD_NORM", "LR", "TRAIN_ACCURACY", "TOKENS_PER_S"];

export class Comparison {
  constructor(runs) {
    this.runs = runs;
    this.grid = element("div", { class: "h-grid" });
    this.words = element("div", {}, "reading…");
    this.choice = element("input", { class: "h-input", placeholder: "add a metric, such as guard/skips", "aria-label": "another metric" });
    this.choice.addEventListener("change", () => this.add(this.choice.value.trim()));
    this.node = element("section", { class: "h-compare" }, element("h3", {}, `${runs.length} runs compared`), this.words, this.choice, this.grid);
  }

  async load() {
    const { metric } = await ask("names");
    await Promise.all(METRICS.map((name) => this.add(metric[name])));
    try {
      this.render(await ask("compare", { run: this.runs }));
    } catch (error) {
      this.words.textContent = error.message;
    }
  }

  // The place of a metric's picture, in the order in which they were asked for, not in that of the answers.
  place(metric) {
    const there = [...this.grid.children].find((node) => node.dataset.plot === metric);
    if (there) return there;
    const place = element("div", { hidden: true, "data-plot": metric });
    this.grid.append(place);
    return place;
  }

  async add(metric, within) {
    if (!metric) return;
    this.place(metric);
    const answers = await Promise.all(
      this.runs.map((run) => ask("curves", { run, name: metric, first: within?.[0], last: within?.[1] }).catch(() => null)),
    );
    const view = { xs: [], curves: {}, axis: "step" };
    const lines = [];
    answers.forEach((answer, index) => {
      const curve = answer?.curves[metric];
      if (!curve || !answer.xs[curve.x].x.length) return;
      view.curves[this.runs[index]] = { ...curve, x: view.xs.push(answer.xs[curve.x]) - 1 };
      lines.push({ name: this.runs[index], label: this.runs[index] });
    });
    if (!lines.length) return;
    const chart = new Chart({ title: metric, lines }, { onzoom: (range) => this.add(metric, range), sync: "compare" });
    chart.node.addEventListener("dblclick", () => this.add(metric));
    this.place(metric).replaceWith(chart.node);
    chart.draw(view, [], { smoothing: 0 });
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
    const rows = answer.settings.map(({ name, values }) => [name, ...values]);
    const last = answer.metrics.map(({ name, values }) => [name, ...values.map(number)]);
    this.words.replaceChildren(
      ...partings,
      element("details", { open: true }, element("summary", {}, "settings that differ"), rows.length ? table(["setting", ...this.runs], rows) : "none"),
      element("details", {}, element("summary", {}, "last values"), table(["metric", ...this.runs], last)),
    );
  }
}
