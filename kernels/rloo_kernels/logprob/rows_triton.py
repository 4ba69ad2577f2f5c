"""`rows_torch.py` in Triton: one program per row, the row read once forward and once backward.

All exponentials are powers of two: exp(x) = 2^((z - max z) scale) with scale = log2(e) / tau; log S
and H are stored in nats. `lm_head/piece_triton.py` runs the same kernels on raw products of the
lm_head: z = c tanh(raw logit_scale / c), or without a soft-cap z = +-raw, by the sign of
logit_scale, is then what the maximum is taken of.

Bytes, b per logit: forward N V b loaded; backward N V b loaded, N V b stored. Masked rows: nothing
loaded; zeros stored in backward. Nothing else of size [N, V] is made.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import on_device_of
from .math_triton import LN2, LOG2E, cap, cap_mode, exponent_factors, log1p, tanh
from .types import RowStatistics


@triton.jit
def _row(pointer, row, inner_rows, stride_outer, stride_inner):
    """Where row number `row` of a (..., T, V) tensor starts; int64: N V exceeds 2**31."""
    outer, inner = row // inner_rows, row % inner_rows
    return pointer + outer.to(tl.int64) * stride_outer + inner.to(tl.int64) * stride_inner


@triton.jit
def _forward_kernel(
    logits,
    ids,
    label,
    keep,
    logps,
    top,
    log_total,
    rest,
    entropy,
    inner_rows,
    stride_outer,
    stride_inner,
    V,
    scale,
    inner,
    softcap,
    HAS_LABEL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    WANT_ENTROPY: tl.constexpr,
    MODE: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One row's statistics, in one pass over its logits: an online softmax."""
    row = tl.program_id(0)
    if HAS_MASK:
        if tl.load(keep + row) == 0:
            tl.store(logps + row, 0.0)
            tl.store(top + row, 0.0)
            tl.store(log_total + row, 0.0)
            tl.store(rest + row, 0.0)
            if WANT_ENTROPY:
                tl.store(entropy + row, 0.0)
            return
    base = _row(logits, row, inner_rows, stride_outer, stride_inner)
    y = tl.load(ids + row)
    # per lane: sum of 2^(z - m) and of 2^(z - m) (z - m), the token's own entry left out
    if HAS_LABEL:
        z_y = tl.load(label + row)
        m = z_y
    else:
        inside = (y >= 0) & (y < V)
        z_y = tl.load(base + y, mask=inside, other=float("nan")).to(tl.float32)
        z_y = cap(z_y, inner, softcap, MODE)
        m = float("-inf")
    total = tl.zeros([BLOCK], tl.float32)
    weighted = tl.zeros([BLOCK], tl.float32)
    lane = tl.arange(0, BLOCK)
    for start in tl.range(0, V, BLOCK, num_stages=STAGES):
        column = start + lane
        z = tl.load(base + column, mask=column < V, other=float("-inf")).to(tl.float32)
        if MODE != 0:  # what lies beyond the row must not come back as -c, or as inf
            z = tl.where(column < V, cap(z, inner, softcap, MODE), float("-inf"))
        new_m = tl.maximum(m, tl.max(z, 0))
        shift = tl.where(m == float("-inf"), 0.0, (m - new_m) * scale)
        # -inf - -inf is nan: a block of impossible tokens adds nothing
        d = tl.where(z == float("-inf"), float("-inf"), (z - new_m) * scale)
        e = tl.where(column == y, 0.0, tl.exp2(d))
        factor = tl.exp2(shift)
        if WANT_ENTROPY:
            term = tl.where(e > 0, e * d, 0.0)
            weighted = (weighted + total * shift) * factor + term
        total = total * factor + e
        m = new_m
    x_y = (z_y - m) * scale
    own = tl.exp2(x_y)
    others = tl.sum(total, 0)
    s = others + own
    log_s = tl.where(x_y == 0, log1p(others), tl.log(s))
    tl.store(logps + row, x_y * LN2 - log_s)
    tl.store(top + row, m)
    tl.store(log_total + row, log_s)
    tl.store(rest + row, others / s)
    if WANT_ENTROPY:
        w = tl.sum(weighted, 0) + tl.where(own > 0, own * x_y, 0.0)
        tl.store(entropy + row, log_s - LN2 * w / s)


