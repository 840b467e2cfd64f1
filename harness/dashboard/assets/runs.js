// The table of all runs: filter, sort, group, open one, compare several.

import { ask } from "./api.js";
import { badge, duration, element, number } from "./format.js";
import { Comparison } from "./compare.js";
import { open, repeat } from "./page.js";

const COLUMNS = [
  ["name", "run"],
  ["state", "state"],
  ["last_step", "step"],
  ["loss", "loss"],
  ["val_loss", "held out"],
  ["tokens_per_s", "tokens/s"],
  ["skips", "skips"],
  ["num_incidents", "incidents"],
  ["group", "group"],
  ["tags", "tags"],
  ["updated", "last record"],
];

// Hundreds of rows take a while to be drawn: only when something has changed, or for their ages.
const AGES_EVERY_MS = 10000;

class Runs extends HTMLElement {
  connectedCallback() {
    this.replaceChildren();
    this.runs = [];
    this.chosen = new Set();
    this.sort = ["updated", -1];
    this.search = element("input", { class: "h-input", type: "search", placeholder: "filter: words of name, state, group, tag", "aria-label": "filter runs", oninput: () => this.show() });
    this.grouping = element(
      "select",
      { class: "h-input", "aria-label": "group by", onchange: () => this.show() },
      [["", "no groups"], ["group", "by group"], ["state", "by state"], ["folder", "by folder"]].map(([value, text]) => element("option", { value }, text)),
    );
    this.compareButton = element("button", { class: "h-button", type: "button", disabled: true, onclick: () => this.compare() }, "Compare");
    this.note = element("span", { class: "h-note" });
    this.table = element("div", { class: "h-scroll" });
    this.panel = element("div", {});
    this.append(element("div", { class: "h-bar" }, this.search, this.grouping, this.compareButton, this.note), this.table, this.panel);
    this.addEventListener("harness-trouble", (event) => (this.note.textContent = event.detail));
    this.poll = repeat(this, 2000, () => this.refresh());
  }

  disconnectedCallback() {
    this.poll.stop();
  }

  async refresh() {
    const answer = await ask("runs");
    this.runs = answer.runs;
    this.now = answer.now;
    this.note.textContent = `${answer.runs.length} runs in ${answer.folder}` + (answer.reading ? `, ${answer.reading} still being read` : "");
    const told = JSON.stringify(answer.runs);
    if (told === this.told && Date.now() - this.shownAt < AGES_EVERY_MS) return;
    this.told = told;
    this.shownAt = Date.now();
    this.show();
  }

  visible() {
    const words = this.search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const [key, sign] = this.sort;
    const worth = (run) => {
      const value = run[key];
      return value == null ? null : Array.isArray(value) ? value.join(" ") : value;
    };
    return this.runs
      .filter((run) => {
        const text = [run.id, run.state, run.group, ...(run.tags || [])].join(" ").toLowerCase();
        return words.every((word) => text.includes(word));
      })
      .sort((a, b) => {
        const [x, y] = [worth(a), worth(b)];
        if (x == null || y == null) return (x == null) - (y == null);
        if (typeof x !== typeof y) return sign * ((typeof x === "string") - (typeof y === "string")); // "nan" among numbers
        return sign * (typeof x === "string" ? x.localeCompare(y) : x - y);
      });
  }

  show() {
    const heads = COLUMNS.map(([key, label]) => {
      const arrow = this.sort[0] === key ? (this.sort[1] > 0 ? " ▲" : " ▼") : "";
      return element("th", {}, element("button", { type: "button", class: "h-sort", onclick: () => this.sortBy(key) }, label + arrow));
    });
    const runs = this.visible();
    const grouping = this.grouping.value;
    const groupOf = (run) => (grouping === "folder" ? run.id.split("/").slice(0, -1).join("/") : run[grouping]) || "none";
    const groups = grouping ? [...new Set(runs.map(groupOf))].sort() : [null];
    const rows = groups.flatMap((group) => [
      group === null ? null : element("tr", { class: "h-group" }, element("td", { colspan: COLUMNS.length + 1 }, String(group))),
      ...runs.filter((run) => group === null || groupOf(run) === group).map((run) => this.row(run)),
    ]);
    this.table.replaceChildren(
      element("table", { class: "h-table h-runs" }, element("thead", {}, element("tr", {}, element("th", {}), heads)), element("tbody", {}, rows)),
    );
    this.compareButton.disabled = this.chosen.size < 2;
  }

  row(run) {
    const box = element("input", { type: "checkbox", "aria-label": `compare ${run.id}`, onchange: () => this.choose(run.id, box.checked) });
    box.checked = this.chosen.has(run.id);
    const open = element("button", { type: "button", class: "h-link", onclick: () => this.open(run.id) }, run.id);
    const total = run.total_steps;
    const share = total && run.last_step != null ? Math.min(1, (run.last_step + 1) / total) : null;
    const progress = element(
      "span",
      { class: "h-progress-cell" },
      run.last_step == null ? "–" : number(run.last_step + 1) + (total ? ` / ${number(total)}` : ""),
      share == null ? null : element("progress", { max: 1, value: share }),
    );
    const cells = [
      box,
      open,
      badge(run.state),
      progress,
      number(run.loss),
      number(run.val_loss),
      number(run.tokens_per_s),
      number(run.skips),
      element("span", { class: run.num_incidents ? "h-bad" : "" }, number(run.num_incidents)),
      run.group || "",
      (run.tags || []).join(", "),
      run.updated ? `${duration(this.now - run.updated)} ago` : "–",
    ];
    return element("tr", { "data-run": run.id }, cells.map((cell) => element("td", {}, cell)));
  }

  sortBy(key) {
    this.sort = [key, this.sort[0] === key ? -this.sort[1] : 1];
    this.show();
  }

  choose(id, on) {
    if (on) this.chosen.add(id);
    else this.chosen.delete(id);
    this.compareButton.disabled = this.chosen.size < 2;
  }

  open(id) {
    open(id);
    this.dispatchEvent(new CustomEvent("harness-open", { detail: id, bubbles: true }));
  }

  compare() {
    const comparison = new Comparison([...this.chosen]);
    this.panel.replaceChildren(comparison.node);
    comparison.load();
  }
}

customElements.define("harness-runs", Runs);
