"""The matrix kernel: a product h W^T whose tiles become exponentials before they leave the chip.

Every tile of h W^T turns into exponentials while it is still an fp32 accumulator, and leaves a
maximum, a sum of exponentials and a weighted sum per row. Without a gradient nothing of size [n, V]
is written. With one it stores E = exp(z - a) in bf16, with the token's own logit a = z_y as the
anchor in place of the maximum, which is not known yet: for a sampled token log Z - z_y = -log p(y)
is moderate. Rows where some z - a > 64 log 2 are flagged on the device and done again with their
maximum as the anchor; the host does not wait for the flags.

    S = 1 + sum_{v != y} E_v     log p(y) = -log S     M_v = -E_v / S,  M_y = (S - 1) / S

Letters: n rows of a piece, D hidden size, V vocabulary. FLOPs: 2nDV, and 2nD for z_y = h . W[y].
Bytes in bf16: X once per column tile and W once per row tile loaded, 2 each; 3 floats per row and
column tile stored and loaded; with the gradient 2 n V stored (V rounded up to 16).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..logprob.math_triton import LN2, cap, cap_mode, exponent_factors, log1p
from ..logprob.types import RowStatistics
from .tiles_triton import tile_for
from .types import LMHead, LogitGradient

LIMIT = tl.constexpr(64.0)  # log2 of the largest exponential stored


@triton.jit
def _label_kernel(
    hidden, weight, bias, ids, z_y, D, V, stride_h, stride_w, inner, softcap,
    HAS_BIAS: tl.constexpr, MODE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """z_y[row] = the logit of the row's own token."""
    row = tl.program_id(0).to(tl.int64)
    y = tl.load(ids + row)
    inside = (y >= 0) & (y < V)
    y = tl.where(inside, y, 0)  # no read outside W; the result is nan
    lane = tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + lane
        h = tl.load(hidden + row * stride_h + d, mask=d < D, other=0.0).to(tl.float32)
        w = tl.load(weight + y * stride_w + d, mask=d < D, other=0.0).to(tl.float32)
        total += h * w
    raw = tl.sum(total, 0)
    if HAS_BIAS:
        raw += tl.load(bias + y).to(tl.float32)
    raw = tl.where(inside, raw, float("nan"))
    tl.store(z_y + row, cap(raw, inner, softcap, MODE))


