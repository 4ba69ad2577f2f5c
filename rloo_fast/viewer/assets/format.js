// Numbers, times and colours.

export function figure(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  const size = Math.abs(value);
    if (size < 1e-12) return "0";
  if (size < 1e-3) return value.toExponential(1).replace("e-", "e−").replace(/^-/, "−");
  if (size >= 1e9) return `${(value / 1e9).toPrecision(3)}G`;
  if (size >= 1e6) return `${(value / 1e6).toPrecision(3)}M`;
  if (size >= 1e4) return `${(value / 1e3).toPrecision(3)}k`;
  const text = Number.isInteger(value) ? String(value) : Number(value.toPrecision(3)).toString();
  return text.replace(/^-/, "−");
}

export function signed(value) {
  if (value === null || value === undefined) return "–";
  return `${value > 0 ? "+" : value < 0 ? "−" : ""}${Math.abs(value).toFixed(2)}`;
}

export function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  const s = Math.round(seconds);
  if (s < 60) return `${s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min ${String(s % 60).padStart(2, "0")} s`;
  const hours = Math.floor(s / 3600);
  const minutes = String(Math.floor((s % 3600) / 60)).padStart(2, "0");
  return hours < 48 ? `${hours} h ${minutes} min` : `${(hours / 24).toFixed(1)} days`;
}

const COLOURS = {
  light: ["#2f5bd8", "#d2571b", "#16835a", "#9a3fb5", "#a97a00", "#c2304a", "#0f7f8a", "#5b616b"],
  dark: ["#82a8ff", "#ff9a62", "#56cc9d", "#d796ea", "#e3bb4b", "#ff8fa1", "#5fd0da", "#a7b0bd"],
};

export const isDark = () =>
  (document.documentElement.dataset.theme ?? "auto") === "auto"
    ? matchMedia("(prefers-color-scheme: dark)").matches
    : document.documentElement.dataset.theme === "dark";

export const colour = (number) => COLOURS[isDark() ? "dark" : "light"][number % 8];

export function faded(hex, alpha) {
  const [r, g, b] = [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
  return `rgba(${r}, ${g}, ${b}, ${alpha})`;
}

// The colour that `hex` at `alpha` gives on a surface, opaque: areas may lie over each other.
export function onSurface(hex, alpha) {
  const under = css("--surface").replace(/^#(.)(.)(.)$/, "#$1$1$2$2$3$3");
  const mixed = [1, 3, 5].map((i) => Math.round(alpha * parseInt(hex.slice(i, i + 2), 16) + (1 - alpha) * parseInt(under.slice(i, i + 2), 16)));
  return `rgb(${mixed.join(", ")})`;
}

export const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
