// Where does the time go? Stages of a step, stacked; tokens per second; what memory is known.

import { ask } from "./data.js";
import { chart, shareBar } from "./charts.js";
import { h, picker } from "./dom.js";
import { colour, figure, onSurface } from "./format.js";
import { chosenRun, go, shownRuns, state } from "./state.js";

// in the order of a step; time beside another stage is no part of the sum
const STAGES = { rollout: "rollout", weight_sync: "weight sync", reward: "reward", reference: "reference", old_logps: "old log-probs", policy: "policy forward, backward", optimizer: "optimizer" };
const MEMORY = { "memory/device_gib": "Most memory of tensors on a GPU so far", "memory/reserved_gib": "Most memory that torch took of a GPU so far", "memory/host_gib": "Most memory of a process so far", "memory/moved_gib": "Moved to the host and back for a rollout", "memory/move_s": "Moving it", "sync/gib": "Weights sent to the engine" };
const BESIDE = ["reward_hidden"];

export async function timeView(query) {
  const run = chosenRun(query);
  const curves = await ask("curves", { run });
  const runs = state.runs.map((one, number) => [number, one.name]);
  const stages = stagesOf(curves);
  const speed = "throughput/completion_tokens_per_s";
  const compared = await Promise.all(shownRuns().map(async (one) => ({ run: one, curves: await ask("curves", { run: one.number }) })));
  const lineOf = (key) => compared.filter((one) => one.curves.series[key]).map((one) => ({
    name: one.run.name, colour: colour(one.run.number), ...over(one.curves, key), points: one.curves.series[key][0].length < 3,
  }));
  const memory = Object.keys(curves.series).filter((key) => /mem|gib|mfu/i.test(key)).toSorted();
  return [
    runs.length > 1 ? h("div", { class: "toolbar" }, picker("run", runs, run, (number) => go("time", { run: number }))) : null,
    stages.length ? shares(stages) : h("p", { class: "nothing" }, "No times are logged yet."),
    h("div", { class: "grid" },
      stages.length ? stacked(stages) : null,
      chart({ title: "Speed", unit: "completion tokens/s", lines: lineOf(speed) }),
      chart({ title: "A step", unit: "seconds", lines: lineOf("step_time") }),
      curves.series["time/reward_hidden_s"]?.[1].some((seconds) => seconds > 0) ? chart({ title: "Rewards beside the rollout", unit: "seconds, not in the sum", lines: lineOf("time/reward_hidden_s") }) : null,
      memory.map((key) => chart({ title: MEMORY[key] ?? key, unit: unitOf(key), lines: lineOf(key) }))),
    memory.length ? null : h("p", { class: "why" }, "Memory is not in this run's log: an earlier version wrote it."),
  ];
}

const unitOf = (key) => (key.endsWith("gib") ? "GiB" : key.endsWith("_s") ? "seconds" : "");
const over = (curves, key) => ({ x: curves.series[key][0].map((i) => curves.x.step[i]), y: curves.series[key][1] });

function stagesOf(curves) {
  const keys = Object.keys(curves.series).filter((key) => /^time\/.+_s$/.test(key)).map((key) => key.slice(5, -2));
  const names = [...Object.keys(STAGES).filter((name) => keys.includes(name)),
    ...keys.filter((name) => !(name in STAGES) && !BESIDE.includes(name))];
  const whole = curves.series.step_time ? new Map(pairs(over(curves, "step_time"))) : new Map();
  // a sync runs inside of its rollout
  const found = names.map((name) => ({ name: STAGES[name] ?? name, key: name, at: new Map(pairs(over(curves, `time/${name}_s`))) }));
  const sync = found.find((one) => one.key === "weight_sync");
  const rollout = found.find((one) => one.key === "rollout");
  if (sync && rollout) for (const [x, y] of rollout.at) rollout.at.set(x, Math.max(y - (sync.at.get(x) ?? 0), 0));
  const rest = new Map([...whole].map(([x, y]) => [x, Math.max(y - found.reduce((sum, one) => sum + (one.at.get(x) ?? 0), 0), 0)]));
  if (rest.size) found.push({ name: "rest", key: "rest", at: rest });
  const xs = [...whole.keys()];
  return found.map((one, i) => ({ ...one, colour: colour(i), x: xs, y: xs.map((x) => one.at.get(x) ?? 0) })).filter((one) => one.y.some((v) => v > 0));
}

const pairs = ({ x, y }) => x.map((place, i) => [place, y[i]]);

function shares(stages) {
  const means = stages.map((one) => ({ name: one.name, colour: one.colour, value: one.y.reduce((a, b) => a + b, 0) / one.y.length }));
  const total = means.reduce((sum, one) => sum + one.value, 0);
  const order = means.toSorted((a, b) => b.value - a.value);
  return h("section", { class: "panel", "aria-label": "Share of a step" }, h("h2", {}, `A step takes ${figure(total)} s on average`), shareBar(means),
    h("ul", { class: "shares" }, order.map((one) => {
      const dot = h("i", { class: "dot" });
      dot.style.background = one.colour;
      return h("li", {}, dot, one.name, h("b", {}, `${Math.round((100 * one.value) / total)} %`), h("span", {}, `${figure(one.value)} s`));
    })));
}

function stacked(stages) {
  let sums = stages[0].x.map(() => 0);
  const lines = stages.map((one) => {
    sums = sums.map((sum, i) => sum + one.y[i]);
    return { name: one.name, x: one.x, y: sums, colour: one.colour, width: 1, quiet: true, fill: onSurface(one.colour, 0.6) };
  });
  // the upper ones first, so that the lower are drawn over them
  return chart({ title: "Stages of a step", unit: "seconds, stacked", lines: lines.reverse(), stacked: true });
}
