"""Reward models: a sequence classifier that reads prompt + completion and writes one number.

B completions; C of them, of similar length, in one forward; T tokens in the longest of those C.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rloo_fast.rewards.builtin import describe_sample
from rloo_fast.rewards.calls import failed
from rloo_fast.rewards.values import read_values

DEFAULT_BATCH_SIZE = 32


class RewardModel:
    """r_i = logits[i, 0] of `model` on the text of prompt_i + completion_i.

    Standard samples: the two strings joined. Conversational ones: the reward tokenizer's own chat
    template over all their messages. Neither gets special tokens added, so an EOS is seen only if
    the text has it (as in TRL >= 0.22). Texts are sorted by length, padded on the right and run
    `batch_size` at a time; the values are those of a loop over single texts, to rounding.

    The model is put in eval mode, its cache is turned off, and its config's pad token becomes the
    tokenizer's (EOS where that has none): the head reads the last token that is not padding.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any = None,
        *,
        chat_template_kwargs: dict[str, Any] | None = None,
        batch_size: int | None = None,
        tokenizer_kwargs: dict[str, Any] | None = None,
    ) -> None:
        config = getattr(model, "config", None)
        if config is None:
            raise ValueError(
                f"A reward model needs a `config` and must return `logits`, as transformers' "
                f"sequence classifiers do; {type(model).__name__} has no config. "
                "Wrap it in a function of (prompts, completions, **kwargs) instead."
            )
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"The reward models' batch_size must be >= 1, got {batch_size}.")
        source = str(getattr(config, "_name_or_path", "") or "")
        self.name = Path(source).name or type(model).__name__
        self.model = model.eval()
        if tokenizer is None:
            tokenizer = _load_tokenizer(self.name, source, tokenizer_kwargs or {})
        self.tokenizer = tokenizer
        self.chat_template_kwargs = chat_template_kwargs or {}
        self.batch_size = batch_size or DEFAULT_BATCH_SIZE
        self._set_pad_token(config)
        if getattr(config, "use_cache", False):
            config.use_cache = False  # keys and values of every layer, for nothing

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any]) -> Tensor:
        """-> (B,) float32 on the CPU, in the order given; one transfer."""
        encoded = self.tokenizer(self._texts(prompts, completions), add_special_tokens=False)
        lengths = [len(ids) for ids in encoded["input_ids"]]
        if 0 in lengths:
            raise ValueError(
                f"Reward model {self.name!r} got a text without tokens: "
                f"{describe_sample(lengths.index(0), prompts, completions)}."
            )
        # Longest first, so that a batch that does not fit in memory fails at once.
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        values = []
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            values.append(self._forward({k: [v[i] for i in rows] for k, v in encoded.items()}))
        in_order = torch.empty(len(order))
        in_order[order] = torch.cat(values).float().cpu()
        return in_order

    @torch.inference_mode()
    def _forward(self, rows: dict[str, list[list[int]]]) -> Tensor:  # C rows -> (C,)
        batch = self.tokenizer.pad(rows, padding=True, padding_side="right", return_tensors="pt")
        device = next(self.model.parameters()).device
        self.model.eval()  # a wrapper or an evaluation loop may have changed it
        logits = getattr(self.model(**batch.to(device)), "logits", None)
        if logits is None or logits.ndim != 2 or logits.shape[1] == 0:
            shape = None if logits is None else tuple(logits.shape)
            raise ValueError(
                f"Reward model {self.name!r} must return logits of shape (batch, labels >= 1), "
                f"got {shape}. Load it with AutoModelForSequenceClassification."
            )
        return logits[:, 0]

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
            self.tokenizer.apply_chat_template(p + c, tokenize=False, **self.chat_template_kwargs)
            for p, c in zip(prompts, completions, strict=True)
        ]

    def _set_pad_token(self, config: Any) -> None:
        if self.tokenizer.pad_token_id is None:
            if self.tokenizer.eos_token_id is None:
                raise ValueError(
                    f"The tokenizer of reward model {self.name!r} has neither a pad nor an EOS "
                    "token; set `tokenizer.pad_token` before passing it."
                )
            self.tokenizer.pad_token = self.tokenizer.eos_token
        text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
        text_config.pad_token_id = self.tokenizer.pad_token_id


def call_model(model: RewardModel, prompts: Sequence[Any], completions: Sequence[Any]) -> Tensor:
    """The model's rewards (B,); what it raises names it."""
    try:
        values = model(prompts, completions)
    except ValueError as error:
        error.add_note(f"(in the reward model {model.name!r})")
        raise
    except Exception as error:
        raise failed(model.name, error) from error
    return read_values(values, model.name, prompts, completions)


def load_reward_model(
    source: str,
    tokenizer: Any = None,
    *,
    model_init_kwargs: dict[str, Any] | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> RewardModel:
    """A directory or hub id -> RewardModel with one label; `options` are RewardModel's.

    Raises ValueError if it cannot be loaded, or if weights are missing from the checkpoint: with a
    head that starts at random the rewards would be noise.
    """
    kwargs = {"trust_remote_code": trust_remote_code, **(model_init_kwargs or {})}
    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            source, num_labels=1, output_loading_info=True, **kwargs
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"Reward model {source!r} could not be loaded: {error}") from error
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"{source!r} is not a trained reward model: its checkpoint lacks {', '.join(missing)}, "
            "which would start at random. To use it all the same, load it yourself with "
            "AutoModelForSequenceClassification and pass the model."
        )
    shared = ("trust_remote_code", "revision", "token", "cache_dir", "local_files_only")
    tokenizer_kwargs = {k: kwargs[k] for k in shared if k in kwargs}
    return RewardModel(model, tokenizer, tokenizer_kwargs=tokenizer_kwargs, **options)


def _load_tokenizer(name: str, source: str, kwargs: dict[str, Any]) -> Any:
    fix = "Pass its tokenizer in `processing_classes`, in the model's place in the list."
    if not source:
        raise ValueError(f"Reward model {name!r} does not say where it came from. {fix}")
    try:
        return AutoTokenizer.from_pretrained(source, **kwargs)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"No tokenizer found for reward model {source!r}: {error} {fix}"
        ) from error
