"""The matrix kernel: a product h W^T whose tiles become exponentials before they leave the chip.

Every tile of h W^T turns into exponentials while it is still an fp32 accumulator, and leaves a sum
of exponentials and a weighted sum per row. Without a gradient nothing of size [n, V] is written.
With one it stores E = exp(z - a) in bf16. The anchor a is the token's own logit z_y in place of the
maximum, which is not known yet: for a sampled token log Z - z_y = -log p(y) is moderate. Rows for
which it is not are flagged on the device and done again with their maximum as the anchor
(`combine_triton.py`); the host does not wait for the flags.

    S = 1 + sum_{v != y} E_v     log p(y) = -log S     M_v = -E_v / S,  M_y = (S - 1) / S

Letters: n rows of a piece, D hidden size, V vocabulary. FLOPs: 2nDV, and 2nD for z_y = h . W[y]; 4
more per flagged row, D and V. Bytes in bf16: X once per column tile and W once per row tile loaded,
2 each; 1 float (2 with an entropy) per row and column tile stored and loaded; with the gradient
2 n V stored (V rounded up to 16).
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import copy_context

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..logprob.math_triton import cap, cap_mode, exponent_factors
from ..logprob.types import RowStatistics
from .combine_triton import combine_kernel, redo_kernel
from .exponentials_triton import exponentials, own_column, product_tile, store_sums, tile_of
from .persistent_triton import persistent_kernel
from .tiles_triton import (
    num_processors,
    redo_tile_for,
    row_tiles_at_once,
    tile_for,
    why_not_by_descriptors,
)
from .types import LMHead, LogitGradient

COMBINED_ROWS = 4  # of one program of combine_kernel


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
    hidden, weight, bias, ids, anchor, matrix, sums, weighted,
    n, D, V, pitch, pitch_v, group, stride_h, stride_w, scale, inner, softcap,
    HAS_BIAS: tl.constexpr, MODE: tl.constexpr, WANT_ENTROPY: tl.constexpr, STORE: tl.constexpr,
    EVEN_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One tile of h W^T, left as sums of exponentials per row, and with STORE as E itself."""
    tile_n, tile_v = tile_of(tl.program_id(0), tl.cdiv(n, BLOCK_N), tl.cdiv(V, BLOCK_V), group)
    row = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = row < n
    column0 = tile_v * BLOCK_V
    product = product_tile(
        hidden, weight, row, in_n, column0, D, V, stride_h, stride_w,
        EVEN_D, BLOCK_N, BLOCK_V, BLOCK_D,
    )  # fmt: skip
    base = tl.load(anchor + row, mask=in_n, other=0.0)
    own = own_column(tl.load(ids + row, mask=in_n, other=-1), V)
    e, total, spread = exponentials(
        product, bias, column0, V, base, own, scale, inner, softcap,
        HAS_BIAS, MODE, WANT_ENTROPY, BLOCK_V,
    )  # fmt: skip
    store_sums(sums, weighted, row, in_n, pitch_v, tile_v, total, spread, WANT_ENTROPY)
    if STORE:
        # up to the pitch, a multiple of 16, so that stores are wide; e = 0 beyond V
        column = column0 + tl.arange(0, BLOCK_V)
        at = matrix + row.to(tl.int64)[:, None] * pitch + column[None, :]
        mask = in_n[:, None] & (column < pitch)[None, :]
        tl.store(at, e.to(matrix.dtype.element_ty), mask=mask)


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


def with_workspace(device: torch.device, launch: Callable[[], object]) -> None:
    """Launches a kernel that makes descriptors, for which Triton asks an allocator for memory.

    The allocator is set in a copy of the context, so that the caller's stays as it is. The memory
    is taken on the current stream, as every tensor is that a kernel uses and nobody keeps.
    """

    def call() -> None:
        triton.set_allocator(
            lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=device)
        )
        launch()

    copy_context().run(call)


def matrix_piece(
    hidden: Tensor,
    head: LMHead,
    token_ids: Tensor,
    want_entropy: bool,
    store: bool,
    label_z: Tensor | None = None,
) -> tuple[RowStatistics, LogitGradient | None]:
    """`forward_piece_torch` without `upstream`; with `store` the gradient M too, scaled by row.

    `top` of the statistics is the anchor: z_y, or the maximum of a row that was done again.
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
    tile = tile_for(depth, head.softcap, why_not_by_descriptors(hidden, head.weight))
    redo_tile = redo_tile_for(depth)
    tiles_n, tiles_v = triton.cdiv(n, tile.rows), triton.cdiv(vocab_size, tile.columns)
    redo_tiles_v = triton.cdiv(vocab_size, redo_tile.columns)
    pitch_v = triton.cdiv(max(tiles_v, redo_tiles_v), 16) * 16  # so that a row's sums are aligned
    z_y = label_logits(hidden, head, token_ids) if label_z is None else label_z.contiguous()
    anchor = floats(n)
    sums = floats(n, pitch_v)
    weighted = floats(n, pitch_v) if want_entropy else None
    redo_rows = torch.empty(n, dtype=torch.int32, device=hidden.device)
    redo_count = torch.zeros((), dtype=torch.int32, device=hidden.device)

    flags = {"MODE": mode, "WANT_ENTROPY": want_entropy, "STORE": store}
    kernel, grid = _head_kernel, tiles_n * tiles_v
    if tile.descriptors:
        kernel, grid = persistent_kernel, min(grid, num_processors())
    with_workspace(
        hidden.device,
        lambda: kernel[(grid,)](
            hidden, head.weight, bias, token_ids, z_y, matrix, sums, weighted,
            n, depth, vocab_size, pitch, pitch_v, row_tiles_at_once(tiles_n, tile, hidden),
            *strides, scale, inner, softcap, HAS_BIAS=has_bias, **flags, **tile.options(depth),
        ),
    )  # fmt: skip

    def combine(num_tiles: int, again: bool) -> None:
        blocks = triton.cdiv(n, COMBINED_ROWS)
        combine_kernel[(min(blocks, num_processors()) if again else blocks,)](
            z_y, token_ids, anchor, matrix, sums, weighted, redo_rows, redo_count,
            *statistics, row_scale, n, vocab_size, pitch, num_tiles, pitch_v,
            scale, softcap, head.slope, int(again), **flags,
            ROWS=COMBINED_ROWS, BLOCK=min(1024, triton.next_power_of_2(pitch_v)), num_warps=4,
        )  # fmt: skip

    combine(tiles_v, again=False)
    # rows whose token is all but impossible, with their maximum as the anchor
    redo_tiles = triton.cdiv(n, redo_tile.rows) * redo_tiles_v
    for find_top in (1, 0):
        redo_kernel[(min(redo_tiles, num_processors()),)](
            hidden, head.weight, bias, token_ids, anchor, matrix, sums, weighted,
            redo_rows, redo_count, depth, vocab_size, pitch, pitch_v, *strides,
            scale, inner, softcap, find_top, HAS_BIAS=has_bias, **flags,
            **redo_tile.options(depth),
        )  # fmt: skip
    combine(redo_tiles_v, again=True)
    return statistics, gradient
