"""One tile of h W^T: its product, and what it leaves behind as sums and as E. For Triton kernels.

    x_v = (z_v - a) scale        E_v = 2^x_v, 0 for the token itself and beyond the vocabulary

Letters: a the anchor of a row (its token's logit, or its maximum), n rows, D hidden size, V
vocabulary. Per element of a tile: one fused multiply-add, one exp2, one and a half comparisons, two
selections, an addition, half a conversion to bf16; with an entropy a multiply-add more, with a
soft-cap those of tanh. `python -m tests.rloo_kernels.test_aot` prints what is compiled of it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..logprob.math_triton import cap


@triton.jit
def tile_of(number, tiles_n, tiles_v, group):
    """(row tile, column tile): the row tiles of a group run together over all column tiles.

    W is loaded once for all rows of a group, whose X stays in the second-level cache.
    """
    of_group = group * tiles_v
    first = (number // of_group) * group
    rows = tl.minimum(tiles_n - first, group)
    inside = number % of_group
    return first + inside % rows, inside // rows


@triton.jit
def product_tile(
    hidden, weight, row, in_n, column0, D, V, stride_h, stride_w,
    EVEN_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """h[row] W[column0 : column0 + BLOCK_V]^T in fp32, by pointers."""
    column = column0 + tl.arange(0, BLOCK_V)
    # beyond the edge any row will do: what it gives is not used
    safe_row = tl.where(in_n, row, 0).to(tl.int64)
    safe_column = tl.where(column < V, column, 0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    h_at = hidden + safe_row[:, None] * stride_h + d[None, :]
    w_at = weight + safe_column[None, :] * stride_w + d[:, None]
    product = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    for start in range(0, D, BLOCK_D):
        if EVEN_D:
            h, w = tl.load(h_at), tl.load(w_at)
        else:
            h = tl.load(h_at, mask=d[None, :] < D - start, other=0.0)
            w = tl.load(w_at, mask=d[:, None] < D - start, other=0.0)
        product = tl.dot(h, w, product)
        h_at += BLOCK_D
        w_at += BLOCK_D
    return product


@triton.jit
def logits_of(
    product, bias, column0, V, inner, softcap,
    HAS_BIAS: tl.constexpr, MODE: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """z of a tile of products, columns beyond the vocabulary included."""
    if HAS_BIAS:
        column = column0 + tl.arange(0, BLOCK_V)
        product += tl.load(bias + column, mask=column < V, other=0.0).to(tl.float32)[None, :]
    return cap(product, inner, softcap, MODE)


@triton.jit
def own_column(y, V):
    """The column of each row's token, -1 where it has none; int32 is compared at half the cost."""
    return tl.where((y >= 0) & (y < V), y, -1).to(tl.int32)


@triton.jit
def exponentials(
    product, bias, column0, V, base, own, scale, inner, softcap,
    HAS_BIAS: tl.constexpr, MODE: tl.constexpr, WANT_ENTROPY: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """(E times the soft-cap's derivative, sum_v E_v, sum_v E_v x_v or 0) of a tile of products.

    Nothing is clipped: an E that overflows makes the sum infinite, which is a flag.
    """
    z = logits_of(product, bias, column0, V, inner, softcap, HAS_BIAS, MODE, BLOCK_V)
    lane = tl.arange(0, BLOCK_V)
    dropped = (lane[None, :] == (own - column0)[:, None]) | (lane >= V - column0)[None, :]
    # 2^-1e4 is 0; selecting before the exp2 leaves fewer numbers alive than after it
    x = tl.where(dropped, -1e4, tl.fma(z, scale, (base * -scale)[:, None]))
    if HAS_BIAS and WANT_ENTROPY:  # a bias of -inf would give 0 times -inf below; nan stays nan
        x = tl.maximum(x, -1e4, propagate_nan=tl.PropagateNan.ALL)
    e = tl.exp2(x)
    total = tl.sum(e, 1)
    weighted = total
    if WANT_ENTROPY:
        weighted = tl.sum(e * x, 1)
    if MODE == 1:  # d softcap / d raw = 1 - tanh^2
        t = z * (1.0 / softcap)
        e *= 1.0 - t * t
    return e, total, weighted


@triton.jit
def store_sums(
    sums, weighted, row, in_n, pitch_v, tile_v, total, spread, WANT_ENTROPY: tl.constexpr
):  # fmt: skip
    """sums, weighted (n, pitch_v): what `exponentials` found for each row of a tile."""
    part = row.to(tl.int64) * pitch_v + tile_v
    tl.store(sums + part, total, mask=in_n)
    if WANT_ENTROPY:
        tl.store(weighted + part, spread, mask=in_n)
