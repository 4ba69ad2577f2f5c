"""The policy's weights as a checkpoint would hold them, streamed in bounded buckets.

Names are those of a checkpoint (what `save_pretrained` writes and every engine's loader reads), one
tensor of a tied pair. A LoRA layer is sent as W + scale B A, added up in float32 into a tensor of
its own: the policy is never merged in place, as adding and subtracting in bfloat16 drifts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .models import base_causal_lm, is_peft_model
from .rollout.engine import Bucket


def check_can_stream(model: nn.Module) -> None:
    """Raise ValueError for adapters whose effect cannot be written as plain weights."""
    if not is_peft_model(model):
        return
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    base = base_causal_lm(model)
    for name, module in base.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        if not isinstance(module, LoraLayer) or any(module.use_dora.values()):
            raise ValueError(
                f"use_vllm=True sends LoRA adapters as W + scale B A; {name} has an adapter of "
                f"another kind ({type(module).__module__}): use plain LoRA, or use_vllm=False."
            )
        if any(module.lora_bias.values()):
            raise ValueError(f"use_vllm=True: {name} has lora_bias=True, which is not sent.")
    ends = {base.get_input_embeddings(), base.get_output_embeddings()}
    changed = [type(m).__name__ for m in ends if hasattr(m, "active_adapters")]
    if _is_tied(base) and changed:
        raise ValueError(
            "use_vllm=True: the model ties its lm_head to its embeddings, but adapters change only "
            "one of the two, and the engine holds a single matrix for both: leave both out of "
            "target_modules and modules_to_save, or use_vllm=False."
        )


def named_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name in the model without adapters, weight), one at a time; a tied weight once."""
    base = base_causal_lm(model)
    adapted = _adapted_weights(base) if is_peft_model(model) else {}
    tied, seen = _is_tied(base), set()
    for name, tensor in base.state_dict(keep_vars=True).items():
        plain = _plain_name(name, model) if is_peft_model(model) else name
        if plain is None or (tied and id(tensor) in seen):
            continue
        seen.add(id(tensor))
        layer = adapted.get(name)
        yield plain, tensor.detach() if layer is None else _merged(layer)


def weight_buckets(model: nn.Module, max_bytes: int) -> Iterator[Bucket]:
    """`named_weights` in checkpoint names, at most `max_bytes` at a time.

    A bucket is larger only for a single tensor that is, or, where a checkpoint cuts a layer's
    weights otherwise than the model does (experts), for the weights of one layer.
    """
    base, size, waiting = base_causal_lm(model), 0, {}
    together = _layer_of if _converts(base) else lambda name: name
    last = None
    for name, tensor in named_weights(model):
        if waiting and size + tensor.nbytes > max_bytes and together(name) != last:
            yield _as_saved(base, waiting)
            size, waiting = 0, {}
        waiting[name] = tensor
        size, last = size + tensor.nbytes, together(name)
    if waiting:
        yield _as_saved(base, waiting)


def _is_tied(base: Any) -> bool:
    return bool(getattr(base.config.get_text_config(), "tie_word_embeddings", False))


def _layer_of(name: str) -> str:
    """model.layers.3.mlp.experts.w -> model.layers.3; a name without a number: itself."""
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts))
    return ".".join(parts[: number + 1])


def _converts(base: Any) -> bool:
    """Whether checkpoints of this model hold other tensors than the model does."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    return bool(get_model_conversion_mapping(base, add_legacy=False))


def _as_saved(base: Any, weights: dict[str, Tensor]) -> Bucket:
    from transformers.core_model_loading import revert_weight_conversion

    with torch.no_grad():
        return list(revert_weight_conversion(base, weights).items())


# Adapters


def _plain_name(name: str, model: Any) -> str | None:
    """A parameter's name without PEFT's wrappers; None for one that is not part of the sum."""
    if ".lora_" in name or ".original_module." in name:
        return None
    if ".modules_to_save." in name:
        owner, _, rest = name.partition(".modules_to_save.")
        adapter, _, leaf = rest.partition(".")
        return f"{owner}.{leaf}" if adapter == model.active_adapter else None
    return name.replace(".base_layer.", ".")


def _adapted_weights(base: Any) -> dict[str, Any]:
    """Weight's name -> the LoRA layer that adds to it."""
    from peft.tuners.lora import LoraLayer

    return {
        f"{name}.base_layer.weight": module
        for name, module in base.named_modules()
        if isinstance(module, LoraLayer)
    }


def _merged(layer: Any) -> Tensor:
    """W + sum over active adapters of scale B A, in W's dtype, from a float32 sum."""
    weight = layer.get_base_layer().weight
    total = weight.detach().float()
    for adapter in layer.active_adapters:
        if adapter in layer.scaling:
            total = total + _delta(layer, adapter)
    return total.to(weight.dtype)


def _delta(layer: Any, adapter: str) -> Tensor:
    if adapter in layer.lora_embedding_A:
        a, b = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
        return (b.detach().float() @ a.detach().float()).T * layer.scaling[adapter]
    a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    product = (b.detach().float() @ a.detach().float()) * layer.scaling[adapter]
    return product.T if getattr(layer, "fan_in_fan_out", False) else product
