"""The loss of completions from their log-probs: the op, and torch or Triton beneath it.

`objective_torch.py` has the mathematics and the letters; `objective_triton.py` runs on a GPU, in
one launch, without waiting for the device. Forward makes the coefficients c = dloss / dlogp, (N,);
backward multiplies them by a number.
"""

# pyright: strict, reportUnknownMemberType=false

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from ..dispatch import use_triton
from ..forward_mode import refuse_tangents
from ..logprob.types import accumulation_dtype
from ..transfer import to_device
from .checks import check_bounds, check_inputs
from .objective_torch import Advantages, objective_torch, resolve_advantages
from .packed import pack_rows, segment_sum
from .types import (
    TABLE_FIELDS,
    LossInputs,
    LossOptions,
    Objective,
    flat_inputs,
    option_values,
)


def with_known_kl(
    inputs: LossInputs, cu_seqlens: Tensor, options: LossOptions
) -> tuple[LossInputs, LossOptions, Advantages | None]:
    """With kl_policy="sampling", the KL of old_logps is known before any log-prob: advantages in
    place of the rewards, and what they are made of. Otherwise all is returned as it is."""
    old, ref = inputs.old_logps, inputs.ref_logps
    takes_kl = inputs.rewards is not None and options.beta != 0 and not options.kl_in_loss
    if options.kl_policy != "sampling" or not takes_kl or old is None or ref is None:
        return inputs, options, None
    kl = old - ref
    if inputs.mask is not None:
        kl = torch.where(inputs.mask, kl, 0.0)
    cu_seqlens = to_device(cu_seqlens, kl.device)
    made = resolve_advantages(inputs, kl, segment_sum(kl, cu_seqlens), cu_seqlens, options)
    per_row = made.per_row if made.per_token is None else None
    inputs = inputs._replace(rewards=None, advantages=per_row, token_advantages=made.per_token)
    return inputs, replace(options, beta=0.0, normalize=False), made


def with_advantages(objective: Objective, made: Advantages | None) -> Objective:
    """The objective with the advantages that `with_known_kl` made, and their shaped rewards."""
    if made is None:
        return objective
    device = objective.loss.device
    return objective._replace(
        advantages=to_device(made.per_row, device),
        shaped_rewards=to_device(made.shaped_rewards, device),
    )


def coefficients_and_table(
    logps: Tensor,
    cu_seqlens: Tensor,
    inputs: LossInputs,
    entropy: Tensor | None,
    options: LossOptions,
) -> tuple[Tensor, Tensor]:
    """(coefficients (N,), table (len(TABLE_FIELDS), R)) on the device of `logps`, no gradient."""
    if not use_triton(logps):
        return objective_torch(logps, cu_seqlens, inputs, entropy, options)
    from .objective_triton import objective_triton

    if not options.normalize:
        return objective_triton(logps, cu_seqlens, inputs, entropy, options)
    # normalising looks at all rows: the advantages are made first, then given
    kl = torch.zeros_like(logps) if inputs.ref_logps is None else logps - inputs.ref_logps
    if inputs.mask is not None:
        kl = torch.where(inputs.mask, kl, 0.0)
    made = resolve_advantages(inputs, kl, segment_sum(kl, cu_seqlens), cu_seqlens, options)
    if made.per_token is None:
        inputs = inputs._replace(rewards=None, advantages=made.per_row)
    else:
        inputs = inputs._replace(rewards=None, token_advantages=made.per_token)
    coefficients, table = objective_triton(logps, cu_seqlens, inputs, entropy, options)
    table[TABLE_FIELDS.index("advantages")] = made.per_row
    table[TABLE_FIELDS.index("shaped_rewards")] = made.shaped_rewards
    return coefficients, table


