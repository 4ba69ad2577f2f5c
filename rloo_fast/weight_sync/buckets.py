"""The policy's weights as a checkpoint would hold them, streamed in bounded buckets.

Names are those of a checkpoint (what `save_pretrained` writes and every engine's loader reads), one
tensor of a tied pair. What adapters make of a weight is a tensor of its own (`adapted.py`): the
policy is never merged in place, as adding and subtracting in bfloat16 drifts. A model sharded by
FSDP2 or ZeRO-3 is gathered weight by weight, on all processes together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..distributed.gathering import full_nbytes, gathered, own_class
from ..models.adapters import base_causal_lm, is_peft_model
from ..records import Bucket
from .adapted import SCRATCH_BYTES, adapted_weight, factors_of, is_tied, plain_name


def named_weights(
    model: nn.Module, dtype: torch.dtype | None = None
) -> Iterator[tuple[str, Tensor]]:
    """(name in the model without adapters, full weight), one at a time; a tied weight once.

    Of a sharded model every process gets every weight, and all must iterate in step. `dtype`: what
    FSDP2 computes in; its shards, which may be float32, are rounded to it first.
    """
    for weight in sent_weights(model):
        yield weight.name, _full(weight, dtype)


def weight_buckets(
    model: nn.Module, max_bytes: int, dtype: torch.dtype | None = None, *, merged: bool = True
) -> Iterator[Bucket]:
    """`named_weights` in checkpoint names, at most `max_bytes` at a time; merged=False: the weights
    below LoRA adapters as they are.

    A bucket exceeds `max_bytes` only for one tensor that does, or for one layer whose checkpoint
    holds other tensors than the model (experts). It is emptied when the next one is asked for.

    Of a sharded model every process holds at most
        max_bytes + 3 x largest tensor + SCRATCH_BYTES
    (the tensor sent last, the one being gathered, its sum with adapters): less than two buckets if
    four such tensors fit into one.
    """
    base = base_causal_lm(model)
    together = _layer_of if _converts(base) else str
    weights = sent_weights(model)
    if not merged:
        weights = [w._replace(layer=None) if factors_of(w.layer) else w for w in weights]
    for part in _cut(weights, max_bytes, together, dtype):
        bucket = _as_saved(base, {weight.name: _full(weight, dtype) for weight in part})
        yield bucket
        bucket.clear()  # whoever still has the list has no weights


def most_in_flight(model: nn.Module, max_bytes: int, dtype: torch.dtype | None = None) -> int:
    """Most bytes that `weight_buckets` holds beside the model."""
    largest = max(full_nbytes(weight.parameter, dtype) for weight in sent_weights(model))
    return max_bytes + 3 * largest + SCRATCH_BYTES


def _cut(
    weights: list[SentWeight],
    max_bytes: int,
    together: Callable[[str], str],
    dtype: torch.dtype | None,
) -> Iterator[list[SentWeight]]:
    """Parts of at most `max_bytes`; names that `together` maps to one value stay in one part."""
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


class SentWeight(NamedTuple):
    name: str  # in the model without adapters
    parameter: Tensor  # maybe a shard
    layer: Any  # the adapter's layer that changes it, or None


def sent_weights(model: nn.Module) -> list[SentWeight]:
    """All weights to send, not gathered yet."""
    base = base_causal_lm(model)
    tied, seen, found = is_tied(base), set(), []
    for name, parameter in base.state_dict(keep_vars=True).items():
        plain, layer = plain_name(base, name) if is_peft_model(model) else (name, None)
        if plain is None or (tied and id(parameter) in seen):
            continue
        seen.add(id(parameter))
        found.append(SentWeight(plain, parameter, layer))
    return found


def _full(weight: SentWeight, dtype: torch.dtype | None) -> Tensor:
    if weight.layer is not None:
        return adapted_weight(weight.layer, dtype)
    return gathered([weight.parameter], dtype)[0]


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


def checkpoint_name(base: Any, name: str) -> str:
    """The name in a checkpoint of one weight of the model. Raises ValueError if a checkpoint holds
    it as a part of another tensor."""
    weight = torch.empty(1, 1, dtype=torch.float32)
    try:
        ((saved, same),) = _as_saved(base, {name: weight})
    except Exception as error:  # whatever the operation that joins it with others says of one alone
        raise ValueError(f"{name} is no tensor of its own in a checkpoint ({error}).") from error
    if same is not weight:
        raise ValueError(f"{name} is another tensor in a checkpoint than in the model.")
    return saved


def _as_saved(base: Any, weights: dict[str, Tensor]) -> Bucket:
    from transformers.core_model_loading import revert_weight_conversion

    with torch.no_grad(), own_class(base):
        return list(revert_weight_conversion(base, weights).items())
