"""The reward functions that come with rloo_fast, and how to read a completion of either format.

Each is called like any other reward function (see `functions.py`) and is named in a configuration
by its key in BUILTINS.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Sequence
from typing import Any

from rloo_fast.types import Message

Completion = str | list[Message]

THINK, END_THINK = "<think>", "</think>"


def completion_text(completion: Completion) -> str:
    """The text the policy wrote: the string itself, or the contents of its messages, joined.

    A message's content may be None (no text) or a list of parts, of which those with text count.
    Raises ValueError for anything else.
    """
    if isinstance(completion, str):
        return completion
    if not isinstance(completion, list) or not all(isinstance(m, dict) for m in completion):
        raise ValueError(
            "A completion is a string or a list of {'role': ..., 'content': ...} messages, "
            f"got {completion!r:.80}."
        )
    return "\n".join(_content_text(message.get("content")) for message in completion)


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
        prompt = completion_text(prompt[-1:])
    return (
        f"sample {number} (prompt {prompt!r:.80}, completion {completion_text(completion)!r:.80})"
    )


def exact_match(
    completions: list[Completion], answer: list[Any], **kwargs: Any
) -> list[float | None]:
    """r_i = 1[strip(completion_i) == strip(answer_i)]; None where the column `answer` is None."""
    return [
        None if gold is None else float(completion_text(completion).strip() == str(gold).strip())
        for completion, gold in zip(completions, answer, strict=True)
    ]


def accuracy(
    completions: list[Completion],
    solution: list[str | None] | None = None,
    answer: list[str | None] | None = None,
    log_extra: Callable[[str, list], None] | None = None,
    **kwargs: Any,
) -> list[float | None]:
    r"""r_i = 1[completion_i is equivalent to gold_i for math-verify]; None if gold_i has no value.

    gold is the column `solution`, or `answer` if there is no `solution`: numbers, text with a
    number or with LaTeX in it, or bare LaTeX (2\sqrt{3}). The completion must give
    its answer in LaTeX (`\boxed{...}`, or "the final answer is $...$"), which is what TRL's
    `accuracy_reward` asks for too; anything else earns 0. With reward_processes, and in a main
    thread, math-verify's own time limits hold; elsewhere they cannot (they use SIGALRM), and
    reward_timeout_s is the limit.
    Raises ImportError without math-verify, ValueError without a gold column.
    """
    try:
        from latex2sympy2_extended import NormalizationConfig  # pyright: ignore[reportMissingImports]
        from math_verify import (  # pyright: ignore[reportMissingImports]
            LatexExtractionConfig,
            parse,
            verify,
        )
    except ImportError as error:
        raise ImportError(
            "The reward function 'accuracy' needs math-verify: pip install math-verify"
        ) from error
    column = solution if solution is not None else answer
    if column is None:
        raise ValueError("'accuracy' needs a column `solution` or `answer` with the gold answers.")
    golds = ["" if gold is None else str(gold) for gold in column]

    in_main = threading.current_thread() is threading.main_thread()
    parse_limit_s, verify_limit_s = (10, 5) if in_main else (0, 0)  # 0: none
    latex = LatexExtractionConfig(
        normalization_config=NormalizationConfig(units=True),
        boxed_match_priority=0,  # look for \boxed first
        try_extract_without_anchor=False,
    )
    # Once per distinct gold: the completions of a group share it.
    targets = {g: parse(_as_latex(g), parsing_timeout=parse_limit_s) for g in set(golds)}
    rewards: list[float | None] = []
    parsed_answers = []
    for completion, gold in zip(completions, golds, strict=True):
        prediction = parse(
            completion_text(completion),
            extraction_config=[latex],
            extraction_mode="first_match",
            parsing_timeout=parse_limit_s,
        )
        parsed_answers.append(str(prediction[0]) if prediction else "")
        same = verify(targets[gold], prediction, timeout_seconds=verify_limit_s)
        rewards.append(float(same) if targets[gold] else None)
    if log_extra is not None:
        log_extra("gold", golds)
        log_extra("parsed_answer", parsed_answers)
    return rewards


def format_think(completions: list[Completion], **kwargs: Any) -> list[float]:
    """r_i = 1[completion_i is "<think>" reasoning "</think>" answer].

    Each tag once, nothing but white space before the first, and an answer that is not blank.
    """
    return [float(_thinks_then_answers(completion_text(c).strip())) for c in completions]


class Format:
    """r_i = 1[the regular expression `pattern` matches all of strip(completion_i)].

    A dot matches line ends too. Raises ValueError for a pattern that is none.
    """

    __name__ = "format"  # of the metric

    def __init__(self, pattern: str) -> None:
        try:
            self.pattern = re.compile(pattern, re.DOTALL)
        except re.error as error:
            raise ValueError(f"{pattern!r} is not a regular expression: {error}.") from error

    def __call__(self, completions: list[Completion], **kwargs: Any) -> list[float]:
        texts = [completion_text(completion).strip() for completion in completions]
        return [float(self.pattern.fullmatch(text) is not None) for text in texts]


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
    "accuracy": accuracy,
    "format": Format,
    "format_think": format_think,
    "length": Length,
    "reasoning_gym": "rloo_fast.rewards.reasoning_gym:reasoning_gym_reward",
}


_COMMAND = re.compile(r"\\(?:text|mathrm)\{[^}]*\}|\\[a-zA-Z]+")


def _as_latex(gold: str) -> str:
    """Bare LaTeX between dollar signs: without them math-verify takes 2\\sqrt{3} for a 2."""
    is_delimited = re.search(r"\$|\\boxed|\\\(|\\\[", gold)
    has_signs = re.search(r"[\\^_{}()\[\]]", gold)
    has_words = re.search("[a-zA-Z]{2}", _COMMAND.sub("", gold))
    return f"${gold}$" if has_signs and not has_words and not is_delimited else gold


def _content_text(content: Any) -> str:
    if isinstance(content, list):
        return "".join(part.get("text") or "" for part in content)
    return content or ""


def _thinks_then_answers(text: str) -> bool:
    once = text.count(THINK) == 1 and text.count(END_THINK) == 1
    return once and text.startswith(THINK) and not text.endswith(END_THINK)
