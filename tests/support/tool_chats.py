"""A byte-level tokenizer with the special tokens of a chat template for tools, and its models."""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2ForCausalLM, Qwen2Tokenizer

from tests.support.tiny import make_model

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TAGS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")


def make_chat_tokenizer(template: str | None = None) -> Qwen2Tokenizer:
    """The bytes and Qwen's tokens; `template`: a chat template, by default that of Qwen2.5."""
    from trl.chat_template_utils import qwen2_5_chat_template

    symbols = ["<|endoftext|>", *sorted(ByteLevel.alphabet())]
    tokenizer = Qwen2Tokenizer(
        vocab={symbol: number for number, symbol in enumerate(symbols)},
        merges=[],
        unk_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
    )
    added: Any = [AddedToken(text, special=True, normalized=False) for text in SPECIAL]
    added += [AddedToken(text, special=False, normalized=False) for text in TAGS]
    tokenizer.add_tokens(added)
    tokenizer.chat_template = template or qwen2_5_chat_template
    return tokenizer


def make_chat_model(tokenizer: Any, **overrides: Any) -> Qwen2ForCausalLM:
    """A random two-layer Qwen2 over this tokenizer."""
    sizes = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 4096,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    return make_model(**{**sizes, **overrides})


def call_of(name: str, arguments: str) -> str:
    """How Qwen writes a call; `arguments`: JSON."""
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'
