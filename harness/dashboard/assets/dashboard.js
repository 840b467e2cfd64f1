// The elements that the page is made of.

import "./compare.js";
import "./monitor.js";
import "./output.js";
import "./runs.js";
import { followTabs } from "./page.js";

followTabs();
