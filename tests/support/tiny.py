"""Tiny models, tokenizers and engines that the tests make for themselves."""

from __future__ import annotations

import os

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

import tests.support.no_curves  # noqa: F401
from rloo_fast.rollout import RolloutEngine

WORDS = [f"w{i}" for i in range(26)]
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant' }}{% endif %}"
)


def make_tokenizer(**kwargs) -> PreTrainedTokenizerFast:
    """Word-level: pad 0, eos 1, unk 2, the roles 3-5, then w0 .. w25."""
    vocab = ["<pad>", "<eos>", "<unk>", "user", "assistant", "system", *WORDS]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocab)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>", **kwargs}
    return PreTrainedTokenizerFast(tokenizer_object=core, padding_side="left", **special)


def make_model(seed: int = 0, **overrides) -> Qwen2ForCausalLM:
    """A random two-layer Qwen2 over make_tokenizer's 32 words."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        **{
            "vocab_size": 32,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "pad_token_id": 0,
            "bos_token_id": None,
            "eos_token_id": 1,
            "initializer_range": 0.2,
            **overrides,
        }
    )
    return Qwen2ForCausalLM(config)


def without_deepspeeds(printed: str) -> str:
    """What was printed, but for the line that DeepSpeed puts there when it is first imported."""
    return "".join(line for line in printed.splitlines(True) if "[real_accelerator" not in line)


def require_vllm() -> None:
    """Skip what needs vLLM where it is not installed; in CI it must be."""
    if not os.environ.get("CI"):
        pytest.importorskip("vllm", reason="vLLM is not installed")


class InjectedEngine(RolloutEngine):
    """An engine for completions that a test makes up: subclasses write `_generate`."""

    shares_weights = True

    def _load(self, version, buckets):
        assert not list(buckets)
