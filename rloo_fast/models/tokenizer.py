"""The policy's tokenizer, its pad token, and the token ids that end a completion."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..config.paths import user_path
from .pretrained import damage

logger = logging.getLogger(__name__)


def load_tokenizer(
    processing_class: Any,
    model: Any,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedTokenizerBase:
    """The tokenizer as given, or the one saved with the model; its pad token is set.

    A missing pad token is taken from EOS, with a note. Raises ValueError where no tokenizer can be
    found.
    """
    if processing_class is None:
        name = getattr(model.config, "_name_or_path", "") or ""
        try:
            processing_class = AutoTokenizer.from_pretrained(
                name, revision=revision, trust_remote_code=trust_remote_code
            )
        except Exception as error:
            why = damage(user_path(name)) if name else None
            raise ValueError(
                f"no tokenizer could be loaded for the model ({name or 'built in memory'!r}): "
                + (why or "pass it as processing_class=...")
            ) from error
    if not isinstance(processing_class, PreTrainedTokenizerBase):
        raise TypeError(
            "The `processing_class` must be a tokenizer (`PreTrainedTokenizerBase`), or a vision-"
            f"language model's processor (`ProcessorMixin`), got {type(processing_class).__name__}."
        )
    if processing_class.pad_token is None:
        if processing_class.eos_token is None:
            raise ValueError(
                "the tokenizer has neither a pad nor an EOS token: set tokenizer.pad_token and "
                "tokenizer.eos_token."
            )
        processing_class.pad_token = processing_class.eos_token
        logger.warning(
            "The tokenizer has no pad token: its EOS token %r is used.", processing_class.eos_token
        )
    model.config.get_text_config().pad_token_id = processing_class.pad_token_id
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.pad_token_id = processing_class.pad_token_id
    return processing_class


def stop_token_ids(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    extra: int | None = None,
    strings: Sequence[str] = (),
) -> tuple[int, ...]:
    """Every id that ends a completion: the tokenizer's EOS, the model's EOS ids, extra.

    A stop string that is a special token, such as "<|im_end|>", is one of these: special tokens are
    left out of the text that stop strings are looked for in.
    """
    ids: list[Any] = [tokenizer.eos_token_id]
    declared = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids += declared if isinstance(declared, (list, tuple)) else [declared]
    ids.append(extra)
    special = {
        token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    ids += [special[string] for string in strings if string in special]
    return tuple(dict.fromkeys(int(i) for i in ids if i is not None))


def check_token_ids(
    tokenizer: PreTrainedTokenizerBase, num_embeddings: int | None, stop_token_id: int | None
) -> None:
    """Raise ValueError for a special token that the model has no embedding for.

    A pad token outside is looked up all the same, an end token outside cannot be sampled.
    """
    named = {
        f"the tokenizer's pad token {tokenizer.pad_token!r}": tokenizer.pad_token_id,
        f"the tokenizer's EOS token {tokenizer.eos_token!r}": tokenizer.eos_token_id,
        "stop_token_id": stop_token_id,
    }
    for what, token_id in named.items():
        if num_embeddings is None or not isinstance(token_id, int) or token_id < num_embeddings:
            continue
        raise ValueError(
            f"{what} has the id {token_id}, but the model has embeddings for ids below "
            f"{num_embeddings} only, the tokenizer {len(tokenizer)} tokens: call "
            "model.resize_token_embeddings(len(tokenizer)) before the trainer is made, or take a "
            "token that the model knows."
        )
