"""Datasets and what a run needs of them, checked when the trainer is made: a run must not find out
hours later that it cannot read a prompt or score a completion."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any, cast

from datasets import Dataset, IterableDataset
from transformers.trainer_utils import IntervalStrategy

from ..config.rloo_config import RLOOConfig
from .first_rows import columns_of, first_row, is_transformed, only_columns, rows_of
from .images import has_image_column
from .row_errors import ReadRows, UnreadableRow
from .skipping import Skipping
from .tokenize import RowTokenizer

logger = logging.getLogger(__name__)

NUM_CHECKED = 10_000  # prompts that are tokenised when the trainer is made, to fail early
NUM_CHECKED_IMAGES = 256  # rows with images, of which each takes milliseconds


def check_datasets(
    train: Any, evaluation: Any, args: RLOOConfig, *, need_prompt: bool = True
) -> None:
    """Types, columns and sizes, which need no model.

    Raises TypeError or ValueError unless both are a datasets.Dataset or IterableDataset (or, for
    evaluation, a dict of them, or None) that has rows and, with `need_prompt`, a column `prompt`.
    """
    if train is None:
        raise ValueError("`train_dataset` is required: pass a dataset with a 'prompt' column.")
    look = not args.skip_unusable_rows
    check_dataset(train, "train_dataset", look=look, need_prompt=need_prompt)
    if isinstance(train, IterableDataset):
        if args.curriculum is not None:
            raise ValueError(
                f"curriculum={args.curriculum} remembers every row of train_dataset by its number, "
                "which a streamed one has not: load it without streaming, or leave curriculum out."
            )
        if args.max_steps <= 0:
            raise ValueError(
                "args.max_steps must be set to a positive value if dataloader does not have a "
                f"length, as that of a streamed train_dataset, was {args.max_steps}."
            )
        if args.dataloader_num_workers:
            logger.warning(
                "Iterable datasets require `dataloader_num_workers=0`, as several workers would "
                "each read all of it; overriding the provided value (%d).",
                args.dataloader_num_workers,
            )
    else:
        check_fills_a_batch(len(train), args.prompts_per_generation)
    for name, dataset in evaluation_sets(evaluation):
        check_dataset(dataset, name, look=look, need_prompt=need_prompt)
    every = [train, *(dataset for _, dataset in evaluation_sets(evaluation))]
    is_streamed = any(isinstance(dataset, IterableDataset) for dataset in every)
    if is_streamed and cast(Any, args).accelerator_config.dispatch_batches:
        raise ValueError(
            "Iterable datasets require `dispatch_batches=False`, as every process reads them for "
            "itself: leave it out of accelerator_config."
        )
    if evaluation is None and args.eval_strategy != "no":
        raise ValueError(
            f"eval_strategy={IntervalStrategy(args.eval_strategy).value!r} needs an eval_dataset: "
            "pass one, or leave eval_strategy out."
        )


def check_prompts(
    train: Any,
    evaluation: Any,
    tokenize_rows: RowTokenizer,
    skipping: Skipping | None,
    prompts_per_batch: int,
) -> None:
    """Raise ValueError unless the first NUM_CHECKED prompts of each set (of a stream: the first
    row) can be tokenised and fit into the model's context.

    With `skipping`, unless enough rows can be used; of a stream it is seen when it is read.
    """
    for name, dataset in [("train_dataset", train), *evaluation_sets(evaluation)]:
        if skipping is None:
            _check_rows(dataset, name, tokenize_rows)
        elif isinstance(dataset, Dataset):
            left = len(dataset) - len(skipping.left_out(dataset, name))
            if dataset is train:
                check_fills_a_batch(left, prompts_per_batch)


def check_reward_columns(
    check_columns: Callable[[Iterable[str]], None],
    train: Any,
    evaluation: Any,
    *,
    keep_columns: bool,
    look: bool,
) -> None:
    """Raise ValueError unless every set has the columns that the reward functions take.

    `check_columns` is the rewards' own check; `keep_columns`: whether they get any; `look`: see
    `columns_of`.
    """
    for name, dataset in [("train_dataset", train), *evaluation_sets(evaluation)]:
        columns = columns_of(dataset, name, look=look) if keep_columns else []
        if columns is None:  # then rows are checked as they are read
            continue
        try:
            check_columns(columns)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error


def have_images(train: Any, evaluation: Any, *, look: bool) -> bool:
    """Whether a set has a column of images. `look`: see `columns_of`."""
    sets = [("train_dataset", train), *evaluation_sets(evaluation)]
    return any(has_image_column(columns_of(d, name, look=look) or ()) for name, d in sets)


def evaluation_sets(evaluation: Any) -> list[tuple[str, Any]]:
    """(name for messages, dataset) of each evaluation set."""
    if evaluation is None:
        return []
    if isinstance(evaluation, dict):
        return [(f"eval_dataset[{name!r}]", dataset) for name, dataset in evaluation.items()]
    return [("eval_dataset", evaluation)]


def check_dataset(dataset: Any, name: str, *, look: bool = True, need_prompt: bool = True) -> None:
    """Raise TypeError or ValueError unless `dataset` is a datasets.Dataset or IterableDataset that
    has rows and, with `need_prompt`, a column `prompt`. `look`: see `columns_of`."""
    if not isinstance(dataset, Dataset | IterableDataset):
        hint = " Pass one of its splits." if isinstance(dataset, dict) else ""
        if isinstance(dataset, list):
            hint = " Write datasets.Dataset.from_list(rows)."
        raise TypeError(
            f"`{name}` must be a `Dataset` or `IterableDataset` of datasets, got "
            f"`{type(dataset).__name__}`.{hint}"
        )
    if isinstance(dataset, Dataset) and len(dataset) == 0:
        raise ValueError(f"{name} is empty: it must have at least one row with a 'prompt'.")
    columns = columns_of(dataset, name, look=look)
    if columns is None:
        return
    if need_prompt and "prompt" not in columns:
        hint = " Rename it, as in dataset.rename_column('question', 'prompt')."
        if "input_ids" in columns:
            hint = " Tokenised datasets of the 2024 trainer are not taken: give the text."
        elif is_transformed(dataset):
            hint = " Its transform must return one."
        raise ValueError(f"{name} has no column 'prompt', only {sorted(columns)}.{hint}")


def _check_rows(dataset: Any, name: str, tokenize_rows: RowTokenizer) -> None:
    """Raise ValueError unless the first rows pass `tokenize_rows`."""
    try:
        if not isinstance(dataset, Dataset):
            row = first_row(dataset)
            tokenize_rows([{} if row is None else row])
            return
        if tokenize_rows.reader is not None:
            _check_images(dataset, tokenize_rows)
            return
        tokenize_rows([dataset[0]])
        for start in range(0, min(len(dataset), NUM_CHECKED), 1000):
            stop = min(start + 1000, NUM_CHECKED)
            tokenize_rows.prompts(rows_of(dataset, start, stop, tokenize_rows.columns))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _check_images(dataset: Dataset, tokenize_rows: RowTokenizer) -> None:
    """The same one by one, and of fewer rows: each of their images is read."""
    whole, rows = ReadRows(dataset), ReadRows(only_columns(dataset, tokenize_rows.columns))
    for number in range(min(len(dataset), NUM_CHECKED_IMAGES)):
        (row,) = (rows if number else whole).__getitems__([number])
        try:
            if isinstance(row, UnreadableRow):
                raise row
            read = tokenize_rows.prompts if number else tokenize_rows
            read([row])
        except ValueError as error:
            raise ValueError(f"row {number} (counted from 0): {error}") from error


def check_fills_a_batch(num_rows: int, prompts_per_batch: int) -> None:
    """Raise ValueError unless `num_rows` prompts make a generation batch."""
    if num_rows < prompts_per_batch:
        raise ValueError(
            f"train_dataset has {num_rows} prompts, but a generation batch takes "
            f"{prompts_per_batch}: give more prompts, or lower per_device_train_batch_size, "
            "gradient_accumulation_steps or steps_per_generation."
        )
