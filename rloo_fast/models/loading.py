"""The policy: a directory, a hub id or a model object -> a causal language model."""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from ..config.json_text import check_json_file
from ..config.paths import user_path
from .adapters import base_causal_lm
from .compiled import without_compile
from .merge import merge_adapter as merge
from .pretrained import check_whole, load_with_info
from .vision import auto_class

# JSON files of a model's directory that are read before its weights
SETTINGS = (
    "config.json", "generation_config.json", "adapter_config.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "model.safetensors.index.json",
)  # fmt: skip

logger = logging.getLogger(__name__)


def load_policy(
    model: str | nn.Module,
    *,
    model_init_kwargs: dict[str, Any] | None = None,
    quantization_config: Any = None,
    trust_remote_code: bool = False,
    merge_adapter: str | None = None,
    num_processes: int = 1,
    with_images: bool = False,
) -> nn.Module:
    """A causal language model from a directory, a hub id, or as given.

    A string is loaded with `model_init_kwargs`, in float32 unless they name a dtype, and whole, its
    image tower too, `with_images`. Either has the adapter `merge_adapter` merged into it.
    For a model that is already loaded these say nothing, which is warned about.
    Raises ValueError for a directory that does not exist, holds no model, or lacks weights.
    """
    if isinstance(model, str):
        kwargs = _init_kwargs(model_init_kwargs, quantization_config)
        kwargs.setdefault("trust_remote_code", trust_remote_code)
        if num_processes > 1:
            kwargs["device_map"] = None
        loaded = _load(model, kwargs, with_images)
    else:
        if model_init_kwargs or quantization_config is not None:
            logger.warning(
                "model_init_kwargs and quantization_config are for models given by name, but your "
                "model is already instantiated: for the policy they will be ignored."
            )
        loaded = _checked(model)
    return loaded if merge_adapter is None else merge(loaded, merge_adapter)


def _init_kwargs(given: dict[str, Any] | None, quantization_config: Any) -> dict[str, Any]:
    kwargs = dict(given or {})
    if quantization_config is not None:
        if "quantization_config" in kwargs:
            raise ValueError(
                "You set `quantization_config` both as a trainer argument and in "
                "`args.model_init_kwargs`: drop the second."
            )
        kwargs["quantization_config"] = quantization_config
    kwargs.setdefault("dtype", kwargs.pop("torch_dtype", torch.float32))  # its former name
    return kwargs


def _load(name: str, kwargs: dict[str, Any], with_images: bool) -> nn.Module:
    auto = auto_class(name, with_images=with_images, **kwargs)
    try:
        loaded, found = load_with_info(auto, name, "model", **kwargs)
    except ImportError as error:
        if kwargs.get("quantization_config") is None:
            raise
        raise ValueError(f"model {name!r} cannot be loaded quantised: {error}") from error
    if getattr(loaded, "_hf_peft_config_loaded", False):
        # its weights are frozen, and new adapters would replace these without a word
        raise ValueError(
            f"model {name!r} is an adapter: give the model it was trained on "
            f"({loaded.config._name_or_path!r}), with merge_adapter={name!r} to train on their "
            "sum; or pass PeftModel.from_pretrained(..., is_trainable=True) to go on training it."
        )
    may_differ = bool(kwargs.get("ignore_mismatched_sizes"))
    check_whole(loaded, found, name, "model", may_differ=may_differ)
    return loaded


def _checked(model: Any) -> nn.Module:
    """`model`, a causal language model or a PeftModel around one, not compiled; TypeError for
    anything else."""
    model = without_compile(model) if isinstance(model, nn.Module) else model
    base = base_causal_lm(model) if isinstance(model, nn.Module) else None
    encodes = getattr(getattr(base, "config", None), "is_encoder_decoder", False)
    if not hasattr(base, "generate") or encodes:
        raise TypeError(
            "model must be a directory, a hub id, or a causal language model of transformers "
            f"(or a PeftModel around one), got {type(model).__name__}."
        )
    return model


def check_model_path(name: str) -> None:
    """Raise ValueError if `name` is written like a path and no model is there, or its settings are
    no JSON that can be read."""
    path = user_path(name)
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or path.exists()
    if not looks_like_path:
        return
    if not path.is_dir():
        raise ValueError(
            f"model {name!r}: there is no such directory. Give the directory of a model saved with "
            "save_pretrained, or a hub id such as 'org/name'."
        )
    if not (path / "config.json").is_file() and not (path / "adapter_config.json").is_file():
        raise ValueError(f"model {name!r}: the directory holds no config.json, so no saved model.")
    for file in map(path.joinpath, SETTINGS):
        if file.is_file():
            check_json_file(file)


def context_length(model: Any) -> int | None:
    """Longest sequence the model has positions for, None if its config does not say."""
    config = model.config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def num_embeddings(model: Any) -> int | None:
    """Token ids that the model takes: 0 up to this number. None if it does not say.

    A number that the module keeps, rather than the shape of its weight: ZeRO-3 splits that.
    """
    embeddings: Any = None
    with suppress(AttributeError, NotImplementedError):  # not transformers', or without any
        embeddings = model.get_input_embeddings()
    while embeddings is not None:
        count = getattr(embeddings, "num_embeddings", None)
        if isinstance(count, int):
            return count
        embeddings = getattr(embeddings, "base_layer", None)  # adapters on it
    return None
