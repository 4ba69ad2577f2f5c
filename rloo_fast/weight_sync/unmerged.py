"""The policy as its base weights and its LoRA apart, for an engine that adds B A x to W x.

The base is frozen, so that an engine which keeps it needs the adapter's tensors alone. These have
the names of peft's own files, with the scale in B and all active adapters of a layer as one:

    base_model.model.LAYER.lora_A.weight   (r, in)    A = [A_1; A_2; ...]
    base_model.model.LAYER.lora_B.weight   (out, r)   B = [s_1 B_1, s_2 B_2, ...]
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..distributed.gathering import full_nbytes, gathered
from ..models.adapters import base_causal_lm, is_peft_model
from ..records import Bucket, SentParts
from .adapted import factors_of
from .buckets import checkpoint_name, sent_weights, weight_buckets

PREFIX = "base_model.model."  # of an adapter's tensor; no weight of a checkpoint begins so
INSTEAD = "set vllm_lora='merged', which sends W + scale B A"


def policy_buckets(
    model: nn.Module, max_bytes: int, dtype: torch.dtype, parts: SentParts
) -> Iterator[Bucket]:
    """What an engine that wants these `parts` is sent; `dtype`: see `named_weights`, and that of
    the adapter's tensors. Of a sharded model all processes iterate in step."""
    if parts != "adapter":
        yield from weight_buckets(model, max_bytes, dtype, merged=parts == "merged")
    if parts != "merged":
        yield from _adapter_buckets(model, max_bytes, dtype)


class Parted:
    """Iterates over the weights of a stream of buckets that are no adapter's; `adapter` then has
    the others."""

    def __init__(self, buckets: Iterable[Bucket]):
        self._stream = (named for bucket in buckets for named in bucket)
        self.adapter: dict[str, Tensor] = {}

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self._stream:
            if name.startswith(PREFIX):
                self.adapter[name] = tensor
            else:
                yield name, tensor


def check_can_send_unmerged(model: nn.Module) -> None:
    """Raise ValueError for a policy that is more than frozen weights and LoRA on linear layers."""
    if not is_peft_model(model) or not any(_layers(model)):
        raise ValueError(
            "vllm_lora='adapter' sends LoRA adapters beside weights that stay as they are, and the "
            "policy has no active LoRA: pass a peft_config, or set vllm_lora='merged'."
        )
    factors: set[int] = set()
    for name, layer in _layers(model):
        if len(layer.lora_embedding_A):
            raise ValueError(
                f"vllm_lora='adapter': {name} is an embedding, whose adapter vLLM computes in some "
                f"models only: leave it out of target_modules, or {INSTEAD}."
            )
        factors |= {id(factor) for pair in factors_of(layer) for factor in pair[1:]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in factors:
            raise ValueError(
                f"vllm_lora='adapter': {name} is trained as well, and an adapter cannot hold it "
                "(modules_to_save, trained biases, embeddings or weights): train LoRA alone, or "
                f"{INSTEAD}."
            )


class AdapterShape(NamedTuple):
    """What an engine makes room for: rank of the largest adapter as it is sent, and last parts of
    the adapted layers' names, such as q_proj."""

    rank: int
    names: tuple[str, ...]


def adapter_shape(model: nn.Module) -> AdapterShape:
    """Of a policy that passes `check_can_send_unmerged`."""
    base, layers = base_causal_lm(model), list(_layers(model))
    return AdapterShape(
        max(sum(layer.r[name] for name, _, _ in factors_of(layer)) for _, layer in layers),
        tuple(sorted({_layer_name(base, name).rpartition(".")[2] for name, _ in layers})),
    )


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name of the weight in the model without adapters, layer) of each with an active LoRA."""
    for weight in sent_weights(model):
        if factors_of(weight.layer):
            yield weight.name, weight.layer


def _layer_name(base: Any, name: str) -> str:
    return checkpoint_name(base, name).removesuffix(".weight")


def _adapter_buckets(model: nn.Module, max_bytes: int, dtype: torch.dtype) -> Iterator[Bucket]:
    base, bucket, size = base_causal_lm(model), [], 0
    for name, layer in _layers(model):
        nbytes = sum(
            full_nbytes(factor) // factor.itemsize * dtype.itemsize
            for _, *pair in factors_of(layer)
            for factor in pair
        )
        if bucket and size + nbytes > max_bytes:
            yield bucket
            bucket, size = [], 0
        a, b = _stacked(layer, dtype)
        prefix = f"{PREFIX}{_layer_name(base, name)}"
        bucket += [(f"{prefix}.lora_A.weight", a), (f"{prefix}.lora_B.weight", b)]
        size += nbytes
    yield bucket


@torch.no_grad()
def _stacked(layer: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(A, B) of all active adapters of a layer, in tensors of their own."""
    found = factors_of(layer)
    whole = gathered([factor for _, *pair in found for factor in pair])
    a = torch.cat([factor.to(dtype) for factor in whole[::2]])
    scaled = [
        layer.scaling[name] * b.to(torch.promote_types(b.dtype, torch.float32))
        for (name, _, _), b in zip(found, whole[1::2], strict=True)
    ]
    return a, torch.cat(scaled, 1).to(dtype)
