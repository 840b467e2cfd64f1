// The form of the configuration survives a reload: what is filled in is kept as long as this tab of the browser is open.

const PLACE = "harness-form";

export function keep(keys, values) {
  sessionStorage.setItem(PLACE, JSON.stringify(Object.fromEntries(keys.map((key, at) => [key, values[at]]))));
  return values;
}

// What was kept, and for keys of which nothing is known the values that are there.
export function kept(keys, values) {
  const known = JSON.parse(sessionStorage.getItem(PLACE) ?? "{}");
  return keys.map((key, at) => (Object.hasOwn(known, key) ? known[key] : values[at]));
}
