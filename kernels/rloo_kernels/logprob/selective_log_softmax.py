"""Logits in, the log-prob of one token per row and the row's entropy out.

`rows_torch.py` has the mathematics and the letters; `rows_triton.py` runs on a GPU. No second
[N, V] tensor is made in forward. Bytes, b per logit: forward N V b read, for log-prob and entropy
together; backward N V b read and N V b written, in place on request. On a GPU, rows that `mask`
leaves out are not read.
"""

# pyright: strict, reportUnknownMemberType=false

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dispatch import use_triton
from ..forward_mode import refuse_tangents
from .checks import check_temperature, check_token_ids, check_token_range
from .rows_torch import backward_torch_, forward_torch
from .types import RowStatistics, accumulation_dtype


@torch.library.custom_op("rloo_kernels::logprob", mutates_args=())
def _logprob(
    logits: Tensor,
    token_ids: Tensor,
    keep: Tensor | None,
    temperature: float,
    want_entropy: bool,
    inplace_backward: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`RowStatistics` of logits (..., V)."""
    check_token_range(token_ids, logits.shape[-1])
    if use_triton(logits):
        from .rows_triton import forward_triton

        return forward_triton(logits, token_ids, keep, temperature, want_entropy)
    return forward_torch(logits, token_ids, keep, temperature, want_entropy)


@_logprob.register_fake
def _logprob_fake(
    logits: Tensor,
    token_ids: Tensor,
    keep: Tensor | None,
    temperature: float,
    want_entropy: bool,
    inplace_backward: bool,
) -> tuple[Tensor, ...]:
    rows = logits.new_empty(token_ids.shape, dtype=accumulation_dtype(logits.dtype))
    entropy = torch.empty_like(rows) if want_entropy else rows.new_empty(0)
    return (*(torch.empty_like(rows) for _ in range(4)), entropy)


def _backward_(
    out: Tensor,
    logits: Tensor,
    token_ids: Tensor,
    keep: Tensor | None,
    statistics: RowStatistics,
    grad: Tensor | None,
    grad_entropy: Tensor | None,
    temperature: float,
) -> None:
    backward = backward_torch_
    if use_triton(logits):
        from .rows_triton import backward_triton_

        backward = backward_triton_
    backward(out, logits, token_ids, keep, statistics, grad, grad_entropy, temperature)


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
    """dL/dlogits, in new memory."""
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    s = RowStatistics(logps, top, log_total, rest, entropy)
    _backward_(out, logits, token_ids, keep, s, grad, grad_entropy, temperature)
    return out


@_logprob_backward.register_fake
def _logprob_backward_fake(logits: Tensor, *args: Any) -> Tensor:
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
    """dL/dlogits, written over the logits."""
    s = RowStatistics(logps, top, log_total, rest, entropy)
    _backward_(logits, logits, token_ids, keep, s, grad, grad_entropy, temperature)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, token_ids, keep, ctx.temperature, _, ctx.inplace = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:4])
    ctx.save_for_backward(logits, token_ids, keep, *output)


def _differentiate(
    ctx: Any,
    grad: Tensor | None,
    _top: None,
    _log_total: None,
    _rest: None,
    grad_entropy: Tensor | None,
) -> tuple[Tensor | None, ...]:
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
    differentiable. Rows where `mask` is False give 0 and get no gradient, whatever their logits
    and token ids hold. `inplace_backward` overwrites the logits with their gradient: a second
    backward is then refused. Neither forward-mode nor second derivatives are offered.

    Raises ValueError for shapes that do not fit, a temperature that is not positive, expanded
    logits that are to be overwritten, and token ids outside [0, V); on a GPU, where checking the
    ids would wait for the device, such a row's log-prob is nan.
    """
    check_temperature(temperature)
    refuse_tangents("selective_log_softmax", logits)
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
