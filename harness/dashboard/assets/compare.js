// Runs side by side, live: their curves on one axis, what was set differently, where they part.

import { allShown, show, shown, whenMoved } from "./address.js";
import { ask } from "./api.js";
import { Chart, colourOf } from "./chart.js";
import { badge, element, number, table, update } from "./format.js";
import { axisList, axisOf, rangeOf, setOptions, smoothingOf, smoothingRange } from "./inputs.js";
import { repeat, sayFresh, sayOld } from "./page.js";

const METRICS = ["TRAIN_LOSS", "VAL_LOSS", "GRAD_NORM", "LR", "TRAIN_ACCURACY", "TOKENS_PER_S"];
const POINTS = 800;
const POINTS_TO_SUBTRACT = 4000; // so that in most runs each stands for one step

class Comparison extends HTMLElement {
  connectedCallback() {
    this.replaceChildren();
    this.charts = new Map();
    this.answers = new Map(); // the last one about each run's curves
    this.axis = axisList(() => this.note({ "compare-axis": this.axis.value }));
    this.smoothing = smoothingRange(() => {
      show({ "compare-smoothing": this.smoothing.value });
      if (this.asked) this.draw(this.asked);
    });
    this.baseline = element("select", { class: "h-input", "aria-label": "baseline", onchange: () => this.note({ baseline: this.baseline.value }) });
    this.choice = element("input", { class: "h-input", list: "h-metrics", placeholder: "add a metric", "aria-label": "another metric", onchange: () => this.add(this.choice.value.trim()) });
    this.options = element("datalist", { id: "h-metrics" });
    this.added = element("span", {});
    this.difference = element("input", { type: "checkbox", onchange: () => this.note({ difference: this.difference.checked ? "1" : null }) });
    this.logs = element("input", { type: "checkbox", onchange: () => this.note({ "compare-log": this.logs.checked ? "1" : null }) });
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
      element("label", {}, this.logs, " log axes"),
      element("label", {}, "baseline ", this.baseline),
      element("label", {}, this.difference, " less the baseline"),
      this.choice,
      this.options,
      this.added,
      this.reset,
    );
    this.append(element("section", { class: "h-compare" }, this.words, this.legend, bar, this.grid, this.about));
    this.addEventListener("harness-trouble", (event) => sayOld(this, this.words, event.detail));
    this.stopFollowing = whenMoved(() => this.follow());
    this.poll = repeat(this, 2500, () => this.refresh());
    this.telling = repeat(this, 10000, () => this.tell());
    this.follow();
  }

  disconnectedCallback() {
    this.poll.stop();
    this.telling.stop();
    this.stopFollowing();
    this.charts.forEach((chart) => chart.remove());
  }

  // What the address says is compared.
  follow() {
    this.axis.value = axisOf(shown("compare-axis"));
    this.smoothing.value = smoothingOf(shown("compare-smoothing"));
    this.difference.checked = shown("difference") === "1";
    this.within = rangeOf(shown("compare-zoom"));
    const hasLogs = shown("compare-log") === "1";
    if (hasLogs !== this.hasLogs) this.charts.forEach((chart) => chart.setLog(hasLogs));
    this.hasLogs = this.logs.checked = hasLogs;
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

  drop(metric) {
    this.note({ metric: allShown("metric").filter((one) => one !== metric) });
  }

  // What is to be seen now: the runs with their colours, and the same with the baseline first.
  wanted() {
    const all = [...new Set(allShown("compare"))];
    const runs = all.slice(0, this.names.limit.COMPARED);
    const baseline = runs.includes(shown("baseline")) ? shown("baseline") : runs[0];
    const standard = METRICS.map((name) => this.names.metric[name]);
    const added = [...new Set(allShown("metric"))].filter((metric) => !standard.includes(metric));
    return {
      runs,
      numLeftOut: all.length - runs.length,
      baseline,
      order: [baseline, ...runs.filter((run) => run !== baseline)],
      added,
      metrics: [...standard, ...added],
      axis: this.axis.value,
      within: this.within,
      isLess: this.difference.checked,
    };
  }

  async refresh() {
    this.names ??= await ask("names");
    const asked = this.wanted();
    const isEnough = asked.runs.length >= 2;
    for (const node of [this.legend, this.about, this.grid]) node.hidden = !isEnough;
    if (!isEnough) {
      this.words.textContent = "choose two runs or more in the tab Runs, and press Compare there";
      return;
    }
    setOptions(this.baseline, asked.runs, asked.baseline);
    this.showAdded(asked.added);
    this.unanswered = await this.askCurves(asked);
    sayFresh(this);
    this.asked = asked;
    this.draw(asked);
    if (this.told?.order !== asked.order.join("\n")) this.telling.soon();
  }

  // Asks each run once for all metrics; those that have not changed keep what they have. Returns why some have not answered.
  async askCurves({ runs, metrics, axis, within, isLess }) {
    const question = { name: metrics, axis, first: within?.[0], last: within?.[1], points: isLess ? POINTS_TO_SUBTRACT : POINTS };
    const key = JSON.stringify(question);
    const ask1 = async (run) => {
      const known = this.answers.get(run);
      const answer = await ask("curves", { run, ...question, seen: known?.key === key ? known.version : null });
      if (!answer.unchanged) this.answers.set(run, { key, version: answer.version, curves: answer });
    };
    const results = await Promise.allSettled(runs.map(ask1));
    const failed = runs.map((run, index) => [run, results[index].reason]).filter(([, reason]) => reason);
    if (failed.length === runs.length) throw failed[0][1];
    // What is kept of a run that is gone is shown while it belongs to what is asked.
    for (const [run, reason] of failed) this.answers.set(run, { ...this.answers.get(run), version: reason.message });
    for (const run of [...this.answers.keys()]) if (!runs.includes(run) || (this.answers.get(run).key ?? key) !== key) this.answers.delete(run);
    return failed.map(([run, reason]) => `${run}: ${reason.message}`);
  }

  draw(asked) {
    const { runs, numLeftOut, metrics, added, axis, baseline, isLess } = asked;
    const views = metrics.map((metric) => this.viewOf(metric, asked));
    const why = isLess ? whyNotLess(axis, views, baseline) : null;
    if (isLess && !why) views.forEach((view) => subtract(view, baseline));
    metrics.forEach((metric, index) => this.drawOne(metric, runs, views[index]));
    for (const [metric, chart] of this.charts)
      if (!metrics.includes(metric)) {
        chart.remove();
        this.charts.delete(metric);
      }
    const unknown = added.filter((metric) => !runs.some((run) => this.answers.get(run)?.curves?.curves[metric]?.mean.length));
    this.words.textContent = [
      numLeftOut ? `${runs.length} runs are compared at most, so ${numLeftOut} are left out` : null,
      ...this.unanswered,
      why,
      unknown.length ? `no run has ${unknown.join(", ")}` : null,
      this.trouble,
    ]
      .filter(Boolean)
      .join("; ");
  }

  // One metric of all runs.
  viewOf(metric, { runs, axis }) {
    const view = { xs: [], curves: {}, axis };
    for (const run of runs) {
      const answer = this.answers.get(run)?.curves;
      const curve = answer?.curves[metric];
      if (curve && answer.xs[curve.x].x.length) view.curves[run] = { ...curve, x: view.xs.push(answer.xs[curve.x]) - 1 };
    }
    return view;
  }

  drawOne(metric, runs, view) {
    const lines = runs.map((run, index) => ({ name: run, label: run, colour: colourOf(index) }));
    const key = runs.join("\n");
    let chart = this.charts.get(metric);
    if (chart && chart.node.dataset.runs !== key) {
      chart.remove();
      chart = null;
    }
    if (!chart) {
      chart = new Chart({ title: metric, lines }, { onzoom: (range) => this.zoom(range), sync: "compare", log: this.hasLogs });
      chart.node.dataset.runs = key;
      this.charts.set(metric, chart);
      this.grid.append(chart.node);
    }
    chart.draw(view, [], { smoothing: Number(this.smoothing.value) });
  }

  // Metrics that were added can be taken away again.
  showAdded(added) {
    const buttons = added.map((metric) => element("button", { class: "h-button", type: "button", "data-key": metric, "aria-label": `remove ${metric}`, onclick: () => this.drop(metric) }, `${metric} ×`));
    update(this.added, element("span", {}, buttons));
  }

  // Where runs part is found in whole logs: it is asked again only when one of them has changed.
  async tell() {
    const { order } = this.asked ?? {};
    if (!order) return;
    const told = { order: order.join("\n"), versions: order.map((run) => this.answers.get(run)?.version).join("\n") };
    if (this.told?.order === told.order && this.told.versions === told.versions) return;
    try {
      const answer = await ask("compare", { run: order });
      if (this.asked.order.join("\n") !== told.order) return; // others are compared by now, and have their turn
      this.trouble = null;
      this.told = told;
      this.render(answer, order, this.asked.runs);
    } catch (error) {
      this.trouble = `what was set, and where they part, is not known: ${error.message}`;
    }
  }

  // order: the runs that the answer's columns are of.
  render(answer, order, runs) {
    const partings = answer.partings.map((parting) => {
      const [first, second] = parting.runs;
      if (parting.error) return element("p", {}, `${first} and ${second}: ${parting.error}`);
      if (parting.num_common === 0) return element("p", {}, `${first} and ${second} have no step in common`);
      if (parting.step == null) return element("p", {}, `${first} and ${second} are equal, bit for bit, on all ${parting.num_common} steps that both have`);
      const values = parting.values.map((value) => String(value)).join(" and ");
      return element("p", { class: "h-parting" }, `${first} and ${second} part at step ${parting.step}: ${parting.metric} is ${values}`);
    });
    const named = (run) => element("span", { class: "h-swatch" }, element("i", { style: `background:${colourOf(runs.indexOf(run))}` }), run);
    const swatches = runs.map((run) => element("span", { class: "h-swatch" }, named(run), badge(answer.states[order.indexOf(run)] ?? "gone")));
    const shownAs = (value) => (value === undefined || value === null ? "–" : value);
    const rows = answer.settings.map(({ name, values }) => [name, ...values.map(shownAs)]);
    const last = answer.metrics.map(({ name, values }) => [name, ...values.map(number)]);
    setOptions(this.options, answer.metrics.map(({ name }) => name));
    update(this.legend, element("div", { class: "h-bar h-colours" }, swatches));
    const about = element(
      "div",
      {},
      ...partings,
      element("details", { open: true }, element("summary", {}, "settings that differ"), rows.length ? table(["setting", ...order.map(named)], rows) : "none"),
      element("details", {}, element("summary", {}, "last values"), table(["metric", ...order.map(named)], last)),
    );
    update(this.about, about);
  }

}

