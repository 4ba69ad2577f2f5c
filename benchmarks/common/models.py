"""What `benchmarks.step` trains on: models of real sizes with random weights, prompts, completions.

Nothing is downloaded. Prompts all have the shape's number of tokens; completion lengths are the
quantiles of the distribution that the shape names; ids are drawn uniformly from a fixed seed. A
completion shorter than the limit ends with EOS, one cut at the limit does not.

Letters: P prompts, K completions each, B = P K rows; p prompt tokens, l completion tokens.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import NormalDist
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPTNeoXConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from rloo_fast.records import Rollout
from rloo_fast.rollout import RolloutEngine

PAD, EOS, NUM_SPECIAL = 0, 1, 3
GPU_TIMES = 8
NUM_WORDS = 64  # that prompts are written in; completions are ids and need no words

# hidden, layers, heads, intermediate, vocabulary
NEOX = {
    "tiny": (64, 2, 4, 128, 512),
    "pythia-14m": (128, 6, 4, 512, 50304),
    "pythia-70m": (512, 6, 8, 2048, 50304),
    "pythia-410m": (1024, 24, 16, 4096, 50304),
    "pythia-1b": (2048, 16, 8, 8192, 50304),
}
# the same, with key-value heads after heads; embeddings are tied
GROUPED = {
    "smollm2-135m": (LlamaConfig, (576, 30, 9, 3, 1536, 49152)),
    "qwen2.5-0.5b": (Qwen2Config, (896, 24, 14, 2, 4864, 151936)),
}
MODELS = (*NEOX, *GROUPED)


@dataclass(frozen=True)
class Shape:
    """P prompts of `prompt` tokens with K completions each, none longer than `limit`."""

    name: str
    prompt: int
    limit: int
    num_generations: int
    num_prompts: int
    uniform: tuple[int, int] | None = None  # bounds, both included
    lognormal: tuple[float, float] | None = None  # median, sigma of the logarithm; cut at limit
    system: int = 0  # tokens that all prompts begin with

    @property
    def num_rows(self) -> int:
        return self.num_prompts * self.num_generations

    def on(self, device: str) -> Shape:
        """With as many prompts as keep the device busy for a second or so."""
        return self if device == "cpu" else self.with_sizes(None, GPU_TIMES * self.num_prompts)

    def with_sizes(self, num_generations: int | None, num_prompts: int | None) -> Shape:
        return replace(
            self,
            num_generations=num_generations or self.num_generations,
            num_prompts=num_prompts or self.num_prompts,
        )

    def lengths(self) -> list[int]:
        """Completion tokens of every row: quantiles (i + 1/2) / B of the distribution, shuffled.

        Quantiles, not draws: eight draws may by luck be even, and padding then costs nothing.
        """
        quantiles = [(i + 0.5) / self.num_rows for i in range(self.num_rows)]
        if self.uniform is not None:
            low, high = self.uniform
            lengths = [low + int(q * (high - low + 1)) for q in quantiles]
        else:
            assert self.lognormal is not None, self
            median, sigma = self.lognormal
            normal = NormalDist(0.0, sigma)
            lengths = [round(median * math.exp(normal.inv_cdf(q))) for q in quantiles]
        random.Random(f"{self.name} lengths").shuffle(lengths)
        return [min(max(length, 1), self.limit) for length in lengths]

    def distribution(self) -> str:
        if self.uniform is not None:
            return f"uniform {self.uniform[0]}..{self.uniform[1]}"
        assert self.lognormal is not None, self
        return f"lognormal, median {self.lognormal[0]:g}, sigma {self.lognormal[1]:g}"


SHAPES = {
    shape.name: shape
    for shape in (
        # most TL;DR summaries are near their limit of 53 tokens
        Shape("tldr", 400, 53, 4, 2, uniform=(30, 53)),
        Shape("math", 100, 512, 8, 1, lognormal=(167, 0.6)),  # mean about 200
        Shape("code", 300, 1024, 8, 1, lognormal=(290, 0.65)),  # mean about 350
        Shape("system", 1100, 128, 4, 4, uniform=(32, 128), system=1000),
        Shape("short", 24, 8, 4, 2, uniform=(3, 8)),  # for tests
    )
}


def model_config(name: str) -> PretrainedConfig:
    """The configuration of one of MODELS, without dropout, with our tokenizer's special ids."""
    special = {"pad_token_id": PAD, "bos_token_id": None, "eos_token_id": EOS}
    if name in NEOX:
        hidden, layers, heads, intermediate, vocab = NEOX[name]
        return GPTNeoXConfig(
            hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
            intermediate_size=intermediate, vocab_size=vocab, max_position_embeddings=2048,
            rotary_pct=0.25, attention_dropout=0.0, hidden_dropout=0.0, **special,
        )  # fmt: skip
    kind, (hidden, layers, heads, kv_heads, intermediate, vocab) = GROUPED[name]
    return kind(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, intermediate_size=intermediate, vocab_size=vocab,
        max_position_embeddings=8192, tie_word_embeddings=True, attention_dropout=0.0, **special,
    )  # fmt: skip


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Word-level: pad 0, eos 1, unk 2, then w0 .. w63."""
    words = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(NUM_WORDS))]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, padding_side="left", **special)


def save_model(name: str, folder: str | Path, seed: int = 0) -> None:
    """Write a model with random fp32 weights, and its tokenizer, where every trainer loads them."""
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(model_config(name)).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


def perturb(model: nn.Module, share: float = 0.1, seed: int = 0) -> None:
    """w <- w + share * std(w) * normal noise: a policy that is not its reference, so that KL != 0.

    The same seed makes the same weights in every trainer.
    """
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator, device=device, dtype=p.dtype)
            p.add_(noise, alpha=share * float(p.std(correction=0)))


def prompt_texts(shape: Shape) -> list[str]:
    """P different prompts of `shape.prompt` words, a token each, the first `shape.system` alike."""
    draw = random.Random(f"{shape.name} prompts")
    words = lambda n: [f"w{draw.randrange(NUM_WORDS)}" for _ in range(n)]  # noqa: E731
    system = words(shape.system)
    own = shape.prompt - shape.system
    return [" ".join(system + words(own)) for _ in range(shape.num_prompts)]


def completions(shape: Shape, vocab: int) -> list[list[int]]:
    """Ids of every row, prompt-major."""
    draw = random.Random(f"{shape.name} completions")
    rows = []
    for length in shape.lengths():
        ids = [draw.randrange(NUM_SPECIAL, vocab) for _ in range(length)]
        rows.append(ids if length == shape.limit else [*ids[:-1], EOS])
    return rows


class Injected(RolloutEngine):
    """The same completions for whoever asks: our engine, and a stand-in for TRL's generation."""

    shares_weights = True

    def __init__(self, shape: Shape, vocab: int):
        super().__init__()
        tokenizer = make_tokenizer()
        prompts: list[list[int]] = tokenizer(prompt_texts(shape))["input_ids"]  # pyright: ignore
        self.prompt_ids = [ids for ids in prompts for _ in range(shape.num_generations)]
        self.completion_ids = completions(shape, vocab)

    def for_trl(self, prompt_ids: list[list[int]], images: Any, fields: Any) -> list[list[int]]:
        assert prompt_ids == self.prompt_ids, "TRL asks for other prompts than were planned"
        return [list(ids) for ids in self.completion_ids]

    def _load(self, version: int, buckets: Any) -> None:
        return

    def _generate(
        self, prompt_ids: list[list[int]], sampling: Any, seeds: Any, on_finished: Any
    ) -> Rollout:
        assert prompt_ids == self.prompt_ids, "our trainer asks for other prompts than planned"
        ids = [list(ids) for ids in self.completion_ids]
        ends = ["stop" if row[-1] == EOS else "length" for row in ids]
        return Rollout(ids, ends)


