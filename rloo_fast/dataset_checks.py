"""Datasets and what is asked of them, checked when the trainer is made: a run must not find out
hours later that it cannot read a prompt or score a completion."""

from __future__ import annotations

from typing import Any

from datasets import IterableDataset

from .config import RLOOConfig
from .prompts import RowTokenizer, check_dataset, check_fills_a_batch
from .rewards import Rewards


def check_datasets(train: Any, evaluation: Any, args: RLOOConfig) -> None:
    """What can be told without a model: types, columns, sizes.

    Raises TypeError or ValueError unless both are a datasets.Dataset or IterableDataset (or, for
    evaluation, a dict of them, or None) that has rows and a column `prompt`.
    """
    if train is None:
        raise ValueError("train_dataset is missing: pass a dataset with a 'prompt' column.")
    check_dataset(train, "train_dataset")
    if isinstance(train, IterableDataset):
        if args.max_steps <= 0:
            raise ValueError(
                "max_steps must be set for a streamed train_dataset, whose length is not known."
            )
        if args.dataloader_num_workers:
            raise ValueError(
                "dataloader_num_workers must be 0 for a streamed train_dataset: several workers "
                "would each read all of it."
            )
    else:
        check_fills_a_batch(len(train), args.prompts_per_generation)
    for name, dataset in evaluation_sets(evaluation):
        check_dataset(dataset, name)
    if evaluation is None and args.eval_strategy != "no":
        raise ValueError(
            f"eval_strategy={args.eval_strategy.value!r} needs an eval_dataset: pass one, or leave "  # pyright: ignore
            "eval_strategy out."
        )


def check_prompts(train: Any, evaluation: Any, tokenize_rows: RowTokenizer) -> None:
    """Raise ValueError unless the first prompts of each set can be tokenised and fit into the
    model's context."""
    for name, dataset in [("train_dataset", train), *evaluation_sets(evaluation)]:
        check_dataset(dataset, name, tokenize_rows)


def check_reward_columns(rewards: Rewards, train: Any, evaluation: Any, args: RLOOConfig) -> None:
    """Raise ValueError unless every set has the columns that the reward functions take."""
    for name, dataset in [("train_dataset", train), *evaluation_sets(evaluation)]:
        columns = [] if args.remove_unused_columns else dataset.column_names
        if columns is None:  # a stream that does not say
            continue
        try:
            rewards.check_columns(columns)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error


def evaluation_sets(evaluation: Any) -> list[tuple[str, Any]]:
    """(name for messages, dataset) of each evaluation set."""
    if evaluation is None:
        return []
    if isinstance(evaluation, dict):
        return [(f"eval_dataset[{name!r}]", dataset) for name, dataset in evaluation.items()]
    return [("eval_dataset", evaluation)]
