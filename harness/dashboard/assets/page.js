// What the elements of the page have in common: when they ask again, which run is open, which tab is in front.

import { show, shown, whenMoved } from "./address.js";
import { ask } from "./api.js";
import { clock } from "./format.js";

const PAUSE_MS = 250;
const LONGEST_WAIT_MS = 10000;
const FIRST_TAB = "Runs"; // in front until another is chosen

// Calls `work` now and again every `everyMs`, from one begin to the next, while `node` is on the screen; never twice
// at the same time, and with a pause in between however long it takes.
export function repeat(node, everyMs, work) {
  let stopped = false;
  let busy = false;
  let again = false;
  let timer = null;
  const round = async () => {
    const began = performance.now();
    busy = true;
    if (node.isConnected && node.offsetParent !== null && !document.hidden) {
      try {
        await work();
      } catch (error) {
        node.dispatchEvent(new CustomEvent("harness-trouble", { detail: error.message }));
      }
    }
    busy = false;
    if (!stopped) timer = setTimeout(round, again ? 0 : Math.max(PAUSE_MS, everyMs - (performance.now() - began)));
    again = false;
  };
  round();
  return {
    stop() {
      stopped = true;
      clearTimeout(timer);
    },
    soon() {
      again = busy;
      if (busy || stopped) return;
      clearTimeout(timer);
      timer = setTimeout(round, 0);
    },
  };
}

// Figures that are not new stay, and are said to be old, with the time, in a line that stays on the screen.
export function sayOld(host, note, why) {
  const since = host.freshAt ? `; what is shown is of ${clock(host.freshAt / 1000).slice(11)}` : "";
  note.textContent = since ? `${String(why).replace(/\.$/, "")}${since}` : why;
  host.dataset.old = "true";
}

export function sayFresh(host) {
  host.freshAt = Date.now();
  delete host.dataset.old;
}

// Tabs that a narrow page has no room for are in a menu.
const TABS = '[role="tab"], .overflow-dropdown button';

function tabCalled(title) {
  return [...document.querySelectorAll(TABS)].find((tab) => tab.textContent.trim() === title);
}

// Title of the tab in front, if there is one yet.
function front() {
  return [...document.querySelectorAll(TABS)].find(isInFront)?.textContent.trim();
}

function isInFront(tab) {
  return tab.getAttribute("aria-selected") === "true" || tab.classList.contains("selected");
}

// Brings a tab to the front; false if it is not there yet.
export function turnTo(title) {
  const tab = tabCalled(title);
  if (tab && !isInFront(tab)) tab.click();
  return Boolean(tab);
}

// The page turns to a run at once; Gradio, which only tells its list of runs, follows.
export function open(run) {
  const monitor = document.querySelector("harness-monitor");
  show({ tab: "Monitoring", run, zoom: null, incident: null }, { isPlace: true });
  monitor?.follow();
  ask("run", { run }).catch(() => {}); // its log is read while the page turns
  turnTo("Monitoring");
}

// Gradio's list of runs shows the run that is open, however it was opened.
let told = null;
export function tellRun(run) {
  const table = document.querySelector("harness-runs");
  if (!table || told === run) return;
  told = run;
  table.dispatchEvent(new CustomEvent("harness-open", { detail: run, bubbles: true }));
}

// The tab in front is a part of the address.
export function followTabs() {
  let isMoving = false;
  const turn = () => {
    isMoving = true;
    const isThere = turnTo(shown("tab") ?? FIRST_TAB);
    isMoving = false;
    return isThere;
  };
  document.addEventListener("click", (event) => {
    const tab = event.target.closest?.(TABS);
    if (tab && !isMoving) show({ tab: tab.textContent.trim() }, { isPlace: true });
  });
  whenMoved(turn);
  const began = performance.now();
  const wait = setInterval(() => {
    const isLate = performance.now() - began > LONGEST_WAIT_MS;
    // Another than the first one has been chosen before this script had come.
    if ((front() ?? FIRST_TAB) !== FIRST_TAB) show({ tab: front() }, { isPlace: true });
    if (turn()) clearInterval(wait);
    else if (isLate) {
      clearInterval(wait);
      show({ tab: null }); // there is none of that name
      turn();
    }
  }, 50);
}
