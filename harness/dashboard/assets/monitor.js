// One run, live: its state, its curves, its layers, its incidents and its checkpoints.

import { show, shown, whenMoved } from "./address.js";
import { ask } from "./api.js";
import { Chart, marksOf } from "./chart.js";
import { ago, element, table, update } from "./format.js";
import { HeatMap } from "./heatmap.js";
import { Incidents } from "./incidents.js";
import { axisList, axisOf, rangeOf, setOptions, smoothingOf, smoothingRange, stepOf } from "./inputs.js";
import { ledgerBar } from "./ledger.js";
import { repeat, sayFresh, sayOld, tellRun } from "./page.js";
import { plotsOf } from "./plots.js";
import { checkpointsOf, eventsOf, lastValuesOf, ranksOf, summaryOf } from "./summary.js";

const MAX_SEEN = 6;

class Monitor extends HTMLElement {
  connectedCallback() {
    if (this.built) return;
    this.built = true;
    this.settings = { axis: "step", smoothing: 0, within: null };
    this.charts = [];
    this.requested = null;
    this.turn = 0;
    this.seen = new Map(); // the last answers about some views of runs
    this.head = element("div", { class: "h-head" });
    this.note = element("div", { class: "h-note", role: "status" });
    this.grid = element("div", { class: "h-grid" });
    this.rest = element("div", { class: "h-grid" });
    this.system = element("div", { class: "h-grid" });
    this.more = element("div", { class: "h-grid" });
    this.ledger = element("div", {});
    this.incidents = new Incidents({ onpick: (incident, range) => this.settle({ incident, ...(range && { zoom: range.join("-") }) }, { isPlace: true }) });
    this.checkpoints = element("div", {});
    this.events = element("div", {});
    this.ranks = element("div", {});
    this.lastValues = element("div", {});
    this.configuration = element("div", {});
    this.layerChart = element("div", { class: "h-grid" });
    this.heat = new HeatMap({ onpick: (layer) => this.settle({ layer }, { isPlace: true }) });
    this.statistic = element("select", { class: "h-input", "aria-label": "statistic of the layers", onchange: () => this.settle({ statistic: this.statistic.value }) });
    this.parts = {};
    const section = (title, open, ...nodes) => (this.parts[title] = element("details", { open, class: "h-section", ontoggle: () => this.isIncomplete() && this.requestRefresh() }, element("summary", {}, title), ...nodes));
    this.search = element("input", { class: "h-input", type: "search", placeholder: "search all metrics", "aria-label": "search all metrics", onchange: () => this.settle({ metrics: this.search.value || null }) });
    this.append(
      this.head,
      this.note,
      this.controls(),
      this.ledger,
      this.grid,
      section("Incidents", true, this.incidents.node),
      this.rest,
      section("Layers", true, this.statistic, this.heat.node, this.layerChart),
      section("Ranks, last step", false, this.ranks),
      section("Checkpoints", false, this.checkpoints),
      section("Host and devices", false, this.system),
      section("More metrics", false, this.search, this.more),
      section("Events", false, this.events),
      section("Last values", false, this.lastValues),
      section("Configuration", false, this.configuration),
    );
    this.addEventListener("harness-trouble", (event) => sayOld(this, this.note, event.detail));
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
      show({ run: id, zoom: null, incident: null }, { isPlace: Boolean(this.dataset.run) });
      tellRun(id);
    }
    this.readSettings();
    this.incidents.clear();
    this.heat.clear();
    this.charts.forEach((chart) => chart.remove());
    this.charts = [];
    for (const node of [this.head, this.ledger, this.checkpoints, this.events, this.ranks, this.lastValues, this.configuration, this.layerChart, this.statistic]) node.replaceChildren();
    delete this.configuration.dataset.attempts;
    delete this.dataset.ready;
    this.dataset.run = id || "";
    this.showSeen();
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
    const before = this.viewKey();
    this.settings = {
      axis: axisOf(shown("axis")),
      smoothing: smoothingOf(shown("smoothing")),
      within: rangeOf(shown("zoom")),
      incident: stepOf(shown("incident")),
      statistic: shown("statistic") ?? "grad_norm",
      layer: shown("layer"),
      metrics: shown("metrics") ?? "",
    };
    this.search.value = this.settings.metrics;
    if (this.settings.metrics) this.parts["More metrics"].open = true;
    this.axis.value = this.settings.axis;
    this.smoothing.value = this.settings.smoothing;
    this.reset.disabled = !this.settings.within;
    const log = shown("log") === "1";
    if (log !== this.logs.checked || log !== Boolean(this.hasLogs)) {
      this.hasLogs = this.logs.checked = log;
      this.charts.forEach((chart) => chart.setLog(log || chart.plot.log || false));
    }
    if (!this.data) return;
    this.makeCharts();
    this.heat.choose(this.settings.layer);
    this.incidents.tell(this.settings.incident);
    if (this.viewKey() !== before) this.showSeen();
  }

  settle(values, options) {
    show(values, options);
    this.readSettings();
    this.requestRefresh();
  }

  zoom(within) {
    this.settle({ zoom: within && within.join("-") }, { isPlace: true });
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
    const requested = this.visibleParts();
    const { axis, within } = this.settings;
    const key = this.viewKey();
    const answer = await ask("run", { run, seen: this.version, ...requested, axis, first: within?.[0], last: within?.[1], points: 400 });
    if (!answer.unchanged) this.remember(key, { answer, requested, at: Date.now() });
    if (key !== this.viewKey()) return; // something else is to be seen by now
    sayFresh(this);
    tellRun(run);
    this.note.textContent = this.data ? this.words() : "";
    this.age();
    if (answer.unchanged) return;
    this.version = turn === this.turn ? answer.version : null;
    this.requested = requested;
    await this.render(run, answer);
  }

  // Pictures that have been seen are there at once when they are asked for again, and then brought up to date.
  remember(key, seen) {
    this.seen.delete(key);
    this.seen.set(key, seen);
    if (this.seen.size > MAX_SEEN) this.seen.delete(this.seen.keys().next().value);
  }

  showSeen() {
    const seen = this.seen.get(this.viewKey());
    if (!seen) return;
    this.requested = seen.requested;
    this.freshAt = seen.at;
    this.render(this.wanted, seen.answer).catch(() => {}); // the refresh that follows says why
  }

  viewKey() {
    const { axis, within } = this.settings;
    return JSON.stringify([this.wanted, axis, within]);
  }

  async render(run, answer) {
    this.data = answer;
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
      Incidents: data.incidents.length,
      Layers: data.statistics.length,
      "Ranks, last step": Object.keys(data.ranks || {}).length,
      Checkpoints: data.checkpoints.length,
      "Host and devices": data.names.some((name) => name.startsWith(names.prefix.SYSTEM)),
      Events: data.events.length,
      "Last values": Object.keys(data.last).length,
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
    const names = charts.length ? charts.flatMap((chart) => chart.names) : plotsOf(this.names).flatMap((plot) => plot.lines.map((line) => line.name));
    const hasLayers = this.heat.node.closest("details").open;
    return { name: [...new Set(names)], statistic: hasLayers ? this.chosenStatistic() : null };
  }

  // Whether something can be seen that was not asked for.
  isIncomplete() {
    if (!this.data) return false;
    const { name, statistic } = this.visibleParts();
    return !this.hasSettings() || name.some((one) => !this.requested.name.includes(one)) || (statistic !== null && statistic !== this.requested.statistic && this.data.statistics.includes(statistic));
  }

  renderSummary() {
    const { data, names } = this;
    update(this.head, summaryOf(this.wanted, data, names));
    this.hideEmpty();
    this.note.textContent = this.words();
    if (data.ledger) refill(this.ledger, ledgerBar(data.ledger));
    this.incidents.draw(this.wanted, data.incidents, data.event_counts[names.event.INCIDENT] || 0);
    this.incidents.tell(this.settings.incident);
    refill(this.checkpoints, checkpointsOf(data));
    refill(this.events, eventsOf(data));
    refill(this.lastValues, lastValuesOf(data));
    refill(this.ranks, ranksOf(data));
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
    for (const plot of plotsOf(this.names, this.data.max_norm)) make(plot, plot.isMain ? this.grid : this.rest);
    for (const name of this.data.names.filter((one) => one.startsWith(prefix.SYSTEM)).slice(0, 60))
      make({ title: name.slice(prefix.SYSTEM.length), lines: [{ name, label: name.split("/").pop() }] }, this.system);
    this.makeLayerChart();
    this.showMore();
  }

  // The one that the address names, if the run has it.
  chosenStatistic() {
    const { statistics } = this.data ?? { statistics: [] };
    return !statistics.length || statistics.includes(this.settings.statistic) ? this.settings.statistic : statistics[0];
  }

  // The history of the layer that is chosen in the heat map.
  makeLayerChart() {
    const { layer } = this.settings;
    const statistic = this.chosenStatistic();
    const name = layer && `${this.names.prefix.LAYERS}${statistic}/${layer}`;
    const there = this.charts.find((chart) => chart.plot.layer);
    if (there && there.names[0] !== name) {
      there.remove();
      this.charts.splice(this.charts.indexOf(there), 1);
    }
    if (name && there?.names[0] !== name)
      this.addChart({ title: `${layer}: ${statistic}`, lines: [{ name, label: statistic }], log: true, layer: true }, this.layerChart);
  }

  showMore() {
    const shown = new Set(this.charts.flatMap((chart) => (chart.plot.more ? [] : chart.names)));
    const words = this.settings.metrics.toLowerCase().split(/\s+/).filter(Boolean);
    const names = this.data ? this.data.names.filter((name) => !shown.has(name) && words.every((word) => name.toLowerCase().includes(word))).slice(0, 24) : [];
    for (const chart of this.charts.filter((one) => one.plot.more && !names.includes(one.names[0]))) {
      chart.remove();
      this.charts.splice(this.charts.indexOf(chart), 1);
    }
    const present = new Set(this.charts.filter((one) => one.plot.more).map((one) => one.names[0]));
    for (const name of names.filter((one) => !present.has(one))) this.addChart({ title: name, lines: [{ name, label: name.split("/").pop() }], more: true }, this.more);
  }

  drawCharts() {
    const { curves } = this.data;
    const marks = marksOf(this.data.events, this.names.event);
    for (const chart of this.charts) if (chart.names.some((name) => name in curves.curves)) chart.draw(curves, marks, this.settings);
  }

  drawLayers() {
    const { layers, statistics } = this.data;
    setOptions(this.statistic, statistics, this.chosenStatistic());
    this.heat.choose(this.settings.layer);
    this.heat.node.hidden = !statistics.length;
    if (layers && statistics.length) this.heat.draw(layers);
  }

}

// Puts a part in the place of what was there; what is the same stays itself.
function refill(node, part) {
  if (node.firstChild) update(node.firstChild, part);
  else node.append(part);
}

customElements.define("harness-monitor", Monitor);
