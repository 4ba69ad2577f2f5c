"""A byte-level tokenizer, the essential form of some models' chat templates, and scripted turns."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from rloo_fast.records import Prompt, Rollout
from rloo_fast.rollout.trajectories import Language
from tests.support.tiny import InjectedEngine


def jinja(text: str) -> str:
    """Line ends, here "|", that no block takes away."""
    return text.replace("|n", "{{ '\\n' }}")


TOOLS = (
    "{%- if tools %}{{ role('system') }}Tools:{% for t in tools %}|n{{ t | tojson }}{% endfor %}"
)
IM = (
    "{%- macro role(name) %}<|im_start|>{{ name }}|n{% endmacro %}"
    + TOOLS
    + "<|im_end|>|n{% endif %}"
)
CALLS = (
    "{%- for call in m.tool_calls or [] %}"
    "{%- if m.content or not loop.first %}|n{% endif %}<tool_call>|n"
    '{{ \'{"name": "\' + call.function.name + \'", "arguments": \' }}'
    "{{ call.function.arguments | tojson }}{{ '}' }}|n</tool_call>{% endfor %}"
)
SAID = (
    "{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}|n"
    "<tool_response>|n{{ m.content }}|n</tool_response>"
    "{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>|n{% endif %}"
)
THOUGHT = "{%- if KEEPS %}<think>|n{{ m.reasoning_content.strip() }}|n</think>|n|n{% endif %}"


def qwen(*, keeps: str = "false", opening: str = "", content: str = "m.content") -> str:
    """Turns behind their reasoning where `keeps` is true; `opening`: of a turn to be sampled."""
    return jinja(
        IM + "{%- set ns = namespace(last=-1) %}{%- for m in messages %}"
        "{%- if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{%- endfor %}"
        "{%- for m in messages %}{%- if m.role == 'tool' %}"
        + SAID
        + "{%- else %}{{ role(m.role) }}"
        + THOUGHT.replace("KEEPS", keeps)
        + "{{ "
        + content
        + " }}"
        + CALLS
        + "<|im_end|>|n{%- endif %}{%- endfor %}"
        + "{%- if add_generation_prompt %}{{ role('assistant') }}"
        + opening
        + "{% endif %}"
    )


LLAMA3 = jinja(
    "{%- macro role(name) %}<|start_header_id|>{{ name }}<|end_header_id|>|n|n{% endmacro %}"
    "{{- bos_token }}" + TOOLS + "<|eot_id|>{% endif %}{%- for m in messages %}"
    "{%- if m.tool_calls %}{%- set call = m.tool_calls[0].function %}{{ role('assistant') }}"
    '{{ \'{"name": "\' + call.name + \'", "parameters": \' }}{{ call.arguments | tojson }}'
    "{{ '}' }}{%- elif m.role == 'tool' %}{{ role('ipython') }}{{ m.content | tojson }}"
    "{%- else %}{{ role(m.role) }}{{ m.content | trim }}{%- endif %}<|eot_id|>{%- endfor %}"
    "{%- if add_generation_prompt %}{{ role('assistant') }}{% endif %}"
)
SMOLLM2 = jinja(  # every message alike, calls nowhere
    IM + "{%- for m in messages %}{{ role(m.role) }}{{ m.content }}<|im_end|>|n{%- endfor %}"
    "{%- if add_generation_prompt %}{{ role('assistant') }}{% endif %}"
)
AFTER_THE_QUESTION = "m.reasoning_content and loop.index0 > ns.last"
TEMPLATES = {
    "Qwen2.5": qwen(),
    "Qwen3, reasoning kept": qwen(keeps=AFTER_THE_QUESTION),
    "Qwen3, reasoning of the last turn": qwen(keeps="m.reasoning_content and loop.last"),
    "Qwen3, none asked for": qwen(opening="<think>|n|n</think>|n|n"),
    "QwQ, opened and dropped": qwen(
        opening="<think>|n", content="m.content.split('</think>')[-1].strip()"
    ),
    "Llama 3": LLAMA3,
    "SmolLM2": SMOLLM2,
}
RESPONSE_SMOLLM2 = {  # its card has a list of calls between the tags; here it is one
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "tool_calls": {
            "open": "<tool_call>",
            "close": "</tool_call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close": "<|im_end|>", "content": "text"},
    },
}
SPECIAL = (
    "<pad>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>",
    "<|end_header_id|>", "<|eot_id|>",
)  # fmt: skip
TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
WORDS = ("name", "arguments", "assistant", "user", "tool", "add", "number", "parameters", "the")
VOCAB = 256 + len(SPECIAL) + len(TAGS) + 64


def chat_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """Bytes, and some words merged of them, so that a text has more than one encoding."""
    letters = sorted(ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate(letters)}
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        for end in range(2, len(word) + 1):
            pair = (word[: end - 1], word[end - 1])
            if pair not in merges:
                merges.append(pair)
            vocab.setdefault(word[:end], len(vocab))
    core: Any = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<|eot_id|>" if name == "Llama 3" else "<|im_end|>",
        bos_token="<|begin_of_text|>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL[1:])})
    tokenizer.add_tokens(list(TAGS))
    tokenizer.chat_template = TEMPLATES[name]
    if name == "SmolLM2":
        tokenizer.response_template = RESPONSE_SMOLLM2
    assert len(tokenizer) <= VOCAB
    return tokenizer


def language_of(tokenizer: Any) -> Language:
    return Language.of(tokenizer, {}, [tokenizer.eos_token_id])


ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "The sum.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
        },
    },
}


@dataclass(frozen=True)
class Result:
    content: Any
    failed: bool = False
    ends: bool = False


class Adds:
    """A ToolSet with one tool; `calls` notes what it was asked. Text for an answer that is not."""

    def __init__(self, answer=None):
        self.schemas, self.calls, self.answer = [ADD], [], answer

    def start(self, name: str, arguments: Any) -> Future:
        self.calls.append((name, arguments))
        future: Future = Future()
        if self.answer is None:
            future.set_result(Result(str(arguments["a"] + arguments["b"])))
        elif isinstance(self.answer, Future):
            return self.answer
        else:
            future.set_result(self.answer)
        return future


def question(tokenizer: Any, text: str, tools: list[Any]) -> Prompt:
    messages = [{"role": "user", "content": text}]
    ids = tokenizer.apply_chat_template(
        messages, tools=tools, add_generation_prompt=True, tokenize=True, return_dict=True
    )["input_ids"]
    return Prompt(messages, ids, {})


def call_text(name: str, a: int, b: int, *, odd: bool = False) -> str:
    """A call as a model writes it; `odd`: with other spaces than the template's."""
    if name == "Llama 3":
        space = "  " if odd else " "
        return f'{{"name": "add",{space}"parameters": {{"a": {a}, "b":{space}{b}}}}}'
    inner = f'{{"name": "add", "arguments": {{"a": {a}, "b": {b}}}}}'
    if odd:
        inner = f'{{"name":"add",  "arguments": {{"a":{a},"b": {b}}}}}'
    return f"<tool_call>\n{inner}\n</tool_call>"