def fixed_reward(completion_ids: list[list[int]], **kwargs: object) -> list[float]:
    """In [-1, 1], a function of the ids alone."""
    return [(sum(ids) % 97) / 48 - 1 for ids in completion_ids]


def update_flops(model_folder: str | Path, shape: Shape, beta: float) -> int:
    """FLOPs that one update needs where every shared token is run once and nothing is padded.

    The policy costs three forwards (backward is twice forward), the reference, if beta > 0, one.
    N = sum of l tokens are predicted; nothing is from the last one of a row, so P p + N - B run,
    less (P - 1) s where all prompts begin with the same s.
    """
    lengths = shape.lengths()
    tokens = shape.num_prompts * shape.prompt + sum(lengths) - shape.num_rows
    pairs = attended_pairs(shape.prompt, shape.num_prompts, lengths)
    tokens -= (shape.num_prompts - 1) * shape.system
    pairs -= (shape.num_prompts - 1) * shape.system * (shape.system + 1) // 2
    config = AutoConfig.from_pretrained(model_folder)
    return (4 if beta > 0 else 3) * forward_flops(config, tokens, pairs, sum(lengths))


def forward_flops(config: PretrainedConfig, tokens: int, pairs: int, predicted: int) -> int:
    """2 M tokens + 4 A pairs + 2 D V predicted

    M weights of the blocks' matrix products; A = layers x heads x head size: QK^T and PV take 2 A
    each per (query, key) pair that the mask leaves; D hidden, V vocabulary.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    weights = sum(
        m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear) and m is not head
    )
    head_size = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    width = config.num_hidden_layers * config.num_attention_heads * head_size
    head_flops = 2 * config.hidden_size * config.vocab_size * predicted
    return 2 * weights * tokens + 4 * width * pairs + head_flops


def attended_pairs(prompt: int, num_prompts: int, lengths: Sequence[int]) -> int:
    """(query, key) pairs of a causal mask with every prompt run once:

    sum over groups of p (p + 1) / 2  +  sum over rows of (l - 1) p + (l - 1) l / 2
    """
    own = num_prompts * prompt * (prompt + 1) // 2
    return own + sum((n - 1) * prompt + (n - 1) * n // 2 for n in lengths)
