"""Hidden states x lm_head -> the RLOO loss and its gradients: three matrix products, never [N, V].

    log p(y) of every token -> KL, reward, leave-one-out, ratio, clip -> c = dloss / dlogp
    dX = c (M W)        dW = M^T (c X)        db = M^T c           M = dlogp / d raw  (`head.py`)

The coefficient of a token needs its group's log-probs (with a KL in the reward), its sequence's
(with a ratio), or nothing at all, and nothing else of the batch. So *the group is the chunk*: while
its weights M are alive, its coefficients are made and its gradients summed. Backward only scales.

FLOPs of one call, N rows of which n have c != 0:

    nothing requires a gradient                           2NDV
    coefficients known beforehand (on-policy, no KL in    2NDV + 4nDV (2nDV with a frozen head)
      the reward, or advantages given)
    groups, or sequences with a ratio, that fit a piece   2NDV + 4nDV (2nDV with a frozen head)
    those that do not, and normalize=True                 2NDV + 6nDV (2NDV + 2NDV, frozen head)

Rows that `mask` leaves out are not run. (On a GPU, unscorable rows of a pass without ratios are not
looked for: n counts them.) Held at a time: one piece of logits (`chunk_bytes`), and with more than
one piece an fp32 sum of dW.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .head import Head, piece_rows
from .linear_logprob import check_head, needed_gradients
from .linear_run import Run
from .logprob import accumulation_dtype, check_token_ids, check_token_range
from .rloo import Objective, pack_rows
from .segments import (
    ROWS,
    LossOptions,
    Signal,
    check_signal,
    flat_signal,
    option_values,
    scaled_gradient,
)


@torch.library.custom_op("rloo_kernels::linear_rloo", mutates_args=())
def linear_rloo_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    cu_seqlens: Tensor,
    rewards: Tensor | None,
    advantages: Tensor | None,
    token_advantages: Tensor | None,
    old_logps: Tensor | None,
    ref_logps: Tensor | None,
    mask: Tensor | None,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    num_generations: int,
    beta: float,
    epsilon_low: float,
    epsilon_high: float,
    denominator: float,
    advantage: str,
    kl: str,
    level: str,
    token_mean: bool,
    normalize: bool,
    want_entropy: bool,
    need: list[bool],
    size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, coefficients, table, log-probs, entropies, dX, dW, db); the unwanted ones empty."""
    check_token_range(token_ids if mask is None else token_ids[mask], weight.shape[0])
    num_tokens, index = len(token_ids), None
    signal = Signal(rewards, advantages, token_advantages, old_logps, ref_logps, None)
    if mask is not None:  # rows left out are not run: what follows sees only those kept
        index = mask.nonzero().squeeze(1)
        before = torch.cat([mask.new_zeros(1, dtype=torch.long), mask.cumsum(0)])
        cu_seqlens = before[cu_seqlens.to(mask.device)]
        hidden, token_ids = hidden[index], token_ids[index]
        signal = Signal(*signal[:2], *(None if x is None else x[index] for x in signal[2:]))
    head = Head(weight, bias, temperature, softcap, logit_scale)
    options = LossOptions(
        num_generations, beta, epsilon_low, epsilon_high, denominator, advantage, kl, level,
        token_mean, normalize,
    )  # fmt: skip
    run = Run(
        hidden, head, token_ids, cu_seqlens, signal, options, want_entropy,
        (need[0], need[1], need[2]), size,
    )  # fmt: skip
    grads = [hidden.new_empty(0) if g is None else g for g in run()]
    entropy = run.logps.new_empty(0) if run.entropy is None else run.entropy
    per_token = [run.coefficients, run.logps, entropy, grads[0]]
    if index is not None:
        per_token = [
            x.new_zeros(num_tokens, *x.shape[1:]).index_copy_(0, index, x) if wanted else x
            for x, wanted in zip(per_token, (True, True, want_entropy, need[0]), strict=True)
        ]
    coefficients, logps, entropy, grad_hidden = per_token
    loss = run.table[0].sum() / denominator
    return loss, coefficients, run.table, logps, entropy, grad_hidden, grads[1], grads[2]


