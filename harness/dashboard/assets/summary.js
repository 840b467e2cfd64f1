// A run in figures and tables.

import { ago, badge, bytes, clock, duration, element, number, table } from "./format.js";

// State, progress and the newest figures.
export function summaryOf(run, data, { event, metric }) {
  const nonfinite = data.nonfinite_steps;
  const steps = data.last_step == null ? 0 : data.last_step + 1;
  const share = data.total_steps ? Math.min(1, steps / data.total_steps) : null;
  const last = (name) => number(data.last[name]);
  // What a run does not measure takes no room.
  const fact = (label, value, more = "") => (value === "–" ? null : element("div", { class: `h-fact ${more}` }, element("span", {}, label), element("b", {}, value)));
  return element(
    "div",
    { class: "h-head" },
    element("h2", {}, run, " ", badge(data.state)),
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
}

export function checkpointsOf({ checkpoints }) {
  const inSeconds = (value) => (value == null ? "–" : `${number(value)} s`);
  const rows = checkpoints.toReversed().map((one) => [
    one.num_steps,
    element("span", { class: `h-health h-${one.health}` }, one.health),
    bytes(one.size_bytes),
    inSeconds(one.seconds),
    inSeconds(one.blocked_s),
    clock(one.time),
  ]);
  return table(["after steps", "health", "size", "written in", "training blocked", "time"], rows);
}

export function eventsOf({ events }) {
  const text = (one) => one.text + (one.abandoned ? " (on a branch that was replaced)" : "");
  return table(["time", "event", "step", "what"], events.toReversed().map((one) => [clock(one.time), one.name, one.step ?? "–", text(one)]));
}

export function lastValuesOf({ last }) {
  return table(["metric", "value"], Object.entries(last).map(([name, value]) => [name, number(value)]));
}

// Figures of each rank at the last step.
export function ranksOf(data) {
  const ranks = Object.entries(data.ranks || {});
  const world = Math.max(0, ...ranks.map(([, row]) => row.length));
  return table(["rank", ...ranks.map(([name]) => name)], [...Array(world).keys()].map((rank) => [rank, ...ranks.map(([, row]) => number(row[rank]))]));
}
