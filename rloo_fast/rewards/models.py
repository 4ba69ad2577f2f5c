"""Reward models: a sequence classifier that reads prompt + completion and writes one number.

B completions; C of them, of similar length, in one forward; T tokens in the longest of those C.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from ..config.paths import user_path
from ..models.loading import num_embeddings
from ..models.pretrained import check_whole, damage, load_with_info
from ..offload.gpu import Gpu
from ..offload.offloaded_model import OffloadedModel
from .calls import failed
from .copies import fresh
from .model_inputs import ModelInputs
from .values import read_values

logger = logging.getLogger(__name__)

DEFAULT_BATCH_SIZE = 32


class RewardModel:
    """r_i = the logit, or the probability, of one label of `model` on prompt_i + completion_i.

    Standard samples: the two strings joined. Conversational ones: the reward tokenizer's own chat
    template over all their messages. `label`: number or name in the config's id2label, None: the
    first. `output`: "logit", or "probability": softmax over the labels, sigmoid of a single one.

    Decoders get no special tokens added (as in TRL >= 0.22); encoders (models whose tokenizer has a
    [CLS]) get theirs. `position` is where a decoder is read: "last", at the last token that is not
    its pad token, or "eos", at an EOS that is put behind each completion that ended, and at the
    last token of those that were cut. A text of more tokens than the model takes loses its
    beginning.

    Texts are sorted by length, padded on the right and run at most `batch_size` at a time, fewer
    where more than half of a batch would be padding; the values are those of a loop over single
    texts, to rounding. The model is put in eval mode, its cache is turned off, and its config's pad
    token becomes the tokenizer's (EOS where that has none).
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any = None,
        *,
        label: int | str | None = None,
        output: str = "logit",
        position: str = "last",
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
        _check_choice("output", output, ("logit", "probability"))
        _check_choice("position", position, ("last", "eos"))
        source = str(getattr(config, "_name_or_path", "") or "")
        self.name = Path(source).name or type(model).__name__
        self.model = model.eval()
        if tokenizer is None:
            tokenizer = _load_tokenizer(self.name, source, tokenizer_kwargs or {})
        self.inputs = ModelInputs(
            self.name,
            tokenizer,
            config,
            position=position,
            chat_template_kwargs=chat_template_kwargs,
            num_embeddings=num_embeddings(model),
        )
        self.batch_size = batch_size or DEFAULT_BATCH_SIZE
        self.output, self.label = output, _label_number(label, config, self.name)
        one_is_right = getattr(config, "problem_type", None) != "multi_label_classification"
        self._softmax = one_is_right and len(_labels(config)) != 1
        self.parked: OffloadedModel | None = None
        if getattr(config, "use_cache", False):
            config.use_cache = False  # keys and values of every layer, for nothing

    def park(self, device: torch.device, gpu: Gpu | None = None) -> None:
        """Keep the model on the host from now on, and on `device` only while it is run."""
        self.parked = OffloadedModel(self.model, device, gpu)

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        ended: Sequence[bool] | None = None,
    ) -> Tensor:
        """-> (B,) float32 on the CPU, in the order given; one transfer.

        `ended`: whether each completion ended (Rollout.finish_reasons) or was cut; needed for
        position "eos" only.
        """
        rows = self.inputs.rows(prompts, completions, ended)
        batches = list(_batches([len(row) for row in rows], self.batch_size))
        with self.parked or nullcontext():
            values = [self._forward([rows[i] for i in batch]) for batch in batches]
            together = torch.cat(values).cpu()
        in_order = torch.empty_like(together)
        in_order[[i for batch in batches for i in batch]] = together
        return in_order

    @torch.inference_mode()
    def _forward(self, rows: list[list[int]]) -> Tensor:  # C rows -> (C,) float32
        pad, longest = self.inputs.pad_id(rows), max(map(len, rows))
        ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        device = next(self.model.parameters()).device
        self.model.eval()  # a wrapper or an evaluation loop may have changed it
        output = self.model(input_ids=ids.to(device), attention_mask=mask.to(device))
        logits = getattr(output, "logits", None)
        if logits is None or logits.ndim != 2 or logits.shape[1] <= self.label:
            shape = None if logits is None else tuple(logits.shape)
            raise ValueError(
                f"Reward model {self.name!r} must return logits of shape (batch, labels >= "
                f"{self.label + 1}), got {shape}. Load it with AutoModelForSequenceClassification."
            )
        logits = logits.float()
        if self.output == "probability":
            logits = logits.softmax(dim=-1) if self._softmax else logits.sigmoid()
        return logits[:, self.label]


