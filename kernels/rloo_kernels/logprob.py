"""Logits -> log-probability of one token per row, and the entropy of the row.

    x_v      = z_v / tau - max_u z_u / tau                S = sum_v exp(x_v)
    log p(y) = x_y - log S
    H        = log S - sum_v exp(x_v) x_v / S

Letters: N rows, V vocabulary. All statistics are fp32 (fp64 for fp64 logits), whatever the logits'
dtype. The maximum is taken off before anything is summed or subtracted, so that an offset of the
logits costs no digits.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Rows are worked through in pieces whose fp32 copy stays within this many bytes.
CHUNK_BYTES = 64 << 20


def chunk_rows(num_rows: int, vocab_size: int, chunk_bytes: int = CHUNK_BYTES) -> int:
    """Rows per piece, so that a piece of fp32 logits takes at most `chunk_bytes` (at least one
    row)."""
    return max(1, min(num_rows, chunk_bytes // (4 * max(vocab_size, 1))))


def check_token_ids(token_ids: Tensor, num_rows: int, vocab_size: int) -> None:
    """Raise ValueError unless `token_ids` is an integer tensor of shape (N,) with values in [0,
    V)."""
    if token_ids.shape != (num_rows,) or token_ids.is_floating_point():
        raise ValueError(
            f"token_ids must be an integer tensor of shape ({num_rows},), one id per row, "
            f"got {token_ids.dtype} of shape {tuple(token_ids.shape)}."
        )
    if num_rows and token_ids.device.type == "cpu":  # on a GPU this would wait for the device
        low, high = int(token_ids.min()), int(token_ids.max())
        if low < 0 or high >= vocab_size:
            raise ValueError(f"token_ids must lie in [0, {vocab_size}), got {low} to {high}.")


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def row_statistics(
    z: Tensor, token_ids: Tensor, want_entropy: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(log-prob of the token, max, S, entropy or None) of rows of scaled logits z (n, V)."""
    top = z.amax(-1)
    x = z - top[:, None]
    e = torch.exp(x)
    total = e.sum(-1)
    log_total = total.log()
    logps = x.gather(-1, token_ids[:, None]).squeeze(-1) - log_total
    entropy = None
    if want_entropy:
        # 0 * -inf is nan: a token of probability zero adds nothing to the entropy
        weighted = x.clamp_(min=torch.finfo(x.dtype).min).mul_(e)
        entropy = log_total - weighted.sum(-1) / total
    return logps, top, total, entropy


class _SelectiveLogSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, token_ids, keep, temperature, want_entropy, inplace_backward):
        num_rows, vocab_size = logits.shape
        dtype = accumulation_dtype(logits.dtype)
        logps = logits.new_empty(num_rows, dtype=dtype)
        top, total = torch.empty_like(logps), torch.empty_like(logps)
        entropy = torch.empty_like(logps) if want_entropy else None
        size = chunk_rows(num_rows, vocab_size)
        for start in range(0, num_rows, size):
            rows = slice(start, start + size)
            z = logits[rows].to(dtype) / temperature
            logps[rows], top[rows], total[rows], h = row_statistics(
                z, token_ids[rows], want_entropy
            )
            if entropy is not None and h is not None:
                entropy[rows] = h
        if keep is not None:
            logps.masked_fill_(~keep, 0.0)
            entropy = None if entropy is None else entropy.masked_fill_(~keep, 0.0)
        ctx.save_for_backward(logits, token_ids, keep, top, total)
        ctx.temperature, ctx.inplace = temperature, inplace_backward
        if entropy is not None:
            ctx.mark_non_differentiable(entropy)
        return logps, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        logits, token_ids, keep, top, total = ctx.saved_tensors
        grad = grads[0] / ctx.temperature
        out = logits.detach() if ctx.inplace else torch.empty_like(logits)
        size = chunk_rows(*logits.shape)
        for start in range(0, logits.shape[0], size):
            rows = slice(start, start + size)
            g = grad[rows, None]
            # d logp / d z_v = [v = y] - exp(x_v) / S
            x = logits[rows].to(top.dtype) / ctx.temperature - top[rows, None]
            d = x.exp_().mul_(-g / total[rows, None])
            d.scatter_add_(-1, token_ids[rows, None], g)
            if keep is not None:  # a masked row may hold nan, which 0 does not cancel
                d.masked_fill_(~keep[rows, None], 0.0)
            out[rows] = d.to(out.dtype)
        return out, None, None, None, None, None


def selective_log_softmax(
    logits: Tensor,
    token_ids: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    return_entropy: bool = False,
    inplace_backward: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """log softmax(logits / temperature) at one token per row, without a second [N, V] tensor in
    forward.

    Shapes: logits (..., V) of any float dtype; token_ids and mask (...); returns log-probs (...)
    in fp32, with `return_entropy` also the entropies (...) in nats, which carry no gradient.
    Rows where `mask` is False give 0 and get no gradient; their token ids are not looked at.
    `inplace_backward` overwrites the logits with their gradient: a second backward is then wrong.

    Raises ValueError for a temperature that is not positive and for token ids outside [0, V).
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}.")
    shape, vocab_size = logits.shape[:-1], logits.shape[-1]
    flat, ids = logits.reshape(-1, vocab_size), token_ids.reshape(-1)
    keep = None
    if mask is not None:
        keep = mask.reshape(-1).bool()
        ids = torch.where(keep, ids, 0)
    check_token_ids(ids, flat.shape[0], vocab_size)
    logps, entropy = _SelectiveLogSoftmax.apply(
        flat, ids.long(), keep, temperature, return_entropy, inplace_backward
    )
    if return_entropy:
        return logps.view(shape), entropy.view(shape)
    return logps.view(shape)
