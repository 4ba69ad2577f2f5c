"""Stage 1: dataset -> prompts, in an order that a resumed run repeats.

The loader yields one item per optimizer step: the generation batches that start in that step, each
a list of dataset rows (none in a step that only reuses earlier completions). Every process reads
the same items and takes its own completions from them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, Sampler
from transformers import PreTrainedTokenizerBase

from .config import RLOOConfig, as_dict
from .types import Prompt

Row = dict[str, Any]
NUM_CHECKED = 10_000  # prompts that are tokenised when the trainer is made, to fail early


def is_conversational(text: Any) -> bool:
    return isinstance(text, list) and bool(text) and isinstance(text[0], dict) and "role" in text[0]


class StepSampler(Sampler[list[int]]):
    """Dataset rows of every optimizer step of an epoch; the order follows from (seed, epoch).

    A generation batch of P prompts lasts `micro_steps_per_batch` micro-steps, an optimizer step
    takes `micro_steps_per_update`. Prompts that do not fill a generation batch wait for the next
    epoch, as in TRL.
    """

    def __init__(
        self,
        num_rows: int,
        prompts_per_batch: int,
        micro_steps_per_batch: int,
        micro_steps_per_update: int,
        *,
        shuffle: bool,
        seed: int,
    ):
        self.num_rows, self.prompts_per_batch = num_rows, prompts_per_batch
        self.micro_steps_per_batch = micro_steps_per_batch
        self.micro_steps_per_update = micro_steps_per_update
        self.shuffle, self.seed, self.epoch = shuffle, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        micro_steps = (self.num_rows // self.prompts_per_batch) * self.micro_steps_per_batch
        return -(-micro_steps // self.micro_steps_per_update)

    def __iter__(self) -> Iterator[list[int]]:
        order = list(range(self.num_rows))
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed + self.epoch)
            order = torch.randperm(self.num_rows, generator=generator).tolist()
        num_batches = self.num_rows // self.prompts_per_batch
        for update in range(len(self)):
            first = update * self.micro_steps_per_update
            last = min(
                first + self.micro_steps_per_update, num_batches * self.micro_steps_per_batch
            )
            begin = -(-first // self.micro_steps_per_batch)
            end = -(-last // self.micro_steps_per_batch)
            yield order[begin * self.prompts_per_batch : end * self.prompts_per_batch]


class StepLoader(DataLoader):
    """DataLoader over a StepSampler that passes the epoch on."""

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)  # pyright: ignore


class StreamedSteps(IterableDataset):
    """The same for a streamed dataset: one endless pass, reshuffled whenever the stream ends."""

    def __init__(
        self,
        dataset: Any,
        prompts_per_batch: int,
        micro_steps_per_batch: int,
        micro_steps_per_update: int,
    ):
        self.dataset, self.prompts_per_batch = dataset, prompts_per_batch
        self.micro_steps_per_batch = micro_steps_per_batch
        self.micro_steps_per_update = micro_steps_per_update

    def _rows(self) -> Iterator[Row]:
        epoch = 0
        while True:
            self.dataset.set_epoch(epoch)
            row = None
            for row in self.dataset:
                yield row
            if row is None:
                raise ValueError("train_dataset is empty: the stream ended without a single row.")
            epoch += 1

    def __iter__(self) -> Iterator[list[Row]]:
        rows, micro_step = self._rows(), 0
        while True:
            step: list[Row] = []
            for _ in range(self.micro_steps_per_update):
                if micro_step % self.micro_steps_per_batch == 0:
                    step += [next(rows) for _ in range(self.prompts_per_batch)]
                micro_step += 1
            yield step


def tokenize(
    rows: list[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    chat_template_kwargs: dict[str, Any],
    max_prompt_tokens: int | None,
    keep_columns: bool = True,
    length_option: str = "max_completion_length",
) -> list[Prompt]:
    """Dataset rows -> prompts with token ids; conversational ones go through the chat template.

    Raises ValueError for a prompt that is empty, of a wrong type, or leaves no room for the
    completion in the model's context, and for rows of both kinds. `length_option`: the setting of
    the longest completion, as the caller's user knows it.
    """
    if len({is_conversational(row.get("prompt")) for row in rows}) > 1:
        raise ValueError(
            "some prompts are conversations and some are not: make all of them strings, or all "
            "of them lists of messages."
        )
    prompts = []
    for row in rows:
        if "prompt" not in row:
            raise ValueError(f"a row has no 'prompt', only {sorted(row)}: name its text 'prompt'.")
        text = row["prompt"]
        ids = _encode(text, tokenizer, chat_template_kwargs)
        if not ids or text == "":
            raise ValueError(
                f"a prompt is empty ({_shown(text)}): there is no token to continue. "
                "Drop such rows from the dataset."
            )
        if max_prompt_tokens is not None and len(ids) > max_prompt_tokens:
            raise ValueError(
                f"a prompt has {len(ids)} tokens, but only {max_prompt_tokens} fit into the "
                f"model's context beside {length_option}: shorten or drop it, or lower "
                f"{length_option}. The prompt begins {_shown(text)}."
            )
        columns = {
            k: v for k, v in row.items() if k not in ("prompt", "completion", "completion_ids")
        }
        prompts.append(Prompt(text, list(ids), columns if keep_columns else {}))
    return prompts


def _encode(text: Any, tokenizer: PreTrainedTokenizerBase, kwargs: dict[str, Any]) -> list[int]:
    if is_conversational(text):
        return _apply_template(text, tokenizer, kwargs)
    if isinstance(text, str):
        return tokenizer(text)["input_ids"]  # pyright: ignore
    raise ValueError(
        "a prompt must be a string or a list of {'role': ..., 'content': ...} messages, "
        f"got {_shown(text)}."
    )


def _apply_template(
    messages: Any, tokenizer: PreTrainedTokenizerBase, kwargs: dict[str, Any]
) -> list[int]:
    if tokenizer.chat_template is None and "chat_template" not in kwargs:
        raise ValueError(
            "a prompt is a conversation, but the tokenizer has no chat template: set "
            "tokenizer.chat_template, or make the prompts strings."
        )
    try:
        encoded: Any = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, **kwargs
        )
    except Exception as error:  # whatever the template's code runs into
        raise ValueError(
            f"the chat template fails on a prompt ({type(error).__name__}: {error}). The prompt "
            f"is {_shown(messages)}."
        ) from error
    return encoded["input_ids"]


class RowTokenizer:
    """`tokenize` with a run's settings: dataset rows -> prompts."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, context_length: int | None, args: RLOOConfig
    ):
        self.tokenizer = tokenizer
        self.chat_template_kwargs = as_dict(args.chat_template_kwargs)
        self.room = None if context_length is None else context_length - args.max_completion_length
        if self.room is not None and self.room < 1:
            raise ValueError(
                f"max_completion_length={args.max_completion_length} leaves no room for a prompt "
                f"in the model's context of {context_length} tokens: lower it."
            )
        self.keep_columns = not args.remove_unused_columns

    def __call__(self, rows: list[Row]) -> list[Prompt]:
        return tokenize(
            rows,
            self.tokenizer,
            chat_template_kwargs=self.chat_template_kwargs,
            max_prompt_tokens=self.room,
            keep_columns=self.keep_columns,
        )

    def num_tokens(self, texts: list[Any]) -> list[int]:
        """Tokens of each prompt, chat template included."""
        if all(isinstance(text, str) for text in texts):
            return [len(ids) for ids in self.tokenizer(texts)["input_ids"]]  # pyright: ignore
        return [len(_encode(t, self.tokenizer, self.chat_template_kwargs)) for t in texts]


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 120 else shown[:117] + "..."


