"""Dataset rows -> prompts with token ids; conversations go through the chat template."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..config.rloo_config import RLOOConfig, as_dict
from ..models.chat_templates import apply_template
from ..models.vision import ImageReader
from ..records import Prompt, PromptText
from .image_prompts import prompt_with_images, raw_prompt, trial_prompt
from .images import COLUMNS
from .messages import is_conversational, kind_error, shown, template_errors
from .row_errors import UnreadableRow, UnusableRow
from .row_functions import Row

Schemas = Callable[[Row], list[dict[str, Any]]]  # a dataset row -> those of its tools

OPTION = " skip_unusable_rows=True leaves such rows out and counts them."


def tokenize(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    chat_template_kwargs: dict[str, Any],
    max_prompt_tokens: int | None,
    num_embeddings: int | None = None,
    keep_columns: bool = True,
    length_option: str = "max_completion_length",
    engine_length: int | None = None,
    reader: ImageReader | None = None,
    engine_reads_images: bool = False,
    schemas: Schemas | None = None,
    default: PromptText | None = None,
) -> list[Prompt]:
    """Dataset rows -> prompts with token ids; conversational ones go through the chat template.

    `reader`: of a run with images, of which a row may have some; None: a text run.
    `engine_reads_images`: prompts are also made as the rollout engine's own processor takes them.
    `schemas`: of a run with tools, whose prompts must be conversations. `default`: the prompt of a
    row that has none.

    Raises UnusableRow (a ValueError) for a prompt that is missing, empty, of a wrong type, has
    token ids that are not < num_embeddings, or leaves no room for the completion in the model's
    context, or in `engine_length`; ValueError for rows of both kinds. `length_option`: the setting
    of the longest completion, as the caller's user knows it. `engine_length`: the longest prompt
    that the rollout engine's memory was laid out for, where the user did not say.
    """
    if len({is_conversational(row.get("prompt", default)) for row in rows}) > 1:
        raise ValueError(
            "some prompts are conversations and some are not: make all of them strings, or all "
            "of them lists of messages."
        )
    prompts = []
    for row in rows:
        text: Any = row.get("prompt", default)
        inputs = None
        if default is None and "prompt" not in row:
            raise UnusableRow(f"a row has no 'prompt', only {sorted(row)}: name its text 'prompt'.")
        raw = None
        if reader is not None:
            text, ids, inputs = prompt_with_images(row, reader, chat_template_kwargs)
            if engine_reads_images:
                raw = raw_prompt(text, row, reader, chat_template_kwargs)
        elif any(row.get(name) is not None for name in COLUMNS):
            raise UnusableRow(
                "a row has an image, and the run has no processor: pass the processor of "
                f"a vision-language model as processing_class. Its prompt begins {shown(text)}."
            )
        else:
            ids = _encode(text, tokenizer, _options(row, text, chat_template_kwargs, schemas))
        if not ids or text == "":
            raise UnusableRow(
                f"a prompt {'is empty' if text in ('', []) else 'has no tokens'} "
                f"({shown(text)}): there is no token to continue. "
                "Drop such rows from the dataset."
            )
        if num_embeddings is not None and max(ids) >= num_embeddings:
            raise UnusableRow(_beyond(max(ids), num_embeddings, tokenizer, text))
        if max_prompt_tokens is not None and len(ids) > max_prompt_tokens:
            raise UnusableRow(
                f"a prompt has {len(ids)} tokens, but only {max_prompt_tokens} fit into the "
                f"model's context beside {length_option}: shorten or drop it, or lower "
                f"{length_option}. The prompt begins {shown(text)}."
            )
        if engine_length is not None and len(ids) > engine_length:
            raise UnusableRow(
                f"a prompt has {len(ids)} tokens, but the rollout engine was started for prompts "
                f"of at most {engine_length}, from those that were there to see: set "
                f"vllm_max_model_length to the longest prompt plus {length_option}, or "
                f"max_prompt_length to leave longer prompts out. The prompt begins {shown(text)}."
            )
        columns = {
            k: v for k, v in row.items() if k not in ("prompt", "completion", "completion_ids")
        }
        prompts.append(Prompt(text, list(ids), columns if keep_columns else {}, inputs, raw))
    return prompts


def _beyond(token_id: int, num_embeddings: int, tokenizer: Any, text: Any) -> str:
    token = tokenizer.convert_ids_to_tokens(token_id)
    return (
        f"a prompt has the token id {token_id} ({token!r}), but the model has embeddings for ids "
        f"below {num_embeddings} only, the tokenizer {len(tokenizer)} tokens: call "
        "model.resize_token_embeddings(len(tokenizer)) before the trainer is made, or pass the "
        f"tokenizer that belongs to the model. The prompt begins {shown(text)}."
    )


def _options(
    row: Row, text: Any, chat_template_kwargs: dict[str, Any], schemas: Schemas | None
) -> dict[str, Any]:
    """Those of apply_chat_template, with the row's tools."""
    if schemas is None:
        return chat_template_kwargs
    if not is_conversational(text):
        raise UnusableRow(
            "with tools, a prompt is a conversation: make it a list of {'role': ..., 'content': "
            f"...}} messages, got {shown(text)}."
        )
    # None: a template may announce tools where the list is empty
    return {**chat_template_kwargs, "tools": schemas(row) or None}


