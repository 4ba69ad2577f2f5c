"""Per-token log-probs, reference log-probs and rewards -> KL, shaped reward, advantage, ratio,
clip, loss and its per-token coefficients.

    KL_i  = sum_t (logp_it - ref_it)                                   k1 estimate, no gradient
    R_i   = reward_i - beta KL_i                                       NaN: unscorable
    A_i   = R_i - mean over scorable j != i of the group of R_j        (arXiv:2402.14740)
    rho_i = exp(sum_t logp_it - sum_t old_it)                          a sum over t, not a mean
    loss  = - sum_i min(rho_i A_i, clip(rho_i, 1 - eps_low, 1 + eps_high) A_i) / denominator
    c_it  = dloss / dlogp_it = - rho_i A_i / denominator, 0 where clipped

Letters: P prompts, K samples each, R = P K rows (completions), N completion tokens of all rows
together. Row r owns tokens `cu_seqlens[r]:cu_seqlens[r + 1]` of every packed (N,) tensor. All in
fp32 (fp64 in, fp64 out). On a GPU it is one launch, one program per group, without waiting for the
device; bytes: each (N,) input read twice, c written once.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .advantages import (
    BY_GROUP,
    comparable_rows,
    scaled_advantages,
    segment_ids,
    segment_sum,
    token_level_advantages,
)
from .dispatch import use_triton
from .logprob import accumulation_dtype

# One line of the (len(ROWS), R) table that a segment pass fills.
ROWS = (
    "loss_per_row",
    "advantages",
    "kl",
    "shaped_rewards",
    "logp_sum",
    "log_ratio",
    "token_ratio_sum",
    "clipped_low",
    "clipped_high",
    "entropy_sum",
    "num_tokens",
)


KL_IN_LOSS = ("loss", "corrected_loss")


@dataclass(frozen=True)
class LossOptions:
    """What the loss is; checked when it is made.

    advantage: of a group, see `advantages.py`. kl: "reward" (a sequence's KL is taken off its
    reward), "reward_to_go" (per token, REINFORCE++, arXiv:2501.03262 eq. 1), "loss" (k3 =
    exp(ref - logp) - (ref - logp) - 1, added to the loss of every token and differentiated, as in
    GRPO) or "corrected_loss" (likewise k3 times the token's ratio, differentiated through both:
    beta rho (logp - ref) in the slope, the unbiased gradient of the reverse KL, arXiv:2512.02556).
    level: one ratio per "sequence" (RLOO) or per "token" (GRPO, PPO). token_mean: a row's token
    losses are averaged, not summed.
    """

    num_generations: int = 0  # 0: the advantages are given
    beta: float = 0.0
    epsilon_low: float = 0.2
    epsilon_high: float | None = None  # None: epsilon_low
    denominator: float | None = None  # None: the number of rows
    advantage: str = "rloo"
    kl: str = "reward"
    level: str = "sequence"
    token_mean: bool = False
    normalize: bool = False

    def __post_init__(self) -> None:
        for name, choices in (
            ("advantage", tuple(BY_GROUP)),
            ("kl", ("reward", "reward_to_go", *KL_IN_LOSS)),
            ("level", ("sequence", "token")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}.")
        if self.kl != "reward" and self.level == "sequence":
            raise ValueError(f'kl="{self.kl}" is per token: it needs level="token".')
        if self.token_mean and self.level == "sequence":
            raise ValueError('token_mean=True averages token losses: it needs level="token".')
        if self.denominator is not None and not self.denominator > 0:
            raise ValueError(f"denominator must be > 0, got {self.denominator}.")

    @property
    def high(self) -> float:
        return self.epsilon_low if self.epsilon_high is None else self.epsilon_high

    @property
    def kl_in_loss(self) -> bool:
        return self.beta != 0 and self.kl in KL_IN_LOSS


class Signal(NamedTuple):
    """What a row's tokens are credited with: exactly one of the first three is given."""

    rewards: Tensor | None = None  # (R,) NaN: unscorable
    advantages: Tensor | None = None  # (R,) NaN counts as 0
    token_advantages: Tensor | None = None  # (N,)
    old_logps: Tensor | None = None  # (N,) None: on-policy, the ratio is exactly 1
    ref_logps: Tensor | None = None  # (N,)
    mask: Tensor | None = None  # (N,) bool


