// Line charts by uPlot: curves of several runs, bands of seeds, lines at which to worry.

import { h } from "./dom.js";
import { colour, css, duration, faded, figure } from "./format.js";
import { state } from "./state.js";

const HEIGHT = 190;
const drawn = new Set();

// Those that left the page.
export function dropCharts() {
  for (const one of drawn) {
    if (one.element.isConnected) continue;
    one.stop();
    drawn.delete(one);
  }
}

// The mean of what lies within `share` of all points around a place; of few points, themselves.
export function smoothed(values, share) {
  const half = Math.floor((values.length * share) / 2);
  if (half < 1) return values;
  const sums = [0], counts = [0];
  values.forEach((value, i) => {
    const is = value !== null && value !== undefined;
    sums.push(sums[i] + (is ? value : 0));
    counts.push(counts[i] + (is ? 1 : 0));
  });
  return values.map((value, i) => {
    if (value === null || value === undefined) return value;
    const reach = Math.min(half, i, values.length - 1 - i);
    const [low, high] = [i - reach, i + reach + 1];
    return (sums[high] - sums[low]) / Math.max(counts[high] - counts[low], 1);
  });
}

// Mean, least and largest of several curves, as far as all of them go.
export function band(curves) {
  const end = Math.min(...curves.map((c) => c.x.at(-1)));
  const begin = Math.max(...curves.map((c) => c.x[0]));
  const x = [...new Set(curves.flatMap((c) => c.x))].filter((v) => v >= begin && v <= end);
  x.sort((a, b) => a - b);
  const values = curves.map((c) => interpolated(c, x));
  const of = (f) => x.map((_, i) => f(values.map((one) => one[i])));
  return {
    x,
    mean: of((all) => all.reduce((a, b) => a + b, 0) / all.length),
    least: of((all) => Math.min(...all)),
    largest: of((all) => Math.max(...all)),
  };
}

function interpolated({ x, y }, places) {
  let at = 0;
  return places.map((place) => {
    while (at < x.length - 2 && x[at + 1] < place) at += 1;
    if (x.length === 1 || place <= x[0]) return y[0];
    const share = (place - x[at]) / (x[at + 1] - x[at] || 1);
    return y[at] + Math.min(Math.max(share, 0), 1) * (y[at + 1] - y[at]);
  });
}

// lines: [{ name, x, y, colour, faint, dashed, points, width, fill }]; limits: { name: value }.
// bands: pairs of numbers of lines, the upper first.
export function chart({ title, unit, lines, limits = {}, bands = [], xUnit = "step", height = HEIGHT, badge = null,
  stacked = false }) {
  const known = lines.filter((line) => line.y.some((v) => v !== null && v !== undefined));
  const readout = h("span", { class: "readout" });
  const box = h("div", { class: "plot" });
  const element = h("figure", { class: "chart", role: "group", "aria-label": inWords(title, known, limits) },
    h("figcaption", {}, h("b", {}, title), unit ? h("span", { class: "unit" }, unit) : null, badge, readout), box);
  if (!known.length) {
    box.append(h("p", { class: "nothing" }, "Not logged."));
    return element;
  }
  const limitLines = Object.entries(limits).map(([name, value]) => ({
    name, x: ends(known), y: [value, value], colour: css("--worry"), dashed: true, isLimit: true, width: 1.25,
  }));
  const all = [...known, ...limitLines];
  const data = uPlot.join(all.map((line) => [line.x, line.y]));
  const series = all.map((line) => ({
    label: line.name,
    stroke: line.faint ? faded(line.colour, 0.3) : line.colour,
    width: line.width ?? (line.faint ? 1 : 1.75),
    dash: line.dashed ? [5, 4] : undefined,
    fill: line.fill,
    points: { show: Boolean(line.points), size: 5, fill: line.colour },
    spanGaps: true,
  }));
  const options = (width) => ({
    width, height, padding: [8, 10, 0, 0],
    legend: { show: false },
    scales: { x: { time: false, range: xRange }, y: { range: (u, low, high) => yRange(low, high, known, limits, stacked) } },
    series: [{}, ...series],
    bands: bands.map(([upper, lower, fill]) => ({ series: [upper + 1, lower + 1], fill })),
    axes: [axis({ values: (u, ticks) => ticks.map((t) => (xUnit === "seconds" ? duration(t) : figure(t))), size: 26 }),
      axis({ size: 52, values: (u, ticks) => ticks.map(figure) })],
    cursor: { sync: { key: "page", setSeries: false }, drag: { x: true, y: false }, points: { size: 6 }, y: false },
    hooks: {
      setCursor: [(u) => readout.replaceChildren(...reading(u, all, xUnit))],
      setSelect: [(u) => zoomTo(u)],
      draw: [(u) => nameLimits(u, limits)],
    },
  });
  mount(element, box, options, data);
  return element;
}

function mount(element, box, options, data) {
  const one = { element, plot: null };
  const draw = () => {
    const width = Math.floor(box.clientWidth);
    if (width < 40) return;
    if (one.plot === null) {
      one.plot = new uPlot(options(width), data, box);
      one.plot.over.addEventListener("dblclick", () => zoom(null));
    } else if (Math.abs(one.plot.width - width) > 1) one.plot.setSize({ width, height: one.plot.height });
  };
  let near = false;
  one.watcher = new ResizeObserver(() => near && draw());
  one.seen = new IntersectionObserver((entries) => {
    if (!entries.some((entry) => entry.isIntersecting)) return;
    near = true;
    draw();
    one.seen.disconnect();
  }, { rootMargin: "400px 0px" });
  one.watcher.observe(box);
  one.seen.observe(box);
  one.stop = () => {
    one.watcher.disconnect();
    one.seen.disconnect();
    one.plot?.destroy();
  };
  one.zoom = () => one.plot?.setScale("x", xLimits(one.plot));
  drawn.add(one);
}