def check_dataset(dataset: Any, name: str, tokenize_rows: Any = None) -> None:
    """Raise TypeError or ValueError unless `dataset` is a datasets.Dataset or IterableDataset that
    has rows, a column `prompt` and no images.

    With `tokenize_rows`, its first NUM_CHECKED prompts (of a stream: the first) must pass it too.
    """
    from datasets import Dataset, IterableDataset

    if not isinstance(dataset, Dataset | IterableDataset):
        hint = " Pass one of its splits." if isinstance(dataset, dict) else ""
        raise TypeError(
            f"{name} must be a datasets.Dataset or IterableDataset, got {type(dataset).__name__}."
            f"{hint}"
        )
    columns = dataset.column_names
    if columns is not None and "prompt" not in columns:
        hint = " Rename it, as in dataset.rename_column('question', 'prompt')."
        if "input_ids" in columns:
            hint = " Tokenised datasets of the 2024 trainer are not taken: give the text."
        raise ValueError(f"{name} has no column 'prompt', only {sorted(columns)}.{hint}")
    if columns is not None and {"image", "images"} & set(columns):
        raise ValueError(f"{name} has an image column; rloo_fast trains text models: remove it.")
    if isinstance(dataset, Dataset) and len(dataset) == 0:
        raise ValueError(f"{name} is empty: it must have at least one row with a 'prompt'.")
    if tokenize_rows is None:
        return
    for rows in _first_rows(dataset, name):
        try:
            tokenize_rows(rows)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error


