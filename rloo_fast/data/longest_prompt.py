"""The longest prompt of a run, which the rollout engine's memory is laid out for."""

from __future__ import annotations

from itertools import islice
from typing import Any

from datasets import Dataset, IterableDataset

from .checks import evaluation_sets
from .first_rows import rows_of
from .tokenize import RowTokenizer

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
        rows = [row for row in rows if isinstance(row, dict) and "prompt" in row]
        return MARGIN * max(tokenizer.num_tokens(rows), default=1) if rows else 1
    assert isinstance(dataset, Dataset)
    size = tokenizer.at_a_time
    return max(
        max(tokenizer.num_tokens(rows_of(dataset, start, start + size, tokenizer.columns)))
        for start in range(0, len(dataset), size)
    )
