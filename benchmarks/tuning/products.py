"""Ways to make dX and dW, each of them timed: python -m benchmarks.tuning.products

    dX   one product, or the sum of products over parts of the vocabulary (`waves.best_parts`)
    dW   added to an fp32 sum by the library's product with beta = 1, or in memory (`weight_triton`)

One piece of `--rows` rows, 2nDV FLOPs each. What wins where another way was chosen names a wrong
assumption: `waves.TILE_STEPS`, `waves.REDUCE_ADD_MOST_ROWS`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable

import torch
from rloo_kernels.lm_head.gradients import parts_of_product, product
from rloo_kernels.lm_head.waves import PARTS
from torch import Tensor

from benchmarks.common import harness
from benchmarks.common.harness import Row
from benchmarks.loss.run import SHAPES, Shape

WORST_ERROR = 1e-2  # of the largest number, against the library's way


def ways_of_dx(matrix: Tensor, weight: Tensor, total: torch.dtype) -> dict[str, Callable]:
    allowed = [s for s in PARTS if s == 1 or len(weight) % (8 * s) == 0]
    return {
        f"{s} part{'s' if s > 1 else ''}": lambda s=s: product(matrix, weight, total, s)
        for s in allowed
    }


def ways_of_dw(matrix: Tensor, hidden: Tensor, into: Tensor) -> dict[str, Callable]:
    """Each adds to `into` and returns it; the one in memory only on a GPU."""
    if not matrix.is_cuda:
        return {"library": lambda: into.addmm_(matrix.T.float(), hidden.float())}
    from rloo_kernels.lm_head.weight_triton import add_in_memory

    def in_memory() -> Tensor:
        add_in_memory(into, matrix, hidden)
        return into

    return {
        "library": lambda: torch.addmm(into, matrix.T, hidden, out_dtype=into.dtype, out=into),
        "in memory": in_memory,
    }


def run_shape(shape: Shape, dtype: torch.dtype, device: torch.device, runs: int) -> list[Row]:
    """Rows of dX and dW; `note`: FLOP rate, and which way the code takes for dX."""
    n, depth, vocab = shape.num_rows, shape.hidden, shape.vocab
    wide = -(-vocab // 16) * 16  # as the matrix kernel stores its rows
    matrix = torch.randn(n, wide, device=device).to(dtype)[:, :vocab]
    hidden, weight = (torch.randn(k, depth, device=device).to(dtype) for k in (n, vocab))
    into = torch.zeros(vocab, depth, device=device)
    jobs = {
        "dX": ways_of_dx(matrix, weight, torch.float32),
        "dW": ways_of_dw(matrix, hidden, into),
    }
    rows = []
    chosen = parts_of_product(matrix, weight)
    for job, ways in jobs.items():
        found: dict[str, Row] = {}
        truth: Tensor | None = None
        for name, way in ways.items():
            row = found[name] = Row(job, name, str(shape), device.type, str(dtype)[6:], tokens=n)
            into.zero_()
            made = way().clone()
            truth = made if truth is None else truth
            error = ((made - truth).abs().max() / truth.abs().max()).item()
            if error <= WORST_ERROR:  # nan is not
                row.error_vs_reference = error
            else:
                row.skipped = f"wrong: off by {error:.1e} of the largest number"
        steps = {name: ways[name] for name, row in found.items() if row.skipped is None}
        for name, seconds in harness.time_interleaved(steps, device, runs=runs).items():
            row = found[name]
            row.set_times(seconds)
            assert row.seconds_median is not None
            row.note = f"{2 * n * depth * vocab / row.seconds_median / 1e12:.3g} TFLOP/s"
            if job == "dX" and name.split()[0] == str(chosen):
                row.add_note("the code's way")
        rows += found.values()
    return rows


def main(argv: list[str] | None = None) -> int:
    """0 if no way is wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tuning.products")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--shape", action="append", help="; ".join(SHAPES))
    parser.add_argument("--rows", type=int, default=2304, help="rows of the piece")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--json")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU.")
    env, rows = harness.environment(), []
    for text in args.shape or list(SHAPES):
        shape = Shape.parse(text, args.rows)
        rows += run_shape(shape, getattr(torch, args.dtype), torch.device(args.device), args.runs)
        if args.json:
            harness.write_json(args.json, env, rows)
    print(json.dumps(env))
    print(harness.format_table(rows, baseline="library"))
    return int(any((row.skipped or "").startswith("wrong") for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