def check_signal(signal: Signal, shape: torch.Size, num_rows: int, options: LossOptions) -> None:
    """Raise ValueError unless the signal fits `num_rows` rows and token_ids of `shape`."""
    given = [name for name in Signal._fields[:3] if getattr(signal, name) is not None]
    if len(given) != 1:
        raise ValueError(
            f"give exactly one of rewards, advantages and token_advantages, got {given or 'none'}."
        )
    for name in ("advantages", "rewards"):
        x = getattr(signal, name)
        if x is not None and x.shape != (num_rows,):
            raise ValueError(f"{name} must be ({num_rows},), one per row, got {tuple(x.shape)}.")
    for name in ("token_advantages", "old_logps", "ref_logps", "mask"):
        x = getattr(signal, name)
        if x is not None and x.shape != shape:
            raise ValueError(f"{name} must be {tuple(shape)} as token_ids, got {tuple(x.shape)}.")
    k = options.num_generations
    if signal.rewards is not None and (k < 2 or num_rows % k):
        raise ValueError(
            "rewards must hold whole groups of num_generations >= 2 samples, "
            f"got {num_rows} rows and num_generations={k}."
        )
    if signal.rewards is None and options.normalize:
        raise ValueError("normalize=True scales advantages that are made here: give rewards.")
    if signal.token_advantages is not None and options.level == "sequence":
        raise ValueError('token_advantages need level="token".')
    if options.beta != 0 and signal.rewards is None and not options.kl_in_loss:
        raise ValueError(
            f"beta={options.beta} takes the KL off rewards, and advantages were given: leave beta "
            'out, or add the KL to the loss with kl="loss".'
        )
    if options.beta != 0 and signal.ref_logps is None:
        raise ValueError(f"beta={options.beta} needs ref_logps, the reference's log-probs.")


def check_bounds(bounds: list[int], num_tokens: int) -> None:
    """Raise ValueError unless cu_seqlens run from 0 to the number of tokens without falling."""
    falls = any(a > b for a, b in pairwise(bounds))
    if not bounds or bounds[0] != 0 or bounds[-1] != num_tokens or falls:
        raise ValueError(
            f"cu_seqlens must run from 0 to the number of tokens, {num_tokens}, without falling; "
            f"got {bounds[:8]}{' ...' if len(bounds) > 8 else ''}, ending at {bounds[-1:]}."
        )


def segments_torch(
    logps: Tensor,
    cu_seqlens: Tensor,
    signal: Signal,
    entropy: Tensor | None,
    options: LossOptions,
) -> tuple[Tensor, Tensor]:
    """The specification: (coefficients (N,), table (len(ROWS), R)); options.denominator is set."""
    assert options.denominator is not None
    owner = segment_ids(cu_seqlens, len(logps))
    valid = torch.ones_like(logps, dtype=torch.bool) if signal.mask is None else signal.mask

    def counted(x: Tensor | None) -> Tensor:
        return torch.zeros_like(logps) if x is None else torch.where(valid, x, 0.0)

    def row_sum(x: Tensor) -> Tensor:
        return segment_sum(x, cu_seqlens)

    kl = counted(None if signal.ref_logps is None else logps - signal.ref_logps)
    log_ratio = counted(None if signal.old_logps is None else logps - signal.old_logps)
    row_kl, row_ratio = row_sum(kl), row_sum(log_ratio)
    num_tokens = row_sum(valid.to(logps.dtype))
    by_row, by_token, shaped = _credit(signal, kl, row_kl, cu_seqlens, options)

    token_level = options.level == "token"
    if token_level:
        a, exponent = by_row[owner] if by_token is None else by_token, log_ratio
    else:
        a, exponent = by_row, row_ratio
    ratio = torch.exp(exponent)
    low = (ratio < 1 - options.epsilon_low) & (a < 0)
    high = (ratio > 1 + options.high) & (a > 0)
    # no gradient there, whatever the ratio: an inf must not meet a 0, which makes nan
    still = low | high | (a == 0)
    moving = torch.exp(torch.where(still, 0.0, exponent)) * a
    bound = ratio.clamp(1 - options.epsilon_low, 1 + options.high) * a
    loss = -torch.where(still, torch.where(a == 0, 0.0, bound), moving)
    slope = -torch.where(still, 0.0, moving)
    low, high = low.to(logps.dtype), high.to(logps.dtype)
    if options.kl_in_loss:
        e = torch.expm1(-kl)
        corrected = options.kl == "corrected_loss"  # d(rho k3) = rho (k3 + dk3) = rho (k3 - e)
        times, k3_slope = (ratio, kl) if corrected else (1.0, -e)
        loss = loss + options.beta * times * (e + kl)
        slope = slope + options.beta * times * k3_slope
    if token_level:
        share = 1 / num_tokens.clamp(min=1)
        weight = share if options.token_mean else torch.ones_like(share)
        loss, low, high = (row_sum(counted(x)) for x in (loss, low, high))
        loss, low, high = loss * weight, low * share, high * share
        slope = slope * weight[owner]
    else:
        slope = slope[owner]
    columns = {
        "loss_per_row": loss,
        "advantages": by_row if by_token is None or signal.rewards is not None
        else row_sum(counted(by_token)),
        "kl": row_kl,
        "shaped_rewards": shaped,
        "logp_sum": row_sum(counted(logps)),
        "log_ratio": row_ratio,
        "token_ratio_sum": row_sum(counted(torch.exp(log_ratio))),
        "clipped_low": low,
        "clipped_high": high,
        "entropy_sum": row_sum(counted(entropy)),
        "num_tokens": num_tokens,
    }  # fmt: skip
    table = torch.stack([columns[name] for name in ROWS])
    return counted(slope) / options.denominator, table


