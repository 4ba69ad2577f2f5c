"""Hidden states x lm_head -> log-probability of one token per row and the row's entropy, never [N,
V].

    z = softcap(logit_scale * (h W^T + bias)) / tau          softcap(x) = c tanh(x / c)
    log p(y) = z_y - log sum_v exp(z_v)

Letters: N rows, D hidden size, V vocabulary. The rows are worked through in pieces; what lives at
one time is one piece of logits (`CHUNK_BYTES`), not [N, V]. Matrix products run in the inputs'
dtype (autocast does not reach into the op), statistics and the sum of the weight gradient in fp32.

FLOPs: forward 2NDV; backward 4NDV, plus 2NDV to make the logits again when they did not fit one
piece.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .logprob import accumulation_dtype, check_token_ids, chunk_rows, row_statistics


class HeadTransform(NamedTuple):
    """What the model does to h W^T before the softmax."""

    temperature: float
    softcap: float | None
    logit_scale: float

    def __call__(self, logits: Tensor) -> Tensor:
        z = logits * self.logit_scale if self.logit_scale != 1.0 else logits
        if self.softcap is not None:
            z = self.softcap * torch.tanh(z / self.softcap)
        return z / self.temperature if self.temperature != 1.0 else z

    def backward_(self, grad_z: Tensor, z: Tensor) -> Tensor:
        """dL/d(h W^T) from dL/dz and z, written into grad_z."""
        scale = self.logit_scale / self.temperature
        if self.softcap is not None:
            # d softcap(x) / dx = 1 - tanh(x / c)^2, and tanh(x / c) = z tau / c
            tanh = z * (self.temperature / self.softcap)
            grad_z.mul_(1.0 - tanh * tanh)
        return grad_z.mul_(scale) if scale != 1.0 else grad_z


def _logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, transform: HeadTransform
) -> Tensor:
    out = torch.nn.functional.linear(hidden, weight, bias)
    return transform(out.to(accumulation_dtype(out.dtype)))


def _add_product_(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a b, with the product in the dtype of `out`, not rounded to that of a and b first."""
    if a.dtype == out.dtype:
        out.addmm_(a, b)
    elif a.is_cuda:
        out += torch.mm(a, b, out_dtype=out.dtype)
    else:
        out.addmm_(a.to(out.dtype), b.to(out.dtype))


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, token_ids, transform, want_entropy, size):
        num_rows = hidden.shape[0]
        logps = hidden.new_empty(num_rows, dtype=accumulation_dtype(hidden.dtype))
        top, total = torch.empty_like(logps), torch.empty_like(logps)
        entropy = torch.empty_like(logps) if want_entropy else None
        z = None
        for start in range(0, num_rows, size):
            rows = slice(start, start + size)
            z = _logits(hidden[rows], weight, bias, transform)
            logps[rows], top[rows], total[rows], h = row_statistics(
                z, token_ids[rows], want_entropy
            )
            if entropy is not None and h is not None:
                entropy[rows] = h
        one_piece = num_rows <= size and any(ctx.needs_input_grad[:3])
        z = z if one_piece else None
        ctx.save_for_backward(hidden, weight, bias, token_ids, top, total, z)
        ctx.transform, ctx.size = transform, size
        if entropy is not None:
            ctx.mark_non_differentiable(entropy)
        return logps, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        with torch.autocast(grads[0].device.type, enabled=False):
            found = _gradients(ctx, grads[0])
        inputs = ctx.saved_tensors[:3]
        found = [None if g is None else g.to(x.dtype) for g, x in zip(found, inputs, strict=True)]
        return (*found, None, None, None, None)


def _gradients(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dL/d(hidden, weight, bias) from dL/d(log-probs), None where it is not asked for."""
    hidden, weight, bias, token_ids, top, total, saved_z = ctx.saved_tensors
    transform = ctx.transform
    need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
    grad_hidden = torch.empty_like(hidden) if need_hidden else None
    # summed over pieces in fp32: rounding each piece to bf16 first biases training
    grad_weight = torch.zeros_like(weight, dtype=top.dtype) if need_weight else None
    grad_bias = torch.zeros_like(bias, dtype=top.dtype) if need_bias else None
    for start in range(0, hidden.shape[0], ctx.size):
        rows = slice(start, start + ctx.size)
        z = saved_z if saved_z is not None else _logits(hidden[rows], weight, bias, transform)
        # dL/dz_v = g ([v = y] - exp(z_v - top) / S)
        g = grad[rows, None]
        d = (z - top[rows, None]).exp_().mul_(-g / total[rows, None])
        d.scatter_add_(-1, token_ids[rows, None], g)
        d = transform.backward_(d, z)
        if grad_bias is not None:
            grad_bias += d.sum(0)
        d = d.to(hidden.dtype)
        if grad_hidden is not None:
            grad_hidden[rows] = d @ weight
        if grad_weight is not None:
            _add_product_(grad_weight, d.T, hidden[rows])
    return grad_hidden, grad_weight, grad_bias


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    return_entropy: bool = False,
    chunk_bytes: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """log softmax(softcap(logit_scale (h W^T + bias)) / temperature) at one token per row, never
    [N, V].

    Shapes: hidden (N, D), weight (V, D), bias (V,), token_ids (N,); returns log-probs (N,) in
    fp32, with `return_entropy` also the entropies (N,) in nats, which carry no gradient. N = 0 is
    fine. Gradients go to those of hidden, weight and bias that require them.

    Raises ValueError for shapes and dtypes that do not fit, a temperature or softcap that is not
    positive, and token ids outside [0, V).
    """
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden must be (N, D) and weight (V, D) with the same D, "
            f"got {tuple(hidden.shape)} and {tuple(weight.shape)}."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be ({weight.shape[0]},), got {tuple(bias.shape)}.")
    dtypes = [x.dtype for x in (hidden, weight, bias) if x is not None]
    if len(set(dtypes)) > 1:
        raise ValueError(f"hidden, weight and bias must have the same dtype, got {dtypes}.")
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}.")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be > 0, or None for none, got {softcap}.")
    check_token_ids(token_ids, hidden.shape[0], weight.shape[0])
    transform = HeadTransform(temperature, softcap, logit_scale)
    args = (chunk_bytes,) if chunk_bytes is not None else ()
    size = chunk_rows(hidden.shape[0], weight.shape[0], *args)
    with torch.autocast(hidden.device.type, enabled=False):
        logps, entropy = _LinearLogprob.apply(
            hidden, weight, bias, token_ids.long(), transform, return_entropy, size
        )
    return (logps, entropy) if return_entropy else logps
