// What went wrong in a run: the newest first, those of a kind together, each with its story.

import { ask } from "./api.js";
import { element, number, table, update } from "./format.js";

const FIRST = 10;
const SAMPLES_SHOWN = 8;
const AROUND = 30;
const GROUPS_SHOWN = 12;
const HEADS = ["step", "kind", "rank", "parameter", "micro-batch", "NaN", "Inf", "samples", "guard", "reason"];

// Indices of the samples to blame; of logs before these were kept, positions in the order of the data.
function samplesOf(incident) {
  const indices = incident.sample_indices;
  if (Array.isArray(indices) && indices.length) {
    const more = indices.length > SAMPLES_SHOWN ? ` and ${indices.length - SAMPLES_SHOWN} more` : "";
    const sources = Array.isArray(incident.sample_sources) ? incident.sample_sources : [];
    const named = indices.slice(0, SAMPLES_SHOWN).map((index, at) => (sources[at] ? `${index} (${sources[at]})` : index));
    return named.join(", ") + more;
  }
  return Array.isArray(incident.samples) ? `positions ${incident.samples[0]} to ${incident.samples[1] - 1}` : "–";
}

// What incidents are counted by.
function groupOf({ kind, parameter }) {
  return [kind || "incident", parameter].filter(Boolean).join(" in ");
}

export class Incidents {
  // onpick(step, range): the incident that was chosen, and the steps around it; nulls when its story is closed.
  constructor({ onpick }) {
    this.onpick = onpick;
    this.groups = element("div", { class: "h-bar" });
    this.list = element("div", { class: "h-incident-box" });
    this.more = element("button", { class: "h-button", type: "button", onclick: () => this.unfold() });
    this.text = element("pre", { class: "h-story", tabindex: 0, role: "region", "aria-label": "story of the incident" });
    this.close = element("button", { class: "h-button", type: "button", onclick: () => this.pick(null) }, "Close the story");
    this.story = element("div", { hidden: true }, this.text, this.close);
    this.node = element("div", {}, this.groups, this.list, this.more, this.story);
    this.clear();
  }

  clear() {
    this.showsAll = false;
    this.group = null;
    this.told = null;
    this.isUnread = false;
    this.story.hidden = true;
    this.groups.replaceChildren();
    this.list.replaceChildren();
  }

  unfold() {
    this.showsAll = !this.showsAll;
    this.draw(this.run, this.incidents, this.total);
  }

  // incidents: the newest ones, oldest first; total: how many there have been.
  draw(run, incidents, total) {
    Object.assign(this, { run, incidents, total });
    const newest = incidents.filter((one) => this.group === null || groupOf(one) === this.group).reverse();
    update(this.groups, element("div", { class: "h-bar" }, this.groupButtons()));
    this.more.hidden = newest.length <= FIRST;
    this.more.textContent = this.showsAll ? `the newest ${FIRST}` : `all ${number(newest.length)}`;
    const fresh = table(HEADS, newest.slice(0, this.showsAll ? newest.length : FIRST).map((one) => this.row(one)), { class: "h-table h-incidents" });
    fresh.querySelectorAll("tbody tr").forEach((line, at) => {
      const one = newest[at];
      line.dataset.key = `${one.step} ${one.kind} ${one.time}`;
      if (one.step != null && one.step === this.told) line.setAttribute("aria-current", "true");
      line.addEventListener("click", () => one.step != null && getSelection().isCollapsed && this.pick(one.step));
    });
    if (this.list.firstChild) update(this.list.firstChild, fresh);
    else this.list.append(fresh);
  }

  // How often each kind has struck each parameter; a press leaves only those in the table.
  groupButtons() {
    const counts = new Map();
    for (const one of this.incidents) counts.set(groupOf(one), (counts.get(groupOf(one)) ?? 0) + 1);
    const choose = (name) => {
      this.group = this.group === name ? null : name;
      this.draw(this.run, this.incidents, this.total);
    };
    const button = ([name, count]) =>
      element("button", { class: "h-button", type: "button", "data-key": name, "aria-pressed": String(this.group === name), onclick: () => choose(name) }, `${number(count)} × ${name}`);
    const most = [...counts].sort((a, b) => b[1] - a[1]);
    const shown = most.filter(([name], place) => place < GROUPS_SHOWN || name === this.group);
    // What is pressed can be released, though others are more frequent by now, or it is among the newest no more.
    if (this.group !== null && !counts.has(this.group)) shown.push([this.group, 0]);
    const left = this.total - this.incidents.length;
    const words = left > 0 ? [element("span", { class: "h-note" }, `of the newest ${number(this.incidents.length)}; ${number(left)} before them`)] : [];
    return [...shown.map(button), ...words];
  }

  row(one) {
    const step = one.step == null ? "–" : element("button", { type: "button", class: "h-link", title: "zoom there and read its story" }, String(one.step));
    return [
      step,
      one.kind || "",
      one.rank ?? "–",
      one.parameter || "–",
      one.micro_batch ?? "–",
      number(one.num_nan),
      number(one.num_inf),
      samplesOf(one),
      one.verdict || one.action || "–",
      (one.reason || one.summary || "") + (one.abandoned ? " (on a branch that was replaced)" : ""),
    ];
  }

  pick(step) {
    this.onpick(step, step === null ? null : [Math.max(0, step - AROUND), step + AROUND]);
    this.tell(step);
  }

  // Opens the story of the incident at a step; null closes it.
  async tell(step) {
    if ((step === this.told && !this.isUnread) || (step !== null && !this.incidents)) return;
    if (step !== this.told) this.text.textContent = "reading…";
    this.told = step;
    this.isUnread = false;
    this.story.hidden = step === null;
    this.draw(this.run, this.incidents, this.total);
    if (step === null) return;
    const { run } = this;
    const { story, error } = await ask("story", { run, step }).catch((error) => ({ error }));
    if (run !== this.run || step !== this.told) return;
    this.isUnread = Boolean(error); // and asked for again
    const reasons = this.incidents.filter((one) => one.step === step).map((one) => one.reason || one.summary || one.kind || "");
    const hint = `No story of step ${step} is kept: harness replay ${run} --step ${step} writes one.`;
    const words = error ? `The story cannot be read: ${error.message}.` : story || hint;
    this.text.textContent = `step ${step}: ${[...new Set(reasons)].join("; ")}\n\n${words}`;
  }
}
