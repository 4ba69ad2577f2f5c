// One completion: a card among its group's, and the whole of it in a dialog.

import { ask } from "./data.js";
import { h } from "./dom.js";
import { figure, signed } from "./format.js";
import { SHADES, legend, shadedText, shadesOf } from "./tokens.js";

const FOLDED = 700; // characters of a card; the whole is a click away

export const rewardNames = (row) => Object.keys(row).filter((name) => name.startsWith("reward/"));

export function card({ run, step, number, row, shade, isChosen, open }) {
  const text = h("div", { class: "text" }, row.completion.length > FOLDED ? `${row.completion.slice(0, FOLDED)}…` : row.completion);
  const parts = rewardNames(row);
  const element = h("article", { class: isChosen ? "card chosen" : "card", "aria-label": cardWords(row) },
    h("button", { type: "button", class: "cardtop", onclick: open, title: "The whole completion" },
      h("b", { class: "reward" }, figure(row.reward)),
      h("span", { class: `advantage ${row.advantage > 0 ? "up" : row.advantage < 0 ? "down" : ""}`, title: "advantage" }, signed(row.advantage)),
      h("span", { class: "grow" }),
      row.length === undefined ? null : h("span", { title: "tokens" }, `${row.length} tok`),
      row.end === "length" ? h("span", { class: "cut", title: "cut at the length limit" }, "cut") : null),
    parts.length > 1 ? h("div", { class: "parts" }, parts.map((name) => h("span", {}, name.slice(7), " ", h("b", {}, figure(row[name]))))) : null,
    text);
  if (SHADES[shade]) {
    ask("tokens", { run, step, row: number }).then((tokens) => {
      if (tokens.text) text.replaceWith(shadedText(tokens, shade));
    }).catch(() => element.append(h("p", { class: "nothing" }, "Its tokens are not kept.")));
  }
  return element;
}

const cardWords = (row) =>
  `Sample ${row.sample + 1} of group ${row.group + 1}: reward ${figure(row.reward)}, advantage ${signed(row.advantage)}`;

export async function openCompletion({ run, step, number, row, prompt, shade, close, next }) {
  const dialog = h("dialog", { class: "whole", "aria-label": cardWords(row) });
  const body = h("div");
  let tokens = {};
  const draw = (chosen) => {
    const shades = shadesOf(tokens);
    const buttons = [["", "plain"], ...shades.map((name) => [name, SHADES[name][0]])];
    body.replaceChildren(
      h("div", { class: "toolbar" },
        shades.length ? h("div", { class: "segmented", role: "group", "aria-label": "Shading" }, buttons.map(([name, words]) =>
          h("button", { type: "button", "aria-pressed": String(name === chosen), onclick: () => draw(name) }, words))) : null,
        legend(chosen)),
      chosen && tokens.text ? shadedText(tokens, chosen) : completionText);
  };
  let isLeft = true;
  const aside = (by) => {
    if (!next(by)) return;
    isLeft = false;
    dialog.close();
  };
  let completionText = foldedMarks(row.completion);
  dialog.append(
    h("div", { class: "dialogtop" }, h("h2", {}, `Step ${step} · group ${row.group + 1} · sample ${row.sample + 1}`),
      h("span", { class: "grow" }),
      h("button", { type: "button", onclick: () => aside(-1), "aria-label": "The sample before" }, "←"),
      h("button", { type: "button", onclick: () => aside(1), "aria-label": "The next sample" }, "→"),
      h("button", { type: "button", onclick: () => dialog.close(), "aria-label": "Close", autofocus: true }, "✕")),
    facts(row), h("h3", {}, "Prompt"), h("div", { class: "text prompt" }, prompt), h("h3", {}, "Completion"), body);
  const pressed = (event) => {
    if (event.key === "ArrowLeft" || event.key === "ArrowRight") aside(event.key === "ArrowLeft" ? -1 : 1);
  };
  window.addEventListener("keydown", pressed); // a button that was drawn anew has lost the focus
  dialog.addEventListener("close", () => {
    window.removeEventListener("keydown", pressed);
    dialog.remove();
    if (isLeft) close();
  });
  document.body.append(dialog);
  draw("");
  dialog.showModal();
  const [found, messages] = await Promise.all([
    ask("tokens", { run, step, row: number }).catch(() => ({})),
    row.has_messages ? ask("messages", { run, step, row: number }).catch(() => ({})) : {},
  ]);
  tokens = found;
  if (messages.messages) completionText = turns(JSON.parse(messages.messages).completion);
  draw(shadesOf(tokens).includes(shade) ? shade : "");
}

function facts(row) {
  const entries = [
    ["reward", figure(row.reward)], ...rewardNames(row).map((name) => [name.slice(7), figure(row[name])]),
    ["score", figure(row.score)], ["advantage", signed(row.advantage)], ["KL, nats", figure(row.kl)],
    ["tokens", figure(row.length)], ["ended by", row.end === "length" ? "the length limit" : row.end === "stop" ? "itself" : "–"],
    ...Object.entries(row.extra ? JSON.parse(row.extra) : {}).map(([name, value]) => [name, String(value)]),
  ];
  return h("dl", { class: "facts" }, entries.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))));
}

// <think> and tool calls in a text are folded, each under its first words.
const MARKED = /<(think|tool_call|tool_response)>([\s\S]*?)(?:<\/\1>|$)/g;

function foldedMarks(text) {
  const parts = [];
  let end = 0;
  for (const match of text.matchAll(MARKED)) {
    parts.push(text.slice(end, match.index), fold(match[1], match[2]));
    end = match.index + match[0].length;
  }
  return h("div", { class: "text" }, parts, text.slice(end));
}

function fold(name, text) {
  const words = text.trim().slice(0, 80);
  return h("details", { class: "turn" }, h("summary", {}, h("b", {}, name), ` ${words}${text.length > 80 ? "…" : ""}`),
    h("div", { class: "text" }, text));
}

// A conversation: what the model says is open, tools' answers and calls are folded.
function turns(messages) {
  if (!Array.isArray(messages)) return foldedMarks(String(messages));
  return h("div", {}, messages.map((message) => {
    const content = typeof message.content === "string" ? message.content : JSON.stringify(message.content ?? "", null, 1);
    const calls = (message.tool_calls ?? []).map((call) => fold("tool call", JSON.stringify(call.function ?? call, null, 1)));
    const thought = message.reasoning_content ? fold("thought", message.reasoning_content) : null;
    if (message.role !== "assistant") return fold(message.role ?? "?", content);
    return h("div", { class: "turn" }, h("b", {}, message.role), thought, content ? foldedMarks(content) : null, calls);
  }));
}
