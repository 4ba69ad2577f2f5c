"""Ratios to an older policy over the length of a completion: per completion, and per token.

python -m benchmarks.staleness.lengths [--rows 128] [--json FILE]

Completions are sampled by one policy, a random Qwen2 of two layers, and their log-probs taken by
another: the same weights with noise, as much as gives a mean |log-ratio| of `drift` nats per token.
No row ends early, so that prefixes of one sample serve every length.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks.common.harness import environment

LENGTHS, DRIFTS = (16, 64, 256, 1024), (0.01, 0.03)
EPSILON = 0.2  # of the clip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.staleness.lengths")
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    env, model = environment(), make_model()
    ids = model.generate(
        torch.full((options.rows, 1), 5), do_sample=True, max_new_tokens=LENGTHS[-1], top_k=0,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    sampler = log_probs(model, ids)
    rows = []
    for drift in DRIFTS:
        log_ratio = log_probs(moved(model, ids, sampler, drift), ids) - sampler
        rows += [measured(log_ratio[:, :length], drift) for length in LENGTHS]
    for row in rows:
        print(json.dumps(row), flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps({"env": env, "rows": rows}, indent=1) + "\n")
    return 0


def make_model() -> Any:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=LENGTHS[-1] + 8,
        initializer_range=0.1,
    )  # fmt: skip
    return Qwen2ForCausalLM(config).eval()


@torch.no_grad()
def log_probs(model: Any, ids: Tensor) -> Tensor:  # (R, 1 + T) -> (R, T)
    parts = []
    for some in ids.split(16):
        logps = model(some).logits[:, :-1].log_softmax(-1)
        parts.append(logps.gather(2, some[:, 1:, None]).squeeze(2).double())
    return torch.cat(parts)


@torch.no_grad()
def moved(model: Any, ids: Tensor, sampler: Tensor, drift: float) -> Any:
    """The model with noise in its weights, for a mean |log-ratio| of `drift` on a few rows."""
    base = {name: p.clone() for name, p in model.state_dict().items()}
    torch.manual_seed(1)
    noise = {name: torch.randn_like(p) * p.std() for name, p in base.items() if p.ndim == 2}
    other = make_model()
    scale = drift
    for _ in range(2):  # |log-ratio| is about linear in the noise
        state = {name: p + scale * noise[name] if name in noise else p for name, p in base.items()}
        other.load_state_dict(state)
        found = (log_probs(other, ids[:8]) - sampler[:8]).abs().mean().item()
        scale *= drift / found
    return other


def measured(log_ratio: Tensor, drift: float) -> dict[str, float]:
    found: dict[str, float] = {"drift": drift, "length": log_ratio.shape[1]}
    found["mean_abs_log_ratio"] = round(log_ratio.abs().mean().item(), 5)
    for level, logs in (("completion", log_ratio.sum(1)), ("token", log_ratio.flatten())):
        ratio = logs.exp()
        outside = (ratio < 1 - EPSILON) | (ratio > 1 + EPSILON)
        found |= {
            f"{level}/ess": round(_ess(ratio), 4),
            f"{level}/ess_capped": round(_ess(ratio.clamp(max=2.0)), 4),
            f"{level}/max": round(ratio.max().item(), 3),
            f"{level}/outside_clip": round(outside.double().mean().item(), 4),
        }
    return found


def _ess(weights: Tensor) -> float:
    return (weights.sum() ** 2 / len(weights) / (weights**2).sum()).item()


if __name__ == "__main__":
    raise SystemExit(main())
