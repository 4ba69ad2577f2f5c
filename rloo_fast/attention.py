"""Attention over one row of completions that share their prompts, for any model of transformers.

A micro-batch is one row of T tokens, prompt | completion | completion | prompt | ..., cut into
segments: segment s owns tokens bounds[s]:bounds[s + 1] and sees its prefix (its prompt; empty for a
prompt, or for a row that holds its own prompt) and itself, causally. Positions restart after the
prompt, and a sliding window counts them. Called as

    with segment_attention(model):
        out = model.base_model(input_ids=ids, position_ids=pos, use_cache=False, segments=segments)
    keep_for_backward(out.last_hidden_state, model)  # with gradient checkpointing

No mask function is registered under NAME, so transformers makes none.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from rloo_kernels.dispatch import log_once
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, PreTrainedConfig

from .attention_flash import choose_backend, flex_segments, varlen_attention
from .attention_ops import segment_attention_op
from .models import base_causal_lm
from .packing import LAYOUTS

NAME = "rloo_fast_segments"

# keywords of transformers' attention functions that ask for what no backend here computes
OTHER_KINDS = (
    "s_aux", "sinks", "position_bias", "head_mask", "output_attentions", "indices", "block_indices",
)  # fmt: skip


class Segments(NamedTuple):
    """S segments of one row. Made by `make_segments`; torch.compile traces through it."""

    bounds: Tensor  # (S + 1,) int32, CPU
    prefix: Tensor  # (S, 2) int32, CPU: first and last + 1 of the tokens seen before its own
    key_index: Tensor | None  # (M,) tokens that are keys, per segment prefix then own; None: all
    cu_q: Tensor  # (S + 1,) int32: bounds, on the device
    cu_k: Tensor  # (S + 1,) int32: where the segments' keys begin in key_index
    max_q: int  # no segment has more tokens, and none more keys; rounded up to powers of two,
    max_k: int  # so that a compiled graph seldom sees a new one


def make_segments(
    lengths: Sequence[int],
    prefixes: Sequence[tuple[int, int]],
    device: torch.device | str,
    *,
    pad_segments_to: int | None = None,
    pad_keys_to: int | None = None,
) -> Segments:
    """Segments of these lengths, in order, that see these prefixes ((0, 0): none).

    For static shapes: `pad_segments_to` segments, the last ones empty, and `pad_keys_to` entries of
    key_index. Raises ValueError for a prefix that does not end before its segment begins, and for
    more segments or keys than are padded to.
    """
    if len(lengths) != len(prefixes):
        raise ValueError(f"{len(lengths)} lengths but {len(prefixes)} prefixes: give one for each.")
    bounds, cu_k, index = [0], [0], []
    for length, (first, last) in zip(lengths, prefixes, strict=True):
        start = bounds[-1]
        if length < 0 or not 0 <= first <= last <= start:
            raise ValueError(
                f"segment {len(bounds) - 1} at token {start} has length {length} and prefix "
                f"({first}, {last}): the length must be >= 0 and the prefix end before the segment."
            )
        bounds.append(start + length)
        seen = [(first, last), (start, start + length)] if length else []  # no queries, no keys
        index += [torch.arange(*part) for part in seen]
        cu_k.append(cu_k[-1] + sum(b - a for a, b in seen))
    missing = (pad_segments_to or len(lengths)) - len(lengths)
    missing_keys = (pad_keys_to or cu_k[-1]) - cu_k[-1]
    if missing < 0 or missing_keys < 0:
        raise ValueError(
            f"{len(lengths)} segments with {cu_k[-1]} keys do not fit pad_segments_to="
            f"{pad_segments_to} and pad_keys_to={pad_keys_to}: raise them."
        )
    keys = None
    if pad_keys_to is not None or cu_k != bounds:
        keys = torch.cat([*index, torch.zeros(missing_keys, dtype=torch.long)]).to(device)
    rows = (bounds + bounds[-1:] * missing, cu_k + cu_k[-1:] * missing)
    cu_q, cu_k = (torch.tensor(x, dtype=torch.int32) for x in rows)
    max_q, max_k = (_power_of_two(int(x.diff().max())) for x in (cu_q, cu_k))
    pairs = torch.tensor([*prefixes, *[(0, 0)] * missing], dtype=torch.int32).view(-1, 2)
    return Segments(cu_q, pairs, keys, cu_q.to(device), cu_k.to(device), max_q, max_k)


def _power_of_two(n: int) -> int:
    return max(128, 1 << (n - 1).bit_length())


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
            query, key, value, segments.bounds, segments.prefix, scale, sliding_window, softcap
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
        originals = [
            (c, c._attn_implementation)
            for c in configs.values()
            if isinstance(c, PreTrainedConfig) and c._attn_implementation != NAME
        ]
        for config, _ in originals:
            config._attn_implementation_internal = NAME
        _switched[model] = _Switched(originals)
    return _switched[model]


def restore(model: nn.Module) -> None:
    """Give `model` its own attention implementation back, if it is switched."""
    state = _switched.pop(model, None)
    for config, name in state.originals if state else ():
        config._attn_implementation_internal = name


def unsupported_reason(model: nn.Module, *, layout: str) -> str | None:
    """Why `model` cannot run in `layout`, as far as can be told without running it, or None.

    Raises ValueError for an unknown layout.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}.")
    if layout == "padded":
        return None
    base = base_causal_lm(model)
    config = base.config.get_text_config(decoder=True)
    if base.config.is_encoder_decoder:
        return "it is an encoder-decoder"
    if getattr(base, "_is_stateful", False):
        return "its layers carry a state from token to token"
    others = set(getattr(config, "layer_types", None) or ()) - {
        "full_attention",
        "sliding_attention",
    }
    if others:
        return f"its layers include {', '.join(sorted(others)).replace('_', ' ')}"
    if getattr(config, "attention_chunk_size", None):
        return "its attention is cut into chunks"
    if not getattr(base, "_supports_attention_backend", False):
        return "it does not take its attention from transformers' AttentionInterface"
    if not getattr(base, "_supports_flash_attn", False):
        return "its attention depends on a mask (it does not support FlashAttention)"
    two_way = getattr(config, "use_bidirectional_attention", None) in (True, "all")
    if two_way or not getattr(config, "is_causal", True):
        return "its attention is not causal"
    decoder = base.get_decoder()
    if any(name.rpartition(".")[2] == "sinks" for name, _ in decoder.named_parameters()):
        return "its attention has sinks"
    if any(isinstance(m, nn.Conv1d) for m in decoder.modules()):
        return "its layers include a convolution over the tokens"
    return None
