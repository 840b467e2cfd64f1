// One run, live: its state, its curves, its layers, its incidents and its checkpoints.

import { show, shown, whenMoved } from "./address.js";
import { ask } from "./api.js";
import { Chart, marksOf } from "./chart.js";
import { ago, badge, bytes, clock, duration, element, number, table, update } from "./format.js";
import { HeatMap } from "./heatmap.js";
import { Incidents } from "./incidents.js";
import { axisList, axisOf, rangeOf, setOptions, smoothingOf, smoothingRange } from "./inputs.js";
import { ledgerBar } from "./ledger.js";
import { repeat, tellRun } from "./page.js";

// The pictures of a run; `names` are those of metrics as the server gives them.
const PLOTS = ({ metric, prefix }, maxNorm) => [
  { title: "loss", lines: [{ name: metric.TRAIN_LOSS, label: "training" }, { name: metric.VAL_LOSS, label: "held out", colour: "#ff725c" }] },
  { title: "accuracy", lines: [{ name: metric.TRAIN_ACCURACY, label: "training" }, { name: metric.VAL_ACCURACY, label: "held out", colour: "#ff725c" }] },
  { title: "learning rate", lines: [{ name: metric.LR, label: "learning rate" }] },
  {
    title: "gradient norm",
    lines: [{ name: metric.GRAD_NORM, label: "before clipping" }, { name: metric.GRAD_NORM_CLIPPED, label: "after clipping", colour: "#3ca951" }],
    threshold: { value: maxNorm },
    log: true,
  },
  { title: "NaN and Inf in gradients", lines: [{ name: metric.NUM_NAN, label: "NaN" }, { name: metric.NUM_INF, label: "Inf", colour: "#ff725c" }] },
  { title: "skipped steps", lines: [{ name: metric.SKIPS, label: "skips" }] },
  { title: "clipped share", lines: [{ name: metric.CLIP_FRAC, label: "share of steps clipped" }] },
  { title: "spike score", lines: [{ name: metric.SPIKE_SCORE, label: "robust z" }] },
  { title: "loss scale", lines: [{ name: metric.LOSS_SCALE, label: "loss scale" }], log: true },
  { title: "tokens per second", lines: [{ name: metric.TOKENS_PER_S, label: "tokens/s" }] },
  { title: "model FLOP utilisation", lines: [{ name: metric.MFU_FRAC, label: "MFU" }] },
  {
    title: "time per step (s)",
    lines: [
      { name: metric.STEP_S, label: "step" },
      { name: metric.COMPUTE_S, label: "compute" },
      { name: metric.DATA_WAIT_S, label: "waiting for data" },
      { name: metric.CHECKPOINT_BLOCKED_S, label: "blocked by checkpoints" },
    ],
  },
  ...["compute_s", "data_wait_s", "loss", "grad_norm"].map((name) => ({
    title: `ranks: ${name.replace("_s", " (s)").replace("_", " ")}`,
    lines: ["max", "mean", "min"].map((part) => ({ name: `${prefix.RANKS}${name}/${part}`, label: part })),
  })),
];

class Monitor extends HTMLElement {
  connectedCallback() {
    if (this.built) return;
    this.built = true;
    this.settings = { axis: "step", smoothing: 0, within: null };
    this.charts = [];
    this.requested = null;
    this.turn = 0;
    this.head = element("div", { class: "h-head" });
    this.note = element("div", { class: "h-note", role: "status" });
    this.grid = element("div", { class: "h-grid" });
    this.system = element("div", { class: "h-grid" });
    this.more = element("div", { class: "h-grid" });
    this.ledger = element("div", {});
    this.incidents = new Incidents({ onpick: (range) => this.zoom(range) });
    this.checkpoints = element("div", {});
    this.events = element("div", {});
    this.ranks = element("div", {});
    this.lastValues = element("div", {});
    this.configuration = element("div", {});
    this.layerChart = element("div", { class: "h-grid" });
    this.heat = new HeatMap({ onpick: (name) => this.pick(name) });
    this.statistic = element("select", { class: "h-input", "aria-label": "statistic of the layers", onchange: () => this.requestRefresh() });
    this.parts = {};
    const section = (title, open, ...nodes) => (this.parts[title] = element("details", { open, class: "h-section", ontoggle: () => this.isIncomplete() && this.requestRefresh() }, element("summary", {}, title), ...nodes));
    this.search = element("input", { class: "h-input", type: "search", placeholder: "search all metrics", "aria-label": "search all metrics", onchange: () => this.showMore() });
    this.append(
      this.head,
      this.note,
      this.controls(),
      this.ledger,
      section("Incidents", true, this.incidents.node),
      this.grid,
      section("Layers", true, this.statistic, this.heat.node, this.layerChart),
      section("Ranks, last step", false, this.ranks),
      section("Checkpoints", false, this.checkpoints),
      section("Host and devices", false, this.system),
      section("More metrics", false, this.search, this.more),
      section("Events", false, this.events),
      section("Last values", false, this.lastValues),
      section("Configuration", false, this.configuration),
    );
    this.addEventListener("harness-trouble", (event) => this.sayOld(event.detail));
    this.poll = repeat(this, 1200, () => this.refresh());
    this.stopFollowing = whenMoved(() => this.follow());
    this.follow();
  }

