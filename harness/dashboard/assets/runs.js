// The table of all runs: filter, sort, group, open one, compare several.

import { ask } from "./api.js";
import { allShown, show, shown, whenMoved } from "./address.js";
import { ago, badge, element, number, update } from "./format.js";
import { open, repeat, sayFresh, sayOld, turnTo } from "./page.js";

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
    this.chosen = new Set(allShown("compare"));
    this.search = element("input", { class: "h-input", type: "search", placeholder: "filter: words of name, state, group, tag", "aria-label": "filter runs", oninput: () => this.note({ filter: this.search.value || null }) });
    this.grouping = element(
      "select",
      { class: "h-input", "aria-label": "group by", onchange: () => this.note({ group: this.grouping.value || null }) },
      [["", "no groups"], ["group", "by group"], ["state", "by state"], ["folder", "by folder"]].map(([value, text]) => element("option", { value }, text)),
    );
    this.compareButton = element("button", { class: "h-button", type: "button", disabled: true, onclick: () => this.compare() }, "Compare");
    this.words = element("span", { class: "h-note", role: "status" });
    this.table = element("div", { class: "h-scroll", tabindex: 0 });
    this.append(element("div", { class: "h-bar" }, this.search, this.grouping, this.compareButton, this.words), this.table);
    this.addEventListener("harness-trouble", (event) => sayOld(this, this.words, event.detail));
    this.stopFollowing = whenMoved(() => this.follow());
    this.poll = repeat(this, 2000, () => this.refresh());
    this.follow();
  }

  disconnectedCallback() {
    this.poll.stop();
    this.stopFollowing();
  }

  // What the address says is in the table.
  follow() {
    this.search.value = shown("filter") ?? "";
    this.grouping.value = shown("group") ?? "";
    this.sort = [shown("sort") ?? "updated", Number(shown("order") ?? -1)];
    this.show();
  }

  note(values) {
    show(values);
    this.show();
  }

  async refresh() {
    this.names ??= await ask("names");
    const answer = await ask("runs");
    sayFresh(this);
    this.runs = answer.runs;
    this.now = answer.now;
    this.words.textContent = answer.runs.length
      ? `${number(answer.runs.length)} runs in ${answer.folder}` + (answer.reading ? `, ${answer.reading} still being read` : "")
      : `no run in ${answer.folder} yet: start one in the tab Training, or with \`harness train\` in a terminal`;
    const drawn = JSON.stringify(answer.runs);
    if (drawn === this.drawn && Date.now() - this.shownAt < AGES_EVERY_MS) return;
    this.drawn = drawn;
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
      const order = this.sort[0] === key ? (this.sort[1] > 0 ? "ascending" : "descending") : null;
      return element("th", { "aria-sort": order }, element("button", { type: "button", class: "h-sort", onclick: () => this.sortBy(key) }, label + arrow));
    });
    const runs = this.visible();
    const grouping = this.grouping.value;
    const groupOf = (run) => (grouping === "folder" ? run.id.split("/").slice(0, -1).join("/") : run[grouping]) || "none";
    const groups = grouping ? [...new Set(runs.map(groupOf))].sort() : [null];
    const rows = groups.flatMap((group) => [
      group === null ? null : element("tr", { class: "h-group", "data-key": `group ${group}` }, element("td", { colspan: COLUMNS.length + 1 }, String(group))),
      ...runs.filter((run) => group === null || groupOf(run) === group).map((run) => this.row(run)),
    ]);
    const table = element("table", { class: "h-table h-runs" }, element("thead", {}, element("tr", {}, element("th", {}, element("span", { class: "h-hidden" }, "compare")), heads)), element("tbody", {}, rows));
    if (this.table.firstChild) update(this.table.firstChild, table);
    else this.table.append(table);
    this.allowCompare();
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
      share == null ? null : element("progress", { max: 1, value: share, "aria-label": `${(100 * share).toFixed(0)} % of its steps` }),
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
      run.updated ? ago(this.now - run.updated) : "–",
    ];
    return element("tr", { "data-run": run.id, "data-key": `run ${run.id}` }, cells.map((cell) => element("td", {}, cell)));
  }

  sortBy(key) {
    this.sort = [key, this.sort[0] === key ? -this.sort[1] : 1];
    this.note({ sort: key, order: this.sort[1] });
  }

  choose(id, on) {
    if (on) this.chosen.add(id);
    else this.chosen.delete(id);
    this.allowCompare();
  }

  // The chosen ones that are still there.
  chosenRuns() {
    const there = new Set(this.runs.map((run) => run.id));
    return [...this.chosen].filter((id) => there.has(id));
  }

  allowCompare() {
    const num = this.chosenRuns().length;
    const most = this.names?.limit.COMPARED ?? Infinity;
    this.compareButton.disabled = num < 2 || num > most;
    this.compareButton.textContent = num > most ? `Compare: ${num} are chosen, ${most} at most` : "Compare";
  }

  open(id) {
    open(id);
  }

  compare() {
    show({ tab: "Compare", compare: this.chosenRuns() }, { isPlace: true });
    turnTo("Compare");
  }
}

customElements.define("harness-runs", Runs);
