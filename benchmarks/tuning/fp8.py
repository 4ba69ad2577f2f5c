"""What a reference's log-probs lose by products in fp8, beside what bf16 loses, against float64.

    python -m benchmarks.fp8 --device cpu|cuda --json FILE

Logits as language models have them: every token has a favourite, by a margin that goes from none to
16 nats, over a vocabulary whose rows have lengths that differ (lognormal, 0.3). "outliers" has six
hidden dimensions 30 times as large as the rest, as residual streams do, and the head's columns for
them smaller: a row's scale is then set by them. Tokens are sampled from the exact distribution.

Per token |error| of log p(y), mean and largest; per sequence the error of sum_t log p, and so of
its KL: mean |error|, and the mean error, which does not average out over a batch.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest import mock

import torch
from rloo_kernels import linear_logprob, reference_logprob_fp8
from rloo_kernels.lm_head import reference_logprob_fp8 as module
from rloo_kernels.lm_head.fp8 import product, to_fp8
from torch import Tensor

from benchmarks.common import harness

SHAPES = {"Qwen2.5-0.5B": (896, 151936), "pythia-1b": (2048, 50304)}
LARGEST_MARGIN = 16.0  # nats between the favourite and what the others sum to


@dataclass
class Line:
    """Errors of one way to the log-probs of one shape's tokens, in nats."""

    shape: str
    hidden: str  # plain or outliers
    way: str
    mean: float  # of |error| of a token's log-prob
    largest: float
    sequence: float  # mean |error| of a sequence's KL
    bias: float  # mean error of a sequence's KL


def make_head(
    depth: int, vocab_size: int, tokens: int, outliers: bool, seed: int
) -> tuple[Tensor, Tensor]:
    """(hidden (N, D), weight (V, D)) in bf16."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random)

    weight = normal(vocab_size, depth) / depth**0.5
    weight *= (0.3 * normal(vocab_size, 1)).exp()
    favourite = torch.randint(vocab_size, (tokens,), generator=random)
    hidden = 2.0 * normal(tokens, depth)
    direction = weight[favourite] / weight[favourite].square().sum(-1, keepdim=True)
    others = (hidden @ weight.T).logsumexp(-1)
    margin = LARGEST_MARGIN * torch.rand(tokens, generator=random)
    now = (hidden * weight[favourite]).sum(-1)
    hidden += direction * (others + margin - 4.0 - now)[:, None]
    if outliers:
        dims = torch.randperm(depth, generator=random)[:6]
        hidden[:, dims] *= 30.0
        weight[:, dims] /= 30.0
    return hidden.bfloat16(), weight.bfloat16()


def exact_logprobs(hidden: Tensor, weight: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """(sampled ids (N,), their log-probs in float64), some rows at a time."""
    random = torch.Generator().manual_seed(seed)
    ids, logps = [], []
    wide = weight.double().T
    for rows in hidden.split(64):
        logq = (rows.double() @ wide).log_softmax(-1)
        picked = torch.multinomial(logq.exp().cpu(), 1, generator=random).to(hidden.device)
        ids.append(picked.squeeze(-1))
        logps.append(logq.gather(-1, picked).squeeze(-1))
    return torch.cat(ids), torch.cat(logps)


def eager_bf16(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    """A bf16 head and a log_softmax in fp32, as models and trainers do."""
    parts = zip(hidden.split(64), ids.split(64), strict=True)
    return torch.cat([(h @ weight.T).float().log_softmax(-1).gather(-1, i[:, None])[:, 0]
                      for h, i in parts])  # fmt: skip


def all_in_fp8(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    """The same op with the token's own logit in fp8 too."""

    def rounded(h: Tensor, head: object, columns: Tensor) -> Tensor:
        picked = (to_fp8(h[i : i + 1]) for i in range(len(h)))
        rows = (to_fp8(weight[c : c + 1]) for c in columns.tolist())
        return torch.cat([product(a, b, None).flatten() for a, b in zip(picked, rows, strict=True)])

    with mock.patch.object(module, "label_logits", rounded):
        return reference_logprob_fp8(hidden, weight, ids)


WAYS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "bf16, eager": eager_bf16,
    "bf16, linear_logprob": linear_logprob,
    "fp8, reference_logprob_fp8": reference_logprob_fp8,
    "fp8, the token's logit too": all_in_fp8,
}


def measure(
    shape: str, sizes: tuple[int, int], sequences: int, length: int, device: torch.device
) -> list[Line]:
    lines = []
    for kind in ("plain", "outliers"):
        hidden, weight = (
            x.to(device) for x in make_head(*sizes, sequences * length, kind == "outliers", 0)
        )
        ids, exact = exact_logprobs(hidden, weight, 1)
        for way, function in WAYS.items():
            with torch.no_grad():
                error = function(hidden, weight, ids).double() - exact
            per_sequence = error.view(sequences, length).sum(-1)
            numbers = (error.abs().mean(), error.abs().max(), per_sequence.abs().mean(),
                       per_sequence.mean())  # fmt: skip
            lines.append(Line(shape, kind, way, *(x.item() for x in numbers)))
    return lines


def format_table(lines: list[Line]) -> str:
    head = "| shape | hidden states | way | token, mean | token, largest | sequence, mean | bias |"
    rows = [
        f"| {x.shape} | {x.hidden} | {x.way} | {x.mean:.4f} | {x.largest:.3f} | "
        f"{x.sequence:.3f} | {x.bias:+.3f} |"
        for x in lines
    ]
    return "\n".join([head, "| --- | --- | --- | --- | --- | --- | --- |", *rows])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fp8", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--length", type=int, default=64, help="tokens of a sequence")
    parser.add_argument("--sizes", help="D,V in place of the models' shapes")
    parser.add_argument("--json", help="write env and lines here")
    args = parser.parse_args(argv)
    shapes = SHAPES
    if args.sizes:
        depth, vocab_size = map(int, args.sizes.split(","))
        shapes = {f"{depth} x {vocab_size}": (depth, vocab_size)}
    device = torch.device(args.device)
    lines: list[Line] = []
    for shape, sizes in shapes.items():
        lines += measure(shape, sizes, args.sequences, args.length, device)
    print(format_table(lines))
    if args.json:
        content = {"env": harness.environment(), "rows": [asdict(x) for x in lines]}
        Path(args.json).write_text(json.dumps(content, indent=1) + "\n")
    return 0