@torch.library.custom_op("rloo_kernels::segments", mutates_args=())
def _objective(
    logps: Tensor,
    cu_seqlens: Tensor,
    rewards: Tensor | None,
    advantages: Tensor | None,
    token_advantages: Tensor | None,
    old_logps: Tensor | None,
    ref_logps: Tensor | None,
    mask: Tensor | None,
    entropy: Tensor | None,
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
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss (), coefficients (N,), table (len(TABLE_FIELDS), R))."""
    options = LossOptions(
        num_generations, beta, epsilon_low, epsilon_high, denominator, advantage, kl, level,
        token_mean, normalize,
    )  # fmt: skip
    inputs = LossInputs(rewards, advantages, token_advantages, old_logps, ref_logps, mask)
    if not cu_seqlens.is_cuda:  # on a GPU, looking would wait for the device
        check_bounds(cast(list[int], cu_seqlens.tolist()), len(logps))
    coefficients, table = coefficients_and_table(logps, cu_seqlens, inputs, entropy, options)
    return table[0].sum() / denominator, coefficients, table


@_objective.register_fake
def _objective_fake(logps: Tensor, cu_seqlens: Tensor, *args: Any) -> tuple[Tensor, ...]:
    table = logps.new_empty(len(TABLE_FIELDS), cu_seqlens.shape[0] - 1)
    return logps.new_empty(()), torch.empty_like(logps), table


@torch.library.custom_op("rloo_kernels::loss_backward", mutates_args=())
def scaled_gradient(gradient: Tensor, factor: Tensor, of: Tensor) -> Tensor:
    """gradient * factor in the dtype of `of`, where `gradient` is dloss / d`of`.

    An op of its own that takes `of` as an input, so that differentiating it once more is refused
    and the gradient is not taken for a constant. On a GPU one pass, whatever the dtypes.
    """
    if gradient.is_cuda:
        out = torch.empty_like(gradient, dtype=of.dtype)
        # one number in one dimension: as a scalar it would be rounded to the gradient's dtype
        return torch.mul(gradient, factor.reshape((1,) * max(gradient.ndim, 1)), out=out)
    return (gradient * factor).to(of.dtype)


@scaled_gradient.register_fake
def _scaled_gradient_fake(gradient: Tensor, factor: Tensor, of: Tensor) -> Tensor:
    return torch.empty_like(gradient, dtype=of.dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(output[1], inputs[0])


def _differentiate(
    ctx: Any, grad: Tensor, _coefficients: None, _table: None
) -> tuple[Tensor | None, ...]:
    coefficients, logps = ctx.saved_tensors
    return (scaled_gradient(coefficients, grad, logps), *(None,) * 18)


_objective.register_autograd(_differentiate, setup_context=_setup_context)


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
    **options: Any,
) -> Objective:
    """The clipped RLOO loss of completions from their log-probs; `LossOptions` lists the options.

    Shapes: logps, old_logps, ref_logps, mask, entropy (N,) with cu_seqlens (R + 1,) starting at 0
    and ending at N, or padded (R, T) without; exactly one of rewards (R,) (prompt-major, with
    `num_generations`; NaN: unscorable), advantages (R,) and token_advantages (as logps, with
    level="token"). old_logps None: on-policy, the ratio is exactly 1; NaN: of that token alone, so
    that rows of the present policy stand beside rows of older ones (not with kl_policy="sampling",
    which would know no KL of them). `denominator`: what the sum over rows is divided by: the number
    of completions of the step on all ranks; by default R.
    Only `logps` gets a gradient. With level="token" the loss sums over a row's tokens, so that at
    beta = 0 and ratio 1 both levels have the same gradient.

    With old_logps, beta and kl="reward", R_i = reward_i - beta KL_i takes the KL of `kl_policy`:
    KL_i = sum_t (logp_it - ref_it) with "present", the default, sum_t (old_it - ref_it) with
    "sampling". `kl` of the result is the present policy's in both.

    Raises ValueError for shapes that do not fit, options that contradict each other, and (on a
    CPU) cu_seqlens that do not run from 0 to N. RLOO: arXiv:2402.14740; the clip is PPO's
    (arXiv:1707.06347, eq. 7), on the ratio of the whole completion.
    """
    checked = LossOptions(**options)
    num_rows, cu_seqlens = pack_rows(logps, cu_seqlens)
    inputs = LossInputs(rewards, advantages, token_advantages, old_logps, ref_logps, mask)
    refuse_tangents("rloo_objective", logps, entropy, *inputs)
    check_inputs(inputs, logps.shape, num_rows, checked)
    shape = logps.shape
    inputs, checked, made = with_known_kl(
        flat_inputs(inputs, logps, logps.device), cu_seqlens, checked
    )
    if entropy is not None:
        if entropy.shape != shape:
            raise ValueError(f"entropy must be {tuple(shape)}, got {tuple(entropy.shape)}.")
        dtype = accumulation_dtype(logps.dtype)
        entropy = to_device(entropy.detach(), logps.device, dtype).reshape(-1)
    if logps.dtype not in (torch.float32, torch.float64):
        logps = logps.float()
    loss, coefficients, table = _objective(
        logps.reshape(-1),
        to_device(cu_seqlens, logps.device),
        *inputs,
        entropy,
        *option_values(checked, num_rows),
    )
    return with_advantages(Objective(loss, coefficients.view(shape), *table.unbind(0)), made)
