"""Completions as a rollout server sends them, checked before anything is trained on them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from .colocate import REASONS, finish_reason

# probabilities of float32 logits may come out above 1 by rounding, never by this much
HIGHEST = 1e-3
LOWEST = -1e30  # a finite float32; vLLM writes -9999 for a probability of 0
TEXT_BYTES = 4096  # per token: its id, its log-prob, and its text, which vLLM repeats


class Completion(NamedTuple):
    ids: list[int]
    logps: list[float]
    finish_reason: str


class OddAnswer(ValueError):
    """What is wrong with an answer, without the server's name."""


def most_bytes(num_prompt: int, max_tokens: int) -> int:
    """Longest answer to one prompt: vLLM repeats it, and asks for no more text than it may."""
    return 64 * 1024 + TEXT_BYTES * (num_prompt + max_tokens)


def read_completion(
    answer: dict[str, Any],
    *,
    request_id: str,
    prompt_ids: Sequence[int],
    max_tokens: int,
    vocab_size: int | None,
) -> Completion:
    """The one completion of `prompt_ids` that was asked for as `request_id`.

    Raises OddAnswer for anything that is not one: of another request or prompt, token ids that are
    not whole numbers of the vocabulary, more of them than were asked for, log-probs that are no
    numbers, not finite or positive beyond rounding, or not one for each token. EngineError for one
    that the server could not finish.
    """
    said = answer.get("id")
    if said != f"cmpl-{request_id}":
        raise OddAnswer(f"it is for request {shown(said)}, and 'cmpl-{request_id}' was sent")
    choices = answer.get("choices")
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise OddAnswer(f"choices must hold one completion, and is {shown(choices)}")
    choice: dict[str, Any] = choices[0]
    if choice.get("prompt_token_ids") != list(prompt_ids):
        raise OddAnswer(
            f"it is for the prompt {shown(choice.get('prompt_token_ids'))}, and "
            f"{shown(list(prompt_ids))} was sent"
        )
    reason = read_reason(choice)
    ids = read_ids(choice.get("token_ids"), max_tokens, vocab_size)
    logprobs = choice.get("logprobs")
    logps = logprobs.get("token_logprobs") if isinstance(logprobs, dict) else logprobs
    return Completion(ids, read_logps(logps, len(ids)), reason)


def read_reason(choice: dict[str, Any]) -> str:
    """Rollout's word for what ended it."""
    reason = choice.get("finish_reason")
    if not isinstance(reason, str):
        raise OddAnswer(f"finish_reason must be one of {sorted(REASONS)}, and is {shown(reason)}")
    return finish_reason(reason)


def read_ids(ids: Any, max_tokens: int, vocab_size: int | None) -> list[int]:
    if not isinstance(ids, list) or not 1 <= len(ids) <= max_tokens:
        count = f"{len(ids)} of them" if isinstance(ids, list) else shown(ids)
        raise OddAnswer(f"token_ids must be a list of 1 to {max_tokens} tokens, and is {count}")
    end = math.inf if vocab_size is None else vocab_size
    for index, token in enumerate(ids):
        if type(token) is not int or not 0 <= token < end:  # not bool, which is an int as well
            raise OddAnswer(
                f"token_ids[{index}] must be an id of the model's {vocab_size} tokens, and is "
                f"{shown(token)}"
            )
    return ids


def read_logps(logps: Any, count: int) -> list[float]:
    if not isinstance(logps, list) or len(logps) != count:
        came = len(logps) if isinstance(logps, list) else shown(logps)
        raise OddAnswer(f"token_logprobs must be a list of {count}, one per token, and is {came}")
    for index, logp in enumerate(logps):
        if type(logp) not in (int, float) or not LOWEST <= logp <= HIGHEST:  # false for NaN
            raise OddAnswer(
                f"token_logprobs[{index}] must be the logarithm of a probability, and is "
                f"{shown(logp)}"
            )
    return [float(logp) for logp in logps]


def shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
