// What a program that was started here has printed, as it comes.

import { ask } from "./api.js";
import { element } from "./format.js";
import { repeat, sayFresh, sayOld } from "./page.js";

const LONGEST = 200000;

class Output extends HTMLElement {
  connectedCallback() {
    this.printed = document.createTextNode("");
    this.text = element("pre", { class: "h-output", tabindex: 0, role: "region", "aria-label": "output of the run" }, this.printed);
    this.words = element("div", { class: "h-note", role: "status" });
    this.replaceChildren(this.words, this.text);
    this.addEventListener("harness-trouble", (event) => sayOld(this, this.words, event.detail));
    this.run = this.wanted;
    this.poll = repeat(this, 1000, () => this.refresh());
  }

  disconnectedCallback() {
    this.poll.stop();
  }

  set run(id) {
    this.wanted = id;
    this.offset = 0;
    if (this.text) this.printed.data = "";
    if (this.text) this.text.dataset.note = id ? `${id} has printed nothing that is kept here: only what is started from this page is` : "what the chosen run prints is shown here";
    this.poll?.soon();
  }

  async refresh() {
    const run = this.wanted;
    if (!run) return;
    const answer = await ask("output", { run, offset: this.offset });
    if (run !== this.wanted) return;
    sayFresh(this);
    this.words.textContent = "";
    if (!answer.text) return;
    const atEnd = this.text.scrollTop + this.text.clientHeight >= this.text.scrollHeight - 20;
    this.offset = answer.offset;
    // Added to the text that is there: what is selected in it stays selected.
    this.printed.appendData(answer.text);
    this.printed.deleteData(0, Math.max(0, this.printed.length - LONGEST));
    if (atEnd) this.text.scrollTop = this.text.scrollHeight;
  }
}

customElements.define("harness-output", Output);
