// The page: which view, which runs, and what is new.

import { arrived, completions } from "./completions.js";
import { dropCharts } from "./charts.js";
import { ask, askNow, forget, isReport } from "./data.js";
import { byId, h } from "./dom.js";
import { colour, duration } from "./format.js";
import { healthView } from "./health.js";
import { overview } from "./overview.js";
import { VIEWS, change, go, place, state } from "./state.js";
import { timeView } from "./timing.js";

const DRAW = { overview, completions, health: healthView, time: timeView };
const EVERY_MS = 2000;
const KEYS = [
  ["1 – 4", "the views"], ["/", "search or filter"], ["[  ]", "the step before, the next step"], ["j  k", "the next group, the one before"],
  ["t", "light, dark, as the system"], ["?", "this help"], ["drag in a chart", "zoom; twice a click: back"],
];
let drawing = 0;

async function draw(keepsPlace = false) {
  const number = ++drawing;
  const { view, query } = place();
  drawTop(view);
  const main = byId("main");
  try {
    const parts = await DRAW[view](query);
    if (number !== drawing) return;
    main.style.minHeight = keepsPlace ? `${main.offsetHeight}px` : "";
    main.dataset.view = view;
    const focused = document.activeElement?.id;
    main.replaceChildren(...parts.flat(Infinity).filter(Boolean));
    dropCharts();
    if (focused && byId(focused) && main.contains(byId(focused))) byId(focused).focus({ preventScroll: true });
    if (!keepsPlace) arrived();
    main.dataset.drawn = String(number);
    requestAnimationFrame(() => { main.style.minHeight = ""; });
    notice("");
  } catch (error) {
    if (number === drawing) notice(error.message);
  }
}

function notice(text) {
  byId("notice").hidden = !text;
  byId("notice").textContent = text;
}

function drawTop(view) {
  byId("views").replaceChildren(...VIEWS.map(([name, words], i) => h("a", {
    href: `#${name}`, "aria-current": name === view ? "page" : null, title: `${i + 1}`,
  }, words)));
  const several = state.runs.length > 1;
  byId("runs").replaceChildren(...state.runs.map((run, number) => {
    const dot = h("i", { class: "dot" });
    dot.style.background = colour(state.runs.findIndex((one) => one.label === run.label));
    const words = [dot, h("b", {}, run.name), run.label === run.name ? null : h("span", {}, run.label),
      h("span", { class: `status ${run.status}` }, run.status),
      h("span", { class: "at" }, `step ${run.step}${run.max_steps ? ` of ${run.max_steps}` : ""}`),
      run.seconds_left ? h("span", { class: "at" }, `${duration(run.seconds_left)} left`) : null];
    if (!several) return h("span", { class: "run" }, words);
    return h("button", { type: "button", class: "run", "aria-pressed": String(!state.hidden.has(number)),
      title: "Show or hide this run", onclick: () => toggle(number) }, words);
  }));
  document.title = several ? `${state.runs.length} runs · rloo-fast` : `${state.runs[0]?.name ?? ""} · rloo-fast`;
}

function toggle(number) {
  if (state.hidden.has(number)) state.hidden.delete(number);
  else if (state.hidden.size < state.runs.length - 1) state.hidden.add(number);
  draw(true);
}

function theme(next) {
  const order = ["auto", "light", "dark"];
  const now = document.documentElement.dataset.theme ?? "auto";
  const wanted = next ?? order[(order.indexOf(now) + 1) % 3];
  document.documentElement.dataset.theme = wanted;
  try { localStorage.setItem("theme", wanted); } catch { /* a report from disk may have no storage */ }
  byId("theme").textContent = { auto: "◐", light: "☀", dark: "☾" }[wanted];
  byId("theme").setAttribute("aria-label", `Colours: ${wanted}`);
}

function help() {
  const dialog = h("dialog", { class: "help", "aria-label": "Keys" }, h("h2", {}, "Keys"),
    h("dl", { class: "keys" }, KEYS.map(([keys, words]) => h("div", {}, h("dt", {}, h("kbd", {}, keys)), h("dd", {}, words)))),
    h("p", {}, "The address says what is shown: copy it to send a group, a filter or a zoomed view."),
    h("button", { type: "button", onclick: () => dialog.close() }, "Close"));
  dialog.addEventListener("close", () => dialog.remove());
  document.body.append(dialog);
  dialog.showModal();
}

function nextGroup(by) {
  const groups = [...document.querySelectorAll(".group")];
  const top = byId("main").querySelector(".sticky")?.getBoundingClientRect().bottom ?? 0;
  const at = groups.findIndex((group) => group.getBoundingClientRect().top >= top - 2);
  const wanted = groups[Math.max(0, by > 0 && groups[at]?.getBoundingClientRect().top < top + 40 ? at + 1 : by > 0 ? at : at - 1)];
  wanted?.scrollIntoView({ block: "start" });
}

function pressed(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
  if (/^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) return event.key === "Escape" ? event.target.blur() : undefined;
  const acts = {
    1: () => go("overview"), 2: () => go("completions"), 3: () => go("health"), 4: () => go("time"),
    "/": () => byId("search")?.focus(), "[": () => byId("before")?.click(), "]": () => byId("after")?.click(),
    j: () => nextGroup(1), k: () => nextGroup(-1), t: () => { theme(); draw(true); }, "?": help,
  };
  if (event.key in acts) {
    event.preventDefault();
    acts[event.key]();
  }
}

// What runs have written since. A view that is read is left as it is, but for its curves.
async function look() {
  if (document.hidden) return;
  const { runs } = await askNow("runs");
  const changed = runs.flatMap((run, i) => (JSON.stringify(run.stamp) === JSON.stringify(state.runs[i]?.stamp) ? [] : [i]));
  const isOther = changed.length || runs.some((run, i) => run.status !== state.runs[i]?.status);
  state.runs = runs;
  if (!isOther) return;
  changed.forEach(forget);
  const { view, query } = place();
  const isReading = view === "completions" && query.follow !== "1";
  if (isReading || document.querySelector("dialog[open], .u-select[style*='width: 1']")) drawTop(view);
  else draw(true);
}

async function watch() {
  try {
    await look();
    if (byId("notice").dataset.lost) { delete byId("notice").dataset.lost; notice(""); }
  } catch (error) {
    byId("notice").dataset.lost = "1";
    notice(error instanceof TypeError ? "The server has ended: start rloo-fast view again to follow the run." : error.message);
  }
  setTimeout(watch, EVERY_MS);
}

async function begin() {
  byId("tools").append(
    isReport ? h("span", { class: "at" }, "a report") : null ?? "",
    h("button", { type: "button", id: "theme", onclick: () => { theme(); draw(true); } }, "◐"),
    h("button", { type: "button", "aria-label": "Keys", onclick: help }, "?"));
  let kept = null;
  try { kept = localStorage.getItem("theme"); } catch { /* as above */ }
  theme(["light", "dark"].includes(kept) ? kept : "auto");
  state.runs = (await ask("runs")).runs;
  window.addEventListener("hashchange", () => draw());
  window.addEventListener("zoomed", () => { if (byId("unzoom")) byId("unzoom").disabled = state.zoom === null; });
  window.addEventListener("keydown", pressed);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => draw(true));
  await draw();
  if (!isReport) setTimeout(watch, EVERY_MS);
}

begin().catch((error) => notice(error.message));
