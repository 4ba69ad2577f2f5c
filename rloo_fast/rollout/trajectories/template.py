"""What a run's chat template writes around the turns of a conversation, and the ids of it.

A prompt ends with what opens a turn of the policy. The policy writes the turn and, as its last
token, what ends one; what the template has behind that token is new, and is the policy's to read.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

from jinja2 import TemplateError

from ...models.chat_templates import apply_template
from ...records import Message
from .known_calls import CALL, KEY, NAME, VALUE

TEXT, SAID, THOUGHT = "probed text q7", "probed result q7", "probed thought q7"
USER: Message = {"role": "user", "content": "hi"}


class TurnTemplate:
    """A tokenizer's chat template, with the options of a run, for conversations with tools.

    header: what stands before the text of a turn. end: the special token behind it, "" where there
    is none. called: how it writes a call.
    Raises ValueError for a template without a place for what tools say.
    """

    def __init__(self, tokenizer: Any, options: dict[str, Any] | None = None):
        self.tokenizer, self.options = tokenizer, dict(options or {})
        self.arguments_as_text = False
        self.called = self._rendered_call()
        # some have no place for calls: then a turn that calls is its text, as it was written
        self.writes_calls = all(word in self.called for word in (NAME, KEY, VALUE))
        alone = self.render([USER, {"role": "assistant", "content": TEXT}])
        before, _, behind = alone.rpartition(TEXT)
        self.end = self._special_start(behind)
        # without the reasoning that some templates begin for the policy, or leave out
        self.header = before.removeprefix(self.render([USER])).split("<think>")[0]
        thought: Message = {"role": "assistant", "content": TEXT, "reasoning_content": THOUGHT}
        # others look for reasoning in the text, or leave it to the policy
        self.writes_reasoning = THOUGHT in self.render([USER, thought])
        self._end_ids = self.encode(self.end)

    def render(
        self,
        messages: Sequence[Message],
        tools: list[Any] | None = None,
        *,
        opens_turn: bool = False,
    ) -> str:
        """The text of a conversation; `opens_turn`: with what opens a turn of the policy."""
        messages = [self._as_taken(message) for message in messages]
        return apply_template(
            self.tokenizer,
            messages,
            tools=tools or None,
            tokenize=False,
            add_generation_prompt=opens_turn,
            **self.options,
        )

    def opening(self, messages: Sequence[Message], tools: list[Any] | None) -> str:
        """What opens a turn behind these messages."""
        closed = self.render(messages, tools)
        opened = self.render(messages, tools, opens_turn=True)
        return opened[len(closed) :] if opened.startswith(closed) else ""

    def encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []

    def encode_behind_end(self, text: str) -> list[int]:
        """Ids of what follows a turn's end: encoded behind that token, so that no space is put in
        front of it."""
        whole = self.encode(self.end + text)
        if self.end and whole[: len(self._end_ids)] == self._end_ids:
            return whole[len(self._end_ids) :]
        return self.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=False)

    def num_tokens_within(self, ids: Sequence[int], text: str) -> int:
        """Of `ids`, the most first ones whose text `text` begins with."""
        low, high = 0, len(ids)
        while low < high:  # a longer start of ids has a longer text
            middle = (low + high + 1) // 2
            if len(self.decode(ids[:middle])) <= len(text):
                low = middle
            else:
                high = middle - 1
        while low and not text.startswith(self.decode(ids[:low])):
            low -= 1  # a character whose last bytes are in the next token
        return low

    def _rendered_call(self) -> str:
        """A turn that calls a tool, and what the tool said, behind it."""
        call: Message = {"role": "assistant", "content": "", "tool_calls": [deepcopy(CALL)]}
        said: Message = {"role": "tool", "name": NAME, "content": SAID}
        try:
            text = self._rendered(call, said)
        except (TypeError, TemplateError):  # some take arguments as the text of an object
            self.arguments_as_text = True
            try:
                text = self._rendered(call, said)
            except (TypeError, TemplateError) as error:
                raise ValueError(self._refusal(f"it fails: {error}")) from error
        if SAID not in text:
            raise ValueError(self._refusal("it leaves out the message of the tool"))
        return text

    def _rendered(self, *messages: Message) -> str:
        return self.render([USER, *messages])

    def _refusal(self, why: str) -> str:
        return (
            "the chat template cannot write a conversation of a user, an assistant that calls a "
            f"tool, and the tool ({why}): set tokenizer.chat_template to one that does."
        )

    def _as_taken(self, message: Message) -> Message:
        calls = message.get("tool_calls")
        if not calls or not self.arguments_as_text:
            return message
        functions = [call["function"] for call in calls]
        texts = [
            {"name": function["name"], "arguments": json.dumps(function["arguments"])}
            for function in functions
        ]
        return {**message, "tool_calls": [{"type": "function", "function": f} for f in texts]}

    def _special_start(self, text: str) -> str:
        """The longest special token that the text begins with, "" for none."""
        tokens = [str(token) for token in self.tokenizer.all_special_tokens]
        tokens += [added.content for added in self.tokenizer.added_tokens_decoder.values()]
        return max((t for t in tokens if t and text.startswith(t)), key=len, default="")
