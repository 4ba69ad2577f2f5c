// Is something wrong? Each check with the line at which to worry, and why.

import { ask } from "./data.js";
import { chart, smoothed } from "./charts.js";
import { h, keyOf, picker } from "./dom.js";
import { colour, faded, figure } from "./format.js";
import { chosenRun, go, state } from "./state.js";

const WORDS = { ok: "fine", worry: "look here", unknown: "not known" };

export async function healthView(query) {
  const run = chosenRun(query);
  const [{ checks }, curves, { steps }] = await Promise.all(
    ["health", "curves", "steps"].map((path) => ask(path, { run })));
  const worries = checks.filter((check) => check.state === "worry");
  const runs = state.runs.map((one, number) => [number, one.name]);
  return [
    h("div", { class: "toolbar" },
      runs.length > 1 ? picker("run", runs, run, (number) => go("health", { run: number })) : null,
      h("p", { class: "verdict", "data-worries": worries.length }, worries.length
        ? [h("b", {}, `${worries.length} of ${checks.length} checks want a look: `), worries.map((w) => w.title).join(", ")]
        : [h("b", {}, "Nothing to worry about "), `in ${checks.filter((c) => c.state === "ok").length} checks that are known.`])),
    h("div", { class: "grid checks" }, checks.map((check) => checkCard(check, curves, steps, run)),
      spread("Reward, over its completions", "reward", steps, run,
        "The outer band holds all completions of a step, the next four of five, the inner half of them, the line the median. A band that closes on one value has nothing left to teach; two that drift apart are two kinds of answers."),
      spread("Length, over its completions", "length", steps, run,
        "Bands as those of the reward. A tail that grows towards max_completion_length comes before completions are cut.", "tokens")),
  ];
}

function checkCard(check, curves, steps, run) {
  if (check.source === "parts") return parts(check, curves);
  const own = colour(run);
  const line = check.source === "steps"
    ? { x: steps.map((s) => s.step), y: steps.map((s) => s[check.key] ?? null) }
    : { x: (curves.series[check.key]?.[0] ?? []).map((i) => curves.x.step[i]), y: curves.series[check.key]?.[1] ?? [] };
  const isLong = line.y.length > 30;
  const lines = isLong
    ? [{ name: "as logged", ...line, colour: own, faint: true }, { name: check.title, x: line.x, y: smoothed(line.y, 0.06), colour: own }]
    : [{ name: check.title, ...line, colour: own, points: line.y.length < 3 }];
  const badge = h("span", { class: `badge ${check.state}` }, WORDS[check.state]);
  return h("section", { class: "check", "data-key": check.key, "data-state": check.state },
    chart({ title: check.title, unit: check.unit, lines, limits: check.lines, badge }),
    h("p", { class: "why" }, check.why));
}

function parts(check, curves) {
  const names = check.series.map((key) => key.replace(/^rewards\/(.+)\/mean$/, "$1"));
  const lines = check.series.map((key, i) => {
    const [at, y] = curves.series[key];
    return { name: names[i], x: at.map((n) => curves.x.step[n]), y: smoothed(y, y.length > 30 ? 0.06 : 0), colour: colour(i), points: y.length < 3, quiet: true };
  });
  const badge = h("span", { class: `badge ${check.state}` }, WORDS[check.state]);
  return h("section", { class: "check", "data-key": check.key, "data-state": check.state },
    chart({ title: check.title, unit: check.unit, lines, badge }), keyOf(lines.map((line) => `${line.name} ${figure(line.y.at(-1))}`), colour), h("p", { class: "why" }, check.why));
}

// Quantiles of each step: least, 10 %, 25 %, median, 75 %, 90 %, largest
function spread(title, key, steps, run, why, unit = "") {
  const known = steps.filter((step) => step[key]);
  const x = known.map((step) => step.step);
  const own = colour(run);
  const of = (i) => known.map((step) => step[key][i]);
  const names = ["largest", "90 %", "75 %", "median", "25 %", "10 %", "least"];
  const lines = [6, 5, 4, 3, 2, 1, 0].map((i, n) => ({ name: names[n], x, y: of(i), colour: own, width: i === 3 ? 1.75 : 0, quiet: i !== 3 }));
  const bands = [[0, 6, faded(own, 0.1)], [1, 5, faded(own, 0.14)], [2, 4, faded(own, 0.2)]];
  return h("section", { class: "check" }, chart({ title, unit, lines: known.length ? lines : [], bands }), h("p", { class: "why" }, why));
}
