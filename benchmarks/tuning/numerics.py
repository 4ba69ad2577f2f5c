"""The ops' errors against float64, beside those of plain torch in the same dtype.

    python -m benchmarks.numerics --device cpu|cuda --json FILE

One line per op, options, dtype and result: error = |x - exact| / |exact| (2-norms), for log-probs
the largest |x - exact|. An op passes with at most twice torch's error plus `ATOL`. On a GPU the
Triton kernels are measured, and with bf16 both ways to the logits (`lm_head/piece_triton.py`).
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rloo_kernels import (
    fused_linear_rloo_loss,
    linear_logprob,
    rloo_objective,
    selective_log_softmax,
)
from rloo_kernels.dispatch import use_triton
from torch import Tensor

from benchmarks.common import harness

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ATOL = {"float32": 1e-5, "bfloat16": 2.0**-8, "float16": 2.0**-11}
Numbers = dict[str, Tensor]


@dataclass
class Line:
    """One result of one op."""

    op: str
    options: str
    dtype: str
    result: str
    error: float
    error_of_torch: float
    bound: float

    @property
    def passed(self) -> bool:
        return self.error <= self.bound  # nan does not


@dataclass(frozen=True)
class Inputs:
    """N = 8 ragged completions of two prompts, one of them empty."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor
    logits: Tensor
    token_ids: Tensor
    cu_seqlens: Tensor
    rewards: Tensor
    ref_logps: Tensor
    old_logps: Tensor

    @classmethod
    def make(cls, vocab_size: int, dtype: torch.dtype, device: torch.device, size: int) -> Inputs:
        generator = torch.Generator().manual_seed(vocab_size)
        lengths = torch.tensor([17, 0, 31, 5, 64, 1, 23, 40])
        num_tokens = int(lengths.sum())

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        hidden = normal(num_tokens, size).to(dtype)
        weight = (2 * normal(vocab_size, size) / size**0.5).to(dtype)
        logits = hidden.float() @ weight.float().T
        logq = logits.log_softmax(-1)
        ids = torch.multinomial(logq.exp(), 1, generator=generator)
        logps = logq.gather(-1, ids).squeeze(-1)
        tensors = (
            hidden,
            weight,
            normal(vocab_size).to(dtype),
            logits.to(dtype),
            ids.squeeze(-1),
            torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]),
            normal(len(lengths)),
            logps + 0.1 * normal(num_tokens),
            logps + 0.02 * normal(num_tokens),
        )
        return cls(*(x.to(device) for x in tensors))

    def double(self) -> Inputs:
        return Inputs(*(x.double() if x.is_floating_point() else x for x in vars(self).values()))


def scores_torch(logits: Tensor, token_ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(log-probs, entropies) by plain torch, statistics in fp32 (fp64 for fp64)."""
    z = logits if logits.dtype == torch.double else logits.float()
    logq = (z / temperature).log_softmax(-1)
    logps = logq.gather(-1, token_ids[:, None]).squeeze(-1)
    return logps, -(logq.exp() * logq).sum(-1)


def differentiate(logps: Tensor, entropy: Tensor, leaves: dict[str, Tensor]) -> Numbers:
    """Log-probs, entropies, and the gradients of sum_i (w_i logp_i + w'_i H_i)."""
    weights = torch.linspace(-1, 1, len(logps), device=logps.device, dtype=torch.double)
    loss = (logps * weights).sum() + (entropy * weights.flip(0)).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()))
    names = [f"grad {name}" for name in leaves]
    return {"log-prob": logps, "entropy": entropy, **dict(zip(names, grads, strict=True))}


def case_logits(x: Inputs, ours: bool, temperature: float) -> Numbers:
    logits = x.logits.detach().clone().requires_grad_()
    if ours:
        found = selective_log_softmax(
            logits, x.token_ids, temperature=temperature, return_entropy=True
        )
        assert isinstance(found, tuple)
    else:
        found = scores_torch(logits, x.token_ids, temperature)
    return differentiate(*found, {"logits": logits})


def _leaves(x: Inputs, frozen: bool) -> dict[str, Tensor]:
    leaves = {"hidden": x.hidden.detach().clone().requires_grad_()}
    if not frozen:
        leaves["weight"] = x.weight.detach().clone().requires_grad_()
        leaves["bias"] = x.bias.detach().clone().requires_grad_()
    return leaves


def case_linear(x: Inputs, ours: bool, frozen: bool, softcap: float | None) -> Numbers:
    leaves = _leaves(x, frozen)
    weight, bias = leaves.get("weight", x.weight), leaves.get("bias", x.bias)
    if ours:
        found = linear_logprob(
            leaves["hidden"], weight, x.token_ids, bias=bias, softcap=softcap, return_entropy=True
        )
        assert isinstance(found, tuple)
    else:
        raw = torch.nn.functional.linear(leaves["hidden"], weight, bias)
        raw = raw if raw.dtype == torch.double else raw.float()
        z = raw if softcap is None else softcap * torch.tanh(raw / softcap)
        found = scores_torch(z, x.token_ids, 1.0)
    return differentiate(*found, leaves)


