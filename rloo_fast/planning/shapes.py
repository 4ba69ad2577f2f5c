"""Sizes of a decoder-only transformer, as far as memory and traffic depend on them.

Built-in shapes are arithmetic; another model's are read off the model that its config.json makes on
torch's meta device, which takes no memory. Only that needs torch and transformers.
"""

from __future__ import annotations

import difflib
import warnings
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..config.paths import user_path

ALL = "all-linear"  # peft's word for every linear layer but the lm_head
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
    linears: tuple[tuple[str, int, int, int], ...]  # name, inputs, outputs, how many; no lm_head
    # parameters of LoRA of rank 1 on all of them, and on experts where peft does, or why it refuses
    all_linear: int | str
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
        return max(self.head, *(inputs * outputs for _, inputs, outputs, _ in self.linears))

    def adapters(self, rank: int, targets: tuple[str, ...]) -> int:
        """Parameters of LoRA's A and B on `targets`: sum of rank (in + out).

        Raises ValueError where peft refuses this model.
        """
        if targets == (ALL,):
            if isinstance(self.all_linear, str):
                raise ValueError(
                    f"LoRA cannot go to all linear layers of this model: name some by "
                    f"--lora_targets. peft says: {self.all_linear}"
                )
            return rank * self.all_linear
        sizes = [n * (i + o) for name, i, o, n in self.linears if name in targets]
        return rank * sum(sizes)


def _llama(
    hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int, vocab: int, bias: bool
) -> Shape:
    """A Llama, or with a bias on q, k and v a Qwen2; embeddings not tied."""
    d, h = hidden, hidden // heads
    widths = (heads * h, kv_heads * h, kv_heads * h)
    sizes = [*((d, width) for width in widths), (heads * h, d), *2 * [(d, intermediate)]]
    sizes.append((intermediate, d))
    linears = [(name, *size, layers) for name, size in zip(ATTENTION + MLP, sizes, strict=True)]
    block = sum(i * o for i, o in sizes) + 2 * d + (sum(widths) if bias else 0)
    return Shape(
        d, layers, heads, kv_heads, h, intermediate, vocab, tuple(linears),
        all_linear=layers * sum(i + o for i, o in sizes),
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
    path = user_path(model)
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
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    model = _on_meta(path)
    config = model.config.get_text_config()
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    if not lists:
        raise ValueError(
            f"{path}: expected a model of repeated layers, got {type(model).__name__}."
        )
    layers = max(lists, key=_num_params)
    sizes = [_num_params(layer) for layer in layers]
    head = model.get_output_embeddings()
    linears: Counter[tuple[str, int, int]] = Counter()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and module is not head:
            inputs, outputs = module.weight.shape
            if isinstance(module, nn.Linear):
                inputs, outputs = outputs, inputs
            linears[name.rpartition(".")[2], inputs, outputs] += 1
    embeddings = model.get_input_embeddings().weight
    own = 0 if head is None or embeddings is head.weight else embeddings.numel()
    hidden = _first(config, "hidden_size") or embeddings.shape[1]
    heads = _first(config, "num_attention_heads", "n_head", "num_query_heads", "num_heads")
    if not heads:
        raise ValueError(
            f"{path}: the memory of a model with attention is planned, and "
            f"{type(model).__name__} says no number of attention heads."
        )
    # what comes back to the hidden size from more than it is the MLP
    back = [inputs for _, inputs, outputs in linears if outputs == hidden]
    shape = Shape(
        hidden=hidden,
        layers=len(layers),
        heads=heads,
        kv_heads=_first(config, "num_key_value_heads", "num_kv_heads") or heads,
        head_size=_first(config, "head_dim") or max(1, hidden // heads),
        intermediate=_first(config, "intermediate_size") or max(back, default=4 * hidden),
        vocab=_first(config, "vocab_size") or embeddings.shape[0],
        linears=tuple((*linear, count) for linear, count in linears.items()),
        all_linear=0,
        blocks=sum(sizes),
        block=max(sizes),
        embeddings=own,
        tail=_num_params(model) - sum(sizes) - own,
    )
    return replace(shape, all_linear=_all_linear(model))


def _all_linear(model: Any) -> int | str:
    """What peft makes of it, which knows families whose experts are one tensor; its reason where it
    refuses (layers whose kernels read the weights past the adapters, as Mamba's). Changes `model`.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=1, target_modules=ALL, task_type="CAUSAL_LM")
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of patterns for experts, which are not adapted by name
        try:
            adapted = get_peft_model(model, config)
        except ValueError as error:
            return " ".join(str(error).split())
    return sum(p.numel() for p in adapted.parameters() if p.requires_grad)


def _on_meta(path: Path) -> Any:
    """The model of a config.json without memory. Raises ValueError where transformers has none."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(path)
        if type(config) not in AutoModelForCausalLM._model_mapping:  # with images: its text part
            config = config.get_text_config()
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except Exception as error:  # of many kinds: a missing package, a field that has no default
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{path}: no causal language model can be made of it: {reason}") from error


def _first(config: Any, *names: str) -> int:
    """The first of these fields that is a number, the largest of a list of them; 0 without one."""
    for name in names:
        try:
            value = getattr(config, name, None)
        except Exception:  # a field that differs from layer to layer, as Gemma 4's head_dim
            continue
        if isinstance(value, list | tuple) and value:
            value = max(value)
        if isinstance(value, int) and value > 0:
            return value
    return 0


def _num_params(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
