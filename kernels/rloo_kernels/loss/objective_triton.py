"""`objective_torch.py` in one launch: one program per group, or per row where advantages are given.

First pass over the group's tokens: KL and log-ratio of each of its K rows, held in registers.
Then shaped rewards, advantages, ratio and clip of all K at once. Second pass: coefficients and
what is counted per token. Nothing of size N but the coefficients is made.

Bytes, 4 per number: log-probs, reference and old log-probs are loaded once, and once more where the
second pass needs them (token-level ratios; a KL per token, as reward-to-go or in the loss);
entropies once; coefficients are stored once, and len(TABLE_FIELDS) numbers per row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import on_device_of
from .types import TABLE_FIELDS, LossInputs, LossOptions

# Lines of the table.
LOSS_PER_ROW = tl.constexpr(TABLE_FIELDS.index("loss_per_row"))
ADVANTAGES = tl.constexpr(TABLE_FIELDS.index("advantages"))
KL = tl.constexpr(TABLE_FIELDS.index("kl"))
SHAPED_REWARDS = tl.constexpr(TABLE_FIELDS.index("shaped_rewards"))
LOGP_SUM = tl.constexpr(TABLE_FIELDS.index("logp_sum"))
LOG_RATIO = tl.constexpr(TABLE_FIELDS.index("log_ratio"))
TOKEN_RATIO_SUM = tl.constexpr(TABLE_FIELDS.index("token_ratio_sum"))
CLIPPED_LOW = tl.constexpr(TABLE_FIELDS.index("clipped_low"))
CLIPPED_HIGH = tl.constexpr(TABLE_FIELDS.index("clipped_high"))
ENTROPY_SUM = tl.constexpr(TABLE_FIELDS.index("entropy_sum"))
NUM_TOKENS = tl.constexpr(TABLE_FIELDS.index("num_tokens"))


@triton.jit
def _pick(values, lane, k):
    """values[k] of a vector in registers."""
    return tl.sum(tl.where(lane == k, values, 0.0), 0)


@triton.jit
def _expm1(x):
    """exp(x) - 1, with the digits of a small x."""
    series = x * (1.0 + x * (0.5 + x * (0.1666666667 + x * (0.04166666667 + x * 0.008333333333))))
    return tl.where(tl.abs(x) < 0.1, series, tl.exp(x) - 1.0)


@triton.jit
def _log_ratio(logp, old):
    """logp - old; 0 where old is nan: the token's own log-prob is the old one."""
    return tl.where(old == old, logp - old, 0.0)


@triton.jit
def _group_advantages(shaped, inside, MEAN: tl.constexpr, STD: tl.constexpr):
    """(advantages of one group, 0 where there is nothing to compare with; where there is)."""
    scorable = inside & (shaped == shaped)  # nan: unscorable
    known = tl.where(scorable, shaped, 0.0)
    n = tl.sum(scorable.to(tl.float32), 0) + tl.zeros_like(shaped)
    total = tl.sum(known, 0)
    compared = scorable & (n > 1)
    if MEAN:
        a = tl.where(scorable, shaped - total / tl.maximum(n, 1.0), 0.0)
        if STD:
            variance = tl.sum(a * a, 0) / tl.maximum(n - 1.0, 1.0)
            a = a / (tl.sqrt(variance) + 1e-4)
    else:  # leave-one-out
        a = shaped - (total - known) / tl.maximum(n - 1.0, 1.0)
    return tl.where(compared, a, 0.0), compared


@triton.jit
def _clip(log_ratio, a, epsilon_low, epsilon_high):
    """(-min(rho a, clip(rho) a), its derivative by log rho, clipped below, clipped above)."""
    ratio = tl.exp(log_ratio)
    low = (ratio < 1.0 - epsilon_low) & (a < 0)
    high = (ratio > 1.0 + epsilon_high) & (a > 0)
    # where nothing moves the ratio may be inf, and inf times 0 would be nan
    still = low | high | (a == 0)
    moving = -tl.exp(tl.where(still, 0.0, log_ratio)) * a
    edge = tl.where(low, 1.0 - epsilon_low, 1.0 + epsilon_high)
    bound = tl.where(a == 0, 0.0, -edge * a)
    loss = tl.where(still, bound, moving)
    return loss, tl.where(still, 0.0, moving), low.to(tl.float32), high.to(tl.float32)


