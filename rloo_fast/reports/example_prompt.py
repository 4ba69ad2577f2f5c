"""The prompt of a model card's quick start: like those of training, and nothing private."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.constants import HUGGINGFACE_CO_URL_HOME

from ..data.sources import TASK
from .hub_ids import is_hub_id

Prompt = str | list[dict[str, Any]]

NUM_LOOKED_AT = 50  # rows, of which the shortest prompt is shown
MAX_CHARS = 3000
LOOKUP_TIMEOUT_S = 5.0


def general_prompt(is_chat: bool) -> Prompt:
    """Where the data may be private, in the form of the training prompts."""
    if is_chat:
        return as_chat("What is the capital of France?")
    return "The capital of France is"


def as_chat(text: str) -> Prompt:
    return [{"role": "user", "content": text}]


def public_prompt(dataset_name: str | None, rows: Iterable[Mapping[str, Any]]) -> Prompt | None:
    """The shortest prompt of the first rows that were loaded as `dataset_name`, unchanged; None
    where anybody may not see it: unless it is a reasoning_gym task or an open dataset of the Hub.
    """
    is_task = dataset_name is not None and dataset_name.startswith(TASK)
    if not is_task and not is_public(dataset_name):
        return None
    prompts = [row["prompt"] for row in itertools.islice(rows, NUM_LOOKED_AT)]
    shortest = min(prompts, key=lambda prompt: len(str(prompt)))
    return _plain(shortest) if len(str(shortest)) <= MAX_CHARS else None


def is_public(dataset_name: str | None) -> bool:
    """Whether the Hub shows this dataset to anybody; False as well where it cannot be asked."""
    if not is_hub_id(dataset_name):
        return False
    assert dataset_name is not None
    # without a token, and not of a mirror: both may show what is private
    hub = HfApi(endpoint=HUGGINGFACE_CO_URL_HOME.rstrip("/"), token=False)
    try:
        info = hub.dataset_info(dataset_name, timeout=LOOKUP_TIMEOUT_S)
    except Exception:  # offline, no network, no such dataset, in the errors of several libraries
        return False
    return not info.private and not info.gated


def _plain(prompt: Prompt) -> Prompt:
    """Messages without the columns that datasets fill up with None."""
    if isinstance(prompt, str):
        return prompt
    return [{k: v for k, v in message.items() if v is not None} for message in prompt]