def _credit(
    signal: Signal, kl: Tensor, row_kl: Tensor, cu_seqlens: Tensor, options: LossOptions
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(advantage per row, per token or None, rewards less their KL penalty or NaN)."""
    shaped = torch.full_like(row_kl, float("nan"))
    if signal.rewards is None:
        if signal.advantages is not None:
            given = signal.advantages.to(row_kl.dtype)
            return torch.where(given.isnan(), 0.0, given), None, shaped
        return torch.zeros_like(row_kl), signal.token_advantages, shaped
    k = options.num_generations
    penalty = 0.0 if options.kl_in_loss else options.beta
    shaped = signal.rewards - penalty * row_kl
    by_row, scale = scaled_advantages(
        shaped,
        k,
        normalize=options.normalize,
        whiten_rewards=False,
        advantage=options.advantage,
    )
    if options.kl != "reward_to_go":
        return by_row, None, shaped
    beta = options.beta * scale  # the KL is scaled as the rewards it is taken off
    compared = comparable_rows(shaped, k)
    return by_row, token_level_advantages(by_row, kl, cu_seqlens, beta, compared), shaped


@torch.library.custom_op("rloo_kernels::segments", mutates_args=())
def segments_op(
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
    """(loss (), coefficients (N,), table (len(ROWS), R))."""
    options = LossOptions(
        num_generations, beta, epsilon_low, epsilon_high, denominator, advantage, kl, level,
        token_mean, normalize,
    )  # fmt: skip
    signal = Signal(rewards, advantages, token_advantages, old_logps, ref_logps, mask)
    if not cu_seqlens.is_cuda:  # on a GPU, looking would wait for the device
        check_bounds(cu_seqlens.tolist(), len(logps))
    coefficients, table = segments(logps, cu_seqlens, signal, entropy, options)
    return table[0].sum() / denominator, coefficients, table


@segments_op.register_fake
def _(logps, cu_seqlens, *args):
    table = logps.new_empty(len(ROWS), cu_seqlens.shape[0] - 1)
    return logps.new_empty(()), torch.empty_like(logps), table


def _setup_context(ctx, inputs, output):
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(output[1], inputs[0])


def _differentiate(ctx, grad, _coefficients, _table):
    return (scaled_gradient(ctx.saved_tensors[0], grad, ctx.saved_tensors[1]), *(None,) * 18)


@torch.library.custom_op("rloo_kernels::loss_backward", mutates_args=())
def scaled_gradient(gradient: Tensor, factor: Tensor, of: Tensor) -> Tensor:
    """gradient * factor. An op of its own, with the input `of` which it is the gradient, so that
    differentiating it once more is refused and not taken for constant."""
    return (gradient * factor).to(gradient.dtype)


@scaled_gradient.register_fake
def _(gradient, factor, of):
    return torch.empty_like(gradient)


segments_op.register_autograd(_differentiate, setup_context=_setup_context)


def segments(
    logps: Tensor,
    cu_seqlens: Tensor,
    signal: Signal,
    entropy: Tensor | None,
    options: LossOptions,
) -> tuple[Tensor, Tensor]:
    """(coefficients (N,), table (len(ROWS), R)) on the device of `logps`, without a gradient."""
    if not use_triton(logps):
        return segments_torch(logps, cu_seqlens, signal, entropy, options)
    from .rloo_triton import segments_triton

    if not options.normalize:
        return segments_triton(logps, cu_seqlens, signal, entropy, options)
    # normalising looks at all rows: the advantages are made first, then given
    kl = torch.zeros_like(logps) if signal.ref_logps is None else logps - signal.ref_logps
    if signal.mask is not None:
        kl = torch.where(signal.mask, kl, 0.0)
    by_row, by_token, shaped = _credit(signal, kl, segment_sum(kl, cu_seqlens), cu_seqlens, options)
    given = {"advantages": by_row} if by_token is None else {"token_advantages": by_token}
    signal = signal._replace(rewards=None, **given)
    coefficients, table = segments_triton(logps, cu_seqlens, signal, entropy, options)
    table[ROWS.index("advantages")] = by_row
    table[ROWS.index("shaped_rewards")] = shaped
    return coefficients, table


def flat_signal(signal: Signal, like: Tensor) -> Signal:
    """Every tensor detached, flat, on the device of `like` and in its accumulation dtype."""
    dtype = accumulation_dtype(like.dtype)
    numbers = (None if x is None else x.detach().to(like.device, dtype) for x in signal[:5])
    mask = None if signal.mask is None else signal.mask.to(like.device).bool()
    return Signal(*(None if x is None else x.reshape(-1) for x in (*numbers, mask)))


def option_values(options: LossOptions, num_rows: int) -> tuple:
    """The options in the order of the ops' schemas, defaults filled in."""
    denominator = options.denominator if options.denominator is not None else max(num_rows, 1)
    return (
        options.num_generations,
        float(options.beta),
        float(options.epsilon_low),
        float(options.high),
        float(denominator),
        options.advantage,
        options.kl,
        options.level,
        options.token_mean,
        options.normalize,
    )
