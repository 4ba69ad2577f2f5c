"""What a reward model reads: prompts and completions -> rows of its own tokens."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from ..models.chat_templates import apply_template
from .builtin import describe_sample

logger = logging.getLogger(__name__)

UNLIMITED = 10**9  # a tokenizer that knows no limit says 10**30


class ModelInputs:
    """Texts, tokens and padding of reward model `name`; sets the pad token of its `config`.

    `position`: "last" or "eos", as RewardModel says. `num_embeddings`: token ids that the model
    takes, None: not known. With a [CLS] in its tokenizer the model is an
    encoder.
    """

    def __init__(
        self,
        name: str,
        tokenizer: Any,
        config: Any,
        *,
        position: str,
        chat_template_kwargs: dict[str, Any] | None,
        num_embeddings: int | None = None,
    ) -> None:
        self.name, self.tokenizer = name, tokenizer
        self.reads_eos = position == "eos"
        self.chat_template_kwargs = chat_template_kwargs or {}
        has_cls = getattr(tokenizer, "cls_token_id", None) is not None
        self.is_encoder = has_cls or bool(getattr(config, "is_encoder_decoder", False))
        self._config = config.get_text_config() if hasattr(config, "get_text_config") else config
        self._num_embeddings = num_embeddings
        self._set_pad_token()
        self._check_ids([tokenizer.pad_token_id], "pad token")
        if self.reads_eos:
            self._check_ids([tokenizer.eos_token_id or 0], "EOS token")
            self._check_reads_eos()
        limits = (
            getattr(tokenizer, "model_max_length", None),
            getattr(self._config, "max_position_embeddings", None),
        )
        self._most_tokens = min((n for n in limits if n and n > 0), default=UNLIMITED)
        self._said_cut = False

    def rows(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        ended: Sequence[bool] | None,
    ) -> list[list[int]]:
        """B token rows, one per sample. Raises ValueError for a sample that has none.

        `ended`: as RewardModel is told it.
        """
        texts = self._texts(prompts, completions)
        if self.reads_eos:  # an EOS that a chat template wrote would be there twice
            texts = [_without(self.tokenizer.eos_token, text) for text in texts]
        rows = self.tokenizer(texts, add_special_tokens=self.is_encoder, verbose=False)["input_ids"]
        rows = [list(row) for row in rows]
        if self.reads_eos:
            self._add_eos(rows, ended)
        if [] in rows:
            raise ValueError(
                f"Reward model {self.name!r} got a text without tokens: "
                f"{describe_sample(rows.index([]), prompts, completions)}."
            )
        largest = max(range(len(rows)), key=lambda number: max(rows[number]))
        self._check_ids(rows[largest], f"text of {describe_sample(largest, prompts, completions)}")
        return self._cut(rows)

    def _check_ids(self, ids: Sequence[int], of: str) -> None:
        """Raise ValueError for a token id that the model has no embedding for."""
        if self._num_embeddings is not None and max(ids) >= self._num_embeddings:
            raise ValueError(
                f"Reward model {self.name!r} has embeddings for token ids below "
                f"{self._num_embeddings} only, but its tokenizer gives {max(ids)} for the {of}. "
                "Call resize_token_embeddings(len(tokenizer)) on the reward model, or pass the "
                "tokenizer that belongs to it."
            )

    def pad_id(self, rows: list[list[int]]) -> int:
        """What to pad these rows with; the model, which looks for it from the right, is told.

        Where the value is read at EOS it is an id that no row ends with: a tokenizer's pad token
        is often the EOS itself, which would be passed over.
        """
        pad = self.tokenizer.pad_token_id
        if self.reads_eos:
            last = {row[-1] for row in rows}
            pad = next(i for i in (pad, *range(len(last) + 1)) if i not in last)
        self._config.pad_token_id = pad
        return pad

    def _texts(self, prompts: Sequence[Any], completions: Sequence[Any]) -> list[str]:
        if all(isinstance(x, str) for x in (*prompts, *completions)):
            return [p + c for p, c in zip(prompts, completions, strict=True)]
        for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            if not (isinstance(prompt, list) and isinstance(completion, list)):
                raise ValueError(
                    f"Reward model {self.name!r} needs prompts and completions of one format, all "
                    f"strings or all message lists; see {describe_sample(i, prompts, completions)}."
                )
        if self.tokenizer.chat_template is None:
            raise ValueError(
                f"The tokenizer of reward model {self.name!r} has no chat template, but the "
                "prompts are conversations. Pass a reward tokenizer with one, or string prompts."
            )
        return [
            apply_template(self.tokenizer, p + c, tokenize=False, **self.chat_template_kwargs)
            for p, c in zip(prompts, completions, strict=True)
        ]

    def _add_eos(self, rows: list[list[int]], ended: Sequence[bool] | None) -> None:
        if ended is None:
            raise ValueError(
                "A reward model that reads at EOS needs `ended`: for each completion, whether it "
                "ended or was cut."
            )
        for row, end in zip(rows, ended, strict=True):
            if end:
                row.append(self.tokenizer.eos_token_id)

    def _cut(self, rows: list[list[int]]) -> list[list[int]]:
        """Cut the beginnings that the model has no room for; an encoder keeps its [CLS]."""
        most = self._most_tokens
        num_long = sum(len(row) > most for row in rows)
        if num_long and not self._said_cut:
            self._said_cut = True
            logger.warning(
                "Reward model %r takes %d tokens: %d of %d texts are longer, and lose their "
                "beginning. This is said once.",
                self.name,
                most,
                num_long,
                len(rows),
            )
        kept = 1 if self.is_encoder else 0
        return [row if len(row) <= most else row[:kept] + row[kept - most :] for row in rows]

    def _set_pad_token(self) -> None:
        if self.tokenizer.pad_token_id is None:
            if self.tokenizer.eos_token_id is None:
                raise ValueError(
                    f"The tokenizer of reward model {self.name!r} has neither a pad nor an EOS "
                    "token; set `tokenizer.pad_token` before passing it."
                )
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self._config.pad_token_id = self.tokenizer.pad_token_id

    def _check_reads_eos(self) -> None:
        if self.is_encoder:
            raise ValueError(
                f"Reward model {self.name!r} is an encoder, which reads the whole text: "
                "reward_model_position='eos' is for decoders. Write 'last'."
            )
        if self.tokenizer.eos_token_id is None:
            raise ValueError(
                f"reward_model_position='eos' needs an EOS token; the tokenizer of reward model "
                f"{self.name!r} has none: set `tokenizer.eos_token`, or write 'last'."
            )


def _without(ending: str, text: str) -> str:
    """`text` up to `ending`, if only white space follows that."""
    shorter = text.rstrip()
    return shorter.removesuffix(ending) if shorter.endswith(ending) else text