function axis(more) {
  return {
    stroke: css("--muted"), font: `11px ${css("--sans")}`, grid: { stroke: css("--grid"), width: 1 },
    ticks: { show: false }, gap: 4, ...more,
  };
}

function ends(lines) {
  const xs = lines.flatMap((line) => [line.x[0], line.x.at(-1)]);
  const [low, high] = [Math.min(...xs), Math.max(...xs)];
  return high > low ? [low, high] : [low, low + 1];
}

const xRange = (u, low, high) => state.zoom ?? (high > low ? [low, high] : [low - 1, high + 1]);

const xLimits = (u) => {
  const [low, high] = state.zoom ?? [u.data[0][0], u.data[0].at(-1)];
  return { min: low, max: high };
};

function zoomTo(u) {
  if (u.select.width < 4) return;
  zoom([u.posToVal(u.select.left, "x"), u.posToVal(u.select.left + u.select.width, "x")]);
  u.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
}

export function zoom(range) {
  state.zoom = range;
  for (const one of drawn) one.zoom();
  window.dispatchEvent(new Event("zoomed"));
}

// Limits far above what was measured are left out of the axis: a flat line at 0 tells nothing.
function yRange(low, high, lines, limits, stacked) {
  const values = lines.filter((line) => !line.faint || lines.every((l) => l.faint)).flatMap((line) => line.y)
    .filter((v) => v !== null && v !== undefined);
  let [least, most] = [Math.min(...values), Math.max(...values)];
  if (low !== null && lines.every((line) => !line.faint)) [least, most] = [Math.min(low, most), Math.min(Math.max(high, least), most)];
  if (stacked) least = 0;
  for (const limit of Object.values(limits)) {
    const span = Math.max(most - least, Math.abs(most) * 0.2, 1e-12);
    if (limit > most && limit - most < 1.5 * span) most = limit;
    if (limit < least && least - limit < 1.5 * span) least = limit;
  }
  const span = most - least || Math.abs(most) * 0.1 || 1;
  const room = Math.max(span, Math.abs(most) * 0.04);
  const middle = (least + most) / 2;
  if (span < room) [least, most] = [middle - room / 2, middle + room / 2];
  const edge = 0.06 * Math.max(span, room);
  return [least >= 0 && least - edge < 0 ? 0 : least - edge, most + edge];
}

function nameLimits(u, limits) {
  const { ctx } = u;
  ctx.save();
  ctx.font = `${11 * devicePixelRatio}px ${css("--sans")}`;
  ctx.fillStyle = css("--worry");
  ctx.textAlign = "right";
  let said = "";
  for (const [name, value] of Object.entries(limits)) {
    const { top, height, left, width } = u.bbox;
    const y = Math.min(Math.max(u.valToPos(value, "y", true), top), top + height);
    const isOutside = value > u.scales.y.max ? "↑ " : value < u.scales.y.min ? "↓ " : "";
    if (isOutside && isOutside === said) continue; // one line beyond the edge is enough
    said = isOutside;
    const above = y - top > 16 * devicePixelRatio;
    ctx.fillText(`${isOutside}${name} ${figure(value)}`, left + width - 4, y + (above ? -4 : 12) * devicePixelRatio);
  }
  ctx.restore();
}

function reading(u, lines, xUnit) {
  const at = u.cursor.idx;
  const shown = lines.map((line, i) => ({ line, i })).filter(({ line }) => !line.faint && !line.isLimit && !line.quiet);
  const found = shown.map(({ line, i }) => {
    const value = at === null || at === undefined ? lastOf(line.y) : nearest(u.data[i + 1], at);
    const dot = h("i", { class: "dot" });
    dot.style.background = line.colour;
    return value === undefined ? null : h("span", { title: line.name }, dot, figure(value));
  }).filter(Boolean);
  if (at === null || at === undefined) return found.slice(0, 4);
  const where = u.data[0][at];
  return [h("span", { class: "at" }, xUnit === "seconds" ? duration(where) : figure(where)), ...found.slice(0, 6)];
}

const lastOf = (values) => values.findLast((v) => v !== null && v !== undefined);

function nearest(values, at) {
  for (let away = 0; away < values.length; away += 1) {
    for (const i of [at - away, at + away]) if (values[i] !== null && values[i] !== undefined) return values[i];
  }
  return undefined;
}

function inWords(title, lines, limits) {
  const parts = lines.filter((line) => !line.faint && !line.quiet).slice(0, 4).map((line) => {
    const known = line.y.filter((v) => v !== null && v !== undefined);
    return `${line.name}: from ${figure(known[0])} to ${figure(known.at(-1))}, ` +
      `between ${figure(Math.min(...known))} and ${figure(Math.max(...known))}`;
  });
  const at = Object.entries(limits).map(([name, value]) => `line “${name}” at ${figure(value)}`);
  return `Chart ${title}. ${[...parts, ...at].join("; ") || "Not logged"}.`;
}

// A bar of shares, in words beside it.
export function shareBar(parts) {
  const total = parts.reduce((sum, part) => sum + part.value, 0) || 1;
  const bar = h("div", { class: "bar", role: "img", "aria-label":
    parts.map((p) => `${p.name} ${Math.round((100 * p.value) / total)} %`).join(", ") });
  parts.forEach((part, i) => {
    const piece = h("span", { title: `${part.name}: ${figure(part.value)} s` });
    piece.style.width = `${(100 * part.value) / total}%`;
    piece.style.background = part.colour ?? colour(i);
    bar.append(piece);
  });
  return bar;
}
