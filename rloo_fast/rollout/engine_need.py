"""How much of a GPU's memory an engine can make use of."""

from __future__ import annotations

from typing import Any

from ..distributed.gathering import full_nbytes
from ..models.adapters import base_causal_lm, is_quantised
from ..offload.memory_plan import GIB
from .settings import EngineSettings

# an estimate, not measured: activations of a full batch of prompts, CUDA graphs, sampling
WORKSPACE = 6 * GIB


def needed_bytes(settings: EngineSettings) -> int | None:
    """Bytes per GPU of the engine's weights, of a KV cache for all its sequences at their longest,
    and of WORKSPACE. None: it cannot be told, as of a quantised policy.

    Cache per token: 2 L G h c, for L layers, G heads of keys of size h, c bytes a number; more
    than layers with a window or without attention take.
    """
    own, model = settings.in_process, base_causal_lm(settings.model)
    config = model.config.get_text_config()
    heads: Any = getattr(config, "num_attention_heads", None)
    layers: Any = getattr(config, "num_hidden_layers", None)
    length: Any = own.engine_kwargs.get("max_model_len", own.max_model_length)
    sequences: Any = own.engine_kwargs.get("max_num_seqs", own.max_num_seqs)
    numbers = (heads, layers, length, sequences)
    if is_quantised(settings.model) or not all(isinstance(n, int) and n > 0 for n in numbers):
        return None
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    itemsize, size = settings.dtype.itemsize, own.tensor_parallel_size
    weights = sum(full_nbytes(p) // p.itemsize * itemsize for p in model.parameters())
    cache = 2 * layers * key_heads * head_size * itemsize * length * sequences
    return weights // size + cache // min(size, key_heads) + WORKSPACE
