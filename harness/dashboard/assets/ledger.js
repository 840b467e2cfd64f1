// Where a run's wall time went: one bar, a part for each class.

import { duration, element } from "./format.js";

export function ledgerBar(ledger) {
  const percent = (share) => `${(100 * share).toFixed(1)} %`;
  const words = ({ name, seconds, frac }) => `${name} ${percent(frac)} (${duration(seconds)})`;
  return element(
    "div",
    {},
    element(
      "div",
      { class: "h-ledger", role: "img", "aria-label": `where the time went: ${ledger.classes.map(words).join(", ")}` },
      ledger.classes.map((one) => element("span", { class: `h-time-${one.name}`, style: `flex-grow: ${one.seconds}`, title: words(one) })),
    ),
    element(
      "div",
      { class: "h-facts h-note" },
      element("span", {}, `goodput ${percent(ledger.goodput_frac)}`),
      element("span", {}, `effective training time ${percent(ledger.ettr_frac)} of ${duration(ledger.wall_s)}`),
      ledger.classes.map((one) => element("span", { class: `h-key h-time-${one.name}` }, words(one))),
    ),
  );
}
