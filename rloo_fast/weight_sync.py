"""The policy's weights as a checkpoint would hold them, streamed in bounded buckets.

Names are those of a checkpoint (what `save_pretrained` writes and every engine's loader reads), one
tensor of a tied pair. A LoRA layer is sent as W + scale B A, added up in float32 into a tensor of
its own: the policy is never merged in place, as adding and subtracting in bfloat16 drifts. A model
sharded by FSDP2 or ZeRO-3 is gathered weight by weight, on all processes together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .models import base_causal_lm, is_peft_model
from .parallel.gathering import full_nbytes, gathered, own_class
from .rollout.engine import Bucket

SCRATCH_BYTES = 16 * 2**20  # of the float32 sum of a weight and its adapters


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


def named_weights(
    model: nn.Module, dtype: torch.dtype | None = None
) -> Iterator[tuple[str, Tensor]]:
    """(name in the model without adapters, full weight), one at a time; a tied weight once.

    Of a sharded model every process gets all of them, and asks for them in step with the others.
    `dtype`: what FSDP2 computes in; its shards, which may be float32, are rounded to it first.
    """
    for weight in _weights(model):
        yield weight.name, _full(weight, dtype)


def weight_buckets(
    model: nn.Module, max_bytes: int, dtype: torch.dtype | None = None
) -> Iterator[Bucket]:
    """`named_weights` in checkpoint names, at most `max_bytes` at a time.

    A bucket is larger only for a single tensor that is, or, where a checkpoint cuts a layer's
    weights otherwise than the model does (experts), for the weights of one layer. It is emptied
    when the next one is asked for. Of a sharded model every process thus holds at most `max_bytes`,
    three times the largest tensor (the last one sent, the one being gathered, its sum with
    adapters) and SCRATCH_BYTES: within two buckets, if four such tensors fit into one.
    """
    base = base_causal_lm(model)
    together = _layer_of if _converts(base) else str
    for part in _cut(_weights(model), max_bytes, together, dtype):
        bucket = _as_saved(base, {weight.name: _full(weight, dtype) for weight in part})
        yield bucket
        bucket.clear()  # whoever still has the list has no weights


def most_in_flight(model: nn.Module, max_bytes: int, dtype: torch.dtype | None = None) -> int:
    """The bytes that `weight_buckets` holds beside the model, at most."""
    largest = max(full_nbytes(weight.parameter, dtype) for weight in _weights(model))
    return max_bytes + 3 * largest + SCRATCH_BYTES


def _cut(
    weights: list[_Weight],
    max_bytes: int,
    together: Callable[[str], str],
    dtype: torch.dtype | None,
) -> Iterator[list[_Weight]]:
    """Parts of at most `max_bytes`, never between names that `together` maps to the same."""
    part, size = [], 0
    for weight in weights:
        nbytes = full_nbytes(weight.parameter, dtype)
        if part and size + nbytes > max_bytes and together(weight.name) != together(part[-1].name):
            yield part
            part, size = [], 0
        part.append(weight)
        size += nbytes
    if part:
        yield part


class _Weight(NamedTuple):
    name: str  # in the model without adapters
    parameter: Tensor  # maybe a shard
    layer: Any  # the LoRA layer that adds to it, or None


def _weights(model: nn.Module) -> list[_Weight]:
    """What there is to send, nothing gathered yet."""
    base = base_causal_lm(model)
    adapted = _adapted_weights(base) if is_peft_model(model) else {}
    tied, seen, found = _is_tied(base), set(), []
    for name, parameter in base.state_dict(keep_vars=True).items():
        plain = _plain_name(name, model) if is_peft_model(model) else name
        if plain is None or (tied and id(parameter) in seen):
            continue
        seen.add(id(parameter))
        found.append(_Weight(plain, parameter, adapted.get(name)))
    return found


def _full(weight: _Weight, dtype: torch.dtype | None) -> Tensor:
    if weight.layer is not None:
        return _merged(weight.layer, dtype)
    return gathered([weight.parameter], dtype)[0]


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

    with own_class(base):
        return bool(get_model_conversion_mapping(base, add_legacy=False))


def _as_saved(base: Any, weights: dict[str, Tensor]) -> Bucket:
    from transformers.core_model_loading import revert_weight_conversion

    with torch.no_grad(), own_class(base):
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


@torch.no_grad()
def _merged(layer: Any, dtype: torch.dtype | None) -> Tensor:
    """W + sum over active adapters of scale B A, in W's dtype, from float32 sums of some rows."""
    adapters = [name for name in layer.active_adapters if name in layer.scaling]
    factors = [factor for name in adapters for factor in _factors(layer, name)]
    weight, *factors = gathered([layer.get_base_layer().weight, *factors], dtype)
    merged = torch.empty_like(weight)
    transposed = getattr(layer, "fan_in_fan_out", False) or len(layer.lora_embedding_A) > 0
    source, target = (weight.T, merged.T) if transposed else (weight, merged)
    num_rows = max(1, SCRATCH_BYTES // (4 * source.shape[1]))
    for start in range(0, len(source), num_rows):
        rows = slice(start, start + num_rows)
        total = source[rows].to(torch.float32, copy=True)
        for name, a, b in zip(adapters, factors[::2], factors[1::2], strict=True):
            total.addmm_(b[rows].float(), a.float(), alpha=layer.scaling[name])
        target[rows] = total
    return merged


def _factors(layer: Any, adapter: str) -> tuple[Tensor, Tensor]:
    """(A, B) of one adapter."""
    if adapter in layer.lora_embedding_A:
        return layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
    return layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
