"""Tiny models, tokenizers and data that the tests make for themselves."""

from __future__ import annotations

import logging
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from rloo_fast.reports.run_report import RunReportMixin
from rloo_fast.rollout import RolloutEngine

draw_curves = RunReportMixin.draw_curves
RunReportMixin.draw_curves = lambda self: None  # half a second in each of some hundred runs

WORDS = [f"w{i}" for i in range(26)]
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant' }}{% endif %}"
)


def pytest_collection_modifyitems(items):
    """Files with long tests come first, or at the end one worker would be left alone with some."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def _few_threads():
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_warning()  # which benchmarks turn down
    logging.getLogger("rloo_fast").setLevel(logging.INFO)


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


@pytest.fixture
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def model_dir(tmp_path):
    """A saved tiny model with its tokenizer."""
    path = tmp_path / "model"
    make_model().save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


class InjectedEngine(RolloutEngine):
    """An engine for completions that a test makes up: subclasses write `_generate`."""

    shares_weights = True

    def _load(self, version, buckets):
        assert not list(buckets)
