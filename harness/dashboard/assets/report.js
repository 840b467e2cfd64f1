// A report: the page of one run, with the run inside.

import "./monitor.js";
import { run } from "./api.js";

document.querySelector("harness-monitor").run = run;
