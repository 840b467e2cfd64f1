// What pictures of one run and of several are set by.

import { element } from "./format.js";

const AXES = [["step", "by step"], ["tokens", "by tokens"], ["hours", "by hours"], ["clock", "by time of day"]];

export function axisList(onchange) {
  return element("select", { class: "h-input", "aria-label": "x axis", onchange }, AXES.map(([value, text]) => element("option", { value }, text)));
}

export function smoothingRange(oninput) {
  return element("input", { type: "range", min: 0, max: 0.99, step: 0.01, value: 0, "aria-label": "smoothing", oninput });
}
