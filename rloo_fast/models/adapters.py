"""PEFT adapters around the policy: checked and added."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, TypeGuard

import torch
from torch import nn

if TYPE_CHECKING:
    from peft import PeftModel


def is_peft_model(model: nn.Module) -> TypeGuard[PeftModel]:
    try:
        from peft import PeftModel
    except ImportError:
        return False
    return isinstance(model, PeftModel)


def base_causal_lm(model: nn.Module) -> Any:
    """The transformers model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if is_peft_model(model) else model


def is_quantised(model: nn.Module) -> bool:
    """Whether weights are held in integers, which matrix products turn into coarse numbers."""
    return not all(p.is_floating_point() for p in model.parameters())


def check_peft_config(peft_config: Any, *, sync_ref_model: bool) -> None:
    """Raise TypeError or ValueError for adapters that cannot be trained; needs no model."""
    if peft_config is None:
        return
    from peft import PeftConfig

    if not isinstance(peft_config, PeftConfig):
        raise TypeError(
            "`peft_config` must be a `peft.PeftConfig` instance, such as LoraConfig(...), got "
            f"{type(peft_config).__name__}."
        )
    _check_kind(peft_config)
    check_no_sync(sync_ref_model)


def _check_kind(config: Any) -> None:
    if config.is_prompt_learning:
        raise ValueError(
            f"{type(config).__name__} adds tokens to the prompt, which this trainer's "
            "forward does not do: use LoRA."
        )
    if getattr(config, "alora_invocation_tokens", None):
        raise ValueError(
            "alora_invocation_tokens: such adapters act from some tokens of the prompt on, which "
            "this trainer's forward does not look for: leave it out, for plain LoRA."
        )


def check_no_sync(sync_ref_model: bool) -> None:
    """Raise ValueError for sync_ref_model=True with adapters."""
    if sync_ref_model:
        raise ValueError(
            "You passed `sync_ref_model=True` while using a PEFT model, whose reference is no "
            "model of its own: set sync_ref_model=False, or train all weights."
        )


def add_adapters(model: nn.Module, peft_config: Any, *, gradient_checkpointing: bool) -> nn.Module:
    """Wrap the model with new adapters, or prepare the ones it has.

    Raises ValueError for adapters that would not be trained, or not be computed as peft does.
    """
    if peft_config is not None:
        from peft import get_peft_model

        if is_peft_model(model):
            raise ValueError(
                "You passed a `PeftModel` instance together with a `peft_config`: merge and unload "
                "its adapters first, or leave peft_config out to go on training them."
            )
        try:
            model = get_peft_model(model, peft_config)
        except (ValueError, TypeError, NotImplementedError) as error:
            raise ValueError(
                f"peft cannot add the adapters of {type(peft_config).__name__}: {error}"
            ) from error
    if is_peft_model(model):
        _check_adapters(model)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "the model has no parameter to train, all are frozen: load adapters with "
            "PeftModel.from_pretrained(..., is_trainable=True), or unfreeze some."
        )
    if is_peft_model(model) and gradient_checkpointing:
        model.enable_input_require_grads()
    return model


def _check_adapters(model: PeftModel) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    for config in model.peft_config.values():
        _check_kind(config)
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    if any(layer.merged for layer in layers):
        raise ValueError(
            "the model's adapters are merged into its weights, where they are not trained: call "
            "model.unmerge_adapter() first."
        )
    if any(layer.disable_adapters for layer in layers):
        raise ValueError(
            "the model's adapters are switched off: call model.enable_adapter_layers() first."
        )
    _check_saved(model)


def _check_saved(model: PeftModel) -> None:
    """Nothing that is trained may be missing from what peft saves."""
    saved: set[int] = set()
    for adapter in model.peft_config:
        try:
            saved |= {id(tensor) for tensor in adapter_state(model, adapter).values()}
        except KeyError as error:  # peft looks for a name that it has taken the adapter's out of
            raise ValueError(
                f"peft cannot save the adapter {adapter!r} ({error}): an adapter must not be named "
                "as a part of the model is. Name it 'default'."
            ) from error
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in saved:
            raise ValueError(
                f"{name} is to be trained, but peft saves it with none of the model's adapters "
                f"{sorted(model.peft_config)}. Name its module in modules_to_save, or freeze it; "
                "and name no adapter as a part of the model is."
            )


