// The elements that the page is made of.

import "./monitor.js";
import "./output.js";
import "./runs.js";
