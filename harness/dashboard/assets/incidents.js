// What went wrong in a run: the newest first, those of a kind together, each with its story.

import { ask } from "./api.js";
import { element, number, table, update } from "./format.js";

const FIRST = 10;
const SAMPLES_SHOWN = 8;
const AROUND = 30;
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

export class Incidents {
  // onpick(range): steps around the incident that was chosen.
  constructor({ onpick }) {
    this.onpick = onpick;
    this.showsAll = false;
    this.groups = element("p", { class: "h-note" });
    this.list = element("div", { class: "h-incident-box" });
    this.more = element("button", { class: "h-button", type: "button", onclick: () => this.unfold() });
    this.story = element("pre", { class: "h-story", hidden: true, tabindex: 0, "aria-label": "story of the incident" });
    this.node = element("div", {}, this.groups, this.list, this.more, this.story);
  }

  clear() {
    this.showsAll = false;
    this.story.hidden = true;
    this.list.replaceChildren();
  }

  unfold() {
    this.showsAll = !this.showsAll;
    this.draw(this.run, this.incidents);
  }

  draw(run, incidents) {
    this.run = run;
    this.incidents = incidents;
    const newest = incidents.slice().reverse();
    this.groups.textContent = incidents.length ? this.summary() : "none";
    this.more.hidden = incidents.length <= FIRST;
    this.more.textContent = this.showsAll ? `the newest ${FIRST}` : `all ${number(incidents.length)}`;
    const rows = newest.slice(0, this.showsAll ? newest.length : FIRST).map((one) => this.row(one));
    const fresh = incidents.length ? table(HEADS, rows, { class: "h-table h-incidents" }) : element("div", {});
    fresh.querySelectorAll("tbody tr").forEach((line, at) => {
      const one = newest[at];
      line.dataset.key = `${one.step} ${one.kind} ${one.time}`;
    });
    if (this.list.firstChild) update(this.list.firstChild, fresh);
    else this.list.append(fresh);
  }

  // How often each kind has struck each parameter.
  summary() {
    const counts = new Map();
    for (const { kind, parameter } of this.incidents) {
      const name = [kind || "incident", parameter].filter(Boolean).join(" in ");
      counts.set(name, (counts.get(name) ?? 0) + 1);
    }
    const all = [...counts].sort((a, b) => b[1] - a[1]).map(([name, count]) => `${number(count)} × ${name}`);
    return all.slice(0, 6).join(", ") + (all.length > 6 ? ` and ${all.length - 6} other kinds` : "");
  }

  row(one) {
    const step = one.step == null ? "–" : element("button", { type: "button", class: "h-link", title: "zoom there and read its story", onclick: () => this.pick(one) }, String(one.step));
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

  async pick(one) {
    this.onpick([Math.max(0, one.step - AROUND), one.step + AROUND]);
    this.story.hidden = false;
    this.story.textContent = "reading…";
    const { story } = await ask("story", { run: this.run, step: one.step }).catch(() => ({ story: null }));
    const hint = `No story of step ${one.step} is kept: harness replay ${this.run} --step ${one.step} writes one.`;
    this.story.textContent = `${one.reason || one.summary || one.kind || ""}\n\n${story || hint}`;
  }
}
