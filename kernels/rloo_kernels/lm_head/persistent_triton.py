"""The matrix kernel by tensor descriptors: one program per processor walks over the tiles.

X, W and E move by TMA, as blocks that the hardware addresses: no thread computes an address, and
what lies beyond an edge loads as 0 and is not stored. With SPECIALIZE the compiler gives the loads
to a warp group of their own (sm_90: one that loads, two that multiply, each half of a tile's rows;
sm_100: loads, tcgen05, epilogue), which runs ahead into the next tile while this one's epilogue is
computed. The compiler does not say when it did not specialise: tests/rloo_kernels/test_aot.py
looks. On sm_90 it needs 4 warps, descriptors that are made in the kernel, and a loop without a
branch that has a value.

HALVES: the epilogue takes the left half of a tile, then the right one: half as many numbers are
alive at a time, and half as much shared memory waits for a store, which makes room for a stage.

Letters and bytes: see `matrix_triton.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .exponentials_triton import exponentials, own_column, store_sums, tile_of


@triton.jit
def persistent_kernel(
    hidden, weight, bias, ids, anchor, matrix, sums, weighted,
    n, D, V, pitch, pitch_v, group, stride_h, stride_w, scale, inner, softcap,
    HAS_BIAS: tl.constexpr, MODE: tl.constexpr, WANT_ENTROPY: tl.constexpr, STORE: tl.constexpr,
    FLATTEN: tl.constexpr, SPECIALIZE: tl.constexpr, HALVES: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Tiles of h W^T, left as sums of exponentials per row, and with STORE as E itself.

    Addresses and distances of rows of hidden, weight and matrix: multiples of 16 bytes.
    """
    h_blocks = tl.make_tensor_descriptor(hidden, [n, D], [stride_h, 1], [BLOCK_N, BLOCK_D])
    w_blocks = tl.make_tensor_descriptor(weight, [V, D], [stride_w, 1], [BLOCK_V, BLOCK_D])
    if STORE:
        width: tl.constexpr = BLOCK_V // 2 if HALVES else BLOCK_V
        e_blocks = tl.make_tensor_descriptor(matrix, [n, pitch], [pitch, 1], [BLOCK_N, width])
    tiles_n, tiles_v = tl.cdiv(n, BLOCK_N), tl.cdiv(V, BLOCK_V)
    for tile in tl.range(
        tl.program_id(0), tiles_n * tiles_v, tl.num_programs(0),
        flatten=FLATTEN, warp_specialize=SPECIALIZE,
    ):  # fmt: skip
        tile_n, tile_v = tile_of(tile, tiles_n, tiles_v, group)
        row0, column0 = tile_n * BLOCK_N, tile_v * BLOCK_V
        product = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
        for start in range(0, D, BLOCK_D):
            h = h_blocks.load([row0, start])
            w = w_blocks.load([column0, start])
            product = tl.dot(h, w.T, product)
        row = row0 + tl.arange(0, BLOCK_N)
        known = tl.minimum(row, n - 1)  # no mask, which could not go from one warp group to another
        base = tl.load(anchor + known)
        own = own_column(tl.load(ids + known), V)
        if HALVES:
            left, right = tl.split(
                tl.permute(tl.reshape(product, [BLOCK_N, 2, BLOCK_V // 2]), [0, 2, 1])
            )
            e, total, spread = exponentials(
                left, bias, column0, V, base, own, scale, inner, softcap,
                HAS_BIAS, MODE, WANT_ENTROPY, BLOCK_V // 2,
            )  # fmt: skip
            if STORE:
                e_blocks.store([row0, column0], e.to(matrix.dtype.element_ty))
            middle = column0 + BLOCK_V // 2
            e, more, further = exponentials(
                right, bias, middle, V, base, own, scale, inner, softcap,
                HAS_BIAS, MODE, WANT_ENTROPY, BLOCK_V // 2,
            )  # fmt: skip
            if STORE:
                e_blocks.store([row0, middle], e.to(matrix.dtype.element_ty))
            total += more
            spread += further
        else:
            e, total, spread = exponentials(
                product, bias, column0, V, base, own, scale, inner, softcap,
                HAS_BIAS, MODE, WANT_ENTROPY, BLOCK_V,
            )  # fmt: skip
            if STORE:
                e_blocks.store([row0, column0], e.to(matrix.dtype.element_ty))
        store_sums(
            sums, weighted, row, row < n, pitch_v, tile_v, total, spread, WANT_ENTROPY
        )  # fmt: skip
