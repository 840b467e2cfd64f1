// Answers what the page asks from the data inside a report, as `api.js` does from the server.

const report = JSON.parse(document.getElementById("harness-report").textContent);

export const { run } = report;

// A name from a log may be that of something that every object has.
const own = (values, name) => (Object.hasOwn(values, name) ? values[name] : null);

const ANSWERS = {
  names: () => report.names,
  settings: () => report.settings,
  story: ({ step }) => ({ story: own(report.stories, String(step)) }),
  run: ({ seen, name, statistic, axis, first, last }) => {
    const { version } = report;
    if (seen === version) return { version, unchanged: true };
    const range = first == null || last == null ? null : [first, last];
    return { ...report.view, version, curves: curvesOf(name, axis, range), layers: layersOf(statistic, range) };
  },
};

export async function ask(path, parameters = {}) {
  return ANSWERS[path](parameters);
}

// First index, and one past the last, of the points that lie in a range of steps. A point stands for the steps up to
// the next one.
function span(steps, range) {
  if (!range) return [0, steps.length];
  const after = (step) => {
    const at = steps.findIndex((one) => one > step);
    return at < 0 ? steps.length : at;
  };
  return [Math.max(0, after(range[0]) - 1), after(range[1])];
}

function cut(curve, [begin, end]) {
  const part = (values) => values && values.slice(begin, end);
  const nonfinite = curve.nonfinite.filter(([at]) => at >= begin && at < end).map(([at, ...counts]) => [at - begin, ...counts]);
  return { mean: part(curve.mean), low: part(curve.low), high: part(curve.high), nonfinite };
}

function curvesOf(names, axis, range) {
  const spans = report.curves.xs.map(({ steps }) => span(steps, range));
  const xs = report.curves.xs.map((x, at) => ({ steps: x.steps.slice(...spans[at]), x: x[axis].slice(...spans[at]) }));
  const nothing = { x: xs.push({ steps: [], x: [] }) - 1, mean: [], low: null, high: null, nonfinite: [] };
  const curves = {};
  for (const name of names) {
    const curve = own(report.curves.curves, name) || layerCurve(name);
    curves[name] = curve ? { x: curve.x, ...cut(curve, spans[curve.x]) } : nothing;
  }
  return { axis, xs, curves };
}

// One row of a heat map as a curve; how many values of a point were not finite is not kept.
function layerCurve(name) {
  for (const [statistic, layers] of Object.entries(report.layers)) {
    const row = layers.names.findIndex((layer) => name === `${report.names.prefix.LAYERS}${statistic}/${layer}`);
    if (row >= 0) return { x: layers.x, mean: layers.values[row], low: null, high: null, nonfinite: layers.nonfinite[row].map((at) => [at, null, null]) };
  }
  return null;
}

function layersOf(statistic, range) {
  const layers = own(report.layers, statistic);
  if (!layers) return null;
  const [begin, end] = span(layers.steps, range);
  return {
    ...layers,
    steps: layers.steps.slice(begin, end),
    values: layers.values.map((row) => row.slice(begin, end)),
    nonfinite: layers.nonfinite.map((places) => places.filter((at) => at >= begin && at < end).map((at) => at - begin)),
  };
}
