"""What adapters make of the model's weights, as plain weights under plain names.

LoRA              W + sum over active adapters of scale B A, in W's dtype, from float32 sums
trained tokens    W with some of its rows replaced
modules_to_save   the module of the active adapter in place of the model's
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..distributed.gathering import gathered
from ..models.adapters import base_causal_lm, is_peft_model

SCRATCH_BYTES = 16 * 2**20  # of the float32 sum of a weight and its adapters


def check_can_stream(model: nn.Module) -> None:
    """Raise ValueError for adapters whose effect cannot be written as plain weights."""
    if not is_peft_model(model):
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    base = base_causal_lm(model)
    for name, module in base.named_modules():
        if isinstance(module, BaseTunerLayer) and (kind := _other_kind(module)):
            raise ValueError(
                f"use_vllm=True sends LoRA adapters as W + scale B A; {name} has an adapter of "
                f"another kind ({kind}): use plain LoRA, or use_vllm=False."
            )
    for config in model.peft_config.values():
        if getattr(config, "layer_replication", None):
            raise ValueError(
                "use_vllm=True: layer_replication makes more layers than the engine's model has: "
                "leave it out, or use_vllm=False."
            )
    for name, parameter in base.named_parameters():
        if not parameter.is_floating_point():
            raise ValueError(
                f"use_vllm=True: {name} is quantised ({parameter.dtype}), and the engine would be "
                "sent its packed numbers: load the model without quantization, or use_vllm=False."
            )
    _check_tied(base)


def _other_kind(layer: Any) -> str | None:
    """What it is, if not a layer that `adapted_weight` can write out."""
    from peft.tuners import lora, trainable_tokens

    if type(layer) is trainable_tokens.TrainableTokensLayer:
        return None
    if type(layer) not in (lora.Linear, lora.Embedding):  # their subclasses compute otherwise
        return f"{type(layer).__module__}.{type(layer).__name__}"
    if layer.lora_variant:
        return ", ".join(sorted({type(v).__name__ for v in layer.lora_variant.values()}))
    return "lora_bias=True" if any(layer.lora_bias.values()) else None


def _check_tied(base: Any) -> None:
    embeddings, head = base.get_input_embeddings(), base.get_output_embeddings()
    changed = [type(m).__name__ for m in (embeddings, head) if hasattr(m, "active_adapters")]
    if not is_tied(base) or not changed:
        return
    tokens = getattr(head, "token_adapter", None)
    if tokens is not None and tokens.tied_adapter is getattr(embeddings, "token_adapter", None):
        return  # the same rows of both
    raise ValueError(
        "use_vllm=True: the model ties its lm_head to its embeddings, but adapters change only "
        "one of the two, and the engine holds a single matrix for both: leave both out of "
        "target_modules and modules_to_save, or use_vllm=False."
    )


def is_tied(base: Any) -> bool:
    return bool(getattr(base.config.get_text_config(), "tie_word_embeddings", False))


def plain_name(base: nn.Module, name: str) -> tuple[str | None, Any]:
    """A tensor of base.state_dict(): its name without PEFT's wrappers, None if it is not sent; and
    the adapter's layer that changes it, or None.

    The wrappers are told by what they are: a module may be named as one of their parts is.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

    module: Any = base
    layer, plain, parts = None, [], name.split(".")
    while parts:
        part = parts.pop(0)
        if isinstance(module, BaseTunerLayer):
            if part != "base_layer":
                return None, None
            layer = module
        elif isinstance(module, ModulesToSaveWrapper):
            mine = [name for name in module.active_adapters if name in module.modules_to_save]
            if not mine and part != "original_module":
                return None, None
            if mine and (part, parts.pop(0)) != ("modules_to_save", mine[0]):
                return None, None
            module = module.modules_to_save[mine[0]] if mine else module.original_module
            continue
        elif not isinstance(module, TrainableTokensWrapper):
            plain.append(part)
        module = getattr(module, "_modules", {}).get(part)
    return ".".join(plain), layer if plain[-1] == "weight" else None


@torch.no_grad()
def adapted_weight(layer: Any, dtype: torch.dtype | None) -> Tensor:
    """The weight of a layer with adapters; `dtype`: see `gathering.gathered`."""
    if hasattr(layer, "trainable_tokens_delta"):
        return _with_rows(layer, dtype)
    found = factors_of(layer)
    factors = [factor for _, *pair in found for factor in pair]
    weight, *factors = gathered([layer.get_base_layer().weight, *factors], dtype)
    merged = torch.empty_like(weight)
    transposed = getattr(layer, "fan_in_fan_out", False) or len(layer.lora_embedding_A) > 0
    source, target = (weight.T, merged.T) if transposed else (weight, merged)
    num_rows = max(1, SCRATCH_BYTES // (4 * source.shape[1]))
    for start in range(0, len(source), num_rows):
        rows = slice(start, start + num_rows)
        total = source[rows].to(torch.float32, copy=True)
        for (name, _, _), a, b in zip(found, factors[::2], factors[1::2], strict=True):
            total.addmm_(b[rows].float(), a.float(), alpha=layer.scaling[name])
        target[rows] = total
    return merged


def _with_rows(layer: Any, dtype: torch.dtype | None) -> Tensor:
    adapters = [name for name in layer.active_adapters if name in layer.trainable_tokens_delta]
    deltas = [layer.trainable_tokens_delta[name] for name in adapters]
    weight, *rows = gathered([layer.get_base_layer().weight, *deltas], dtype)
    changed = weight.clone()
    for name, values in zip(adapters, rows, strict=True):
        changed[layer.token_indices[name]] = values.to(changed)
    return changed


def factors_of(layer: Any) -> list[tuple[str, Tensor, Tensor]]:
    """(name, A, B) of each LoRA adapter that is active in the layer, not gathered; `layer`: None,
    or an adapter's layer of any kind."""
    found = []
    for name in layer.active_adapters if hasattr(layer, "scaling") else ():
        if name in layer.lora_embedding_A:
            found.append((name, layer.lora_embedding_A[name], layer.lora_embedding_B[name]))
        elif name in layer.scaling:
            found.append((name, layer.lora_A[name].weight, layer.lora_B[name].weight))
    return found
