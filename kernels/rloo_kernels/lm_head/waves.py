"""How many rows a piece should have: matrix products run in waves of tiles, a tile per processor.

A product with (a, b) results runs as tiles of 128 x 256 of them. With P processors it takes
ceil(tiles / P) waves, however empty the last one is: 2,341 rows of dX at D = 3584 are 266 tiles,
three waves of 132 processors of which 65 % are work; 2,304 rows are 252 tiles, two waves, 95 %. dX
decides: it has D / 256 tiles beside each other, where the logits and dW have V / 256. What whole
waves do not give, parts of the vocabulary do: dX as the sum of a few products, all in one launch.

Letters: N rows in all, n rows of a piece, D hidden size, V vocabulary. Times are in *steps*: a
processor's time for one tile and one unit of depth, 2 * 128 * 256 FLOPs. Pure Python.
"""

# pyright: strict

from __future__ import annotations

import functools
from typing import NamedTuple

TILE, TILE_WIDE = 128, 256  # of the libraries' large products on sm_90, either way round (assumed)
STEP_FLOPS = 2 * TILE * TILE_WIDE
# Dense bf16 FLOPs in the time of one byte: 700 TFLOP/s by 3.35 TB/s, an H100. Others: 155 (A100)
# to 215 (B200).
FLOPS_PER_BYTE = 209
# One read of W in the time of these rows' dX and dW: 2 D V bytes against 4 D V FLOPs a row. Rows
# with coefficient 0 are run apart, without dX and dW but with a product of their own, from here on.
LEAST_INACTIVE_ROWS = FLOPS_PER_BYTE // 2
# A library's tile takes so many steps beside its depth where it stores 2 bytes a number (fitted to
# cuBLAS in Triton's Gluon tutorial 07, fp16, 8192 x 8192: 588 TFLOP/s at K = 1024, 646 at 4096);
# one that stores 4, or loads and stores 4, as many times that (assumed).
TILE_STEPS = 139
# Rows of a piece up to which dW is added by `weight_triton.py`, from there on by the library's
# product with beta = 1, which loads and stores 4 bytes a number. The kernel only stores them, at
# 0.92 of the library's rate (assumed): n / 0.92 + 2 TILE_STEPS < n + 4 TILE_STEPS.
REDUCE_ADD_MOST_ROWS = 3200
PARTS = (1, 2, 3, 4, 6, 8)  # of the vocabulary, in which dX may be made


def num_tiles(rows: int, columns: int) -> int:
    """Tiles of a product with (rows, columns) results, whichever way round takes fewer."""
    return min(
        -(-rows // TILE) * -(-columns // TILE_WIDE), -(-rows // TILE_WIDE) * -(-columns // TILE)
    )


def num_waves(rows: int, columns: int, num_processors: int) -> int:
    return -(-num_tiles(rows, columns) // num_processors)


def steps_in_parts(rows: int, columns: int, depth: int, parts: int, num_processors: int) -> float:
    """Time of an fp32 product as the sum of `parts` products, each of its share of the depth."""
    waves = -(-num_tiles(rows, columns) * parts // num_processors)
    total = waves * (depth / parts + 2 * TILE_STEPS)
    if parts > 1:  # each part stored and loaded, and the sum stored
        summed = (8 * parts + 4) * rows * columns
        total += summed * FLOPS_PER_BYTE / (STEP_FLOPS * num_processors)
    return total


def best_parts(rows: int, columns: int, depth: int, num_processors: int) -> tuple[float, int]:
    """(the least time of such a product, in how many parts).

    Each part begins at a multiple of 8 (16 bytes); together they take at most a quarter of the
    left factor's bytes, which are those of a piece's logits.
    """
    whole_tiles = -(-rows // TILE) * TILE  # few sizes to compute
    return _best_parts(whole_tiles, columns, depth, num_processors)


@functools.lru_cache(maxsize=4096)
def _best_parts(rows: int, columns: int, depth: int, num_processors: int) -> tuple[float, int]:
    found = [s for s in PARTS if s == 1 or (depth % (8 * s) == 0 and 4 * s * columns <= depth / 2)]
    return min((steps_in_parts(rows, columns, depth, s, num_processors), s) for s in found)


class HeadShape(NamedTuple):
    """What the time of a piece depends on beside its rows."""

    hidden_size: int  # D
    vocab_size: int  # V
    num_processors: int
    needs_hidden: bool = True  # dX is made
    needs_weight: bool = True  # dW is made, and with several pieces summed in fp32

    def steps(self, n: int) -> float:
        """Time of one piece of n rows among several."""
        if n == 0:
            return 0.0
        depth, vocab, p = self.hidden_size, self.vocab_size, self.num_processors
        total = float(num_waves(n, vocab, p) * depth)
        if self.needs_hidden:
            total += best_parts(n, depth, vocab, p)[0]
        if self.needs_weight:
            total += num_waves(vocab, depth, p) * n
            # the sum is loaded and stored once for each piece
            total += 8 * vocab * depth * FLOPS_PER_BYTE / (STEP_FLOPS * p)
        return total

    def steps_of_all(self, num_rows: int, size: int) -> float:
        """Time of num_rows in pieces of `size` rows, the last one of those that remain."""
        full, rest = divmod(num_rows, size)
        return full * self.steps(size) + self.steps(rest)


@functools.lru_cache(maxsize=1024)
def rows_of_piece(num_rows: int, most: int, shape: HeadShape) -> int:
    """The rows of a piece, <= most, with the least time in all; the last piece has what remains.

    All rows where they fit into one piece, else a multiple of the tile (`most` where that is less
    than a tile).
    """
    if num_rows <= most:
        return max(num_rows, 1)
    sizes = range(TILE, most + 1, TILE)
    # of equals the largest: fewer launches
    return min(reversed(sizes), key=lambda n: shape.steps_of_all(num_rows, n), default=most)


class Pieces(NamedTuple):
    """How rows are cut: at most `most` to a piece, by waves of `shape` where that is given."""

    most: int
    shape: HeadShape | None = None

    def steps(self, n: int) -> float:
        """Time of a piece of n rows; without a shape every piece costs the same."""
        return 1.0 if self.shape is None else self.shape.steps(n)

    def cut(self, start: int, stop: int) -> list[slice]:
        """start:stop in pieces: by waves, or else of nearly equal length."""
        num_rows = stop - start
        if num_rows <= 0:
            return []
        if self.shape is None:
            size = -(-num_rows // -(-num_rows // self.most))
        else:
            size = rows_of_piece(num_rows, self.most, self.shape)
        return [slice(at, min(at + size, stop)) for at in range(start, stop, size)]
