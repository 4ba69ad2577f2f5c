// What the model writes: a step's prompts, each with its completions side by side.

import { ask, isReport, stepsInReport } from "./data.js";
import { card, openCompletion } from "./completion.js";
import { h, lazyList, picker } from "./dom.js";
import { figure } from "./format.js";
import { change, chosenRun, go, state } from "./state.js";
import { SHADES, legend } from "./tokens.js";

const SORTS = [
  ["", "as sampled"], ["-reward", "reward, highest"], ["reward", "reward, lowest"], ["-spread", "reward, most apart"],
  ["-advantage", "advantage, highest"], ["advantage", "advantage, lowest"], ["-length", "length, longest"], ["length", "length, shortest"],
];

export async function completions(query) {
  const run = chosenRun(query);
  const summaries = (await ask("steps", { run })).steps;
  const inReport = stepsInReport(run);
  const steps = summaries.map((summary) => summary.step).filter((step) => inReport === null || inReport.includes(step));
  if (!steps.length) return [chooser(run), nothingKept()];
  if (query.prompt) return [chooser(run, "prompt"), ...(await overTheRun(run, query))];
  if (query.find) return [chooser(run, "find"), ...(await everywhere(run, query))];
  const step = steps.includes(Number(query.step)) ? Number(query.step) : steps.at(-1);
  const summary = summaries.find((one) => one.step === step);
  const found = await ask("completions", { run, step });
  const rows = found.rows.map((row, number) => ({ ...row, number }));
  const groups = arranged(rows, query, found.prompts);
  const place = { run, step, prompts: found.prompts, shade: query.shade, query };
  const list = lazyList(groups, (group) => estimate(group), (group) => groupCard(group, place));
  const shown = groups.reduce((sum, group) => sum + group.rows.length, 0);
  later(() => arrive(list, groups, place));
  return [
    h("div", { class: "toolbar sticky" }, chooser(run), stepPicker(steps, step, query), filters(rows, query), shading(query)),
    h("p", { class: "count" }, `${shown} of ${summary.num_rows ?? rows.length} completions, ${groups.length} prompts`,
      rows.length < (summary.num_rows ?? 0) ? ` (${rows.length} are kept: view_mib bounds them)` : "", searchNote(query, run)),
    groups.length ? list : h("p", { class: "nothing" }, "No completion of this step is left by the filters."),
  ];
}

let afterDrawing = null;
const later = (act) => { afterDrawing = act; };

// The view is on the page now: scroll to what the address names.
export function arrived() {
  const act = afterDrawing;
  afterDrawing = null;
  act?.();
}

function chooser(run, leave) {
  const runs = state.runs.map((one, number) => [number, one.name]);
  return [
    leave ? h("button", { type: "button", class: "quiet", onclick: () => change({ prompt: null, find: null }, false) }, "← Back to the step") : null,
    runs.length > 1 ? picker("run", runs, run, (number) => go("completions", { run: number })) : null,
  ];
}

const nothingKept = () => h("div", { class: "panel" }, h("h2", {}, "No completions are kept"),
  h("p", {}, "They are kept while a run trains: ", h("code", {}, "rloo-fast train"), " does so by default, ",
    h("code", {}, "RLOOConfig(view_mib=256)"), " does in Python. ", h("code", {}, "log_completions_csv"), " is read as well, without tokens."));

function stepPicker(steps, step, query) {
  const at = steps.indexOf(step);
  const to = (i) => change({ step: steps[i], group: null, sample: null }, false);
  const out = h("output", {}, step);
  return h("div", { class: "steps", role: "group", "aria-label": "Step" },
    h("button", { type: "button", disabled: at <= 0, onclick: () => to(at - 1), "aria-label": "The step before", id: "before" }, "‹"),
    h("label", {}, h("span", {}, "step "), out,
      h("input", { type: "range", min: 0, max: steps.length - 1, value: at, "aria-label": "Step", "aria-valuetext": `step ${step}`,
        oninput: (event) => { out.value = steps[event.target.value]; }, onchange: (event) => to(Number(event.target.value)) })),
    h("button", { type: "button", disabled: at >= steps.length - 1, onclick: () => to(at + 1), "aria-label": "The next step", id: "after" }, "›"),
    isReport ? null : h("label", { class: "check" }, h("input", { type: "checkbox", checked: query.follow === "1", id: "follow",
      onchange: (event) => change({ follow: event.target.checked ? "1" : null, step: null }) }), "newest"));
}