  disconnectedCallback() {
    this.poll?.stop();
    this.stopFollowing?.();
    this.charts.forEach((chart) => chart.remove());
    this.replaceChildren();
    this.built = false;
  }

  // The run that is shown; set by the page.
  set run(id) {
    const isShown = this.built && (id || "") === this.dataset.run;
    this.wanted = id;
    if (!this.built || isShown) return;
    this.data = null;
    if (id && id !== shown("run")) {
      // Chosen from the list, which says so already.
      show({ run: id, zoom: null }, { isPlace: Boolean(this.dataset.run) });
      tellRun(id);
    }
    this.readSettings();
    this.incidents.clear();
    this.heat.clear();
    this.charts.forEach((chart) => chart.remove());
    this.charts = [];
    for (const node of [this.head, this.ledger, this.checkpoints, this.events, this.ranks, this.lastValues, this.configuration, this.layerChart, this.statistic]) node.replaceChildren();
    delete this.configuration.dataset.attempts;
    this.dataset.run = id || "";
    this.requestRefresh();
  }

  get run() {
    return this.wanted;
  }

  controls() {
    this.axis = axisList(() => this.settle({ axis: this.axis.value }));
    this.smoothing = smoothingRange(() => {
      show({ smoothing: this.smoothing.value });
      this.settings.smoothing = Number(this.smoothing.value);
      this.charts.forEach((chart) => chart.last && chart.draw(chart.last[0], chart.last[1], this.settings));
    });
    this.logs = element("input", { type: "checkbox", onchange: () => this.settle({ log: this.logs.checked ? "1" : null }) });
    this.reset = element("button", { class: "h-button", type: "button", disabled: true, onclick: () => this.zoom(null) }, "Whole run");
    return element(
      "div",
      { class: "h-bar" },
      this.axis,
      element("label", {}, "smoothing ", this.smoothing),
      element("label", {}, this.logs, " log axes"),
      this.reset,
      element("span", { class: "h-note" }, "drag in a picture to zoom"),
    );
  }

  // What the address says is shown.
  follow() {
    const run = this.wanted && !shown("run") ? this.wanted : shown("run");
    this.readSettings();
    if (run && run !== this.dataset.run) this.run = run;
    this.requestRefresh();
  }

  readSettings() {
    this.settings = { axis: axisOf(shown("axis")), smoothing: smoothingOf(shown("smoothing")), within: rangeOf(shown("zoom")) };
    this.axis.value = this.settings.axis;
    this.smoothing.value = this.settings.smoothing;
    this.reset.disabled = !this.settings.within;
    const log = shown("log") === "1";
    if (log !== this.logs.checked || log !== Boolean(this.hasLogs)) {
      this.hasLogs = this.logs.checked = log;
      this.charts.forEach((chart) => chart.setLog(log || chart.plot.log || false));
    }
  }

  settle(values, options) {
    show(values, options);
    this.readSettings();
    this.requestRefresh();
  }

  zoom(within) {
    this.settle({ zoom: within && within.join("-") }, { isPlace: true });
  }

  // Figures that are not new are said to be old, where the eye is.
  sayOld(why) {
    const since = this.freshAt ? `; what is shown is of ${clock(this.freshAt / 1000).slice(11)}` : "";
    this.note.textContent = `${why}${since}`;
    this.dataset.old = "true";
  }

  // Something else is to be seen: an answer that is under way is not the last word.
  requestRefresh() {
    this.turn += 1;
    this.version = null;
    this.poll.soon();
  }

  async refresh() {
    if (!this.wanted && !(await this.takeNewest())) {
      this.note.textContent = "there is no run yet: start one in the tab Training, or with `harness train` in a terminal";
      return;
    }
    const run = this.wanted;
    const { turn } = this;
    this.names ??= await ask("names");
    this.requested = this.visibleParts();
    const { axis, within } = this.settings;
    const answer = await ask("run", { run, seen: this.version, ...this.requested, axis, first: within?.[0], last: within?.[1], points: 400 });
    if (run !== this.wanted) return;
    this.freshAt = Date.now();
    tellRun(run);
    delete this.dataset.old;
    this.note.textContent = this.data ? this.words() : "";
    this.age();
    if (answer.unchanged) return;
    this.data = answer;
    this.version = turn === this.turn ? answer.version : null;
    this.dataset.state = answer.state;
    this.renderSummary();
    this.makeCharts();
    this.drawCharts();
    this.drawLayers();
    await this.renderSettings(run);
    this.dataset.lastStep = answer.last_step;
    this.dataset.ready = "true";
    if (this.isIncomplete()) this.requestRefresh();
  }

