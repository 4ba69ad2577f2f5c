// Tokens as they were sampled, shaded by what the trainer or the sampler says of each.

import { h } from "./dom.js";
import { figure, isDark } from "./format.js";

// name, its words, a strength in [-1, 1] for a value, what the two ends of the scale say
export const SHADES = {
  logp: ["log-prob", (v) => Math.min(-v / 5, 1), "likely", "unlikely"],
  entropy: ["entropy", (v) => Math.min(v / 2.5, 1), "certain", "open"],
  kl: ["KL", (v) => Math.max(Math.min(v / 2, 1), -1), "reference likes it more", "policy likes it more"],
  sampler_diff: ["sampler − trainer", (v) => (Math.abs(v) < 1e-6 ? 0 : Math.min((Math.log10(Math.abs(v)) + 6) / 6, 1)), "equal", "1 nat apart"],
};
const HUES = { logp: [24, 250], entropy: [285, 285], kl: [10, 225], sampler_diff: [345, 345] };

export const shadesOf = (tokens) => Object.keys(SHADES).filter((name) => tokens[name]?.some((v) => v !== null));

function paint(name, strength) {
  if (!strength) return "";
  const hue = HUES[name][strength > 0 ? 0 : 1];
  const alpha = Math.abs(strength) * (isDark() ? 0.55 : 0.5);
  return `hsla(${hue}, 85%, ${isDark() ? 55 : 58}%, ${alpha.toFixed(3)})`;
}

// Special tokens are marked where the completion's own text goes without them.
export function shadedText(tokens, shade) {
  const strength = SHADES[shade]?.[1];
  const words = Object.keys(SHADES).filter((name) => tokens[name]);
  const spans = tokens.text.map((text, i) => {
    const isSpecial = /^<[|/]?[\w｜▁ ]+[|/]?>$/.test(text.trim());
    const span = h("span", { class: isSpecial ? "token special" : "token" }, text);
    const value = tokens[shade]?.[i];
    if (strength && value !== null && value !== undefined) span.style.backgroundColor = paint(shade, strength(value));
    return span;
  });
  const element = h("div", { class: "text tokens" }, spans);
  const tip = (event) => {
    const at = spans.indexOf(event.target);
    if (at < 0) return;
    const said = words.map((name) => `${SHADES[name][0]} ${figure(tokens[name][at])}`).join("\n");
    event.target.title = `${JSON.stringify(tokens.text[at])}, token ${at + 1}\n${said}`;
  };
  element.addEventListener("pointerover", tip);
  return element;
}

export function legend(shade) {
  if (!SHADES[shade]) return null;
  const [name, , low, high] = SHADES[shade];
  const scale = h("span", { class: "scale" });
  const places = shade === "kl" ? [-1, -0.5, 0, 0.5, 1] : [0, 0.25, 0.5, 0.75, 1];
  for (const strength of places) {
    const box = h("i");
    box.style.backgroundColor = paint(shade, strength);
    scale.append(box);
  }
  return h("span", { class: "legend", role: "img", "aria-label": `${name}: from ${low} to ${high}` }, low, scale, high);
}
