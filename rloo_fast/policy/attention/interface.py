"""Attention over one row of completions that share their prompts, for any model of transformers.

A micro-batch is one row of T tokens, prompt | completion | completion | prompt | ..., cut into
segments, a tree: segment s owns tokens bounds[s]:bounds[s + 1] and sees the segment that it
continues (a completion its prompt, a prompt what it begins with like others), all that this one
sees, and itself, causally. Positions count along such a path; so does a sliding window. Called as

    with segment_attention(model):
        out = model.base_model(input_ids=ids, position_ids=pos, use_cache=False, segments=segments)
    keep_for_backward(out.last_hidden_state, model)  # with gradient checkpointing

No mask function is registered under NAME, so transformers makes none.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from rloo_kernels.dispatch import log_once
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, PreTrainedConfig

from ...records import Segments
from .flash import choose_backend, flex_segments, varlen_attention
from .op import segment_attention_op

NAME = "rloo_fast_segments"

# keywords of transformers' attention functions that ask for what no backend here computes
OTHER_KINDS = (
    "s_aux", "sinks", "position_bias", "head_mask", "output_attentions", "indices", "block_indices",
)  # fmt: skip


@torch.compiler.assume_constant_result
def _backend(device: torch.device, dtype: torch.dtype, head_dim: int, softcap: float | None) -> str:
    return _logged_backend(device, dtype, head_dim, softcap)


@cache
def _logged_backend(
    device: torch.device, dtype: torch.dtype, head_dim: int, softcap: float | None
) -> str:
    name, reason = choose_backend(device, dtype, head_dim, softcap=softcap)
    level = logging.WARNING if name != "varlen" and device.type == "cuda" else logging.INFO
    log_once(f"attention over segments runs {name}: {reason}.", level)
    return name


def segment_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    segments: Segments | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query (1, H, T, d), key and value (1, Hkv, T, d) -> (1, T, H, d), as transformers calls it.

    Raises RuntimeError without segments, ValueError for what they do not go with (a mask, dropout,
    a batch, a cache, a row of another length), NotImplementedError for attention of another kind.
    """
    if segments is None:
        raise RuntimeError(
            f"attention implementation {NAME!r} needs segments=make_segments(...) as a keyword of "
            "the model's forward. After a backward that raised, call restore(model)."
        )
    for name in OTHER_KINDS:
        if kwargs.get(name) is not None and kwargs[name] is not False:
            raise NotImplementedError(f"attention over segments has no {name}.")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if not causal:
        raise NotImplementedError("attention over segments is causal; this layer is not.")
    if attention_mask is not None:
        raise ValueError("attention over segments takes no mask: leave attention_mask out.")
    if dropout > 0:
        raise ValueError(f"attention over segments has no dropout, got {dropout}: set it to 0.")
    if query.shape[0] != 1 or query.shape[2] != key.shape[2]:
        raise ValueError(
            f"expected one row and no cache (batch 1, as many keys as queries), got queries "
            f"{tuple(query.shape)} and keys {tuple(key.shape)}: pass use_cache=False."
        )
    bounds = segments.bounds  # looking at a number on a GPU would wait for it
    if bounds.is_cpu and not torch.compiler.is_compiling() and bounds[-1] != query.shape[2]:
        raise ValueError(f"segments cover {int(bounds[-1])} tokens of a row of {query.shape[2]}.")
    dtype, kind = value.dtype, query.device.type
    if torch.is_autocast_enabled(kind) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    head_dim, value_dim = query.shape[3], value.shape[3]
    if value_dim < head_dim:  # the kernels want one size; multi-head latent attention has two
        value = functional.pad(value, (0, head_dim - value_dim))
    scale = head_dim**-0.5 if scaling is None else float(scaling)
    backend = _backend(query.device, dtype, head_dim, softcap)
    if backend == "varlen":
        out = varlen_attention(query, key, value, segments, scale, sliding_window, softcap)
    elif backend == "flex":
        out = flex_segments(query, key, value, segments, scale, sliding_window, softcap)
    else:
        out, _ = segment_attention_op(
            query, key, value, segments.bounds, segments.parents, scale, sliding_window, softcap
        )
    return (out[..., :value_dim].contiguous() if value_dim < head_dim else out), None


AttentionInterface.register(NAME, segment_attention_forward)


@dataclass
class _Switched:
    """A model whose attention is switched on: what to set back, and the contexts it is in."""

    originals: list[tuple[PreTrainedConfig, Any]]
    contexts: int = 0


_switched: WeakKeyDictionary[nn.Module, _Switched] = WeakKeyDictionary()


@contextmanager
def segment_attention(model: nn.Module) -> Iterator[None]:
    """Forwards of `model` inside it attend over the segments they are given."""
    state = _switch_on(model)
    state.contexts += 1
    try:
        yield
    finally:
        state.contexts -= 1
        if not state.contexts:
            restore(model)


def keep_for_backward(hidden: Tensor, model: nn.Module) -> None:
    """Switch the attention on again while backward goes from `hidden` through `model`.

    Gradient checkpointing runs the layers again there. When that backward ends, the implementation
    is restored; if it raises, the next forward does it, or `restore`.
    """
    if not hidden.requires_grad:
        return

    def begin(_: Tensor) -> None:
        _switch_on(model)
        torch.autograd.Variable._execution_engine.queue_callback(partial(_end_backward, model))

    hidden.register_hook(begin)


def _end_backward(model: nn.Module) -> None:
    state = _switched.get(model)
    if state is not None and not state.contexts:
        restore(model)


def _switch_on(model: nn.Module) -> _Switched:
    if model not in _switched:
        # the objects the layers look at; a setter of theirs would reach into configs beside them
        configs = {id(c): c for c in (getattr(m, "config", None) for m in model.modules())}
        towers = _towers(model)
        originals = [
            (c, c._attn_implementation)
            for c in configs.values()
            if isinstance(c, PreTrainedConfig)
            and c._attn_implementation != NAME
            and id(c) not in towers
        ]
        for config, _ in originals:
            config._attn_implementation_internal = NAME
        _switched[model] = _Switched(originals)
    return _switched[model]


def _towers(model: nn.Module) -> set[int]:
    """Ids of the configurations beside the text's in a model of several parts, whose tokens are no
    segments: those of an image tower."""
    config: Any = getattr(model, "config", None)
    parts = getattr(config, "sub_configs", None)
    if not parts:
        return set()
    return {id(getattr(config, name, None)) for name in parts} - {id(config.get_text_config())}


def restore(model: nn.Module) -> None:
    """Give `model` its own attention implementation back, if it is switched."""
    state = _switched.pop(model, None)
    for config, name in state.originals if state else ():
        config._attn_implementation_internal = name
