// What is looked at: the view and its settings, all of it in the address, so that it can be sent.

export const VIEWS = [
  ["overview", "Overview"], ["completions", "Completions"], ["health", "Health"], ["time", "Time"],
];

export const state = { runs: [], hidden: new Set(), zoom: null };

export function place() {
  const [view, query] = location.hash.replace(/^#/, "").split("?");
  const known = VIEWS.some(([name]) => name === view) ? view : "overview";
  return { view: known, query: Object.fromEntries(new URLSearchParams(query ?? "")) };
}

export function address(view, query) {
  const given = Object.entries(query).filter(([, v]) => v !== undefined && v !== null && v !== "");
  const text = new URLSearchParams(given).toString();
  return `#${view}${text ? `?${text}` : ""}`;
}

export function go(view, query) {
  const wanted = address(view, query ?? {});
  if (location.hash === wanted) window.dispatchEvent(new HashChangeEvent("hashchange"));
  else location.hash = wanted;
}

// Changes some settings of the view; `quietly` leaves no step in the browser's history.
export function change(settings, quietly = true) {
  const { view, query } = place();
  const wanted = address(view, { ...query, ...settings });
  if (!quietly) location.hash = wanted;
  else {
    history.replaceState(null, "", wanted);
    window.dispatchEvent(new HashChangeEvent("hashchange"));
  }
}

export const shownRuns = () =>
  state.runs.map((run, number) => ({ ...run, number })).filter((run) => !state.hidden.has(run.number));

export function chosenRun(query) {
  const number = Number(query.run ?? 0);
  return state.runs[number] ? number : 0;
}
