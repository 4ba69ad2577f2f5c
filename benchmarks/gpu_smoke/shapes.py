"""Models from their configurations alone, and checksums of tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rloo_fast.offload.storages import whole_storage

# hidden, layers, heads, key-value heads, intermediate, vocabulary
SHAPES = {
    "tiny": (64, 2, 2, 1, 128, 512),
    "0.5b": (896, 24, 14, 2, 4864, 151936),  # Qwen2.5-0.5B's
    "1.5b": (1536, 28, 12, 2, 8960, 151936),  # Qwen2.5-1.5B's
}
PAD = 0
CHUNK = 1 << 24  # numbers that a checksum takes at a time


def make_model(name: str, device: torch.device, *, tied: bool = True, seed: int = 0) -> Any:
    """With random float32 weights on `device`, in eval mode; none of its tokens ends a text."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    hidden, layers, heads, kv_heads, intermediate, vocab = SHAPES[name]
    no_token: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None}
    config = Qwen2Config(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, intermediate_size=intermediate, vocab_size=vocab,
        max_position_embeddings=4096, tie_word_embeddings=tied, pad_token_id=PAD, **no_token,
    )  # fmt: skip
    torch.manual_seed(seed)
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def checksum(tensor: Tensor) -> tuple[int, bytes]:
    """sum over i of (2i + 1) w_i mod 2^64 of the storage's 8-byte words w, and the bytes behind
    them: a bit that is flipped and two words that are exchanged change it."""
    block = whole_storage(tensor.detach())
    end = len(block) // 8 * 8
    words, total = block[:end].view(torch.int64), 0
    for start in range(0, len(words), CHUNK):
        part = words[start : start + CHUNK]
        odd = 2 * torch.arange(start, start + len(part), device=part.device) + 1
        total += int((part * odd).sum())
    return total % 2**64, bytes(block[end:].tolist())
