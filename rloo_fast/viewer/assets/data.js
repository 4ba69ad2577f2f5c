// Answers of the server, or of the report that this page is: the same under the same questions.

import { byId } from "./dom.js";

const embedded = byId("report") ? JSON.parse(byId("report").textContent) : null;
const kept = new Map();
const MOST_KEPT = 400;

export const isReport = embedded !== null;

export function question(path, query) {
  const parts = Object.entries(query ?? {}).map(([k, v]) => `${k}=${isReport ? v : encodeURIComponent(v)}`);
  return parts.length ? `${path}?${parts.join("&")}` : path;
}

export async function ask(path, query) {
  const wanted = question(path, query);
  if (isReport) {
    if (wanted in embedded) return embedded[wanted];
    throw new Error("This is not in the report: the run's directory has it.");
  }
  if (kept.has(wanted)) return kept.get(wanted);
  const promise = fetched(wanted);
  promise.catch(() => kept.delete(wanted));
  if (kept.size > MOST_KEPT) kept.delete(kept.keys().next().value);
  kept.set(wanted, promise);
  return promise;
}

// Fails with a TypeError where there is no server, else with what it says.
async function fetched(wanted) {
  const response = await fetch(`/api/${wanted}`);
  const found = await response.json();
  if (!response.ok) throw new Error(found.error ?? response.statusText);
  return found;
}

export const stepsInReport = (run) => (isReport ? embedded.report.steps[run] ?? [] : null);

// What a run wrote since is asked for anew; the completions of a step never change.
export function forget(run) {
  for (const wanted of kept.keys()) {
    const isOfRun = wanted.includes(`run=${run}&`) || wanted.endsWith(`run=${run}`);
    if (isOfRun && /^(curves|steps|health|prompt|search)/.test(wanted)) kept.delete(wanted);
  }
}

export async function askNow(path) {
  if (isReport) return embedded[path];
  return fetched(path);
}
