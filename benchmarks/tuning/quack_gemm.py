"""Would QuACK's matrix product with our epilogue beat the kernel of the head? To be measured first.

    python -m benchmarks.tuning.quack_gemm --rows 2304 --json FILE         on sm_90 or sm_100

The product makes what the matrix kernel's main pass makes of n rows, in one launch:

    E = 2^(s h W^T - a)  in bf16        sums (n, V / tile) over columns of E in fp32        z_y

with s = log2(e) logit_scale / tau and a = s z_y the anchor of the row. The head needs more, which
stays with its own kernels: sums over v != y (the token's own term is 1: taken off a sum near 1 it
costs the digits of 1 - p_y), the redo of flagged rows, soft-cap and bias, and a V that is no
multiple of the tile (QuACK adds up the columns beyond it).

Nothing in rloo_kernels calls this: whether it pays is open until a GPU has run it. It compiles for
both devices without one (`tests/benchmarks/test_quack_gemm.py`).

Letters: n rows, D hidden size, V vocabulary. FLOPs: 2nDV. Bytes stored: 2nV.
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.common import harness
from benchmarks.common.harness import Row
from benchmarks.loss.run import SHAPES

LOG2E = math.log2(math.e)
TILES = (256, 192, 128)  # columns of a tile: the first that divides V
ERROR_BOUND = 2.0**-7  # of E in bf16, and of sums of it, relative to the exact ones


class Exponentials(NamedTuple):
    stored: Tensor  # E (n, V) bf16
    sums: Tensor  # (n, V / tile) fp32
    label: Tensor  # h . W[y] (n,) fp32


@functools.cache
def anchored_exponentials() -> Any:
    """The product with its epilogue: QuACK makes a kernel of this function."""
    from quack.epilogue.frontend import gemm_epilogue
    from quack.epilogue.math import pexp2
    from quack.epilogue.ops import ColVecLoad, ColVecReduce, ColVecSelect

    token = ColVecLoad("token")

    @gemm_epilogue(
        ops={"anchor": ColVecLoad("anchor")},
        reduces={"sums": ColVecReduce("sums")},
        outs={"label": ColVecSelect("label", idx_op=token)},
        extra_ops=(token,),
    )
    def epilogue(acc, anchor, scale):
        e = pexp2(acc * scale - anchor)
        return {"D": e, "sums": e, "label": acc}

    return epilogue


def tile_of(vocab_size: int) -> int:
    """Columns of a tile; ValueError where none divides V."""
    for tile in TILES:
        if vocab_size % tile == 0:
            return tile
    raise ValueError(f"V must be a multiple of one of {TILES}, got {vocab_size}.")


def quack_exponentials(
    hidden: Tensor, weight: Tensor, token_ids: Tensor, anchor: Tensor, scale: float
) -> Exponentials:
    """The three of hidden (n, D), weight (V, D), token_ids (n,), anchor (n,) fp32."""
    n, vocab_size = len(hidden), len(weight)
    tile = tile_of(vocab_size)
    made = Exponentials(
        hidden.new_empty(n, vocab_size),
        anchor.new_empty(n, vocab_size // tile),
        anchor.new_empty(n),
    )
    values = {
        "anchor": anchor,
        "scale": scale,
        "sums": made.sums,
        "label": made.label,
        "token": token_ids,
    }
    anchored_exponentials().gemm(
        hidden,
        weight,
        made.stored,
        epi_args=values,
        tile_M=128,
        tile_N=tile,
        cluster_M=2,
        cluster_N=1,
        pingpong=tile <= 192,
    )
    return made


def exponentials_reference(
    hidden: Tensor, weight: Tensor, token_ids: Tensor, anchor: Tensor, scale: float
) -> Exponentials:
    """The same in plain torch, in the dtype of the anchor; E is not rounded."""
    z = hidden.to(anchor.dtype) @ weight.to(anchor.dtype).T
    e = torch.exp2(z * scale - anchor[:, None])
    sums = e.unflatten(1, (-1, tile_of(len(weight)))).sum(-1)
    return Exponentials(e, sums, z.gather(1, token_ids[:, None]).squeeze(1))


def refusal(made: Exponentials, exact: Exponentials) -> str | None:
    """Why what was made is wrong, or None."""
    for name, x, y in zip(made._fields, made, exact, strict=True):
        error = ((x - y).norm() / y.norm()).item()
        if not error <= ERROR_BOUND:
            return f"wrong: error of {name} {error:.1e}, allowed {ERROR_BOUND:.1e}"
    return None


def measured(shape: str, num_rows: int, runs: int) -> list[Row]:
    """The bare product, QuACK's with the epilogue, and our matrix kernel, on one shape."""
    from rloo_kernels.lm_head.piece_triton import forward_piece_triton
    from rloo_kernels.lm_head.types import LMHead

    depth, vocab_size = SHAPES[shape]
    torch.manual_seed(0)
    hidden = torch.randn(num_rows, depth, device="cuda").bfloat16()
    weight = (3 / depth**0.5 * torch.randn(vocab_size, depth, device="cuda")).bfloat16()
    ids = torch.randint(vocab_size, (num_rows,), device="cuda")
    anchor = LOG2E * (hidden.float() * weight[ids].float()).sum(-1)
    head = LMHead(weight, None, 1.0, None, 1.0)
    steps = {
        "mm": lambda: hidden @ weight.T,
        "quack": lambda: quack_exponentials(hidden, weight, ids, anchor, LOG2E),
        "ours": lambda: forward_piece_triton(hidden, head, ids, False, True, None),
    }
    rows = {
        name: Row("quack_gemm", name, f"{shape} n={num_rows}", "cuda", "bfloat16") for name in steps
    }
    rows["ours"].add_note("with the sums combined and flagged rows made again")
    try:
        few = slice(0, min(num_rows, 256))
        made = quack_exponentials(hidden[few], weight, ids[few], anchor[few], LOG2E)
        exact = exponentials_reference(hidden[few], weight, ids[few], anchor[few], LOG2E)
        rows["quack"].skipped = refusal(made, exact)
    except Exception as error:  # a peer may raise anything
        rows["quack"].skipped = f"failed: {type(error).__name__}: {str(error)[:200]}"
    if rows["quack"].skipped:
        del steps["quack"]
    device = torch.device("cuda")
    for name, seconds in harness.time_interleaved(steps, device, runs=runs, warmup=2).items():
        rows[name].set_times(seconds)
        rate = 2 * num_rows * depth * vocab_size / statistics.median(seconds) / 1e12
        rows[name].add_note(f"{rate:.0f} TFLOP/s")
    return list(rows.values())


def main(argv: list[str] | None = None) -> int:
    """1 where there is no GPU, or QuACK's product was wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tuning.quack_gemm")
    parser.add_argument("--shape", action="append", choices=list(SHAPES))
    parser.add_argument("--rows", type=int, default=2304)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--json", help="write env and rows here")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0):
        print("needs a GPU of compute capability 9.0 or newer.", file=sys.stderr)
        return 1
    rows = [row for shape in args.shape or SHAPES for row in measured(shape, args.rows, args.runs)]
    print(harness.format_table(rows, baseline="mm"))
    if args.json:
        harness.write_json(args.json, harness.environment(), rows)
    return int(any(row.skipped for row in rows))


if __name__ == "__main__":
    sys.exit(main())