  hideEmpty() {
    const { data, names } = this;
    const full = {
      Layers: data.statistics.length,
      "Ranks, last step": Object.keys(data.ranks || {}).length,
      Checkpoints: data.checkpoints.length,
      "Host and devices": data.names.some((name) => name.startsWith(names.prefix.SYSTEM)),
      Events: data.events.length,
    };
    for (const [title, content] of Object.entries(full)) this.parts[title].hidden = !content;
  }

  // Without a choice the newest run is shown.
  async takeNewest() {
    const { runs } = await ask("runs");
    const newest = runs.reduce((best, one) => (best && (best.updated ?? 0) >= (one.updated ?? 0) ? best : one), null);
    if (newest && !this.wanted) {
      show({ run: newest.id });
      this.run = newest.id;
    }
    return Boolean(newest);
  }

  age() {
    const last = this.head.querySelector(".h-age b");
    if (last && this.data) last.textContent = this.data.updated == null ? "–" : ago(Date.now() / 1000 - this.data.updated);
  }

  words() {
    const { data } = this;
    const words = [];
    if (data.is_preview) words.push(`this is a preview of a long log, and spikes may be missing until it has been read: ${(100 * data.read_frac).toFixed(0)} % so far`);
    if (data.num_damaged) words.push(`${data.num_damaged} lines of the log cannot be read and are left out`);
    return words.join("; ");
  }

  // What can be seen, and only that is asked for: a closed section costs nothing.
  visibleParts() {
    const charts = this.data ? this.charts.filter((chart) => chart.node.parentElement.offsetParent !== null) : [];
    const names = charts.length ? charts.flatMap((chart) => chart.names) : PLOTS(this.names).flatMap((plot) => plot.lines.map((line) => line.name));
    const hasLayers = this.heat.node.closest("details").open;
    return { name: [...new Set(names)], statistic: hasLayers ? this.statistic.value || "grad_norm" : null };
  }

  // Whether something can be seen that was not asked for.
  isIncomplete() {
    if (!this.data) return false;
    const { name, statistic } = this.visibleParts();
    return !this.hasSettings() || name.some((one) => !this.requested.name.includes(one)) || (statistic !== null && statistic !== this.requested.statistic && this.data.statistics.includes(statistic));
  }

  renderSummary() {
    const { data } = this;
    const { event, metric } = this.names;
    const nonfinite = data.nonfinite_steps;
    const steps = data.last_step == null ? 0 : data.last_step + 1;
    const share = data.total_steps ? Math.min(1, steps / data.total_steps) : null;
    const last = (name) => number(data.last[name]);
    const fact = (label, value, more = "") => element("div", { class: `h-fact ${more}` }, element("span", {}, label), element("b", {}, value));
    const head = element(
      "div",
      { class: "h-head" },
      element("h2", {}, this.wanted, " ", badge(data.state)),
      element(
        "div",
        { class: "h-facts" },
        fact("steps", number(steps) + (data.total_steps ? ` / ${number(data.total_steps)}` : "")),
        fact("loss", last(metric.TRAIN_LOSS)),
        fact("held out", last(metric.VAL_LOSS)),
        fact("best held out", number(data.best_val_loss)),
        fact("gradient norm", last(metric.GRAD_NORM)),
        fact("tokens/s", last(metric.TOKENS_PER_S)),
        fact("skips", last(metric.SKIPS)),
        fact("steps with NaN or Inf", (nonfinite.is_exact ? "" : "≥ ") + number(nonfinite.num)),
        fact("incidents", number(data.event_counts[event.INCIDENT] || 0)),
        fact("outlier batches", number(data.event_counts[event.OUTLIER] || 0)),
        fact("rollbacks", number(data.event_counts[event.ROLLBACK] || 0)),
        fact("attempts", number(data.attempts)),
        fact("running for", duration(data.updated - data.started)),
        fact("started", clock(data.started)),
        fact("last record", data.updated == null ? "–" : ago(Date.now() / 1000 - data.updated), "h-age"),
        fact("host", data.host || "–"),
      ),
      element("div", { class: "h-note" }, data.command.join(" ")),
      share == null ? "" : element("progress", { max: 1, value: share, class: "h-wide", "aria-label": `${(100 * share).toFixed(0)} % of its steps` }),
    );
    update(this.head, head);
    this.hideEmpty();
    this.note.textContent = this.words();
    if (data.ledger) refill(this.ledger, ledgerBar(data.ledger));
    this.incidents.draw(this.wanted, data.incidents);
    this.renderCheckpoints();
    refill(
      this.events,
      table(["time", "event", "step", "what"], data.events.slice().reverse().map((one) => [clock(one.time), one.name, one.step ?? "–", one.text + (one.abandoned ? " (on a branch that was replaced)" : "")])),
    );
    refill(this.lastValues, table(["metric", "value"], Object.entries(data.last).map(([name, value]) => [name, number(value)])));
    const ranks = Object.entries(data.ranks || {});
    const world = Math.max(0, ...ranks.map(([, row]) => row.length));
    refill(this.ranks, table(["rank", ...ranks.map(([name]) => name)], [...Array(world).keys()].map((rank) => [rank, ...ranks.map(([, row]) => number(row[rank]))])));
  }

