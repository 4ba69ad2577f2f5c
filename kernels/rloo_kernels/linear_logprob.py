"""Hidden states x lm_head -> log-probability of one token per row and the row's entropy, never [N,
V].

    z = softcap(logit_scale * (h W^T + bias)) / tau          softcap(x) = c tanh(x / c)
    log p(y) = z_y - log sum_v exp(z_v)

Letters: N rows, D hidden size, V vocabulary. The rows are worked through in pieces; what lives at
one time is one piece of logits (`CHUNK_BYTES`), not [N, V]. Matrix products run in the inputs'
dtype, statistics and the sum of the weight gradient in fp32.

FLOPs: forward 2NDV; backward 4NDV, plus 2NDV to make the logits again when they did not fit one
piece.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

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


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, token_ids, transform, want_entropy, size):
        num_rows = hidden.shape[0]
        logps = hidden.new_empty(num_rows, dtype=accumulation_dtype(hidden.dtype))
        lse = torch.empty_like(logps)
        entropy = torch.empty_like(logps) if want_entropy else None
        z = None
        for start in range(0, num_rows, size):
            rows = slice(start, start + size)
            z = _logits(hidden[rows], weight, bias, transform)
            logps[rows], lse[rows], h = row_statistics(z, token_ids[rows], want_entropy)
            if entropy is not None and h is not None:
                entropy[rows] = h
        one_piece = num_rows <= size and any(ctx.needs_input_grad[:3])
        ctx.save_for_backward(hidden, weight, bias, token_ids, lse, z if one_piece else None)
        ctx.transform, ctx.size = transform, size
        if entropy is not None:
            ctx.mark_non_differentiable(entropy)
        return logps, entropy

    @staticmethod
    def backward(ctx, *grads):
        hidden, weight, bias, token_ids, lse, saved_z = ctx.saved_tensors
        grad, transform = grads[0], ctx.transform
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        # summed over pieces in fp32: rounding each piece to bf16 first biases training
        grad_weight = torch.zeros_like(weight, dtype=lse.dtype) if need_weight else None
        grad_bias = torch.zeros_like(bias, dtype=lse.dtype) if need_bias else None
        for start in range(0, hidden.shape[0], ctx.size):
            rows = slice(start, start + ctx.size)
            z = saved_z if saved_z is not None else _logits(hidden[rows], weight, bias, transform)
            # dL/dz_v = g ([v = y] - p_v)
            d = torch.exp(z - lse[rows, None]).mul_(-grad[rows, None])
            d.scatter_add_(-1, token_ids[rows, None], grad[rows, None])
            d = transform.backward_(d, z)
            if grad_bias is not None:
                grad_bias += d.sum(0)
            d = d.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = d @ weight
            if grad_weight is not None:
                if d.dtype == grad_weight.dtype:
                    grad_weight.addmm_(d.T, hidden[rows])
                else:
                    grad_weight += (d.T @ hidden[rows]).to(grad_weight.dtype)
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
            None,
            None,
        )


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

    Raises ValueError for shapes that do not fit, a temperature that is not positive, and token ids
    outside [0, V).
    """
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden must be (N, D) and weight (V, D) with the same D, "
            f"got {tuple(hidden.shape)} and {tuple(weight.shape)}."
        )
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}.")
    check_token_ids(token_ids, hidden.shape[0], weight.shape[0])
    transform = HeadTransform(temperature, softcap, logit_scale)
    args = (chunk_bytes,) if chunk_bytes is not None else ()
    size = chunk_rows(hidden.shape[0], weight.shape[0], *args)
    logps, entropy = _LinearLogprob.apply(
        hidden, weight, bias, token_ids, transform, return_entropy, size
    )
    return (logps, entropy) if return_entropy else logps
