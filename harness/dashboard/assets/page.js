// What the elements of the page have in common: when they ask again, and which run is open.

import { ask } from "./api.js";

const PAUSE_MS = 250;

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

// The run that was opened last. The page turns to it at once; Gradio, which only tells its list of runs, follows.
export const opened = { run: null };

export function open(run) {
  opened.run = run;
  const monitor = document.querySelector("harness-monitor");
  if (monitor) monitor.run = run;
  ask("run", { run }).catch(() => {}); // its log is read while the page turns
  [...document.querySelectorAll('[role="tab"]')].find((tab) => tab.textContent.trim() === "Monitoring")?.click();
}
