// Is it learning? Curves of all runs, seeds as bands, and what differs between their settings.

import { ask } from "./data.js";
import { band, chart, smoothed, zoom } from "./charts.js";
import { choices, h, keyOf } from "./dom.js";
import { colour, duration, faded, figure } from "./format.js";
import { change, shownRuns, state } from "./state.js";

const X_AXES = [["step", "steps"], ["num_tokens", "tokens"], ["time", "time"]];

export async function overview(query) {
  const runs = shownRuns();
  const curves = await Promise.all(runs.map((run) => ask("curves", { run: run.number })));
  const x = X_AXES.some(([key]) => key === query.x) ? query.x : "step";
  const share = Number(query.smooth ?? 0.05);
  const groups = byLabel(runs, curves);
  const [first, rest] = metricNames(curves);
  const sought = (query.metric ?? "").toLowerCase();
  const draw = (key) => metricChart(key, groups, x, share);
  const main = first.filter((key) => key.toLowerCase().includes(sought));
  const others = rest.filter((key) => key.toLowerCase().includes(sought));
  return [
    runs.length === 1 ? figures(runs[0], curves[0]) : null,
    h("div", { class: "toolbar" },
      h("span", { class: "field" }, h("span", {}, "over"), choices("x axis", X_AXES, x, (key) => { zoom(null); change({ x: key }); })),
      h("label", { class: "field" }, h("span", {}, "smoothing"), h("input", {
        type: "range", min: 0, max: 0.4, step: 0.01, value: share, "aria-valuetext": `${Math.round(share * 100)} % of the run`,
        onchange: (event) => change({ smooth: event.target.value }),
      })),
      h("label", { class: "field grow" }, h("span", { class: "hide" }, "metric"), h("input", {
        type: "search", id: "search", placeholder: "Filter metrics", value: query.metric ?? "",
        onchange: (event) => change({ metric: event.target.value }),
      })),
      h("button", { type: "button", class: "quiet", disabled: state.zoom === null, id: "unzoom", onclick: () => zoom(null) }, "Whole run")),
    main.length || others.length ? null : h("p", { class: "nothing" }, sought ? `No metric has “${sought}” in its name.` : "Nothing is logged yet: the first curves come with the first log."),
    groups.length === 1 && curves.length === 1 && curves[0].eval_prefixes.some((p) => curves[0].series[`${p}reward`]) ? keyOf(["training", "evaluation"], colour) : null,
    h("div", { class: "grid" }, main.map(draw)),
    others.length ? h("details", { class: "more", open: Boolean(sought) || query.more === "1", ontoggle: (event) => {
      const grid = event.target.querySelector(".grid");
      if (event.target.open && !grid.firstChild) grid.append(...others.map(draw));
    } }, h("summary", {}, `${others.length} more metrics`), h("div", { class: "grid" })) : null,
    settings(runs),
  ];
}

function figures(run, curves) {
  const last = (key) => curves.series[key]?.[1].at(-1);
  const first = (key) => curves.series[key]?.[1][0];
  const evaluated = curves.series.eval_accuracy ? "eval_accuracy" : "eval_reward";
  const entries = [
    ["Reward", last("reward"), first("reward")],
    [evaluated === "eval_accuracy" ? "Held-out accuracy" : "Held-out reward", last(evaluated), first(evaluated)],
    ["KL, nats per token", last("kl")],
    ["Completion length", last("completions/mean_length"), first("completions/mean_length")],
    ["Completion tokens/s", last("throughput/completion_tokens_per_s")],
  ].filter(([, value]) => value !== undefined);
  const left = run.seconds_left === null || run.seconds_left === undefined ? [] : [["Time left", duration(run.seconds_left)]];
  return h("dl", { class: "figures" }, entries.map(([name, value, from]) =>
    h("div", {}, h("dt", {}, name), h("dd", {}, figure(value),
      from === undefined || from === value ? null : h("span", { class: "from" }, `from ${figure(from)}`)))),
    left.map(([name, text]) => h("div", {}, h("dt", {}, name), h("dd", {}, text))));
}

// label -> the runs of that label, with their curves
function byLabel(runs, curves) {
  const groups = new Map();
  runs.forEach((run, i) => {
    if (!groups.has(run.label)) groups.set(run.label, { label: run.label, colour: colour(run.number), curves: [] });
    groups.get(run.label).curves.push(curves[i]);
  });
  return [...groups.values()];
}