def _first_rows(dataset: Any, name: str) -> Iterator[list[Row]]:
    from datasets import IterableDataset

    if isinstance(dataset, IterableDataset):
        row = next(iter(dataset), None)
        if row is None:
            raise ValueError(f"{name} is empty: the stream ended without a single row.")
        yield [row]
        return
    for start in range(0, min(len(dataset), NUM_CHECKED), 1000):
        rows = dataset.select(range(start, min(start + 1000, len(dataset))))
        yield [{"prompt": text} for text in rows["prompt"]]


def check_fills_a_batch(num_rows: int, prompts_per_batch: int) -> None:
    """Raise ValueError unless `num_rows` prompts make a generation batch."""
    if num_rows < prompts_per_batch:
        raise ValueError(
            f"train_dataset has {num_rows} prompts, but a generation batch takes "
            f"{prompts_per_batch}: give more prompts, or lower per_device_train_batch_size, "
            "gradient_accumulation_steps or steps_per_generation."
        )


def train_loader(
    dataset: Any, *, prompts_per_batch: int, micro_steps_per_batch: int,
    micro_steps_per_update: int, shuffle: bool, seed: int, num_workers: int = 0,
) -> DataLoader:  # fmt: skip
    """One item per optimizer step. Raises ValueError if no generation batch can be filled."""
    import datasets

    sizes = (prompts_per_batch, micro_steps_per_batch, micro_steps_per_update)
    if isinstance(dataset, datasets.IterableDataset):
        if shuffle:
            dataset = dataset.shuffle(seed=seed)
        return DataLoader(StreamedSteps(dataset, *sizes), batch_size=None, collate_fn=_same)
    check_fills_a_batch(len(dataset), prompts_per_batch)
    sampler = StepSampler(len(dataset), *sizes, shuffle=shuffle, seed=seed)
    return StepLoader(dataset, batch_sampler=sampler, collate_fn=_same, num_workers=num_workers)  # pyright: ignore


def _same(rows: Any) -> Any:
    return rows


class EvalSampler(Sampler[list[int]]):
    """Consecutive prompts, `prompts_per_batch` at a time, the last batch shorter."""

    def __init__(self, num_rows: int, prompts_per_batch: int):
        self.num_rows, self.prompts_per_batch = num_rows, prompts_per_batch

    def __len__(self) -> int:
        return -(-self.num_rows // self.prompts_per_batch)

    def __iter__(self) -> Iterator[list[int]]:
        for start in range(0, self.num_rows, self.prompts_per_batch):
            yield list(range(start, min(start + self.prompts_per_batch, self.num_rows)))


def eval_loader(dataset: Any, *, prompts_per_batch: int, num_workers: int = 0) -> DataLoader:
    """Every prompt of an evaluation set once, in order."""
    import datasets

    if isinstance(dataset, datasets.IterableDataset):
        return DataLoader(dataset, batch_size=prompts_per_batch, collate_fn=_same)  # pyright: ignore
    sampler = EvalSampler(len(dataset), prompts_per_batch)
    return DataLoader(dataset, batch_sampler=sampler, collate_fn=_same, num_workers=num_workers)  # pyright: ignore
