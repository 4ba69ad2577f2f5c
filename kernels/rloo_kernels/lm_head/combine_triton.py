"""Tiles -> statistics of each row, and which rows are to be done again.

    S = 1 + sum_{v != y} E_v     log p(y) = -log S     M_v = -E_v / S,  M_y = (S - 1) / S

A row whose sum is not below 2^64 is flagged: some z - z_y was large, or an E overflowed. Such rows
go to a list on the device, and `redo_kernel` and a second `combine_kernel` serve the list by a
fixed number of programs; where it is empty they load its length and end. The host never looks.

Bytes: the sums of each row and tile once, a row's by wide loads; 4 or 5 floats per row stored.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..logprob.math_triton import LN2, log1p
from .exponentials_triton import exponentials, logits_of, own_column, product_tile, store_sums

LIMIT = tl.constexpr(18446744073709551616.0)  # 2^64: a sum below it holds no E that overflowed


@triton.jit
def _sum_tiles(
    parts, row, inside, tiles_v, pitch_v, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Sum over the tiles of each row."""
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    at = parts + row.to(tl.int64)[:, None] * pitch_v
    up_to = tl.cdiv(tiles_v, 16) * 16  # as the pitch a multiple of 16, so that loads are wide
    for start in range(0, tiles_v, BLOCK):
        tile = start + tl.arange(0, BLOCK)[None, :]
        part = tl.load(at + tile, mask=inside[:, None] & (tile < up_to), other=0.0)
        total += tl.where(tile < tiles_v, part, 0.0)
    return tl.sum(total, 1)


@triton.jit(do_not_specialize=["tiles_v", "again"])
def combine_kernel(
    z_y, ids, anchor, matrix, sums, weighted, redo_rows, redo_count,
    logps, top_out, log_total, rest, entropy, row_scale,
    n, V, pitch, tiles_v, pitch_v, scale, softcap, slope, again,
    MODE: tl.constexpr, WANT_ENTROPY: tl.constexpr, STORE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """All rows, relative to z_y; or with `again` those of the list, relative to their maximum.

    redo_count: 0 before the first of the two. With STORE also M_y and the row scale.
    """
    count = n
    if again != 0:
        count = tl.load(redo_count)
    for start in range(tl.program_id(0) * ROWS, count, tl.num_programs(0) * ROWS):
        row = start + tl.arange(0, ROWS)
        inside = row < count
        if again != 0:
            row = tl.load(redo_rows + row, mask=inside, other=0)
        label = tl.load(z_y + row, mask=inside, other=0.0)
        m = label
        if again != 0:
            m = tl.load(anchor + row, mask=inside, other=0.0)
        others = _sum_tiles(sums, row, inside, tiles_v, pitch_v, ROWS, BLOCK)
        # x of the tiles is z scale - rounded(m scale): take the rounding off
        rounding = tl.fma(m, scale, m * -scale)
        back = tl.exp2(-rounding)
        x_y = tl.where(label == m, 0.0, (label - m) * scale)
        own = tl.exp2(x_y)
        total = others * back + own
        log_s = tl.where(x_y == 0, log1p(others * back), tl.log(total))
        tl.store(logps + row, x_y * LN2 - log_s, mask=inside)
        tl.store(top_out + row, m, mask=inside)
        tl.store(log_total + row, log_s, mask=inside)
        tl.store(rest + row, others * back / total, mask=inside)
        if WANT_ENTROPY:
            spread = _sum_tiles(weighted, row, inside, tiles_v, pitch_v, ROWS, BLOCK)
            spread = (spread - rounding * others) * back
            spread += tl.where(own > 0, own * x_y, 0.0)
            tl.store(entropy + row, log_s - LN2 * spread / total, mask=inside)
        if STORE:
            tl.store(row_scale + row, -slope * back / total, mask=inside)
            mine = -others
            if MODE == 1:
                t = label / softcap
                mine *= 1.0 - t * t
            y = tl.load(ids + row, mask=inside, other=-1)
            at = matrix + row.to(tl.int64) * pitch + y
            tl.store(at, mine.to(matrix.dtype.element_ty), mask=inside & (y >= 0) & (y < V))
        if again == 0:
            # a label that is nan is nan whatever is done
            flagged = (inside & (label == label) & ~(others < LIMIT)).to(tl.int32)
            num_flagged = tl.sum(flagged, 0)
            if num_flagged > 0:
                first = tl.atomic_add(redo_count, num_flagged)
                place = first + tl.cumsum(flagged, 0) - flagged
                tl.store(redo_rows + place, row, mask=flagged > 0)
                tl.store(anchor + row, tl.full([ROWS], float("-inf"), tl.float32),
                         mask=flagged > 0)  # fmt: skip


@triton.jit(do_not_specialize=["find_top"])
def redo_kernel(
    hidden, weight, bias, ids, anchor, matrix, sums, weighted, redo_rows, redo_count,
    D, V, pitch, pitch_v, stride_h, stride_w, scale, inner, softcap, find_top,
    HAS_BIAS: tl.constexpr, MODE: tl.constexpr, WANT_ENTROPY: tl.constexpr, STORE: tl.constexpr,
    EVEN_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The listed rows again: with find_top their maximum into `anchor`, else relative to it.

    anchor: -inf in the listed rows before their maximum is found. Sums and E take the place of
    what the rows had.
    """
    count = tl.load(redo_count)
    tiles_n, tiles_v = tl.cdiv(count, BLOCK_N), tl.cdiv(V, BLOCK_V)
    for tile in range(tl.program_id(0), tiles_n * tiles_v, tl.num_programs(0)):
        place = (tile % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = place < count
        row = tl.load(redo_rows + place, mask=inside, other=0)
        column0 = (tile // tiles_n) * BLOCK_V
        product = product_tile(
            hidden, weight, row, inside, column0, D, V, stride_h, stride_w,
            EVEN_D, BLOCK_N, BLOCK_V, BLOCK_D,
        )  # fmt: skip
        column = column0 + tl.arange(0, BLOCK_V)
        if find_top != 0:
            z = logits_of(product, bias, column0, V, inner, softcap, HAS_BIAS, MODE, BLOCK_V)
            top = tl.max(tl.where((column < V)[None, :], z, float("-inf")), 1)
            tl.atomic_max(anchor + row, top, mask=inside)
        else:
            base = tl.load(anchor + row, mask=inside, other=0.0)
            own = own_column(tl.load(ids + row, mask=inside, other=-1), V)
            e, total, spread = exponentials(
                product, bias, column0, V, base, own, scale, inner, softcap,
                HAS_BIAS, MODE, WANT_ENTROPY, BLOCK_V,
            )  # fmt: skip
            tile_v = tile // tiles_n
            store_sums(
                sums, weighted, row, inside, pitch_v, tile_v, total, spread, WANT_ENTROPY
            )  # fmt: skip
            if STORE:
                at = matrix + row.to(tl.int64)[:, None] * pitch + column[None, :]
                mask = inside[:, None] & (column < pitch)[None, :]
                tl.store(at, e.to(matrix.dtype.element_ty), mask=mask)
