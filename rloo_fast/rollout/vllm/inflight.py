"""Completions of /inference/v1/generate, which says of every token which weights sampled it.

The endpoint takes token ids and gives token ids. A completion under way goes on when the server's
weights are replaced, so its tokens may be of several versions: vLLM calls them spans.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...records import RawPrompt, Sampling
from ..ahead.flight import Sampled
from .answers import OddAnswer, read_ids, read_logps, read_reason, shown
from .colocate import sampling_fields
from .images import as_parts

GENERATE = "/inference/v1/generate"

TOKEN_BYTES = 512  # per token: its id, its log-prob twice, and the names around them


class OtherWeights(OddAnswer):
    """The server holds weights that this run has not loaded, labelled `label`."""

    def __init__(self, label: str):
        super().__init__(f"tokens were sampled by weights {label}")
        self.label = label


def most_bytes(num_prompt: int, max_tokens: int) -> int:
    """Longest answer to one prompt, which it repeats."""
    return 64 * 1024 + TOKEN_BYTES * (num_prompt + max_tokens)


def request_fields(sampling: Sampling) -> dict[str, Any]:
    """What the requests of a run have in common."""
    return {
        "sampling_params": {**sampling_fields(sampling), **sampling.extra},
        "return_token_ids": True,
    }


def request_of(
    fields: dict[str, Any],
    prompt_ids: list[int],
    seed: int,
    request_id: str,
    raw: RawPrompt | None = None,
) -> dict[str, Any]:
    """`raw`: of a run with images, which the server puts in their places itself."""
    own: dict[str, Any] = {"token_ids": prompt_ids}
    if raw is not None and raw.images:
        own = {"token_ids": raw.ids, "content_parts": as_parts(raw.images)}
    params = {**fields["sampling_params"], "seed": seed}
    return {**fields, "sampling_params": params, "request_id": request_id, **own}


def read_sampled(
    answer: dict[str, Any],
    *,
    request_id: str,
    prompt_ids: Sequence[int],
    max_tokens: int,
    vocab_size: int | None,
    run: str,
) -> Sampled:
    """The one completion of `prompt_ids` that was asked for as `request_id`.

    Raises OddAnswer for anything that is not one, see `answers.read_completion`, or whose tokens
    are not all of weights that `run` has loaded (OtherWeights); EngineError for one that the
    server could not finish.
    """
    said = answer.get("request_id")
    if said != f"generate-tokens-{request_id}":
        raise OddAnswer(f"it is for request {shown(said)}, and {request_id!r} was sent")
    choices = answer.get("choices")
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise OddAnswer(f"choices must hold one completion, and is {shown(choices)}")
    if answer.get("prompt_token_ids") != list(prompt_ids):
        raise OddAnswer(
            f"it is for the prompt {shown(answer.get('prompt_token_ids'))}, and "
            f"{shown(list(prompt_ids))} was sent"
        )
    choice: dict[str, Any] = choices[0]
    reason = read_reason(choice)
    ids = read_ids(choice.get("token_ids"), max_tokens, vocab_size)
    logps = read_logps(_logprobs(choice.get("logprobs"), ids), len(ids))
    versions = read_versions(choice.get("weight_versions"), len(ids), run)
    return Sampled(ids, reason, logps, versions)


def _logprobs(logprobs: Any, ids: list[int]) -> Any:
    """The log-prob of every sampled token; what is not of their form, as it is."""
    content = logprobs.get("content") if isinstance(logprobs, dict) else None
    if not isinstance(content, list) or not all(isinstance(entry, dict) for entry in content):
        return content
    if [entry.get("token_id") for entry in content] != ids:
        raise OddAnswer("its log-probs are of other tokens than it sampled")
    return [entry.get("logprob") for entry in content]


def read_versions(spans: Any, count: int, run: str) -> list[int]:
    """(count,) the version of each token, of spans that cover all of them, one after another.

    Labels are "<version>@<run>": of another run, or none, raise OtherWeights.
    """
    versions: list[int] = []
    for span in spans if isinstance(spans, list) else [None]:
        if not isinstance(span, dict):
            raise OddAnswer(
                f"weight_versions must say which weights sampled each token, and is {shown(spans)}"
            )
        number, _, owner = str(span.get("version")).partition("@")
        start, end = span.get("start"), span.get("end")
        if owner != run or not number.isdecimal():
            raise OtherWeights(shown(span.get("version")))
        if start != len(versions) or type(end) is not int or not len(versions) <= end <= count:
            raise OddAnswer(f"weight_versions do not cover its tokens: {shown(spans)}")
        versions += [int(number)] * (end - len(versions))
    if len(versions) != count or versions != sorted(versions):
        raise OddAnswer(f"weight_versions do not cover its {count} tokens: {shown(spans)}")
    return versions
