"""The Python of a model card's quick start. Run as it stands, it prints a completion."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

from .example_prompt import Prompt

WIDTH = 88


def quick_start(
    loads_from: str,
    prompt: Prompt,
    template_kwargs: Mapping[str, Any],
    is_peft: bool,
    base_model: str | None,
    merged_adapter: str | None,
) -> str:
    """Loads the model from `loads_from` and completes `prompt`, plain or messages.

    template_kwargs: what the chat template was given in training. is_peft, base_model and
    merged_adapter: adapters are loaded over the base, with the adapter merged into it before.
    """
    given = _given(template_kwargs) if not isinstance(prompt, str) else {}
    if is_peft:
        return _with_peft(loads_from, prompt, given, base_model, merged_adapter)
    more = f"    tokenizer_encode_kwargs={given!r},\n" if given else ""
    return f"""from transformers import pipeline

generator = pipeline("text-generation", model={literal(loads_from)}, device_map="auto")
prompt = {prompt_literal(prompt)}
output = generator(
    prompt,
    max_new_tokens=128,
    return_full_text=False,
{more})
print(output[0]["generated_text"])"""


def _with_peft(
    loads_from: str,
    prompt: Prompt,
    given: Mapping[str, Any],
    base_model: str | None,
    merged_adapter: str | None,
) -> str:
    if merged_adapter and base_model:
        peft_class, classes = "PeftModel", "AutoModelForCausalLM, AutoTokenizer"
        load = f"""base, merged = {literal(base_model)}, {literal(merged_adapter)}
model = AutoModelForCausalLM.from_pretrained(base, device_map="auto")
model = PeftModel.from_pretrained(model, merged).merge_and_unload()
model = PeftModel.from_pretrained(model, name)"""
    else:
        peft_class, classes = "AutoPeftModelForCausalLM", "AutoTokenizer"
        load = 'model = AutoPeftModelForCausalLM.from_pretrained(name, device_map="auto")'
    if isinstance(prompt, str):
        encode = 'inputs = tokenizer(prompt, return_tensors="pt").to(model.device)'
    else:
        more = f"    **{given!r},\n" if given else ""
        encode = f"""inputs = tokenizer.apply_chat_template(
    prompt,
    add_generation_prompt=True,
    return_dict=True,
    return_tensors="pt",
{more}).to(model.device)"""
    return f"""from peft import {peft_class}
from transformers import {classes}

name = {literal(loads_from)}
tokenizer = AutoTokenizer.from_pretrained(name)
{load}
prompt = {prompt_literal(prompt)}
{encode}
output = model.generate(**inputs, max_new_tokens=128)
new_tokens = output[0, inputs["input_ids"].shape[1] :]
print(tokenizer.decode(new_tokens, skip_special_tokens=True))"""


def literal(text: str) -> str:
    """The text as Python's literal, in double quotes where it has none."""
    shown = repr(text)
    return f'"{shown[1:-1]}"' if shown[0] == "'" and '"' not in text else shown


def prompt_literal(prompt: Prompt) -> str:
    """A prompt as Python, long texts a line of theirs or a part of it per line of code."""
    if isinstance(prompt, str):
        return _text(prompt, "")
    lines = ["["]
    for message in prompt:
        values = (f"{literal(key)}: {_value(value)}" for key, value in message.items())
        lines.append(f"    {{{', '.join(values)}}},")
    return "\n".join([*lines, "]"])


def _value(value: Any) -> str:
    return _text(value, " " * 4) if isinstance(value, str) else repr(value)


def _text(text: str, indent: str) -> str:
    parts = [
        part
        for line in text.splitlines(keepends=True)
        # drops no character, and cuts at spaces
        for part in _cut(line)
    ]
    if len(parts) < 2:
        return literal(text)
    lines = [f"{indent}    {literal(part)}" for part in parts]
    return "\n".join(["(", *lines, f"{indent})"])


def _cut(line: str) -> list[str]:
    """Parts of at most WIDTH characters that give the line together."""
    wrapper = textwrap.TextWrapper(
        WIDTH, expand_tabs=False, replace_whitespace=False, drop_whitespace=False
    )
    return wrapper.wrap(line) or [line]


def _given(template_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Switches of the template, not whole templates or documents, which a card does not show."""
    switches = bool | int | float | None
    return {
        name: value
        for name, value in template_kwargs.items()
        if isinstance(value, switches) or (isinstance(value, str) and len(value) <= 40)
    }