def _encode(text: Any, tokenizer: PreTrainedTokenizerBase, kwargs: dict[str, Any]) -> list[int]:
    if is_conversational(text):
        return _apply_template(text, tokenizer, kwargs)
    if isinstance(text, str):
        return tokenizer(text).input_ids
    raise UnusableRow(kind_error(text))


def _apply_template(
    messages: Any, tokenizer: PreTrainedTokenizerBase, kwargs: dict[str, Any]
) -> list[int]:
    if tokenizer.chat_template is None and "chat_template" not in kwargs:
        raise ValueError(
            "a prompt is a conversation, but the tokenizer has no chat template: set "
            "tokenizer.chat_template, or make the prompts strings."
        )
    with template_errors(messages):
        encoded: Any = apply_template(
            tokenizer, messages, add_generation_prompt=True, tokenize=True, return_dict=True,
            **kwargs,
        )  # fmt: skip
    return encoded["input_ids"]


class RowTokenizer:
    """`tokenize` with a run's settings: dataset rows -> prompts.

    num_embeddings: rows of the model's embedding matrix, None: not known. check_columns: raises
    ValueError for names of dataset columns that do not suit the reward functions. schemas, default:
    see `tokenize`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        context_length: int | None,
        max_completion_length: int,
        chat_template_kwargs: dict[str, Any],
        keep_columns: bool,
        num_embeddings: int | None = None,
        check_columns: Callable[[Iterable[str]], None] | None = None,
        reader: ImageReader | None = None,
        engine_reads_images: bool = False,
        schemas: Schemas | None = None,
        default: PromptText | None = None,
    ):
        self.tokenizer, self.reader = tokenizer, reader
        self.engine_reads_images = engine_reads_images
        self.schemas, self.default = schemas, default
        # what a prompt is made of, and how many of them are held at a time
        self.columns = ("prompt",) if reader is None else ("prompt", *COLUMNS)
        if schemas is not None:
            self.columns = ("prompt", "environment")  # which says what the tools are
        self.at_a_time = 1000 if reader is None else 16
        # a prompt with an image, to try out what a model can do with it
        self.seen: Prompt | None = None
        if reader is not None:
            self.seen = trial_prompt(reader, chat_template_kwargs)
        self.chat_template_kwargs, self.keep_columns = chat_template_kwargs, keep_columns
        self.num_embeddings, self._check_columns = num_embeddings, check_columns
        self._good_columns: set[frozenset[str]] = set()
        self.engine_length: int | None = None  # see `tokenize`; set once the data were looked at
        self.max_prompt_tokens = None
        if context_length is not None:
            self.max_prompt_tokens = context_length - max_completion_length
            if self.max_prompt_tokens < 1:
                raise ValueError(
                    f"max_completion_length={max_completion_length} leaves no room for a prompt "
                    f"in the model's context of {context_length} tokens: lower it."
                )

    @classmethod
    def from_config(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        context_length: int | None,
        args: RLOOConfig,
        *,
        num_embeddings: int | None = None,
        check_columns: Callable[[Iterable[str]], None] | None = None,
        reader: ImageReader | None = None,
        engine_reads_images: bool = False,
        schemas: Schemas | None = None,
        default: PromptText | None = None,
    ) -> RowTokenizer:
        return cls(
            tokenizer,
            context_length=context_length,
            max_completion_length=args.max_completion_length,
            chat_template_kwargs=as_dict(args.chat_template_kwargs),
            keep_columns=not args.remove_unused_columns,
            num_embeddings=num_embeddings,
            check_columns=check_columns,
            reader=reader,
            engine_reads_images=engine_reads_images,
            schemas=schemas,
            default=default,
        )

    @property
    def processor(self) -> Any:
        """Of a run with images; None: a text run."""
        return None if self.reader is None else self.reader.processor

    def __call__(self, rows: Sequence[Row | UnreadableRow]) -> list[Prompt]:
        """Raises UnusableRow for a row that was not read, lacks a column that the reward functions
        need, or whose prompt cannot be used; ValueError as `tokenize`."""
        with _naming_the_option():
            whole = [self._whole(row) for row in rows]
        return self.prompts(whole)

    def prompts(self, rows: Sequence[Row]) -> list[Prompt]:
        """`tokenize` these rows, of which the other columns may have been left out."""
        with _naming_the_option():
            return tokenize(
                rows,
                self.tokenizer,
                chat_template_kwargs=self.chat_template_kwargs,
                max_prompt_tokens=self.max_prompt_tokens,
                num_embeddings=self.num_embeddings,
                keep_columns=self.keep_columns,
                engine_length=self.engine_length,
                reader=self.reader,
                engine_reads_images=self.engine_reads_images,
                schemas=self.schemas,
                default=self.default,
            )

    def with_text(self, prompt: Prompt, text: PromptText) -> Prompt:
        """The same row with another text, such as with what its environment says."""
        (changed,) = self.prompts([{**prompt.columns, "prompt": text}])
        return changed

    def _whole(self, row: Row | UnreadableRow) -> Row:
        """The row, which was read and has every column that the reward functions need."""
        if isinstance(row, UnreadableRow):
            raise row
        if not isinstance(row, Mapping):
            raise UnusableRow(
                f"a row is a dict of its columns, but the dataset gave {type(row).__name__}: call "
                "dataset.with_format(None)."
            )
        columns = frozenset(row)
        if self._check_columns is not None and columns not in self._good_columns:
            try:
                self._check_columns(columns if self.keep_columns else ())
            except ValueError as error:
                raise UnusableRow(f"{error} (The prompt: {shown(row.get('prompt'))}.)") from error
            self._good_columns.add(columns)
        return row

    def num_tokens(self, rows: Sequence[Row]) -> list[int]:
        """Tokens of each row's prompt, chat template and images included; 0 for one that cannot be
        tokenised."""
        texts: list[Any] = [row.get("prompt", self.default) for row in rows]
        if (
            self.reader is None
            and self.schemas is None
            and all(isinstance(text, str) for text in texts)
        ):
            return [len(ids) for ids in self.tokenizer(texts).input_ids]
        return [self._num_tokens(row) for row in rows]

    def _num_tokens(self, row: Row) -> int:
        try:
            if self.reader is not None:
                return len(prompt_with_images(row, self.reader, self.chat_template_kwargs)[1])
            text = row.get("prompt", self.default)
            options = _options(row, text, self.chat_template_kwargs, self.schemas)
            return len(_encode(text, self.tokenizer, options))
        except UnusableRow:
            return 0


@contextmanager
def _naming_the_option() -> Iterator[None]:
    try:
        yield
    except UnreadableRow:
        raise  # a stream that broke cannot be read any further
    except UnusableRow as error:
        error.args = (f"{error}{OPTION}",)
        raise