// What the points of a curve stand for: a step each, or all from one step to the next one; of the last nobody knows.
function placesOf(curve, { steps }) {
  return curve.low ? steps.map((step, at) => (at + 1 < steps.length ? `${step} to ${steps[at + 1]}` : null)) : steps.map(String);
}

function baseOf(view, baseline) {
  const base = view.curves[baseline];
  const known = base ? placesOf(base, view.xs[base.x]).map((place, index) => [place, base.mean[index]]) : [];
  return new Map(known.filter(([place]) => place !== null));
}

// Why nothing can be taken from the baseline's values, in words; null where it can.
function whyNotLess(axis, views, baseline) {
  if (axis !== "step" && axis !== "tokens") return "not less the baseline: that goes step by step, so choose the axis by step or by tokens";
  for (const view of views) {
    const base = view.curves[baseline];
    const at = baseOf(view, baseline);
    const isApart = (curve) => (base.low || curve.low) && !placesOf(curve, view.xs[curve.x]).some((place) => at.has(place));
    if (base && Object.values(view.curves).some(isApart)) return "not less the baseline: points stand for several steps, and not for the same ones in all runs; zoom in";
  }
  return null;
}

// Takes the baseline's values at the same steps from all others; what it has no value for is left out.
function subtract(view, baseline) {
  if (!view.curves[baseline]) view.curves = {};
  const at = baseOf(view, baseline);
  for (const [run, curve] of Object.entries(view.curves)) {
    const places = placesOf(curve, view.xs[curve.x]);
    const mean = curve.mean.map((value, index) => (value == null || at.get(places[index]) == null ? null : value - at.get(places[index])));
    view.curves[run] = { ...curve, mean, low: null, high: null };
  }
}

customElements.define("harness-compare", Comparison);
