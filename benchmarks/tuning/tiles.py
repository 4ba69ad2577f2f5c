"""Tiles of the matrix kernel against each other and against the library's product, on a GPU.

    python -m benchmarks.tiles --shape pythia-1b --rows 16384 --json FILE

For each shape and tile: a pass for log-probs and entropy (2NDV, nothing of size [N, V] written)
and a pass that also stores the gradient of the log-prob (2NDV, 2NV bytes written). "library" is the
other way to the same results (`piece_triton.library_piece`), "product" the bare matrix product in
bf16, which makes no statistics. Tiles "descriptors" are of the persistent kernel, the others of the
kernel by pointers. What wins goes into `tiles_triton.DESCRIPTOR_TILES` and `POINTER_TILES`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable

import torch
from rloo_kernels.lm_head.matrix_triton import matrix_piece
from rloo_kernels.lm_head.piece_triton import library_piece
from rloo_kernels.lm_head.tiles_triton import Tile, forced_tile
from rloo_kernels.lm_head.types import LMHead

from benchmarks.common import harness
from benchmarks.common.harness import Row
from benchmarks.loss.run import SHAPES, Shape

POINTERS = [
    Tile(128, 128, 64, 8, 4),
    Tile(128, 256, 64, 8, 3),
    Tile(128, 128, 64, 4, 4),
    Tile(64, 256, 64, 4, 4),
]
BY_DESCRIPTORS = {"descriptors": True, "specialize": True}
HOPPER = [
    Tile(128, 256, 64, 4, 4, **BY_DESCRIPTORS, halves=True),
    Tile(128, 256, 64, 4, 3, **BY_DESCRIPTORS),
    Tile(256, 128, 64, 4, 4, **BY_DESCRIPTORS, halves=True),
    Tile(128, 128, 64, 4, 6, **BY_DESCRIPTORS, halves=True),
    # not specialised: all warps multiply, and loads run ahead by software
    Tile(128, 256, 64, 8, 3, descriptors=True, flatten=True),
    Tile(128, 256, 64, 8, 4, descriptors=True, halves=True),
]
BLACKWELL = [
    Tile(128, 128, 64, 8, 4, **BY_DESCRIPTORS, flatten=True),
    Tile(128, 128, 64, 8, 6, **BY_DESCRIPTORS, flatten=True),
    Tile(128, 128, 64, 4, 4, **BY_DESCRIPTORS, flatten=True),
    Tile(128, 256, 64, 8, 3, **BY_DESCRIPTORS, flatten=True),
]
WORST_LOGP_ERROR = 1e-3  # against the library's fp32 logits


def candidates() -> list[Tile]:
    """The tiles to try on the current device, the most promising first."""
    major, _ = torch.cuda.get_device_capability()
    return {9: HOPPER, 10: BLACKWELL}.get(major, []) + POINTERS


def name(tile: Tile) -> str:
    size = f"{tile.rows}x{tile.columns}x{tile.depth} w{tile.num_warps} s{tile.num_stages}"
    flags = [f for f in ("descriptors", "specialize", "flatten", "halves") if getattr(tile, f)]
    return " ".join([size, *flags])


def run_shape(shape: Shape, tiles: list[Tile], piece_rows: int, runs: int) -> list[Row]:
    """Rows of one shape, timed on a piece of `piece_rows` rows."""
    device, dtype = torch.device("cuda"), torch.bfloat16
    hidden = torch.randn(piece_rows, shape.hidden, device=device, dtype=dtype)
    weight = torch.randn(shape.vocab, shape.hidden, device=device, dtype=dtype)
    weight *= shape.hidden**-0.5
    head = LMHead(weight, None, 1.0, None, 1.0)
    ids = torch.randint(shape.vocab, (piece_rows,), device=device)
    truth = library_piece(hidden, head, ids, True, False, None)[0].logps
    rows: list[Row] = []
    for store in (False, True):
        benchmark = "head, weights stored" if store else "head, log-probs"
        steps: dict[str, Callable[[], object]] = {
            "product": lambda: hidden @ weight.T,
            "library": lambda store=store: library_piece(hidden, head, ids, True, store, None),
        }
        group = {n: Row(benchmark, n, str(shape), "cuda", "bfloat16") for n in steps}
        for tile in tiles:
            row = group[name(tile)] = Row(benchmark, name(tile), str(shape), "cuda", "bfloat16")

            def step(tile: Tile = tile, store: bool = store) -> object:
                with forced_tile(tile):
                    return matrix_piece(hidden, head, ids, True, store)

            try:
                found = step()[0].logps  # pyright: ignore[reportIndexIssue]
                row.error_vs_reference = (found - truth).abs().max().item()
            except Exception as error:  # too much shared memory, say: the tile is out
                row.skipped = f"failed: {type(error).__name__}: {str(error).splitlines()[0][:120]}"
                continue
            if not row.error_vs_reference <= WORST_LOGP_ERROR:
                row.skipped = f"wrong: log-probs off by {row.error_vs_reference:.1e}"
                continue
            steps[row.provider] = step
        timed = harness.time_interleaved(steps, device, runs=runs, warmup=2)
        flops = 2 * piece_rows * shape.hidden * shape.vocab
        for provider, seconds in timed.items():
            row = group[provider]
            row.set_times(seconds)
            row.tokens = piece_rows
            assert row.seconds_median is not None
            row.note = f"{flops / row.seconds_median / 1e12:.0f} TFLOP/s"
        rows += group.values()
    return rows


def main(argv: list[str] | None = None) -> int:
    """0 if no tile that runs is wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tiles", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--shape", action="append", help="; ".join(SHAPES))
    parser.add_argument("--rows", type=int, default=2048, help="rows of the piece")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--json")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("tiles are timed on a GPU, and torch sees none.")
    env, rows = harness.environment(), []
    print(json.dumps(env))
    for text in args.shape or list(SHAPES):
        rows += run_shape(Shape.parse(text, args.rows), candidates(), args.rows, args.runs)
        if args.json:
            harness.write_json(args.json, env, rows)
    print(harness.format_table(rows, baseline="library"))
    return int(any((row.skipped or "").startswith("wrong") for row in rows))