@torch.no_grad()
def check_forward(model: PeftModel) -> None:
    """Raise ValueError unless the adapters act inside the model's layers, token by token.

    The step and transformers' generate call the model inside: what PeftModel.forward does around
    it (tokens, routers, task ids of some methods) would be left out. A layer that looks at later
    tokens computes otherwise while sampling. Tried with adapters moved away from their start, where
    most do nothing.
    """
    base, training = base_causal_lm(model), model.training
    ids = torch.arange(8, device=model.device)[None] % base.config.get_text_config().vocab_size
    why, exact = None, {p.dtype for p in model.parameters()} <= {torch.float32, torch.float64}
    model.eval()
    try:
        with _moved(model):
            inside, around, begun = (
                _logits(base, ids),
                _logits(model, ids),
                _logits(base, ids[:, :5]),
            )
        if isinstance(inside, str) or isinstance(begun, str):
            why = f"a trial run failed ({inside})"
        elif isinstance(around, str) or not _close(around, inside, exact=exact):
            off = around if isinstance(around, str) else "it gives other logits"
            why = (
                f"PeftModel.forward does more than the model's layers, where it is left out: {off}"
            )
        elif not _close(begun, inside[:, :5], exact=exact):
            why = "the logits of a token change with the tokens after it"
    finally:
        model.train(training)
    if why is not None:
        kind = type(model.active_peft_config).__name__
        advice = "" if kind == "LoraConfig" else " Use LoRA."
        raise ValueError(f"{kind} cannot be used, {why}.{advice}")


@contextmanager
def _moved(model: nn.Module) -> Iterator[None]:
    """While open, random numbers are added to what is trained."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    kept = [parameter.detach().clone() for parameter in trained]
    devices = {p.device for p in trained if p.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=list(devices)):
            torch.manual_seed(0)
            for parameter in trained:
                parameter.add_(0.2 * torch.randn_like(parameter))
        yield
    finally:
        for parameter, was in zip(trained, kept, strict=True):
            parameter.copy_(was)


def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor | str:
    """Of a trial run; a sentence if it fails."""
    try:
        return model(input_ids=ids, use_cache=False).logits
    except Exception as error:  # a method's own code may fail in any way
        return f"{type(error).__name__}: {error}"


def _close(one: torch.Tensor, other: torch.Tensor, *, exact: bool) -> bool:
    """Up to rounding, for which half-precision or quantised weights leave a tenth."""
    off = (one.float() - other.float()).abs().mean() if one.shape == other.shape else torch.inf
    return bool(off <= (2e-3 if exact else 0.1) * other.float().abs().mean())


def saved_names(model: nn.Module) -> set[str] | None:
    """Names in state_dict() of what save_pretrained writes of a model with adapters. None: it has
    no adapters, all of it is written."""
    if not is_peft_model(model):
        return None
    states = [adapter_state(model, name, embeddings="auto") for name in model.peft_config]
    chosen = {id(tensor) for state in states for tensor in state.values()}
    return {n for n, tensor in model.state_dict(keep_vars=True).items() if id(tensor) in chosen}


def adapter_state(
    model: PeftModel, adapter: str, *, embeddings: bool | Literal["auto"] = False
) -> dict[str, torch.Tensor]:
    """What peft saves of an adapter, under the names it saves: the model's own tensors.

    `embeddings`: whether whole embeddings go with it; "auto": where the adapter changes them.
    """
    from peft import get_peft_model_state_dict

    tensors = model.state_dict(keep_vars=True)
    return get_peft_model_state_dict(model, tensors, adapter, save_embedding_layers=embeddings)