@triton.jit
def _backward_kernel(
    out,
    logits,
    ids,
    keep,
    logps,
    top,
    log_total,
    rest,
    entropy,
    grad,
    grad_entropy,
    inner_rows,
    stride_outer,
    stride_inner,
    out_outer,
    out_inner,
    V,
    scale,
    inner,
    softcap,
    out_scale,
    HAS_MASK: tl.constexpr,
    HAS_GRAD: tl.constexpr,
    HAS_ENTROPY_GRAD: tl.constexpr,
    MODE: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dL/dz of one row, each block of logits read and then written; `out` may be `logits`."""
    row = tl.program_id(0)
    target = _row(out, row, inner_rows, out_outer, out_inner)
    lane = tl.arange(0, BLOCK)
    if HAS_MASK:
        if tl.load(keep + row) == 0:
            for start in range(0, V, BLOCK):
                column = start + lane
                tl.store(target + column, tl.zeros([BLOCK], tl.float32), mask=column < V)
            return
    base = _row(logits, row, inner_rows, stride_outer, stride_inner)
    y = tl.load(ids + row)
    m = tl.load(top + row)
    log_s = tl.load(log_total + row)
    log_s2 = log_s * LOG2E
    own, g, gh, h = 0.0, 0.0, 0.0, 0.0
    if HAS_GRAD:
        g = tl.load(grad + row) * out_scale
        own = g * tl.load(rest + row)
    if HAS_ENTROPY_GRAD:
        gh = tl.load(grad_entropy + row) * out_scale
        h = tl.load(entropy + row)
        logp = tl.load(logps + row)
        p_y = tl.exp2(logp * LOG2E)
        own -= gh * tl.where(p_y > 0, p_y * (logp + h), 0.0)
    for start in tl.range(0, V, BLOCK, num_stages=STAGES):
        column = start + lane
        raw = tl.load(base + column, mask=column < V, other=0.0).to(tl.float32)
        x = (cap(raw, inner, softcap, MODE) - m) * scale
        p = tl.exp2(x - log_s2)
        weight = g
        if HAS_ENTROPY_GRAD:
            log_p = tl.where(p > 0, x * LN2 - log_s, 0.0)
            weight = g + gh * (log_p + h)
        d = tl.where(column == y, own, -p * weight)
        if MODE == 1:  # d softcap(r) / dr = 1 - tanh^2
            t = tanh(raw * inner)
            d *= 1.0 - t * t
        tl.store(target + column, d, mask=column < V)


STAGES = 3  # loads in flight ahead of the arithmetic


def _layout(x: Tensor) -> tuple[Tensor, int, int, int]:
    """(x, T, outer stride, inner stride) of x (..., V), copied if a row has no unit stride."""
    if x.stride(-1) != 1 or x.ndim > 3:
        x = x.reshape(-1, x.shape[-1])
        x = x if x.stride(-1) == 1 else x.contiguous()
    if x.ndim == 3:
        return x, x.shape[1], x.stride(0), x.stride(1)
    return x, max(x.numel() // max(x.shape[-1], 1), 1), 0, x.stride(0) if x.ndim == 2 else 0


def _block(vocab_size: int) -> tuple[int, int]:
    """(BLOCK, num_warps): 16 elements per thread keep a row in flight without a spill."""
    block = min(4096, max(128, triton.next_power_of_2(vocab_size)))
    return block, max(1, min(8, block // 512))


def forward_triton(
    logits: Tensor,
    token_ids: Tensor,
    keep: Tensor | None,
    temperature: float,
    want_entropy: bool,
    *,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    label_logits: Tensor | None = None,
) -> RowStatistics:
    """`forward_torch`; the logits may be raw products of an lm_head with a soft-cap and scale.

    `label_logits` (N,), up to `cap`: the tokens' logits where not every token is a column of these
    logits; then an id may be -1, and its token counts as one more column.
    """
    num_rows, vocab_size = token_ids.numel(), logits.shape[-1]
    columns = [torch.empty(num_rows, dtype=torch.float32, device=logits.device) for _ in range(4)]
    entropy = logits.new_empty(num_rows if want_entropy else 0, dtype=torch.float32)
    if num_rows == 0:
        return RowStatistics(*columns, entropy)
    logits, inner_rows, stride_outer, stride_inner = _layout(logits)
    token_ids = token_ids.contiguous()
    keep = None if keep is None else keep.contiguous()
    block, num_warps = _block(vocab_size)
    with on_device_of(logits):
        _forward_kernel[(num_rows,)](
            logits,
            token_ids,
            None if label_logits is None else label_logits.contiguous(),
            keep,
            *columns,
            entropy,
            inner_rows,
            stride_outer,
            stride_inner,
            vocab_size,
            *exponent_factors(temperature, softcap, logit_scale),
            HAS_LABEL=label_logits is not None,
            HAS_MASK=keep is not None,
            WANT_ENTROPY=want_entropy,
            MODE=cap_mode(softcap, logit_scale),
            BLOCK=block,
            STAGES=STAGES,
            num_warps=num_warps,
        )
    return RowStatistics(*columns, entropy)


def backward_triton_(
    out: Tensor,
    logits: Tensor,
    token_ids: Tensor,
    keep: Tensor | None,
    statistics: RowStatistics,
    grad: Tensor | None,
    grad_entropy: Tensor | None,
    temperature: float,
    *,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> None:
    """`backward_torch_`: dL/d(raw logits) into `out` (..., V), which may be `logits`."""
    num_rows, vocab_size = token_ids.numel(), logits.shape[-1]
    if num_rows == 0:
        return
    token_ids = token_ids.contiguous()
    keep = None if keep is None else keep.contiguous()
    view, inner_rows, stride_outer, stride_inner = _layout(logits)
    target, out_rows, out_outer, out_inner = _layout(out)
    if out_rows != inner_rows or target.data_ptr() != out.data_ptr():
        view, inner_rows, stride_outer, stride_inner = _layout(logits.reshape(-1, vocab_size))
        target = torch.empty(num_rows, vocab_size, dtype=out.dtype, device=out.device)
        _, _, out_outer, out_inner = _layout(target)
    block, num_warps = _block(vocab_size)
    with on_device_of(logits):
        _backward_kernel[(num_rows,)](
            target,
            view,
            token_ids,
            keep,
            *statistics,
            None if grad is None else grad.contiguous(),
            None if grad_entropy is None else grad_entropy.contiguous(),
            inner_rows,
            stride_outer,
            stride_inner,
            out_outer,
            out_inner,
            vocab_size,
            *exponent_factors(temperature, softcap, logit_scale),
            logit_scale / temperature,
            HAS_MASK=keep is not None,
            HAS_GRAD=grad is not None,
            HAS_ENTROPY_GRAD=grad_entropy is not None,
            MODE=cap_mode(softcap, logit_scale),
            BLOCK=block,
            STAGES=STAGES,
            num_warps=num_warps,
        )
    if target.data_ptr() != out.data_ptr():
        out.copy_(target.view(out.shape))
