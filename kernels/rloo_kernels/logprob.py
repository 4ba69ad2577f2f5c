"""Logits -> log-probability of one token per row, and the entropy of the row.

    x_v      = (z_v - max_u z_u) / tau                    S = sum_v exp(x_v)
    log p(y) = x_y - log S                                H = log S - sum_v exp(x_v) x_v / S

    d log p(y) / d z_v = ([v = y] - p_v) / tau            d H / d z_v = - p_v (log p_v + H) / tau

Letters: N rows, V vocabulary. All statistics are fp32 (fp64 for fp64 logits), whatever the logits'
dtype. The maximum is taken off before anything else is done, so that an offset of the logits and a
small temperature cost no digits; the token's own term stays out of the sum, so that 1 - p_y and
log p_y keep their digits as p_y -> 1.

Bytes, b per logit: forward N V b read, for log-prob and entropy together; backward N V b read and
N V b written (in place on request). Rows that `mask` leaves out are not read.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .dispatch import use_triton

# The torch implementation works on blocks of rows whose fp32 copy stays in a core's cache.
BLOCK_BYTES = 1 << 20
# exp(LOWEST) is 0 in every dtype. Times 0 it is 0, which -inf is not.
LOWEST = -1e4


class RowStatistics(NamedTuple):
    """What a row's log-prob is made of; each (N,) in the accumulation dtype."""

    logps: Tensor  # log p(y)
    top: Tensor  # max_v z_v
    log_total: Tensor  # log S
    rest: Tensor  # 1 - p(y)
    entropy: Tensor  # H in nats; empty if not asked for


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_token_ids(token_ids: Tensor, shape: torch.Size) -> None:
    """Raise ValueError unless `token_ids` is an integer tensor of `shape`."""
    if token_ids.shape != shape or token_ids.is_floating_point() or token_ids.dtype == torch.bool:
        raise ValueError(
            f"token_ids must be an integer tensor of shape {tuple(shape)}, one id per row, "
            f"got {token_ids.dtype} of shape {tuple(token_ids.shape)}."
        )


def check_token_range(token_ids: Tensor, vocab_size: int) -> None:
    """Raise ValueError unless all ids lie in [0, V). Only on a CPU: elsewhere it would wait."""
    if token_ids.numel() and token_ids.device.type == "cpu":
        low, high = int(token_ids.min()), int(token_ids.max())
        if low < 0 or high >= vocab_size:
            raise ValueError(f"token_ids must lie in [0, {vocab_size}), got {low} to {high}.")


def check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}.")


def scaled_(x: Tensor, temperature: float) -> Tensor:
    return x if temperature == 1.0 else x.div_(temperature)


