"""How models write tool calls, for tokenizers without a `response_template` of transformers.

Which of these forms a chat template has is seen from how it renders a call. The forms and what is
read of each are those that TRL 1.16 sets for the templates it knows.
"""

from __future__ import annotations

import re
from typing import Any

NAME, KEY, VALUE = "probed_name_q7", "probed_key_q7", "probed_value_q7"  # in no template
CALL = {"type": "function", "function": {"name": NAME, "arguments": {KEY: VALUE}}}
NAMED = {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}}
THINK = {"open": "<think>", "close_pattern": r"</think>\s*", "content": "text"}

_JSON = rf'\{{\s*"name": "{NAME}",\s*"%s": \{{\s*"{KEY}": "{VALUE}"\s*\}}\s*\}}'
_XML = {"name": "text"}  # arguments get the types of the tool's schema


def _tagged(tag: str) -> dict[str, Any]:
    """<tool_call>{"name": ..., "arguments": ...}</tool_call>, each call for itself."""
    return {
        "open": f"<{tag}>",
        "close_pattern": rf"</{tag}>\s*",
        "repeats": True,
        "content": "json",
        "transform": {"type": "function", "function": "{content}"},
    }


# (what a rendered call looks like, the field `tool_calls` that reads it, whether turns may think)
FORMS: list[tuple[str, dict[str, Any], bool]] = [
    (rf"<tool_call>\s*{_JSON % 'arguments'}\s*</tool_call>", _tagged("tool_call"), True),
    (
        rf"<tool_call>\s*<function={NAME}>\s*<parameter={KEY}>\s*{VALUE}\s*</parameter>",
        {
            "open_pattern": r"<tool_call>\s*<function=(?P<name>[^\n>]+)>",
            "close_pattern": r"</tool_call>\s*",
            "repeats": True,
            "content": "xml-inline",
            "content_args": {
                "tag_pattern": r"<parameter=(?P<key>[^>\n]+)>\s*(?P<value>.*?)\s*</parameter>",
                "value_parser": _XML,
            },
            "transform": NAMED,
        },
        True,
    ),
    (
        rf"<tool_call>{NAME}\s*<arg_key>{KEY}</arg_key>\s*<arg_value>{VALUE}</arg_value>",
        {
            "open_pattern": r"<tool_call>(?P<name>\S+)\n?",
            "close_pattern": r"</tool_call>\s*",
            "repeats": True,
            "content": "xml-inline",
            "content_args": {
                "tag_pattern": r"<arg_key>(?P<key>[^<]+)</arg_key>\s*"
                r"<arg_value>(?P<value>.*?)</arg_value>",
                "value_parser": _XML,
            },
            "transform": NAMED,
        },
        True,
    ),
    (
        _JSON % "parameters",
        {
            "open_pattern": r'\{"name":\s*"(?P<name>[^"]+)",\s*"parameters":\s*',
            "close_pattern": r"\}\s*%(end)s\s*",
            "repeats": True,
            "content": "json",
            "transform": NAMED,
        },
        False,
    ),
]


def response_template(rendered: str, *, header: str, end: str) -> dict[str, Any] | None:
    """How turns of a chat template are read that renders CALL as `rendered`, begins a turn with
    `header` and ends it with `end`; None: it is none of the known forms."""
    for pattern, calls, thinks in FORMS:
        if re.search(pattern, rendered) is None:
            continue
        ends = {"end": re.escape(end) if end else "$"}
        calls = {k: v % ends if k == "close_pattern" else v for k, v in calls.items()}
        content = {"close_pattern": rf"{ends['end']}\s*", "content": "text"}
        fields = {"tool_calls": calls, "content": content}
        return {
            "defaults": {"role": "assistant"},
            "start_anchor": header,
            "fields": {"reasoning_content": THINK, **fields} if thinks else fields,
        }
    return None