@linear_rloo_op.register_fake
def _(hidden, weight, bias, token_ids, cu_seqlens, *args):
    want_entropy, need, _ = args[-3:]
    logps = hidden.new_empty(hidden.shape[0], dtype=accumulation_dtype(hidden.dtype))
    table = logps.new_empty(len(ROWS), cu_seqlens.shape[0] - 1)
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    grads = (
        hidden.new_empty(shape if wanted else 0) for shape, wanted in zip(shapes, need, strict=True)
    )
    entropy = torch.empty_like(logps) if want_entropy else logps.new_empty(0)
    return (
        logps.new_empty(()), torch.empty_like(logps), table, torch.empty_like(logps), entropy,
        *grads,
    )  # fmt: skip


def _setup_context(ctx, inputs, output):
    ctx.need = inputs[-2]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[5:], *inputs[:3])


def _differentiate(ctx, grad, *_):
    grads, inputs = ctx.saved_tensors[:3], ctx.saved_tensors[3:]
    if grad is None:
        return (None,) * 27
    # looking at the number is free on a CPU, and saves a copy of the weight gradient
    plain = type(grad) is Tensor and not torch.is_grad_enabled() and grad.device.type == "cpu"
    is_one = plain and float(grad) == 1.0
    found = (
        (g if is_one else scaled_gradient(g, grad, x)) if wanted else None
        for g, x, wanted in zip(grads, inputs, ctx.need, strict=True)
    )
    return (*found, *(None,) * 24)


linear_rloo_op.register_autograd(_differentiate, setup_context=_setup_context)


def fused_linear_rloo_loss(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    rewards: Tensor | None = None,
    advantages: Tensor | None = None,
    token_advantages: Tensor | None = None,
    old_logps: Tensor | None = None,
    ref_logps: Tensor | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    return_entropy: bool = False,
    chunk_bytes: int | None = None,
    **options: object,
) -> Objective:
    """The RLOO loss from the last hidden states, with the gradients made in forward.

    Shapes: packed hidden (N, D), token_ids (N,), cu_seqlens (R + 1,) (on the CPU, to spare a GPU a
    wait), or padded hidden (R, T, D), token_ids (R, T) with mask (R, T); hidden states are those
    that predict the tokens. weight (V, D), bias (V,). The signal (rewards ... mask) and the
    `LossOptions` are those of `rloo_objective`, the head's options those of `linear_logprob`. The
    loss is differentiable in hidden, weight and bias; the gradients are made when they are asked
    for (requires_grad, and gradients enabled) and backward scales them. The result does not depend
    on `chunk_bytes`, the bound on the logits alive at one time, beyond rounding.

    On a GPU, finding masked rows and those without signal waits for the device. Raises ValueError
    for what does not fit together and for token ids outside [0, V); on a GPU,
    where looking at the ids would wait for the device, the loss is nan.
    """
    checked = LossOptions(**options)  # pyright: ignore[reportArgumentType]
    check_head(hidden, weight, bias, temperature, softcap)
    shape = hidden.shape[:-1]
    check_token_ids(token_ids, shape)
    num_rows, bounds = pack_rows(token_ids, cu_seqlens)
    if cu_seqlens is None:
        bounds = torch.arange(num_rows + 1) * token_ids.shape[1]
    signal = Signal(rewards, advantages, token_advantages, old_logps, ref_logps, mask)
    check_signal(signal, shape, num_rows, checked)
    flat = hidden.reshape(-1, hidden.shape[-1])
    with torch.autocast(hidden.device.type, enabled=False):
        loss, coefficients, table, logps, entropy, *_ = linear_rloo_op(
            flat,
            weight,
            bias,
            token_ids.reshape(-1).long(),
            bounds,
            *flat_signal(signal, hidden),
            float(temperature),
            softcap,
            float(logit_scale),
            *option_values(checked, num_rows),
            return_entropy,
            list(needed_gradients(hidden, weight, bias)),
            piece_rows(flat, weight.shape[0], chunk_bytes),
        )
    return Objective(
        loss,
        coefficients.view(shape),
        *table.unbind(0),
        logps=logps.view(shape),
        entropy=entropy.view(shape) if return_entropy else None,
    )
