"""The question that a language model is asked as a judge, and how its answer is read."""

from __future__ import annotations

import re

from ..config.paths import user_path
from ..records import PromptText
from ..rewards.builtin import content_text

PLACES: tuple[str, ...] = ("{prompt}", "{text0}", "{text1}")
DEFAULT = """\
Two people were asked to summarize the same forum post in a few sentences. Decide which of them did
it better. A good summary tells what matters most in the post, leaves out side issues, says nothing
that the post does not say, and reads well by itself. Length is not a virtue.

The post, as it was given to them:
<post>
{prompt}
</post>

<summary id="0">
{text0}
</summary>

<summary id="1">
{text1}
</summary>

Which summary is better? Answer with a single character and nothing else: 0 or 1."""


def read_template(path: str | None) -> str:
    """The template in a file, or DEFAULT. Raises ValueError for one that lacks a place."""
    if path is None:
        return DEFAULT
    try:
        template = user_path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ValueError(f"judge_prompt {path}: {reason}.") from error
    if missing := [place for place in PLACES if place not in template]:
        raise ValueError(
            f"judge_prompt {path}: the text must hold {', '.join(PLACES)}; {', '.join(missing)} "
            "is not there."
        )
    return template


def fill(template: str, prompt: PromptText, pair: tuple[str, str]) -> str:
    """The question; braces elsewhere in template and texts stay as they are."""
    values = dict(zip(PLACES, (prompt_text(prompt), *pair), strict=True))
    places = "|".join(map(re.escape, PLACES))
    # in one pass: a text that contains {text1} is not filled again
    return re.sub(places, lambda match: values[match[0]].strip(), template)


def prompt_text(prompt: PromptText) -> str:
    """A prompt as one text: of a single message its content, of several each with its role."""
    if isinstance(prompt, str):
        return prompt
    contents = [content_text(message.get("content")) for message in prompt]
    if len(prompt) == 1:
        return contents[0]
    roles = [message["role"] for message in prompt]
    return "\n\n".join(f"{role}: {text}" for role, text in zip(roles, contents, strict=True))


def read_answer(answer: str, marker: str | None = None) -> int | None:
    """0 or 1 if that is all there is, after the last `marker` where one is given; else None.

    Quotes, asterisks, white space and a full stop around the digit are ignored.
    """
    if marker is not None:
        _, found, answer = answer.rpartition(marker)
        if not found:
            return None
    bare = answer.strip(" \t\r\n\"'`*.")
    return int(bare) if bare in ("0", "1") else None