function filters(rows, query) {
  const bound = (name, label) => h("input", { type: "number", step: "any", placeholder: label, "aria-label": `reward ${label}`,
    value: query[name] ?? "", onchange: (event) => change({ [name]: event.target.value }) });
  return [
    picker("sort", SORTS, query.sort ?? "", (sort) => change({ sort, group: null })),
    h("span", { class: "field", role: "group", "aria-label": "Reward" }, h("span", {}, "reward"), bound("least", "from"), bound("most", "to")),
    rows.some((row) => row.end === "length") ? picker("end", [["", "all"], ["stop", "itself"], ["length", "cut"]], query.end ?? "", (end) => change({ end })) : null,
    h("label", { class: "field grow" }, h("span", { class: "hide" }, "text"), h("input", { type: "search", id: "search",
      placeholder: "Search prompts and completions", value: query.text ?? "", onchange: (event) => change({ text: event.target.value }) })),
  ];
}

function shading(query) {
  const options = [["", "none"], ...Object.entries(SHADES).map(([name, [words]]) => [name, words])];
  return [picker("shade", options, query.shade ?? "", (shade) => change({ shade })), legend(query.shade)];
}

function searchNote(query, run) {
  if (!query.text || isReport) return null;
  return [" · ", h("button", { type: "button", class: "link", onclick: () => go("completions", { run, find: query.text }) }, "search all steps")];
}

// Groups of rows that the filters leave, in the order asked for.
function arranged(rows, query, prompts) {
  const text = (query.text ?? "").toLowerCase();
  const number = (name) => (query[name] === undefined || query[name] === "" ? null : Number(query[name]));
  const [least, most] = [number("least"), number("most")];
  const kept = rows.filter((row) =>
    (least === null || row.reward >= least) && (most === null || (row.reward !== null && row.reward <= most)) &&
    (!query.end || row.end === query.end) &&
    (!text || row.completion.toLowerCase().includes(text) || prompts[row.prompt_id].toLowerCase().includes(text)));
  const groups = new Map();
  for (const row of kept) {
    if (!groups.has(row.group)) groups.set(row.group, { group: row.group, prompt_id: row.prompt_id, rows: [] });
    groups.get(row.group).rows.push(row);
  }
  const found = [...groups.values()];
  const sort = query.sort ?? "";
  if (!sort) return found;
  const sign = sort.startsWith("-") ? -1 : 1;
  const name = sort.replace("-", "");
  const known = (row) => row[name] ?? (sign < 0 ? -Infinity : Infinity);
  const spread = (group) => Math.max(...group.rows.map((r) => r.reward ?? 0)) - Math.min(...group.rows.map((r) => r.reward ?? 0));
  if (name !== "spread") for (const group of found) group.rows.sort((a, b) => sign * (known(a) - known(b)));
  const key = name === "spread" ? spread : (group) => known(group.rows[0]);
  return found.sort((a, b) => sign * (key(a) - key(b)) || a.group - b.group);
}

function estimate(group) {
  const columns = Math.max(1, Math.floor(window.innerWidth / 290));
  const chars = Math.max(...group.rows.map((row) => Math.min(row.completion.length, 700)));
  return 76 + Math.ceil(group.rows.length / columns) * (58 + 20 * Math.ceil(chars / 34));
}

