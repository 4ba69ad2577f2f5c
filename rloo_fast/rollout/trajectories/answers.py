"""A turn's tokens in, a message out: its text, its reasoning, and the calls of tools in it.

Read by the tokenizer's `response_template` (transformers' response parsing) or, where it has none,
by that of the form that its chat template writes calls in.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ...records import Message
from .known_calls import response_template
from .template import TurnTemplate


class Answers:
    """Reads the turns of a run. Raises ValueError where nothing says how calls are written."""

    def __init__(self, template: TurnTemplate, stop_ids: Sequence[int]):
        self.template, self.tokenizer = template, template.tokenizer
        self.stop_ids = set(stop_ids)
        self.header = template.header
        known = getattr(self.tokenizer, "response_template", None)
        if known is None and self.header:
            known = response_template(template.called, header=self.header, end=template.end)
        if known is None:
            raise ValueError(
                "nothing says how this model writes tool calls: the tokenizer has no "
                "response_template, and its chat template writes them in no known form. Set "
                "tokenizer.response_template as transformers' page on response parsing shows."
            )
        self.spec: dict[str, Any] = known
        calls = known["fields"].get("tool_calls", {})
        literals = calls.get("open", [])
        literals = [literals] if isinstance(literals, str) else literals
        self._call = re.compile(calls.get("open_pattern") or "|".join(map(re.escape, literals)))
        self.marks = [
            field["open"]
            for name, field in known["fields"].items()
            if name not in ("content", "tool_calls") and isinstance(field.get("open"), str)
        ]

    def text_of(self, ids: Sequence[int]) -> str:
        """What a turn says, without the token that ended it."""
        return self.template.decode(ids[:-1] if self.ends(ids) else ids)

    def ends(self, ids: Sequence[int]) -> bool:
        """Whether the turn's last token is one that ends it."""
        return bool(ids) and ids[-1] in self.stop_ids

    def read(
        self,
        text: str,
        opening: str,
        tools: list[Any] | None = None,
        plain: str | None = None,
        *,
        is_cut: bool = False,
    ) -> Message:
        """The message of a turn that says `text` behind `opening`; `is_cut`: it was not at its end.
        What cannot be read, such as a call that is no JSON, is a text, `plain` if it is given, as
        in TRL."""
        whole = text if is_cut else text + self.template.end
        try:
            read: Any = self.tokenizer.parse_response(whole, self.spec, prefix=opening, tools=tools)
            return _checked(dict(read))
        except Exception:  # parsers of a template, on what a model wrote
            return {"role": "assistant", "content": text if plain is None else plain}

    def as_written(self, message: Message, said: str) -> Message:
        """The message of a turn that says `said`, as the chat template takes it."""
        calls = message.get("tool_calls")
        if calls and not self.template.writes_calls:
            return {"role": "assistant", "content": said}
        if self.template.writes_reasoning:
            return message
        first = self._call.search(said) if calls else None
        content = said[: first.start()] if first else said
        return {"role": "assistant", "content": content.strip()} | (
            {"tool_calls": calls} if calls else {}
        )

    def same(self, one: str, other: str) -> bool:
        """Whether two texts of a turn, each with what opens it, say the same, but for how a call's
        JSON is written. A turn without its reasoning does not."""
        if "".join(one.split()) == "".join(other.split()):
            return True
        if any(one.count(mark) != other.count(mark) for mark in self.marks):
            return False
        first, second = (
            self.read(text.removeprefix(self.header), self.header) for text in (one, other)
        )
        return first == second


def _checked(message: Message) -> Message:
    """With a text, and calls of one form. Raises ValueError for calls that are none."""
    message["role"] = "assistant"
    message["content"] = message.get("content") or ""
    calls = message.pop("tool_calls", None)
    if calls is None:
        return message
    if not isinstance(calls, list):
        raise ValueError("tool_calls is no list")
    message["tool_calls"] = [_call(call) for call in calls]
    return message


def _call(call: Any) -> dict[str, Any]:
    function = call.get("function", call)
    name, arguments = function["name"], function.get("arguments")
    if not isinstance(name, str):
        raise ValueError("a call's name is no text")
    return {
        "type": call.get("type", "function"),
        "function": {"name": name, "arguments": {} if arguments is None else arguments},
    }