def loose_ids(tokenizer: Any, text: str, step: int) -> list[int]:
    """Ids of a text that its tokenizer would not give: pieces of `step` characters, tags whole."""
    ids: list[int] = []
    while text:
        tag = next((t for t in (*TAGS, *SPECIAL) if text.startswith(t)), None)
        size = len(tag) if tag else step
        piece, text = text[:size], text[size:]
        for t in (*TAGS, *SPECIAL):
            if tag is None and (at := piece.find(t[0])) > 0 and (piece + text)[at:].startswith(t):
                piece, text = piece[:at], piece[at:] + text
        ids += tokenizer(piece, add_special_tokens=False)["input_ids"]
    return ids


class ScriptedEngine(InjectedEngine):
    """Says what `script[row number, turn]` has, with the model's own log-probs of it."""

    def __init__(self, model: Any, tokenizer: Any, turns: dict[int, list[list[int]]]):
        super().__init__()
        self.model, self.tokenizer, self.turns = model, tokenizer, turns
        self.asked: list[list[list[int]]] = []  # prompts of each round
        self.wake(("weights",))
        self.load_weights(0, ())
        self.wake(("kv_cache",))

    def _generate(self, prompt_ids, sampling, seeds, on_finished):
        self.asked.append([[*ids] for ids in prompt_ids])
        found = [self._next(ids) for ids in prompt_ids]
        ids = [turn[: sampling.max_new_tokens] for turn in found]
        stops = {self.tokenizer.eos_token_id}
        return Rollout(
            ids,
            ["stop" if row and row[-1] in stops else "length" for row in ids],
            [self._logps(prompt, row) for prompt, row in zip(prompt_ids, ids, strict=True)],
        )

    def _next(self, prompt: list[int]) -> list[int]:
        """The next turn of the row whose question the prompt has."""
        text = self.tokenizer.decode(prompt)
        row = int(text.split("question ")[1].split(" ")[0])
        return self.turns[row].pop(0)

    def _logps(self, prompt: list[int], ids: list[int]) -> list[float]:
        with torch.no_grad():
            logits = self.model(input_ids=torch.tensor([prompt + ids])).logits[0]
        logps = logits.float().log_softmax(-1)[len(prompt) - 1 : -1]
        return logps.gather(-1, torch.tensor(ids)[:, None])[:, 0].tolist()


def generate_by(engine: ScriptedEngine):
    """As RolloutCycle.generate."""

    def generate(prompt_ids, sampling, seeds):
        return engine.generate(prompt_ids, sampling, seeds, version=0)

    return generate


# A random model that calls a tool in many of its turns: any of some letters begins a call

NOISE_RESPONSE = {
    **RESPONSE_SMOLLM2,
    "fields": {
        "tool_calls": {
            "open_pattern": "[a-m]",
            "close_pattern": r"$|(?=<\|im_end\|>)",
            "content": "text",
            "transform": [
                {
                    "type": "function",
                    "function": {"name": "echo", "arguments": {"word": "{content}"}},
                }
            ],
        },
        "content": {"close": "<|im_end|>", "content": "text"},
    },
}


def noise_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = chat_tokenizer("SmolLM2")
    tokenizer.response_template = NOISE_RESPONSE
    return tokenizer


def echo(word: str) -> str:
    """
    Say how long a word is.

    Args:
        word: any

    Returns:
        a text
    """
    return f"{len(word)} of"
