"""The RLOO loss of completions, from their log-probs or from their logits.

The mathematics and the letters are those of `segments.py`; `linear_rloo.py` has the same loss from
hidden states.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .logprob import accumulation_dtype, selective_log_softmax
from .segments import LossOptions, Signal, check_signal, flat_signal, option_values, segments_op


class Objective(NamedTuple):
    """The loss and what it is made of; only `loss` is differentiable. R rows, N tokens."""

    loss: Tensor  # () minus the clipped objective, summed over rows, / denominator
    coefficients: Tensor  # (N,) dloss / dlogp, in the layout of token_ids
    loss_per_row: Tensor  # (R,) before the division
    advantages: Tensor  # (R,) A_i; per-token advantages: their sum over the row's tokens
    kl: Tensor  # (R,) sum_t (logp_it - ref_it), 0 without a reference
    shaped_rewards: Tensor  # (R,) reward - beta KL; NaN where advantages were given
    logp_sum: Tensor  # (R,) sum_t logp_it
    log_ratio: Tensor  # (R,) sum_t (logp_it - old_it)
    token_ratio_sum: Tensor  # (R,) sum_t exp(logp_it - old_it)
    clipped_low: Tensor  # (R,) share of the row's ratios below 1 - eps_low with A < 0
    clipped_high: Tensor  # (R,) share of the row's ratios above 1 + eps_high with A > 0
    entropy_sum: Tensor  # (R,) sum_t H_it, 0 where no entropies were given
    num_tokens: Tensor  # (R,) tokens counted
    logps: Tensor | None = None  # the ops that make them: log-probs in the layout of token_ids
    entropy: Tensor | None = None  # likewise, if asked for


def pack_rows(token_ids: Tensor, cu_seqlens: Tensor | None) -> tuple[int, Tensor]:
    """(R, cu_seqlens) of packed (N,) token ids, or of padded ones (R, T): cu_seqlens None."""
    if cu_seqlens is not None:
        if token_ids.ndim != 1:
            raise ValueError(
                f"with cu_seqlens, per-token tensors must be (N,), got {tuple(token_ids.shape)}."
            )
        if cu_seqlens.ndim != 1 or len(cu_seqlens) < 1 or cu_seqlens.is_floating_point():
            raise ValueError(
                "cu_seqlens must be integers of shape (R + 1,), "
                f"got {cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}."
            )
        return len(cu_seqlens) - 1, cu_seqlens
    if token_ids.ndim != 2:
        raise ValueError(
            f"without cu_seqlens, per-token tensors must be (R, T), got {tuple(token_ids.shape)}."
        )
    num_rows, width = token_ids.shape
    bounds = torch.arange(num_rows + 1, device=token_ids.device) * width
    return num_rows, bounds


def rloo_objective(
    logps: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    rewards: Tensor | None = None,
    advantages: Tensor | None = None,
    token_advantages: Tensor | None = None,
    old_logps: Tensor | None = None,
    ref_logps: Tensor | None = None,
    mask: Tensor | None = None,
    entropy: Tensor | None = None,
    **options: object,
) -> Objective:
    """The clipped RLOO loss of completions from their log-probs; `LossOptions` lists the options.

    Shapes: logps, old_logps, ref_logps, mask, entropy (N,) with cu_seqlens (R + 1,) starting at 0
    and ending at N, or padded (R, T) without; exactly one of rewards (R,) (prompt-major, with
    `num_generations`; NaN: unscorable), advantages (R,) and token_advantages (as logps, with
    level="token"). old_logps None: on-policy, the ratio is exactly 1. `denominator`: what the sum
    over rows is divided by: the number of completions of the step on all ranks; by default R.
    Only `logps` gets a gradient. With level="token" the loss sums over a row's tokens, so that at
    beta = 0 and ratio 1 both levels have the same gradient.

    Raises ValueError for shapes that do not fit, options that contradict each other, and (on a
    CPU) cu_seqlens that do not run from 0 to N.
    """
    checked = LossOptions(**options)  # pyright: ignore[reportArgumentType]
    num_rows, cu_seqlens = pack_rows(logps, cu_seqlens)
    signal = Signal(rewards, advantages, token_advantages, old_logps, ref_logps, mask)
    check_signal(signal, logps.shape, num_rows, checked)
    shape = logps.shape
    signal = flat_signal(signal, logps)
    if entropy is not None:
        if entropy.shape != shape:
            raise ValueError(f"entropy must be {tuple(shape)}, got {tuple(entropy.shape)}.")
        entropy = entropy.detach().to(logps.device, accumulation_dtype(logps.dtype)).reshape(-1)
    if logps.dtype not in (torch.float32, torch.float64):
        logps = logps.float()
    loss, coefficients, table = segments_op(
        logps.reshape(-1),
        cu_seqlens.to(logps.device),
        *signal,
        entropy,
        *option_values(checked, num_rows),
    )
    return Objective(loss, coefficients.view(shape), *table.unbind(0))


def rloo_loss(
    logits: Tensor,
    token_ids: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    inplace_backward: bool = False,
    return_entropy: bool = False,
    **loss: object,
) -> Objective:
    """The RLOO loss from logits: three passes over them (read; read and write in backward).

    Shapes: logits (N, V) and token_ids (N,) with cu_seqlens (R + 1,), or padded (R, T, V) and
    (R, T) with mask (R, T). `loss`: the signal and options of `rloo_objective`. Where the logits
    need not exist, `fused_linear_rloo_loss` is the op to take.
    """
    scores = selective_log_softmax(
        logits,
        token_ids,
        temperature=temperature,
        mask=mask,
        return_entropy=return_entropy,
        inplace_backward=inplace_backward,
    )
    logps, entropy = scores if isinstance(scores, tuple) else (scores, None)
    found = rloo_objective(logps, cu_seqlens, mask=mask, entropy=entropy, **loss)  # pyright: ignore
    entropy = None if entropy is None else entropy.detach()
    return found._replace(logps=logps.detach(), entropy=entropy)
