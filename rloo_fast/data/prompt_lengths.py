"""max_prompt_length: prompts of more tokens are left out of the datasets, none is cut."""

from __future__ import annotations

import logging
from typing import Any

from datasets import IterableDataset

from .checks import check_fills_a_batch, evaluation_sets
from .first_rows import rows_of
from .tokenize import RowTokenizer

logger = logging.getLogger(__name__)


def drop_long_prompts(
    train: Any,
    evaluation: Any,
    tokenizer: RowTokenizer,
    limit: int | None,
    prompts_per_batch: int,
) -> tuple[Any, Any]:
    """(train, evaluation) without the prompts of more than `limit` (max_prompt_length) tokens.

    A stream is filtered as it is read. A row whose prompt cannot be tokenised stays in, for the
    check that says what is wrong with it. Raises ValueError for a set of which nothing is left, or
    too little to train on.
    """
    if limit is None:
        return train, evaluation
    train = _within(train, tokenizer, limit, "train_dataset")
    if not isinstance(train, IterableDataset):
        check_fills_a_batch(len(train), prompts_per_batch)
    kept = [_within(d, tokenizer, limit, name) for name, d in evaluation_sets(evaluation)]
    if isinstance(evaluation, dict):
        return train, dict(zip(evaluation, kept, strict=True))
    return train, kept[0] if kept else None


def _within(dataset: Any, tokenizer: RowTokenizer, limit: int, name: str) -> Any:
    if isinstance(dataset, IterableDataset):
        return dataset.filter(lambda row: tokenizer.num_tokens([row])[0] <= limit)
    kept, longest = [], 0
    for start in range(0, len(dataset), tokenizer.at_a_time):
        rows = rows_of(dataset, start, start + tokenizer.at_a_time, tokenizer.columns)
        lengths = tokenizer.num_tokens(rows)
        kept += [start + i for i, length in enumerate(lengths) if length <= limit]
        longest = max(longest, *lengths)
    if not kept:
        raise ValueError(
            f"{name}: every prompt has more than max_prompt_length={limit} tokens (the longest "
            f"{longest}): raise it."
        )
    if len(kept) == len(dataset):
        return dataset
    logger.info(
        "%s: %d of %d prompts have more than max_prompt_length=%d tokens (the longest %d) and are "
        "left out.", name, len(dataset) - len(kept), len(dataset), limit, longest,
    )  # fmt: skip
    return dataset.select(kept)
