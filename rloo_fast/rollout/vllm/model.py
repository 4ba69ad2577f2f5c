"""What vLLM's copy of the model holds beyond the parameters that a weight sync writes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

# Backends of unquantized experts that compute with the weights as a checkpoint has them
PLAIN_EXPERTS = ("TRITON", "BATCHED_TRITON")


def kept_in_another_form(model: nn.Module, quantization: str | None) -> str | None:
    """Why `model.load_weights` would leave it computing with other weights; None if it does not.

    After its first load vLLM may re-lay weights (quantized layers, experts of FlashInfer and
    others) or derive further ones from them (multi-head latent attention); `load_weights` alone
    does neither again.
    """
    if quantization is not None:
        return f"quantization={quantization!r} computes with weights of another form"
    for name, module in model.named_modules():
        experts = getattr(getattr(module, "quant_method", None), "unquantized_backend", None)
        if experts is not None and experts.name not in PLAIN_EXPERTS:
            instead = (
                "on a CPU every one does, so use_vllm=False"
                if experts.name == "CPU"
                else "moe_backend='triton' does not"
            )
            return (
                f"the experts of {name} use vLLM's backend {experts.name}, which computes with "
                f"re-laid copies of their weights ({instead})"
            )
        if isinstance(getattr(module, "W_UK_T", None), torch.Tensor):
            return (
                f"{name} computes with matrices derived from kv_b_proj (with VLLM_MLA_DISABLE=1 in "
                "the environment it is an ordinary attention, which does not)"
            )
    return None


def as_read(
    model: nn.Module, weights: Iterable[tuple[str, torch.Tensor]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Weights under the names that vLLM's class of the model reads.

    Transformers 5 has taken `vision_model` out of the names of CLIP's and SigLIP's towers, as in
    LLaVA and Gemma 3; vLLM's towers still have it.
    """
    tower, whole = "vision_tower.", "vision_tower.vision_model."
    is_nested = any(whole in name for name, _ in model.named_parameters())
    for name, tensor in weights:
        before, found, rest = name.partition(tower)
        if is_nested and found and not rest.startswith("vision_model."):
            name = f"{before}{whole}{rest}"
        yield name, tensor


class LooseTensors:
    """Tensors of a model that are neither parameters nor buffers, kept over a sleep at level 2.

    vLLM saves the buffers itself and a weight sync brings the parameters; what layers hold besides,
    such as ALiBi's slopes, lies in the memory that the sleep frees and comes back as garbage.
    """

    def __init__(self) -> None:
        self._kept: list[tuple[torch.Tensor, torch.Tensor]] = []

    @torch.no_grad()
    def save(self, model: nn.Module) -> int:
        """Copy them to the host; returns how many there are."""
        self._kept = [(tensor, tensor.cpu().clone()) for tensor in loose_tensors(model)]
        return len(self._kept)

    @torch.no_grad()
    def restore(self, model: nn.Module) -> int:
        """Write them back in place, which CUDA graphs need."""
        for tensor, kept in self._kept:
            tensor.copy_(kept)
        return len(self._kept)


def loose_tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    """Tensors held by modules, or by vLLM's objects in them, that are neither parameters nor
    buffers, nor views of these, nor caches of keys and values."""
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    seen: set[int] = set()
    for module in model.modules():
        for name, held in vars(module).items():
            if name in ("_parameters", "_buffers", "kv_cache"):
                continue  # the last is made anew after a sleep
            for tensor in _tensors_in(held, seen):
                if tensor.untyped_storage().data_ptr() not in known:
                    yield tensor


def _tensors_in(value: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    if id(value) in seen or isinstance(value, (nn.Module, str, int, float)):
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        if value.numel() and not value.is_meta:
            yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors_in(item, seen)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors_in(item, seen)
    elif type(value).__module__.partition(".")[0] == "vllm" and hasattr(value, "__dict__"):
        for item in vars(value).values():
            yield from _tensors_in(item, seen)
