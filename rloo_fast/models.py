"""Policy, tokenizer and reference model: loading, adapters, stop tokens."""

from __future__ import annotations

import copy
import logging
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.integrations.liger import apply_liger_kernel

from .config import RLOOConfig, as_dict
from .merge import merge_adapter
from .parallel.zero import copy_split

logger = logging.getLogger(__name__)

REF_ADAPTER = "ref"


def is_peft_model(model: nn.Module) -> bool:
    try:
        from peft import PeftModel
    except ImportError:
        return False
    return isinstance(model, PeftModel)


def base_causal_lm(model: nn.Module) -> Any:
    """The transformers model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if is_peft_model(model) else model  # pyright: ignore


def load_policy(
    model: str | PreTrainedModel, args: RLOOConfig, quantization_config: Any = None
) -> nn.Module:
    """A causal language model from a directory, a hub id, or as given.

    A string is loaded with args.model_init_kwargs, in float32 unless they name a dtype. Either has
    args.merge_adapter merged into it.
    Raises ValueError for a directory that is not there or holds no model.
    """
    loaded = _load(model, args, quantization_config)
    return loaded if args.merge_adapter is None else merge_adapter(loaded, args.merge_adapter)


def _load(model: str | PreTrainedModel, args: RLOOConfig, quantization_config: Any) -> nn.Module:
    kwargs = as_dict(args.model_init_kwargs)
    if not isinstance(model, str):
        if args.model_init_kwargs or quantization_config is not None:
            raise ValueError(
                "model_init_kwargs and quantization_config apply to a model given by name; this "
                "one is already loaded: leave them out, or pass its directory or hub id."
            )
        base = base_causal_lm(model) if isinstance(model, nn.Module) else None
        encodes = getattr(getattr(base, "config", None), "is_encoder_decoder", False)
        if not hasattr(base, "generate") or encodes:
            raise TypeError(
                "model must be a directory, a hub id, or a causal language model of transformers "
                f"(or a PeftModel around one), got {type(model).__name__}."
            )
        return model
    check_model_path(model)
    if quantization_config is not None:
        if "quantization_config" in kwargs:
            raise ValueError(
                "quantization_config is given twice: drop the one in model_init_kwargs."
            )
        kwargs["quantization_config"] = quantization_config
    kwargs.setdefault("dtype", kwargs.pop("torch_dtype", torch.float32))  # its former name
    kwargs.setdefault("trust_remote_code", args.trust_remote_code)
    if args.world_size > 1:
        kwargs["device_map"] = None
    loaded = AutoModelForCausalLM.from_pretrained(model, **kwargs)
    if getattr(loaded, "_hf_peft_config_loaded", False):
        # its weights are frozen, and new adapters would take the place of these without a word
        raise ValueError(
            f"model {model!r} is an adapter: give the model it was trained on "
            f"({loaded.config._name_or_path!r}), with merge_adapter={model!r} to train on their "
            "sum; or pass PeftModel.from_pretrained(..., is_trainable=True) to go on training it."
        )
    return loaded


def check_model_path(name: str) -> None:
    """Raise ValueError if `name` is written like a path and no model is there."""
    path = Path(name).expanduser()
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


def load_tokenizer(processing_class: Any, model: Any, args: RLOOConfig) -> PreTrainedTokenizerBase:
    """The tokenizer as given, or the one saved with the model; its pad token is set.

    A missing pad token is taken from EOS, with a note. Raises TypeError for a multimodal processor
    and ValueError where no tokenizer can be found.
    """
    if processing_class is None:
        name = getattr(model.config, "_name_or_path", "") or ""
        revision = as_dict(args.model_init_kwargs).get("revision")
        try:
            processing_class = AutoTokenizer.from_pretrained(
                name, revision=revision, trust_remote_code=args.trust_remote_code
            )
        except Exception as error:
            raise ValueError(
                f"no tokenizer could be loaded for the model ({name or 'built in memory'!r}): pass "
                "it as processing_class=..."
            ) from error
    if isinstance(processing_class, ProcessorMixin):
        raise TypeError("processing_class is a multimodal processor; rloo_fast trains text models.")
    if not isinstance(processing_class, PreTrainedTokenizerBase):
        raise TypeError(
            f"processing_class must be a tokenizer, got {type(processing_class).__name__}."
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
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, extra: int | None = None
) -> tuple[int, ...]:
    """Every id that ends a completion: the tokenizer's EOS, the model's EOS ids, extra."""
    ids: list[Any] = [tokenizer.eos_token_id]
    declared = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids += declared if isinstance(declared, list) else [declared]
    ids.append(extra)
    return tuple(dict.fromkeys(int(i) for i in ids if i is not None))


def disable_dropout(model: nn.Module) -> None:
    """Set every nn.Dropout and every attention-dropout attribute of the model to 0."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "attn_pdrop", "dropout_p"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def has_dropout(model: nn.Module) -> bool:
    """True if a forward in train mode draws random numbers for dropout."""
    in_modules = any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules())
    return in_modules or has_attention_dropout(model)


