"""The longest prompt of a run, which the rollout engine's memory is laid out for."""

from __future__ import annotations

from itertools import islice
from typing import Any

from datasets import Dataset, IterableDataset

from .checks import evaluation_sets
from .first_rows import prompts_of
from .tokenize import RowTokenizer

AT_A_TIME = 1000  # prompts that are tokenised together
OF_A_STREAM = 256  # rows that are read of a stream
MARGIN = 2  # a stream's later prompts may be so many times as long as those rows


def longest_prompt(train: Any, evaluation: Any, tokenizer: RowTokenizer, limit: int | None) -> int:
    """Tokens of the longest prompt of all sets, chat template included.

    `limit`: max_prompt_length, which longer prompts are left out by already; nothing is read then.
    Of a stream the first rows are read, and twice the longest of them is taken.
    """
    if limit is not None:
        return limit
    sets = [train, *(dataset for _, dataset in evaluation_sets(evaluation))]
    return max(_longest(dataset, tokenizer) for dataset in sets)


def _longest(dataset: Any, tokenizer: RowTokenizer) -> int:
    if isinstance(dataset, IterableDataset):
        rows: Any = islice(iter(dataset), OF_A_STREAM)
        texts = [row["prompt"] for row in rows if isinstance(row, dict) and "prompt" in row]
        return MARGIN * max(tokenizer.num_tokens(texts), default=1) if texts else 1
    assert isinstance(dataset, Dataset)
    starts = range(0, len(dataset), AT_A_TIME)
    return max(
        max(tokenizer.num_tokens(prompts_of(dataset, start, start + AT_A_TIME))) for start in starts
    )
