// What the page asks the server. Every answer is plain data; an error has one sentence for people.

const PAUSE_MS = 250;

export async function ask(path, parameters = {}) {
  const query = new URLSearchParams();
  for (const [name, value] of Object.entries(parameters))
    for (const item of Array.isArray(value) ? value : [value]) if (item != null) query.append(name, item);
  const response = await fetch(`/api/${path}?${query}`, { credentials: "same-origin" });
  const answer = await response.json().catch(() => ({ error: `the server answered ${response.status}` }));
  if (answer.error) throw new Error(answer.error);
  return answer;
}

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
