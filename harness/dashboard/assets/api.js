// What the page asks the server; in a report `embedded.js` stands in its place. Every answer is plain data; an
// error has one sentence for people.

export async function ask(path, parameters = {}) {
  const query = new URLSearchParams();
  for (const [name, value] of Object.entries(parameters))
    for (const item of Array.isArray(value) ? value : [value]) if (item != null) query.append(name, item);
  const response = await fetch(`/api/${path}?${query}`, { credentials: "same-origin" }).catch(() => {
    throw new Error("the server does not answer");
  });
  const answer = await response.json().catch(() => ({ error: `the server answered ${response.status}, and not with data` }));
  if (!response.ok || answer.error) throw new Error(answer.error ?? `the server answered ${response.status}`);
  return answer;
}