@triton.jit
def _segments_kernel(
    logps,
    cu_seqlens,
    rewards,
    advantages,
    token_advantages,
    old_logps,
    ref_logps,
    mask,
    entropy,
    coefficients,
    table,
    R,
    K,
    beta,
    epsilon_low,
    epsilon_high,
    denominator,
    HAS_REWARDS: tl.constexpr,
    HAS_TOKEN_ADVANTAGES: tl.constexpr,
    HAS_OLD: tl.constexpr,
    HAS_REF: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    GROUP_MEAN: tl.constexpr,
    GROUP_STD: tl.constexpr,
    KL_TO_GO: tl.constexpr,
    KL_LOSS: tl.constexpr,
    KL_CORRECTED: tl.constexpr,
    TOKEN_LEVEL: tl.constexpr,
    TOKEN_MEAN: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Rows first:first + K, one group: their coefficients and their columns of the table."""
    first = tl.program_id(0) * K
    lane = tl.arange(0, BLOCK_K)
    lane_t = tl.arange(0, BLOCK_T)

    # First pass over the tokens: sums per row, those that the advantages need kept in registers.
    kl_of = tl.zeros([BLOCK_K], tl.float32)
    ratio_of = tl.zeros([BLOCK_K], tl.float32)
    count_of = tl.zeros([BLOCK_K], tl.float32)
    for k in range(0, K):
        begin = tl.load(cu_seqlens + first + k)
        end = tl.load(cu_seqlens + first + k + 1)
        logp_sum = tl.zeros([BLOCK_T], tl.float32)
        kl_sum = tl.zeros([BLOCK_T], tl.float32)
        ratio_sum = tl.zeros([BLOCK_T], tl.float32)
        token_ratio_sum = tl.zeros([BLOCK_T], tl.float32)
        entropy_sum = tl.zeros([BLOCK_T], tl.float32)
        count = tl.zeros([BLOCK_T], tl.float32)
        for start in range(begin, end, BLOCK_T):
            t = start + lane_t
            valid = t < end
            if HAS_MASK:
                valid = valid & (tl.load(mask + t, mask=valid, other=0) != 0)
            logp = tl.load(logps + t, mask=valid, other=0.0)
            logp_sum += logp
            count += valid.to(tl.float32)
            if HAS_REF:
                kl_sum += logp - tl.load(ref_logps + t, mask=valid, other=0.0)
            if HAS_OLD:
                log_ratio = _log_ratio(logp, tl.load(old_logps + t, mask=valid, other=0.0))
                ratio_sum += log_ratio
                token_ratio_sum += tl.where(valid, tl.exp(log_ratio), 0.0)
            if HAS_ENTROPY:
                entropy_sum += tl.load(entropy + t, mask=valid, other=0.0)
        here = lane == k
        kl_of = tl.where(here, tl.sum(kl_sum, 0), kl_of)
        ratio_of = tl.where(here, tl.sum(ratio_sum, 0), ratio_of)
        count_of = tl.where(here, tl.sum(count, 0), count_of)
        tl.store(table + R * LOGP_SUM + first + k, tl.sum(logp_sum, 0))
        tl.store(table + R * ENTROPY_SUM + first + k, tl.sum(entropy_sum, 0))
        if HAS_OLD:
            tl.store(table + R * TOKEN_RATIO_SUM + first + k, tl.sum(token_ratio_sum, 0))
        else:  # on-policy: every ratio is 1
            tl.store(table + R * TOKEN_RATIO_SUM + first + k, tl.sum(count, 0))

    # The group's K rows at once: advantages, and with one ratio per row its clip.
    inside = lane < K
    row = first + lane
    a = tl.zeros([BLOCK_K], tl.float32)
    shaped = tl.full([BLOCK_K], float("nan"), tl.float32)
    compared = inside
    if HAS_REWARDS:
        shaped = tl.load(rewards + row, mask=inside, other=float("nan"))
        if not KL_LOSS:
            shaped -= beta * kl_of
        a, compared = _group_advantages(shaped, inside, GROUP_MEAN, GROUP_STD)
    elif not HAS_TOKEN_ADVANTAGES:
        a = tl.load(advantages + row, mask=inside, other=0.0)
        a = tl.where(a == a, a, 0.0)  # nan: unscorable
    tl.store(table + R * ADVANTAGES + row, a, mask=inside)
    tl.store(table + R * KL + row, kl_of, mask=inside)
    tl.store(table + R * SHAPED_REWARDS + row, shaped, mask=inside)
    tl.store(table + R * LOG_RATIO + row, ratio_of, mask=inside)
    tl.store(table + R * NUM_TOKENS + row, count_of, mask=inside)
    slope_of = tl.zeros([BLOCK_K], tl.float32)
    if not TOKEN_LEVEL:
        loss, slope_of, low, high = _clip(ratio_of, a, epsilon_low, epsilon_high)
        tl.store(table + R * LOSS_PER_ROW + row, loss, mask=inside)
        tl.store(table + R * CLIPPED_LOW + row, low, mask=inside)
        tl.store(table + R * CLIPPED_HIGH + row, high, mask=inside)

    # Second pass: the coefficient of every token, and with one ratio per token its loss.
    for k in range(0, K):
        begin = tl.load(cu_seqlens + first + k)
        end = tl.load(cu_seqlens + first + k + 1)
        a_k = _pick(a, lane, k)
        slope_k = _pick(slope_of, lane, k)
        share = 1.0 / tl.maximum(_pick(count_of, lane, k), 1.0)
        weight = 1.0
        if TOKEN_MEAN:
            weight = share
        kept = _pick(compared.to(tl.float32), lane, k) > 0
        loss_sum = tl.zeros([BLOCK_T], tl.float32)
        low_sum = tl.zeros([BLOCK_T], tl.float32)
        high_sum = tl.zeros([BLOCK_T], tl.float32)
        a_sum = tl.zeros([BLOCK_T], tl.float32)
        paid = 0.0  # KL of the tokens before this block
        for start in range(begin, end, BLOCK_T):
            t = start + lane_t
            in_row = t < end
            valid = in_row
            if HAS_MASK:
                valid = valid & (tl.load(mask + t, mask=valid, other=0) != 0)
            log_ratio = tl.zeros([BLOCK_T], tl.float32)
            kl = tl.zeros([BLOCK_T], tl.float32)
            logp = 0.0
            if (HAS_OLD and TOKEN_LEVEL) or KL_TO_GO or KL_LOSS:
                logp = tl.load(logps + t, mask=valid, other=0.0)
            if HAS_OLD and TOKEN_LEVEL:
                log_ratio = _log_ratio(logp, tl.load(old_logps + t, mask=valid, other=0.0))
            if KL_TO_GO or KL_LOSS:
                kl = logp - tl.load(ref_logps + t, mask=valid, other=0.0)
            slope = slope_k + tl.zeros([BLOCK_T], tl.float32)
            if TOKEN_LEVEL:
                a_t = a_k + tl.zeros([BLOCK_T], tl.float32)
                if HAS_TOKEN_ADVANTAGES:
                    a_t = tl.load(token_advantages + t, mask=valid, other=0.0)
                    a_sum += a_t
                if KL_TO_GO:
                    a_t += beta * (paid + tl.cumsum(kl, 0) - kl)
                    a_t = tl.where(kept, a_t, 0.0)
                    paid += tl.sum(kl, 0)
                loss, slope, low, high = _clip(log_ratio, a_t, epsilon_low, epsilon_high)
                if KL_LOSS:  # k3, as in `_k3_penalty` of the reference
                    e = _expm1(-kl)
                    if KL_CORRECTED:
                        ratio = tl.exp(log_ratio)
                        loss += beta * ratio * (e + kl)
                        slope += beta * ratio * kl
                    else:
                        loss += beta * (e + kl)
                        slope -= beta * e
                loss_sum += tl.where(valid, loss, 0.0)
                low_sum += tl.where(valid, low, 0.0)
                high_sum += tl.where(valid, high, 0.0)
                slope *= weight
            slope = tl.where(valid, slope / denominator, 0.0)
            tl.store(coefficients + t, slope, mask=in_row)
        if TOKEN_LEVEL:
            tl.store(table + R * LOSS_PER_ROW + first + k, tl.sum(loss_sum, 0) * weight)
            tl.store(table + R * CLIPPED_LOW + first + k, tl.sum(low_sum, 0) * share)
            tl.store(table + R * CLIPPED_HIGH + first + k, tl.sum(high_sum, 0) * share)
        if HAS_TOKEN_ADVANTAGES:
            tl.store(table + R * ADVANTAGES + first + k, tl.sum(a_sum, 0))


def objective_triton(
    logps: Tensor,
    cu_seqlens: Tensor,
    inputs: LossInputs,
    entropy: Tensor | None,
    options: LossOptions,
) -> tuple[Tensor, Tensor]:
    """`objective_torch` in one launch; not for normalize=True, which looks at all rows."""
    assert not (options.normalize and inputs.rewards is not None)
    num_rows = cu_seqlens.numel() - 1
    coefficients = torch.empty_like(logps)
    table = torch.empty(len(TABLE_FIELDS), num_rows, dtype=torch.float32, device=logps.device)
    if num_rows == 0:
        return coefficients, table
    group = options.num_generations if inputs.rewards is not None else 1
    # without rewards nothing reads the KL for the advantages
    kl_to_go = options.kl == "reward_to_go" and inputs.rewards is not None and options.beta != 0

    def plain(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.float().contiguous()

    mask = None if inputs.mask is None else inputs.mask.contiguous()

    rewards, advantages, token_advantages, old_logps, ref_logps = map(plain, inputs[:5])
    with on_device_of(logps):
        _segments_kernel[(num_rows // group,)](
            logps.contiguous(),
            cu_seqlens.contiguous(),
            rewards,
            advantages,
            token_advantages,
            old_logps,
            ref_logps,
            mask,
            plain(entropy),
            coefficients,
            table,
            num_rows,
            group,
            options.beta,
            options.epsilon_low,
            options.high,
            options.denominator,
            HAS_REWARDS=rewards is not None,
            HAS_TOKEN_ADVANTAGES=token_advantages is not None,
            HAS_OLD=old_logps is not None,
            HAS_REF=ref_logps is not None,
            HAS_MASK=mask is not None,
            HAS_ENTROPY=entropy is not None,
            GROUP_MEAN=options.advantage in ("grpo", "dr_grpo"),
            GROUP_STD=options.advantage == "grpo",
            KL_TO_GO=kl_to_go,
            KL_LOSS=options.kl_in_loss,
            KL_CORRECTED=options.kl == "corrected_loss",
            TOKEN_LEVEL=options.level == "token",
            TOKEN_MEAN=options.token_mean,
            BLOCK_K=triton.next_power_of_2(group),
            BLOCK_T=512,
            num_warps=4,
        )
    return coefficients, table