def _check_choice(name: str, value: str, choices: tuple[str, str]) -> None:
    if value not in choices:
        raise ValueError(f"A reward model's {name} is {' or '.join(choices)}, got {value!r}.")


def _labels(config: Any) -> dict[int, str]:
    return getattr(config, "id2label", None) or {}


def _label_number(label: int | str | None, config: Any, name: str) -> int:
    """Of the label that is the reward. Raises ValueError, with the labels there are."""
    labels = _labels(config)
    there = ", ".join(f"{number} ({text})" for number, text in labels.items()) or "no named labels"
    if label is None:
        if len(labels) > 1:
            logger.warning(
                "Reward model %r has the labels %s. The first is the reward: write "
                "reward_model_label for another.",
                name,
                there,
            )
        return 0
    by_name = {text: number for number, text in labels.items()}
    number = by_name.get(str(label), int(label) if str(label).isdecimal() else None)
    if number is None or (labels and number not in labels):
        raise ValueError(f"reward_model_label={label!r}: reward model {name!r} has {there}.")
    return number


def _batches(lengths: Sequence[int], most_rows: int) -> Iterator[list[int]]:
    """Row numbers, longest first, so that a batch that does not fit in memory fails at once."""
    batch: list[int] = []
    num_tokens = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        padded = lengths[batch[0]] * (len(batch) + 1) if batch else 0
        if len(batch) == most_rows or padded > 2 * (num_tokens + lengths[i]):
            yield batch
            batch, num_tokens = [], 0
        batch.append(i)
        num_tokens += lengths[i]
    yield batch


def call_model(
    model: RewardModel,
    prompts: Sequence[Any],
    completions: Sequence[Any],
    ended: Sequence[bool] | None,
) -> Tensor:
    """The model's rewards (B,); what it raises names it."""
    try:
        ended = None if ended is None else [*ended]
        values = model(fresh([*prompts]), fresh([*completions]), ended)
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
    dtype: str | None = None,
    model_init_kwargs: dict[str, Any] | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> RewardModel:
    """A directory or hub id -> RewardModel with the labels of its checkpoint.

    `dtype` stands above model_init_kwargs'; `options` are RewardModel's. Raises ValueError if it
    cannot be loaded, or if weights are missing from the checkpoint: with a head that starts at
    random the rewards would be noise.
    """
    kwargs = {"trust_remote_code": trust_remote_code, **(model_init_kwargs or {})}
    if dtype is not None:
        kwargs.pop("torch_dtype", None)  # its former name
        kwargs["dtype"] = dtype
    model, info = _load(source, kwargs)
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"{source!r} is not a trained reward model: its checkpoint lacks {', '.join(missing)}, "
            "which would start at random. To use it all the same, load it yourself with "
            "AutoModelForSequenceClassification and pass the model."
        )
    may_differ = bool(kwargs.get("ignore_mismatched_sizes"))
    check_whole(model, info, source, "reward model", may_differ=may_differ)
    shared = ("trust_remote_code", "revision", "token", "cache_dir", "local_files_only")
    tokenizer_kwargs = {k: kwargs[k] for k in shared if k in kwargs}
    return RewardModel(model, tokenizer, tokenizer_kwargs=tokenizer_kwargs, **options)


def _load(source: str, kwargs: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    load = partial(load_with_info, AutoModelForSequenceClassification, source, "reward model")
    model, info = load(**kwargs)
    if info["mismatched_keys"]:  # two labels are a config's default; a head of one may not say so
        model, info = load(**{"num_labels": 1, **kwargs})
    return model, info


def _load_tokenizer(name: str, source: str, kwargs: dict[str, Any]) -> Any:
    fix = "Pass its tokenizer in `processing_classes`, in the model's place in the list."
    if not source:
        raise ValueError(f"Reward model {name!r} does not say where it came from. {fix}")
    try:
        return AutoTokenizer.from_pretrained(source, **kwargs)
    except Exception as error:  # of a damaged file, tokenizers raises no narrower one
        why = damage(user_path(source)) or error
        raise ValueError(f"No tokenizer found for reward model {source!r}: {why} {fix}") from error