def case_fused(x: Inputs, ours: bool, chunk_rows: int | None, **options: object) -> Numbers:
    leaves = _leaves(x, frozen=False)
    signal = {"rewards": x.rewards, "ref_logps": x.ref_logps}
    if options.pop("off_policy", False):
        signal["old_logps"] = x.old_logps
    loss_options = {"num_generations": 4, "beta": 0.05, **signal, **options}
    hidden, weight, bias = leaves.values()
    if ours:
        chunk_bytes = None if chunk_rows is None else chunk_rows * weight.shape[0] * 6
        out = fused_linear_rloo_loss(
            hidden, weight, x.token_ids, x.cu_seqlens, bias=bias, chunk_bytes=chunk_bytes,
            **loss_options,
        )  # fmt: skip
        logps = out.logps
    else:
        raw = torch.nn.functional.linear(hidden, weight, bias)
        logps, _ = scores_torch(raw, x.token_ids, 1.0)
        with vendor_free():
            out = rloo_objective(logps, x.cu_seqlens, **loss_options)
    assert logps is not None
    grads = torch.autograd.grad(out.loss, list(leaves.values()))
    names = [f"grad {name}" for name in leaves]
    return {"log-prob": logps, "kl": out.kl, **dict(zip(names, grads, strict=True))}


@contextlib.contextmanager
def vendor_free() -> Iterator[None]:
    """Plain torch for the objective too, so that the two sides share no kernel."""
    from rloo_kernels.loss import rloo_objective as module

    kept, module.use_triton = module.use_triton, lambda x: False
    try:
        yield
    finally:
        module.use_triton = kept


TOKENS: dict[str, Any] = {"off_policy": True, "level": "token"}
CASES: dict[tuple[str, str], Callable[[Inputs, bool], Numbers]] = {
    ("selective_log_softmax", "temperature 1"): lambda x, ours: case_logits(x, ours, 1.0),
    ("selective_log_softmax", "temperature 0.1"): lambda x, ours: case_logits(x, ours, 0.1),
    ("linear_logprob", "bias"): lambda x, ours: case_linear(x, ours, False, None),
    ("linear_logprob", "bias, soft-cap 5"): lambda x, ours: case_linear(x, ours, False, 5.0),
    ("linear_logprob", "bias, frozen head"): lambda x, ours: case_linear(x, ours, True, None),
    ("fused_linear_rloo_loss", "KL in the reward"): lambda x, ours: case_fused(x, ours, None),
    ("fused_linear_rloo_loss", "a group per chunk"): lambda x, ours: case_fused(x, ours, 128),
    ("fused_linear_rloo_loss", "groups too large"): lambda x, ours: case_fused(x, ours, 32),
    ("fused_linear_rloo_loss", "ratio and clip"): lambda x, ours: case_fused(
        x, ours, None, off_policy=True
    ),
    ("fused_linear_rloo_loss", "no KL"): lambda x, ours: case_fused(x, ours, None, beta=0.0),
    ("fused_linear_rloo_loss", "GRPO"): lambda x, ours: case_fused(
        x, ours, None, **TOKENS, advantage="grpo", kl="corrected_loss", token_mean=True
    ),
    ("fused_linear_rloo_loss", "Dr. GRPO, plain k3"): lambda x, ours: case_fused(
        x, ours, None, **TOKENS, advantage="dr_grpo", kl="loss"
    ),
}


def error(result: str, value: Tensor, exact: Tensor) -> float:
    difference = value.double() - exact
    if result in ("log-prob", "kl"):
        return difference.abs().max().item()
    return (difference.norm() / exact.norm().clamp(min=1e-30)).item()


def measure(vocab_size: int, dtype: str, device: torch.device, size: int) -> list[Line]:
    """Every case at one V and dtype; a GPU's "library" way comes as an option of its own."""
    inputs = Inputs.make(vocab_size, DTYPES[dtype], device, size)
    lines = []
    for (op, options), case in CASES.items():
        exact, plain = case(inputs.double(), False), case(inputs, False)
        ways = {"": contextlib.nullcontext}
        if use_triton(inputs.hidden) and dtype == "bfloat16" and op != "selective_log_softmax":
            from rloo_kernels.lm_head.piece_triton import library_products

            ways["library product, "] = library_products
        for way, context in ways.items():
            with context():
                got = case(inputs, True)
            for result, truth in exact.items():
                ours, torch_s = (error(result, found[result], truth) for found in (got, plain))
                lines.append(
                    Line(
                        op,
                        f"V={vocab_size}, {way}{options}",
                        dtype,
                        result,
                        ours,
                        torch_s,
                        2 * torch_s + ATOL[dtype] * (4 if result == "kl" else 1),
                    )
                )
    return lines


def format_table(lines: list[Line]) -> str:
    """One line per op, options and dtype: error (error of torch) of each result."""
    grouped: dict[tuple[str, str, str], list[Line]] = {}
    for line in lines:
        grouped.setdefault((line.op, line.options, line.dtype), []).append(line)
    out = []
    for (op, options, dtype), group in grouped.items():
        cells = [
            f"{x.result} {x.error:.1e} ({x.error_of_torch:.1e}){'' if x.passed else ' WRONG'}"
            for x in group
        ]
        out.append(f"{op:22} {dtype:8} {options}\n    " + "   ".join(cells))
    return "\n".join(out)


def main(argv: list[str] | None = None) -> int:
    """0 if every line passes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.numerics", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", default="float32,bfloat16,float16")
    parser.add_argument("--vocab", default="50257,151936", help="vocabulary sizes")
    parser.add_argument("--size", type=int, default=128, help="hidden size D")
    parser.add_argument("--json", help="write env and lines here")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    lines: list[Line] = []
    for vocab_size in map(int, args.vocab.split(",")):
        for dtype in args.dtype.split(","):
            lines += measure(vocab_size, dtype, device, args.size)
    print(format_table(lines))
    wrong = [line for line in lines if not line.passed]
    print(f"{len(lines)} results, {len(wrong)} outside their bound, on {device}.")
    if args.json:
        content = {
            "env": harness.environment(),
            "rows": [asdict(x) | {"bound": x.bound} for x in lines],
        }
        Path(args.json).write_text(json.dumps(content, indent=1) + "\n")
    return int(bool(wrong))