def row_blocks(num_rows: int, vocab_size: int) -> Iterator[slice]:
    """Slices of rows, each a `BLOCK_BYTES` of fp32 at most (at least one row)."""
    size = max(1, BLOCK_BYTES // (4 * max(vocab_size, 1)))
    for start in range(0, num_rows, size):
        yield slice(start, start + size)


def block_statistics(
    z: Tensor, token_ids: Tensor, temperature: float, want_entropy: bool, overwrite: bool = True
) -> tuple[RowStatistics, Tensor]:
    """Statistics of a block of logits z (n, V), and exp(x) with the token's own entry set to 0.

    With `overwrite`, x is left in z where entropy is wanted, else exp(x).
    """
    ids = token_ids[:, None]
    top = z.amax(-1)
    x = z.sub_(top[:, None]) if overwrite else z - top[:, None]
    scaled_(x, temperature)
    x_y = x.gather(-1, ids).squeeze(-1)
    e = x.exp() if want_entropy else x.exp_()
    e.scatter_(-1, ids, 0.0)
    rest, own = e.sum(-1), x_y.exp()
    total = rest + own
    # where the token is the maximum, S = 1 + rest
    log_total = torch.where(x_y == 0, rest.log1p(), total.log())
    entropy = z.new_empty(0)
    if want_entropy:
        # a token of probability zero adds nothing to the entropy
        weighted = torch.linalg.vecdot(e, x.clamp_(min=LOWEST)) + own * x_y.clamp(min=LOWEST)
        entropy = log_total - weighted / total
    return RowStatistics(x_y - log_total, top, log_total, rest / total, entropy), e


def block_gradient_(
    e: Tensor,
    x: Tensor | None,
    token_ids: Tensor,
    s: RowStatistics,
    grad: Tensor | None,
    grad_entropy: Tensor | None,
) -> Tensor:
    """dL/dz of a block from exp(x) with the token's entry 0, written over it.

    `grad` and `grad_entropy` (n,) are dL/d(log-prob) and dL/d(entropy), None for none; `x` is only
    needed for the latter.
    """
    total = s.log_total.exp()
    own = torch.zeros_like(total) if grad is None else grad * s.rest
    if grad_entropy is None:
        assert grad is not None
        e.mul_((-grad / total)[:, None])
    else:
        assert x is not None
        # p_v (log p_v + H) -> 0 as p_v -> 0, where log p_v = -inf
        weight = (x - (s.log_total - s.entropy)[:, None]).clamp_(min=LOWEST)
        weight.mul_(-grad_entropy[:, None])
        if grad is not None:
            weight.sub_(grad[:, None])
        e.mul_(weight).div_(total[:, None])
        p_y = s.logps.exp()
        own -= grad_entropy * p_y * (s.logps.clamp(min=LOWEST) + s.entropy)
    return e.scatter_(-1, token_ids[:, None], own[:, None])


def _matrices(logits: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(number of the first row, rows (n, V)): views of logits (..., V), whatever its strides."""
    if logits.numel() == 0:
        return
    if logits.ndim <= 2:
        yield 0, logits.reshape(-1, logits.shape[-1])
        return
    size = logits[0].numel() // max(logits.shape[-1], 1)
    for i, part in enumerate(logits):
        for start, rows in _matrices(part):
            yield i * size + start, rows


def forward_torch(
    logits: Tensor, token_ids: Tensor, keep: Tensor | None, temperature: float, want_entropy: bool
) -> RowStatistics:
    """The specification of the forward: logits (..., V), token_ids and keep (N,)."""
    num_rows, dtype = token_ids.numel(), accumulation_dtype(logits.dtype)
    columns = [logits.new_zeros(num_rows, dtype=dtype) for _ in range(4)]
    columns.append(logits.new_zeros(num_rows if want_entropy else 0, dtype=dtype))
    for first, part in _matrices(logits):
        for rows in row_blocks(*part.shape):
            here = slice(first + rows.start, min(first + rows.stop, first + len(part)))
            block = part[rows].to(dtype)
            found, _ = block_statistics(
                block, token_ids[here], temperature, want_entropy, logits.dtype != dtype
            )
            for column, values in zip(columns, found, strict=True):
                if column.numel():
                    column[here] = values
    if keep is not None:
        columns = [c.masked_fill_(~keep, 0.0) if c.numel() else c for c in columns]
    return RowStatistics(*columns)


def backward_torch_(
    out: Tensor,
    logits: Tensor,
    token_ids: Tensor,
    keep: Tensor | None,
    statistics: RowStatistics,
    grad: Tensor | None,
    grad_entropy: Tensor | None,
    temperature: float,
) -> None:
    """The specification of the backward: dL/dlogits into `out`, which may be `logits`."""
    dtype = statistics.logps.dtype
    grad, grad_entropy = (g if g is None else g / temperature for g in (grad, grad_entropy))
    for (first, part), (_, target) in zip(_matrices(logits), _matrices(out), strict=True):
        for rows in row_blocks(*part.shape):
            here = slice(first + rows.start, min(first + rows.stop, first + len(part)))
            s = RowStatistics(*(c[here] if c.numel() else c for c in statistics))
            x = scaled_(part[rows].to(dtype) - s.top[:, None], temperature)
            g, gh = (None if v is None else v[here] for v in (grad, grad_entropy))
            d = block_gradient_(x.exp(), x, token_ids[here], s, g, gh)
            if keep is not None:  # a masked row may hold nan, which 0 does not cancel
                d.masked_fill_(~keep[here, None], 0.0)
            target[rows] = d.to(out.dtype)


@torch.library.custom_op("rloo_kernels::logprob", mutates_args=())
def _logprob(
    logits: Tensor,
    token_ids: Tensor,
    keep: Tensor | None,
    temperature: float,
    want_entropy: bool,
    inplace_backward: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    check_token_range(token_ids, logits.shape[-1])
    if use_triton(logits):
        from .logprob_triton import forward_triton

        return forward_triton(logits, token_ids, keep, temperature, want_entropy)
    return forward_torch(logits, token_ids, keep, temperature, want_entropy)


@_logprob.register_fake
def _(logits, token_ids, keep, temperature, want_entropy, inplace_backward):
    rows = logits.new_empty(token_ids.shape, dtype=accumulation_dtype(logits.dtype))
    entropy = torch.empty_like(rows) if want_entropy else rows.new_empty(0)
    return (*(torch.empty_like(rows) for _ in range(4)), entropy)


def _backward_(out: Tensor, logits: Tensor, *args: Any) -> None:
    if use_triton(logits):
        from .logprob_triton import backward_triton_

        backward_triton_(out, logits, *args)
    else:
        backward_torch_(out, logits, *args)


@torch.library.custom_op("rloo_kernels::logprob_backward", mutates_args=())
def _logprob_backward(
    logits: Tensor,
    token_ids: Tensor,
    keep: Tensor | None,
    logps: Tensor,
    top: Tensor,
    log_total: Tensor,
    rest: Tensor,
    entropy: Tensor,
    grad: Tensor | None,
    grad_entropy: Tensor | None,
    temperature: float,
) -> Tensor:
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    s = RowStatistics(logps, top, log_total, rest, entropy)
    _backward_(out, logits, token_ids, keep, s, grad, grad_entropy, temperature)
    return out


@_logprob_backward.register_fake
def _(logits, *args):
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


@torch.library.custom_op("rloo_kernels::logprob_backward_", mutates_args={"logits"})
def _logprob_backward_(
    logits: Tensor,
    token_ids: Tensor,
    keep: Tensor | None,
    logps: Tensor,
    top: Tensor,
    log_total: Tensor,
    rest: Tensor,
    entropy: Tensor,
    grad: Tensor | None,
    grad_entropy: Tensor | None,
    temperature: float,
) -> None:
    s = RowStatistics(logps, top, log_total, rest, entropy)
    _backward_(logits, logits, token_ids, keep, s, grad, grad_entropy, temperature)


def _setup_context(ctx, inputs, output):
    logits, token_ids, keep, ctx.temperature, _, ctx.inplace = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:4])
    ctx.save_for_backward(logits, token_ids, keep, *output)


def _differentiate(ctx, grad, _top, _log_total, _rest, grad_entropy):
    logits, token_ids, keep, *statistics = ctx.saved_tensors
    if not statistics[-1].numel():
        grad_entropy = None
    if grad is None and grad_entropy is None:
        return (None,) * 6
    args = (token_ids, keep, *statistics, grad, grad_entropy, ctx.temperature)
    if ctx.inplace:
        out = logits.detach()
        _logprob_backward_(out, *args)
    else:
        out = _logprob_backward(logits, *args)
    return out, None, None, None, None, None


_logprob.register_autograd(_differentiate, setup_context=_setup_context)


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

    Shapes: logits (..., V) of any float dtype and any strides; token_ids and mask (...); returns
    log-probs (...) in fp32, with `return_entropy` also the entropies (...) in nats; both are
    differentiable. Rows where `mask` is False give 0 and get no gradient; neither they nor their
    token ids are looked at. `inplace_backward` overwrites the logits with their gradient: a second
    backward is then refused.

    Raises ValueError for a temperature that is not positive, for expanded logits that are to be
    overwritten, and for token ids outside [0, V); on a
    GPU, where looking at the ids would wait for the device, such a row's log-prob is nan.
    """
    check_temperature(temperature)
    shape = logits.shape[:-1]
    check_token_ids(token_ids, shape)
    overlap = any(s == 0 and n > 1 for s, n in zip(logits.stride(), logits.shape, strict=True))
    if inplace_backward and overlap:
        raise ValueError(
            "inplace_backward=True would write the gradients of several rows to one place: the "
            f"logits are expanded (strides {logits.stride()} of shape {tuple(logits.shape)})."
        )
    keep, ids = None, token_ids.reshape(-1).long()
    if mask is not None:
        if mask.shape != shape:
            raise ValueError(f"mask must be {tuple(shape)}, got {tuple(mask.shape)}.")
        keep = mask.reshape(-1).bool()
        ids = torch.where(keep, ids, 0)
    logps, *_, entropy = _logprob(logits, ids, keep, temperature, return_entropy, inplace_backward)
    return (logps.view(shape), entropy.view(shape)) if return_entropy else logps.view(shape)