def has_attention_dropout(model: nn.Module) -> bool:
    return any(
        getattr(m, name, 0.0) > 0
        for m in model.modules()
        for name in ("attention_dropout", "attn_pdrop")
        if isinstance(getattr(m, name, None), float)
    )


def check_peft_config(peft_config: Any, args: RLOOConfig) -> None:
    """Raise TypeError or ValueError for adapters that cannot be trained; needs no model."""
    if peft_config is None:
        return
    from peft import PeftConfig

    if not isinstance(peft_config, PeftConfig):
        raise TypeError(
            "peft_config must be a PeftConfig such as peft.LoraConfig(...), got "
            f"{type(peft_config).__name__}."
        )
    if peft_config.is_prompt_learning:
        raise ValueError(
            f"{type(peft_config).__name__} adds tokens to the prompt, which this trainer's "
            "forward does not do: use LoRA."
        )
    _check_no_sync(args)


def _check_no_sync(args: RLOOConfig) -> None:
    if args.sync_ref_model:
        raise ValueError(
            "sync_ref_model=True needs a reference model of its own, which adapters do "
            "without: set sync_ref_model=False, or train all weights."
        )


def add_adapters(model: nn.Module, peft_config: Any, args: RLOOConfig) -> nn.Module:
    """Wrap the model with new adapters, or prepare the ones it has.

    A PeftModel passed in gets a frozen copy of its adapter as reference; with new adapters the
    reference is the model with adapters off.
    """
    if peft_config is not None:
        from peft import get_peft_model

        if is_peft_model(model):
            raise ValueError(
                "peft_config was given for a model that already has adapters: merge and unload "
                "them first, or leave peft_config out to go on training them."
            )
        model = get_peft_model(model, peft_config)  # pyright: ignore
    elif is_peft_model(model) and args.beta > 0:
        _freeze_reference_adapter(model)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "the model has no parameter to train, all are frozen: load adapters with "
            "PeftModel.from_pretrained(..., is_trainable=True), or unfreeze some."
        )
    if is_peft_model(model) and args.gradient_checkpointing:
        model.enable_input_require_grads()  # pyright: ignore
    return model


def _freeze_reference_adapter(model: nn.Module) -> None:
    """Adapter `ref`: a frozen copy of the active one as it is now."""
    active = model.active_adapter
    if REF_ADAPTER not in model.peft_config:  # pyright: ignore
        model.add_adapter(REF_ADAPTER, model.peft_config[active])  # pyright: ignore
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if f".{REF_ADAPTER}." in name:
            source = parameters[name.replace(f".{REF_ADAPTER}.", f".{active}.")]
            parameter.data.copy_(source.data)
            parameter.requires_grad_(False)


def make_reference(model: nn.Module, args: RLOOConfig) -> nn.Module | None:
    """A frozen copy of the policy as it is now; None without KL, or where adapters can be put off.

    A copy, not a second load: a policy passed as an object may differ from what its name loads.
    """
    if args.beta == 0:
        return None
    if is_peft_model(model):
        _check_no_sync(args)
        return None
    is_split = any(hasattr(parameter, "ds_id") for parameter in model.parameters())
    reference = copy_split(model) if is_split else copy.deepcopy(model)
    reference.requires_grad_(False).eval()
    if args.use_liger_kernel:  # the Trainer applies them to the policy alone
        apply_liger_kernel(reference, args.liger_kernel_config)
    return reference


@contextmanager
def reference_weights(model: nn.Module):
    """While open, a PeftModel computes with its reference: the frozen adapter copy, or none."""
    if REF_ADAPTER in model.peft_config:  # pyright: ignore
        active = model.active_adapter
        model.set_adapter(REF_ADAPTER)  # pyright: ignore
        try:
            yield
        finally:
            model.set_adapter(active)  # pyright: ignore
            for name, parameter in model.named_parameters():
                if f".{REF_ADAPTER}." in name:
                    parameter.requires_grad_(False)
    else:
        with model.disable_adapter():  # pyright: ignore
            yield


def context_length(model: Any) -> int | None:
    """Longest sequence the model has positions for, None if its config does not say."""
    config = model.config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None
