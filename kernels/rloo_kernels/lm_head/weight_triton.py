"""The weight gradient added to a running sum in memory, without loading that sum: dW += M^T (c X).

A library's product with beta = 1 loads each tile of the sum before it stores it. Here a tile of the
product leaves as reductions that the memory system does by itself (TMA reduce-add), behind the next
tile's products. Each number of dW gets one addend a piece, and pieces follow one another, so that
two runs give the same bits. Triton 3.9 cannot specialise warps where the left factor is transposed,
so that the tile's way into shared memory is not hidden.

Letters: n rows of a piece, D hidden size, V vocabulary. FLOPs: 2nDV. Bytes: M once per column tile
of dW and c X once per row tile loaded, 2 each; V D numbers of 4 added.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..dispatch import on_device_of
from .tiles_triton import kind_of_device, num_processors
from .waves import REDUCE_ADD_MOST_ROWS


class WeightTile(NamedTuple):
    """Rows (of V) and columns (of D) of dW, made `depth` rows of the piece at a time."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


TILES = {  # by `kind_of_device`; the others have no TMA, or no room for these tiles
    "interpreter": WeightTile(32, 64, 32, 4, 1),
    "hopper": WeightTile(128, 256, 64, 8, 3),  # 213 KB of shared memory
    "blackwell": WeightTile(128, 256, 64, 8, 2),  # triton 3.6 keeps more of the sum there
}
GROUP = 8  # row tiles that share the loads of X


@triton.jit
def _weight_kernel(
    matrix, scaled, total, n, tiles_v, tiles_d, num_programs,
    GROUP: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """total += matrix^T scaled, all three descriptors; each program takes every so many tiles."""
    # flattened, the next tile's first loads run while this one leaves
    for tile in tl.range(tl.program_id(0), tiles_v * tiles_d, num_programs, flatten=True):
        # GROUP row tiles by all column tiles at a time: both factors stay in the L2 cache
        per_group = GROUP * tiles_d
        first = tile // per_group * GROUP
        height = tl.minimum(tiles_v - first, GROUP)
        v = (first + tile % per_group % height) * BLOCK_V
        d = tile % per_group // height * BLOCK_D
        product = tl.zeros([BLOCK_V, BLOCK_D], tl.float32)
        for start in range(0, n, BLOCK_N):  # beyond the edges descriptors load zeros
            product = tl.dot(matrix.load([start, v]).T, scaled.load([start, d]), product)
        # in two halves: a whole one does not fit beside the factors' buffers
        halves = tl.permute(tl.reshape(product, [BLOCK_V, 2, BLOCK_D // 2]), [0, 2, 1])
        left, right = tl.split(halves)
        total.atomic_add([v, d], left)
        total.atomic_add([v, d + BLOCK_D // 2], right)


def adds_in_memory(total: Tensor, matrix: Tensor, scaled: Tensor) -> bool:
    """Whether `add_in_memory` can run here and is expected to be faster than the library's product.

    Descriptors want rows that begin at multiples of 16 bytes.
    """
    aligned = all(
        x.stride(1) == 1 and x.stride(0) * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0
        for x in (total, matrix, scaled)
    )
    if not aligned or len(scaled) > REDUCE_ADD_MOST_ROWS:
        return False
    with on_device_of(total):
        return kind_of_device() in TILES


def add_in_memory(total: Tensor, matrix: Tensor, scaled: Tensor) -> None:
    """total (V, D) fp32 += matrix^T scaled; matrix (n, V) and scaled (n, D) in bf16."""
    (n, depth), vocab_size = scaled.shape, matrix.shape[1]
    with on_device_of(total):
        tile = TILES[kind_of_device()]
        tiles_v, tiles_d = triton.cdiv(vocab_size, tile.rows), triton.cdiv(depth, tile.columns)
        num_programs = min(tiles_v * tiles_d, num_processors())
        _weight_kernel[(num_programs,)](
            TensorDescriptor.from_tensor(matrix, [tile.depth, tile.rows]),
            TensorDescriptor.from_tensor(scaled, [tile.depth, tile.columns]),
            TensorDescriptor.from_tensor(total, [tile.rows, tile.columns // 2]),
            n, tiles_v, tiles_d, num_programs,
            GROUP=GROUP, BLOCK_V=tile.rows, BLOCK_D=tile.columns, BLOCK_N=tile.depth,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