@triton.jit
def _head_kernel(
    hidden, weight, bias, ids, anchor, flagged, matrix, tops, sums, weighted,
    n, D, V, pitch, stride_h, stride_w, scale, inner, softcap,
    HAS_BIAS: tl.constexpr, MODE: tl.constexpr, WANT_ENTROPY: tl.constexpr,
    STORE: tl.constexpr, ONLY_FLAGGED: tl.constexpr, EVEN_D: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One tile of h W^T, left as sums of exponentials per row, and with STORE as -E itself.

    tops, sums, weighted: (tiles of V, n), relative to the tile's maximum, or with STORE to anchor.
    """
    # rows go fastest: the row tiles of one slice of W run together, so that W is read once
    tiles_n = tl.cdiv(n, BLOCK_N)
    tile_v = tl.program_id(0) // tiles_n
    row = (tl.program_id(0) % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tile_v * BLOCK_V + tl.arange(0, BLOCK_V)
    in_n, in_v = row < n, column < V
    if ONLY_FLAGGED:
        if tl.max(tl.load(flagged + row, mask=in_n, other=0), 0) == 0:
            return
    # beyond the edge any row will do: what it gives is not stored
    safe_row = tl.where(in_n, row, 0).to(tl.int64)
    safe_column = tl.where(in_v, column, 0).to(tl.int64)
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
    if HAS_BIAS:
        product += tl.load(bias + safe_column).to(tl.float32)[None, :]
    z = cap(product, inner, softcap, MODE)
    z = tl.where(in_v[None, :], z, float("-inf"))
    top = tl.max(z, 1)
    part = tile_v * n + row  # n V / BLOCK_V of them: int32 will do
    tl.store(tops + part, top, mask=in_n)
    if STORE:
        base = tl.load(anchor + row, mask=in_n, other=0.0)
        x = tl.minimum((z - base[:, None]) * scale, LIMIT)
    else:
        base = tl.where(top == float("-inf"), 0.0, top)
        x = (z - base[:, None]) * scale
    own = column[None, :] == tl.load(ids + row, mask=in_n, other=-1)[:, None]
    e = tl.where(own, 0.0, tl.exp2(x))
    tl.store(sums + part, tl.sum(e, 1), mask=in_n)
    if WANT_ENTROPY:
        # where e = 0, x may be -inf, and 0 times it is nan
        tl.store(weighted + part, tl.sum(e * tl.maximum(x, -1e4), 1), mask=in_n)
    if STORE:
        if MODE == 1:  # d softcap / d raw = 1 - tanh^2
            t = tl.maximum(z, -softcap) / softcap  # -inf beyond the edge, where e = 0
            e *= 1.0 - t * t
        # up to the pitch, a multiple of 16, so that stores are wide; e = 0 beyond V
        at = matrix + row.to(tl.int64)[:, None] * pitch + column[None, :]
        in_pitch = (column < pitch)[None, :]
        tl.store(at, (-e).to(matrix.dtype.element_ty), mask=in_n[:, None] & in_pitch)


@triton.jit
def _combine_kernel(
    z_y, ids, anchor, matrix, tops, sums, weighted,
    logps, top_out, log_total, rest, entropy, row_scale, flagged, new_anchor,
    n, V, pitch, tiles_v, scale, softcap, slope,
    MODE: tl.constexpr, WANT_ENTROPY: tl.constexpr, STORE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Tiles -> statistics of each row; with STORE also M_y, the row scale, who is to be redone."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    in_n = row < n
    label = tl.load(z_y + row, mask=in_n, other=0.0)
    if STORE:
        m = tl.load(anchor + row, mask=in_n, other=0.0)
    else:
        m = label
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    others = tl.zeros([BLOCK], tl.float32)
    spread = tl.zeros([BLOCK], tl.float32)
    for tile in range(0, tiles_v):
        part = tile * n + row
        tile_top = tl.load(tops + part, mask=in_n, other=float("-inf"))
        s = tl.load(sums + part, mask=in_n, other=0.0)
        top = tl.maximum(top, tile_top)
        w = tl.zeros([BLOCK], tl.float32)
        if WANT_ENTROPY:
            w = tl.load(weighted + part, mask=in_n, other=0.0)
        if STORE:
            others += s
            spread += w
        else:
            new_m = tl.maximum(m, tile_top)
            # a label of -inf is the first m, and -inf - -inf is nan
            old_shift = tl.where(m == float("-inf"), 0.0, (m - new_m) * scale)
            shift = tl.where(tile_top == float("-inf"), 0.0, (tile_top - new_m) * scale)
            old_factor, factor = tl.exp2(old_shift), tl.exp2(shift)
            spread = (spread + others * old_shift) * old_factor + (w + s * shift) * factor
            others = others * old_factor + s * factor
            m = new_m
    x_y = (label - m) * scale
    own = tl.exp2(x_y)
    total = others + own
    log_s = tl.where(x_y == 0, log1p(others), tl.log(total))
    tl.store(logps + row, x_y * LN2 - log_s, mask=in_n)
    tl.store(top_out + row, m, mask=in_n)
    tl.store(log_total + row, log_s, mask=in_n)
    tl.store(rest + row, others / total, mask=in_n)
    if WANT_ENTROPY:
        spread += tl.where(own > 0, own * x_y, 0.0)
        tl.store(entropy + row, log_s - LN2 * spread / total, mask=in_n)
    if STORE:
        redo = (top - m) * scale > LIMIT
        tl.store(flagged + row, redo.to(tl.int32), mask=in_n)
        tl.store(new_anchor + row, tl.where(redo, top, m), mask=in_n)
        tl.store(row_scale + row, slope / total, mask=in_n)
        mine = others
        if MODE == 1:
            t = label / softcap
            mine *= 1.0 - t * t
        y = tl.load(ids + row, mask=in_n, other=-1)
        valid = in_n & (y >= 0) & (y < V)
        at = matrix + row.to(tl.int64) * pitch + y
        tl.store(at, mine.to(matrix.dtype.element_ty), mask=valid)


def stored_width(vocab_size: int) -> int:
    """Columns of the matrix that the matrix kernel stores, so that rows are aligned to 32 bytes."""
    return -(-vocab_size // 16) * 16


def label_logits(hidden: Tensor, head: LMHead, token_ids: Tensor) -> Tensor:
    """z_y (n,) of hidden (n, D), up to `cap`; nan where an id is not in [0, V)."""
    n, depth = hidden.shape
    z_y = torch.empty(n, dtype=torch.float32, device=hidden.device)
    if n == 0:
        return z_y
    _, inner, softcap = exponent_factors(head.temperature, head.softcap, head.logit_scale)
    bias = None if head.bias is None else head.bias.contiguous()
    _label_kernel[(n,)](
        hidden, head.weight, bias, token_ids.contiguous(), z_y, depth, head.weight.shape[0],
        hidden.stride(0), head.weight.stride(0), inner, softcap,
        HAS_BIAS=bias is not None, MODE=cap_mode(head.softcap, head.logit_scale),
        BLOCK_D=min(1024, triton.next_power_of_2(depth)), num_warps=4,
    )  # fmt: skip
    return z_y


def matrix_piece(
    hidden: Tensor,
    head: LMHead,
    token_ids: Tensor,
    want_entropy: bool,
    store: bool,
    label_z: Tensor | None = None,
) -> tuple[RowStatistics, LogitGradient | None]:
    """`forward_piece_torch` without `upstream`; with `store` the gradient M too, scaled by row.

    To be called on the device of `hidden`; hidden (n, D) in bf16, or in fp16 without `store`.
    `label_z` (n,): the tokens' logits as `label_logits` makes them, where these are known; then an
    id may be -1, a token that is none of these columns and counts as one more (`vocab_shards.py`).
    """
    n, depth = hidden.shape
    vocab_size = head.weight.shape[0]

    def floats(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=hidden.device)

    # what is handed back
    columns = [floats(n) for _ in range(4)]
    statistics = RowStatistics(*columns, floats(n if want_entropy else 0))
    pitch = stored_width(vocab_size)
    matrix = hidden.new_empty((n, pitch) if store else (0, 0))
    row_scale = floats(n if store else 0)
    gradient = LogitGradient(matrix[:, :vocab_size], row_scale) if store else None
    if n == 0:
        return statistics, gradient
    hidden, token_ids = hidden.contiguous(), token_ids.contiguous()
    bias = None if head.bias is None else head.bias.contiguous()
    scale, inner, softcap = exponent_factors(head.temperature, head.softcap, head.logit_scale)
    mode, has_bias = cap_mode(head.softcap, head.logit_scale), head.bias is not None
    strides = hidden.stride(0), head.weight.stride(0)
    # what only the kernels pass on to each other
    tile = tile_for(depth, head.softcap)
    tiles_n, tiles_v = triton.cdiv(n, tile.rows), triton.cdiv(vocab_size, tile.columns)
    z_y = label_logits(hidden, head, token_ids) if label_z is None else label_z.contiguous()
    anchor = floats(n if store else 0)
    flagged = torch.empty(n if store else 0, dtype=torch.int32, device=hidden.device)
    tops, sums = floats(tiles_v, n), floats(tiles_v, n)
    weighted = floats(tiles_v, n) if want_entropy else None

    def tiles(base: Tensor, only_flagged: bool) -> None:
        _head_kernel[(tiles_n * tiles_v,)](
            hidden, head.weight, bias, token_ids, base, flagged, matrix,
            tops, sums, weighted, n, depth, vocab_size, pitch, *strides, scale, inner, softcap,
            HAS_BIAS=has_bias, MODE=mode, WANT_ENTROPY=want_entropy,
            STORE=store, ONLY_FLAGGED=only_flagged, EVEN_D=depth % tile.depth == 0,
            BLOCK_N=tile.rows, BLOCK_V=tile.columns, BLOCK_D=tile.depth,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip

    def combine(base: Tensor) -> None:
        _combine_kernel[(triton.cdiv(n, 128),)](
            z_y, token_ids, base, matrix, tops, sums, weighted,
            *statistics, row_scale, flagged, anchor,
            n, vocab_size, pitch, tiles_v, scale, softcap, head.slope,
            MODE=mode, WANT_ENTROPY=want_entropy, STORE=store, BLOCK=128, num_warps=4,
        )  # fmt: skip

    tiles(z_y, only_flagged=False)
    combine(z_y)
    if store:  # rows whose token is all but impossible, with their maximum as the anchor
        tiles(anchor, only_flagged=True)
        combine(anchor)
    return statistics, gradient