  // A new attempt may have set something else.
  hasSettings() {
    return !this.configuration.closest("details").open || this.configuration.dataset.attempts === String(this.data.attempts);
  }

  async renderSettings(run) {
    if (this.hasSettings()) return;
    const settings = await ask("settings", { run });
    if (run !== this.wanted) return;
    this.configuration.replaceChildren(table(["setting", "value"], settings));
    this.configuration.dataset.attempts = this.data.attempts;
  }

  renderCheckpoints() {
    const rows = this.data.checkpoints.slice().reverse().map((one) => [
      one.num_steps,
      element("span", { class: `h-health h-${one.health}` }, one.health),
      bytes(one.size_bytes),
      one.seconds == null ? "–" : `${number(one.seconds)} s`,
      one.blocked_s == null ? "–" : `${number(one.blocked_s)} s`,
      clock(one.time),
    ]);
    refill(this.checkpoints, rows.length ? table(["after steps", "health", "size", "written in", "training blocked", "time"], rows) : element("p", { class: "h-note" }, "none"));
  }

  addChart(plot, parent) {
    const chart = new Chart(plot, { onzoom: (range) => this.zoom(range), log: this.logs.checked });
    this.charts.push(chart);
    parent.append(chart.node);
  }

  makeCharts() {
    const { prefix } = this.names;
    const known = new Set(this.charts.map((chart) => chart.plot.title));
    const make = (plot, parent) => {
      if (known.has(plot.title)) return;
      this.addChart(plot, parent);
    };
    for (const plot of PLOTS(this.names, this.data.max_norm)) make(plot, this.grid);
    for (const name of this.data.names.filter((one) => one.startsWith(prefix.SYSTEM)).slice(0, 60))
      make({ title: name.slice(prefix.SYSTEM.length), lines: [{ name, label: name.split("/").pop() }] }, this.system);
    this.showMore(false);
  }

  showMore(redraw = true) {
    const shown = new Set(this.charts.flatMap((chart) => (chart.plot.more ? [] : chart.names)));
    const words = this.search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const names = this.data ? this.data.names.filter((name) => !shown.has(name) && words.every((word) => name.toLowerCase().includes(word))).slice(0, 24) : [];
    for (const chart of this.charts.filter((one) => one.plot.more && !names.includes(one.names[0]))) {
      chart.remove();
      this.charts.splice(this.charts.indexOf(chart), 1);
    }
    const present = new Set(this.charts.filter((one) => one.plot.more).map((one) => one.names[0]));
    for (const name of names.filter((one) => !present.has(one))) this.addChart({ title: name, lines: [{ name, label: name.split("/").pop() }], more: true }, this.more);
    if (redraw) this.requestRefresh();
  }

  drawCharts() {
    const { curves } = this.data;
    const marks = marksOf(this.data.events, this.names.event);
    for (const chart of this.charts) if (chart.names.some((name) => name in curves.curves)) chart.draw(curves, marks, this.settings);
  }

  drawLayers() {
    const { layers, statistics } = this.data;
    setOptions(this.statistic, statistics, this.statistic.value || "grad_norm");
    this.heat.node.hidden = !statistics.length;
    if (layers && statistics.length) this.heat.draw(layers);
  }

  pick(layer) {
    const name = `${this.names.prefix.LAYERS}${this.statistic.value}/${layer}`;
    this.charts.filter((chart) => chart.plot.layer).forEach((chart) => chart.remove());
    this.charts = this.charts.filter((chart) => !chart.plot.layer);
    this.addChart({ title: `${layer}: ${this.statistic.value}`, lines: [{ name, label: this.statistic.value }], log: true, layer: true }, this.layerChart);
    this.requestRefresh();
  }
}

// Puts a part in the place of what was there; what is the same stays itself.
function refill(node, part) {
  if (node.firstChild) update(node.firstChild, part);
  else node.append(part);
}

customElements.define("harness-monitor", Monitor);
