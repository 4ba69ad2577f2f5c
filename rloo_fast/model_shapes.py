"""Sizes of a decoder-only transformer, as far as memory and traffic depend on them.

Built-in shapes are arithmetic; another model's are read off the model that its config.json makes on
torch's meta device, which takes no memory. Only that needs torch and transformers.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Shape:
    """Parameters by what is sharded and gathered together, and the sizes of activations."""

    hidden: int  # D
    layers: int  # L
    heads: int  # H
    kv_heads: int  # G
    head_size: int  # h
    intermediate: int  # I, of the gated MLP
    vocab: int  # V
    linears: tuple[tuple[str, int, int], ...]  # of a layer: name, inputs, outputs
    blocks: int  # parameters of all layers
    block: int  # of the largest layer
    embeddings: int  # of the input embeddings; 0 where they are tied to the lm_head
    tail: int  # everything else: the lm_head, the last norm

    @property
    def params(self) -> int:
        return self.embeddings + self.blocks + self.tail

    @property
    def head(self) -> int:
        """V D: the lm_head, tied or not."""
        return self.vocab * self.hidden

    @property
    def largest_matrix(self) -> int:
        return max(self.head, *(inputs * outputs for _, inputs, outputs in self.linears))

    def adapters(self, rank: int, targets: tuple[str, ...]) -> int:
        """Parameters of LoRA's A and B on `targets` in every layer: sum of rank (in + out)."""
        sizes = [(i + o) for name, i, o in self.linears if name in targets]
        return self.layers * rank * sum(sizes)


def _llama(
    hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int, vocab: int, bias: bool
) -> Shape:
    """A Llama, or with a bias on q, k and v a Qwen2; embeddings not tied."""
    d, h = hidden, hidden // heads
    widths = (heads * h, kv_heads * h, kv_heads * h)
    sizes = [*((d, width) for width in widths), (heads * h, d), *2 * [(d, intermediate)]]
    sizes.append((intermediate, d))
    linears = [(name, *size) for name, size in zip(ATTENTION + MLP, sizes, strict=True)]
    block = sum(i * o for i, o in sizes) + 2 * d + (sum(widths) if bias else 0)
    return Shape(
        d, layers, heads, kv_heads, h, intermediate, vocab, tuple(linears),
        blocks=layers * block, block=block, embeddings=vocab * d, tail=vocab * d + d,
    )  # fmt: skip


SHAPES = {
    "7b": _llama(3584, 28, 28, 4, 18944, 152064, True),  # Qwen2.5-7B
    "32b": _llama(5120, 64, 40, 8, 27648, 152064, True),  # Qwen2.5-32B
    "70b": _llama(8192, 80, 64, 8, 28672, 128256, False),  # Llama-3.1-70B
}


def find_shape(model: str) -> Shape:
    """One of SHAPES, or that of a local directory with a config.json (or the file itself).

    Raises ValueError for what is neither, and for a model without repeated layers.
    """
    if model.lower() in SHAPES:
        return SHAPES[model.lower()]
    path = Path(model).expanduser()
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        close = difflib.get_close_matches(model.lower(), SHAPES, n=1)
        meant = f" Did you mean {close[0]}?" if close else ""
        raise ValueError(
            f"model must be one of {', '.join(SHAPES)}, or a local directory with a config.json, "
            f"got {model!r}.{meant}"
        )
    return _measured(path)


def _measured(path: Path) -> Shape:
    import torch
    from torch import nn
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
    config = model.config.get_text_config()
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    if not lists:
        raise ValueError(
            f"{path}: expected a model of repeated layers, got {type(model).__name__}."
        )
    layers = max(lists, key=_num_params)
    sizes = [_num_params(layer) for layer in layers]
    linears = [
        (name.rpartition(".")[2], module.in_features, module.out_features)
        for name, module in layers[0].named_modules()
        if isinstance(module, nn.Linear)
    ]
    head = model.get_output_embeddings().weight
    embeddings = model.get_input_embeddings().weight
    own = 0 if embeddings is head else embeddings.numel()
    heads = config.num_attention_heads
    return Shape(
        hidden=config.hidden_size,
        layers=len(layers),
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_size=getattr(config, "head_dim", None) or config.hidden_size // heads,
        intermediate=config.intermediate_size,
        vocab=config.vocab_size,
        linears=tuple(linears),
        blocks=sum(sizes),
        block=max(sizes),
        embeddings=own,
        tail=_num_params(model) - sum(sizes) - own,
    )


def _num_params(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