function groupCard(group, place) {
  const rewards = group.rows.map((row) => row.reward).filter((v) => v !== null);
  const mean = rewards.length ? rewards.reduce((a, b) => a + b, 0) / rewards.length : null;
  const prompt = place.prompts[group.prompt_id];
  return h("section", { class: "group", "aria-label": `Group ${group.group + 1}`, "data-group": group.group },
    h("header", {},
      h("a", { class: "number", href: linkTo(place, group), title: "Link to this group" }, `#${group.group + 1}`),
      promptText(prompt),
      h("span", { class: "mean" }, "mean ", h("b", {}, figure(mean))),
      isReport ? null : h("button", { type: "button", class: "link", onclick: () => go("completions", { run: place.run, prompt: group.prompt_id }) }, "over the run")),
    h("div", { class: "cards" }, group.rows.map((row) => card({
      ...place, number: row.number, row, isChosen: isChosen(row, place.query), open: () => whole(row, place),
    }))));
}

const linkTo = (place, group) => `#completions?run=${place.run}&step=${place.step}&group=${group.group}`;
const isChosen = (row, query) => String(row.group) === query.group && (query.sample === undefined || String(row.sample) === query.sample);

function promptText(prompt) {
  if (prompt.length < 240) return h("div", { class: "text prompt" }, prompt);
  return h("details", { class: "prompt" }, h("summary", {}, h("span", { class: "text" }, `${prompt.slice(0, 200)}…`)), h("div", { class: "text" }, prompt));
}

// `before`: the address when it is closed again.
function whole(row, place, before = location.hash) {
  const all = place.siblings ?? [row];
  const address = (one) => history.replaceState(null, "", `${linkTo(place, one)}&sample=${one.sample}${place.shade ? `&shade=${place.shade}` : ""}`);
  address(row);
  openCompletion({
    ...place, number: row.number, row, prompt: place.prompts[row.prompt_id],
    close: () => history.replaceState(null, "", before),
    next: (by) => {
      const at = all.indexOf(row);
      if (all[at + by]) whole(all[at + by], place, before);
      return Boolean(all[at + by]);
    },
  });
}

function arrive(list, groups, place) {
  place.siblings = groups.flatMap((group) => group.rows);
  const { group, sample } = place.query;
  if (group === undefined) return;
  const at = groups.findIndex((one) => String(one.group) === group);
  const box = list.reveal(at);
  box?.querySelector(".group").classList.add("chosen");
  if (sample === undefined) return;
  const row = groups[at]?.rows.find((one) => String(one.sample) === sample);
  if (row) whole(row, place, linkTo(place, row));
}

// The same prompt, step after step
async function overTheRun(run, query) {
  const { steps } = await ask("prompt", { run, id: query.prompt });
  if (!steps.length) return [h("p", { class: "nothing" }, "This prompt is in no step that is kept.")];
  const prompt = steps[0].prompts[query.prompt];
  const list = lazyList(steps, (one) => estimate({ rows: one.rows }), (one) => {
    const rows = one.rows.map((row) => ({ ...row, number: null }));
    return h("section", { class: "group", "aria-label": `Step ${one.step}` },
      h("header", {}, h("a", { class: "number", href: `#completions?run=${run}&step=${one.step}&group=${rows[0].group}` }, `step ${one.step}`)),
      h("div", { class: "cards" }, rows.map((row) => card({ run, step: one.step, row, open: () =>
        go("completions", { run, step: one.step, group: row.group, sample: row.sample }) }))));
  });
  return [h("div", { class: "panel" }, h("h2", {}, `One prompt in ${steps.length} steps`), h("div", { class: "text prompt" }, prompt)), list];
}

async function everywhere(run, query) {
  const { hits, is_all: isAll } = await ask("search", { run, q: query.find });
  return [
    h("p", { class: "count" }, `${hits.length}${isAll ? "" : " newest"} completions with “${query.find}”, the newest first`),
    h("div", { class: "cards wide" }, hits.map((hit) => h("article", { class: "card" },
      h("a", { class: "cardtop", href: `#completions?run=${run}&step=${hit.step}&group=${hit.group}&sample=${hit.sample}` },
        h("b", { class: "reward" }, figure(hit.reward)), h("span", { class: "grow" }), `step ${hit.step}`),
      h("div", { class: "text" }, hit.completion)))),
  ];
}
