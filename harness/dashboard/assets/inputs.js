// What pictures of one run and of several are set by.

import { element } from "./format.js";

const AXES = [["step", "by step"], ["tokens", "by tokens"], ["hours", "by hours"], ["clock", "by time of day"]];

// What the address says of them: what is none of what there is to choose is ignored.
export function axisOf(text) {
  return AXES.some(([value]) => value === text) ? text : "step";
}

export function smoothingOf(text) {
  const value = Number(text ?? 0);
  return value >= 0 && value < 1 ? value : 0;
}

// First and last step of a zoom, two whole numbers; null for all of them.
export function rangeOf(text) {
  const found = /^(\d{1,15})-(\d{1,15})$/.exec(text ?? "");
  return found && found.slice(1).map(Number).sort((a, b) => a - b);
}

export function stepOf(text) {
  return /^\d{1,15}$/.test(text ?? "") ? Number(text) : null;
}

// Puts options into a list, only where they are others: a list that is open stays so.
export function setOptions(list, values, chosen = list.value) {
  if ([...list.options].map((option) => option.value).join("\n") !== values.join("\n"))
    list.replaceChildren(...values.map((value) => element("option", { value }, value)));
  if (values.includes(chosen) && list.value !== chosen) list.value = chosen;
}

export function axisList(onchange) {
  return element("select", { class: "h-input", "aria-label": "x axis", onchange }, AXES.map(([value, text]) => element("option", { value }, text)));
}

export function smoothingRange(oninput) {
  return element("input", { type: "range", min: 0, max: 0.99, step: 0.01, value: 0, "aria-label": "smoothing", oninput });
}
