"""The reward functions that come with rloo_fast, and how to read a completion of either format.

Each is called like any other reward function (see `functions.py`) and is named in a configuration
by its key in BUILTINS.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..records import Message

Completion = str | list[Message]

THINK, END_THINK = "<think>", "</think>"


def completion_text(completion: Completion) -> str:
    """The text the policy wrote: the string itself, or the contents of its messages, joined.

    Messages of others, such as a tool's, do not count. A message's content may be None (no text) or
    a list of parts, of which those with text count.
    Raises ValueError for anything else.
    """
    if isinstance(completion, str):
        return completion
    if not isinstance(completion, list) or not all(isinstance(m, dict) for m in completion):
        raise ValueError(
            "A completion is a string or a list of {'role': ..., 'content': ...} messages, "
            f"got {completion!r:.80}."
        )
    return "\n".join(content_text(m.get("content")) for m in completion if _is_own(m))


def answer_text(completion: Completion) -> str:
    """The text of the last message that the policy wrote; the string itself of a text."""
    if isinstance(completion, list):
        completion = [message for message in completion if _is_own(message)][-1:]
    return completion_text(completion)


def _is_own(message: Message) -> bool:
    return message.get("role", "assistant") == "assistant"


def describe_sample(
    index: int,
    prompts: Sequence[Any],
    completions: Sequence[Any],
    rows: Sequence[int] | None = None,
) -> str:
    """One line for an error message: which sample, its prompt and its completion, shortened.

    `rows`: the samples' numbers, if they are not 0, 1, ...
    """
    number = index if rows is None else rows[index]
    prompt, completion = prompts[index], completions[index]
    if isinstance(prompt, list):  # the last message is what tells one conversation from another
        prompt = content_text(prompt[-1].get("content"))
    return (
        f"sample {number} (prompt {prompt!r:.80}, completion {completion_text(completion)!r:.80})"
    )


def exact_match(
    completions: list[Completion], answer: list[Any], **kwargs: Any
) -> list[float | None]:
    """r_i = 1[strip(completion_i) == strip(answer_i)]; None where the column `answer` is None.

    Of several messages, as with tools, the last one that the policy wrote is the answer.
    """
    return [
        None if gold is None else float(answer_text(completion).strip() == str(gold).strip())
        for completion, gold in zip(completions, answer, strict=True)
    ]


def format_think(completions: list[Completion], **kwargs: Any) -> list[float]:
    """r_i = 1[completion_i is "<think>" reasoning "</think>" answer].

    Each tag once, nothing but white space before the first, and an answer that is not blank.
    """
    return [float(_thinks_then_answers(completion_text(c).strip())) for c in completions]


class Length:
    """r_i = -clip((n_i - target) / (limit - target), 0, 1), n_i the tokens of completion i.

    0 up to `target` tokens, then falling to -1 at `limit` (2 * target if left out) and beyond. An
    EOS counts as a token. Raises ValueError unless 0 <= target < limit.
    """

    __name__ = "length"  # of the metric

    def __init__(self, target: int, limit: int | None = None) -> None:
        self.target, self.limit = target, 2 * target if limit is None else limit
        if not 0 <= self.target < self.limit:
            raise ValueError(f"0 <= target < limit is needed, got {target} and {self.limit}.")

    def __call__(self, completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        room = self.limit - self.target
        return [-min(max((len(ids) - self.target) / room, 0.0), 1.0) for ids in completion_ids]


# Name in a configuration -> the function or class, or where it is (imported when it is asked for).
BUILTINS: dict[str, Callable[..., Any] | str] = {
    "code": "rloo_fast.rewards.code:CodeReward",
    "exact_match": exact_match,
    "accuracy": "rloo_fast.rewards.accuracy:accuracy",
    "format": "rloo_fast.rewards.format:Format",
    "format_think": format_think,
    "length": Length,
    "reasoning_gym": "rloo_fast.rewards.reasoning_gym:reasoning_gym_reward",
}


def content_text(content: Any) -> str:
    """The text of a message's content, whoever wrote it; "" of None."""
    if isinstance(content, list):
        return "".join(part.get("text") or "" for part in content)
    return content or ""


def _thinks_then_answers(text: str) -> bool:
    once = text.count(THINK) == 1 and text.count(END_THINK) == 1
    return once and text.startswith(THINK) and not text.endswith(END_THINK)