function metricNames(curves) {
  const logged = new Set(curves.flatMap((one) => Object.keys(one.series)));
  const prefixes = [...new Set(curves.flatMap((one) => one.eval_prefixes))];
  const bare = (key) => key.slice(prefixes.find((p) => key.startsWith(p))?.length ?? 0);
  const main = [...new Set(curves.flatMap((one) => one.main))];
  const here = (name) => logged.has(name) || prefixes.some((p) => logged.has(p + name));
  const isZero = (name) => curves.every((one) => ["", ...prefixes].every((p) =>
    (one.series[p + name]?.[1] ?? []).every((value) => Math.abs(value) < 5e-7)));
  const first = main.filter((name) => here(name) && !isZero(name));
  const rest = [...logged].filter((key) => !first.includes(bare(key)) && key !== "epoch" && !prefixes.some((p) => key === `${p}runtime`));
  return [first, rest.sort()];
}

function curve(curves, key, x) {
  const [at, y] = curves.series[key] ?? [[], []];
  const places = curves.x[x];
  return { x: at.map((i) => places[i]), y };
}

function metricChart(key, groups, x, share) {
  const lines = [], bands = [];
  for (const group of groups) {
    const found = group.curves.map((one) => curve(one, key, x)).filter((one) => one.x.length);
    if (found.length === 1) lines.push(...runLines(found[0], group, share));
    else if (found.length > 1) {
      const smooth = found.map((one) => ({ x: one.x, y: smoothed(one.y, share) }));
      const { x: at, mean, least, largest } = band(smooth);
      const start = lines.length;
      lines.push(
        { name: `${group.label}, largest`, x: at, y: largest, colour: group.colour, width: 0, quiet: true },
        { name: `${group.label}, least`, x: at, y: least, colour: group.colour, width: 0, quiet: true },
        { name: `${group.label}, mean of ${found.length}`, x: at, y: mean, colour: group.colour, width: 2 });
      bands.push([start, start + 1, faded(group.colour, 0.16)]);
    }
    lines.push(...evaluations(key, group, groups, x));
  }
  const [title, unit] = groups.flatMap((g) => g.curves).map((one) => one.titles[key]).find(Boolean) ?? [key, ""];
  return chart({ title, unit, lines, bands, xUnit: x === "time" ? "seconds" : x });
}

function runLines(one, group, share) {
  const isSmoothed = one.y.length * share >= 2;
  const line = { name: group.label, x: one.x, colour: group.colour };
  if (!isSmoothed) return [{ ...line, y: one.y, points: one.y.length < 3 }];
  return [{ ...line, name: `${group.label}, as logged`, y: one.y, faint: true }, { ...line, y: smoothed(one.y, share) }];
}

// Those of a metric beside it: of a run alone in a colour of their own, else dashed.
function evaluations(key, group, groups, x) {
  return group.curves.flatMap((one) => one.eval_prefixes.filter((p) => one.series[p + key]).map((prefix) => {
    const isAlone = groups.length === 1 && group.curves.length === 1;
    const what = prefix === "eval_" ? "evaluation" : prefix.slice(5, -1);
    const found = curve(one, prefix + key, x);
    return {
      name: isAlone ? what : `${group.label}, ${what}`, ...found, dashed: !isAlone, quiet: !isAlone,
      colour: isAlone ? colour(1) : group.colour, points: isAlone || found.x.length < 3,
    };
  }));
}

function settings(runs) {
  const configs = runs.map((run) => run.config ?? {});
  if (!configs.some((config) => Object.keys(config).length)) return null;
  const names = [...new Set(configs.flatMap(Object.keys))].sort();
  const text = (value) => (typeof value === "string" ? value : JSON.stringify(value) ?? "–");
  const differ = names.filter((name) => new Set(configs.map((config) => text(config[name]))).size > 1);
  const table = (rows) => h("div", { class: "scroll" }, h("table", {}, h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "setting"),
    runs.map((run) => h("th", { scope: "col" }, run.name)))),
    h("tbody", {}, rows.map((name) => h("tr", {}, h("th", { scope: "row" }, name),
      configs.map((config) => h("td", {}, text(config[name]))))))));
  const parts = [];
  if (runs.length > 1) {
    parts.push(h("section", { class: "panel", "aria-label": "Settings that differ" }, h("h2", {}, "Settings that differ"),
      differ.length ? table(differ) : h("p", { class: "nothing" }, "None: the runs differ in nothing but chance, code and machine.")));
  }
  const environment = runs.map((run) => run.environment ?? {});
  const facts = [...new Set(environment.flatMap(Object.keys))];
  parts.push(h("details", { class: "more" }, h("summary", {}, "All settings and versions"),
    h("div", { class: "scroll" }, h("table", {}, h("tbody", {}, facts.map((name) => h("tr", {}, h("th", { scope: "row" }, name),
      environment.map((one) => h("td", {}, one[name] ?? "–"))))))), table(names)));
  return parts;
}
