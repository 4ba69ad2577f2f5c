"""What the row kernels and the lm_head's matrix kernel compute alike: the logit and its exponent.

z = softcap(logit_scale raw)        softcap(x) = c tanh(x / c)        exp(z / tau) = 2^(z scale)
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def log1p(x):
    """log(1 + x) for x >= 0, with the digits of a small x."""
    series = x * (1.0 - x * (0.5 - x * (0.3333333333 - x * 0.25)))
    return tl.where(x < 0.01, series, tl.log(1.0 + x))


@triton.jit
def tanh(x):
    """(exp(2x) - 1) / (exp(2x) + 1), from the exponential that cannot overflow."""
    t = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    y = (1.0 - t) / (1.0 + t)
    # below 0.03 the difference above would lose digits
    small = tl.abs(x) * (1.0 - x * x * 0.3333333333)
    y = tl.where(tl.abs(x) < 0.03, small, y)
    return tl.where(x < 0, -y, y)


@triton.jit
def cap(raw, inner, softcap, MODE: tl.constexpr):
    """z of a raw logit by `cap_mode`: as it is (0), negated (-1), or soft-capped (1)."""
    if MODE == 1:
        raw = softcap * tanh(raw * inner)
    elif MODE == -1:
        raw = -raw
    return raw


def exponent_factors(
    temperature: float, softcap: float | None, logit_scale: float
) -> tuple[float, float, float]:
    """(scale, inner, softcap) such that p_v is proportional to 2^(cap(raw_v) scale).

    A soft-cap c gives z = c tanh(raw inner) with inner = logit_scale / c; without one, the size of
    logit_scale is part of `scale`.
    """
    scale = LOG2E.value / temperature
    if softcap is None:
        return scale * abs(logit_scale), 0.0, 0.0
    return scale, logit_scale / softcap, softcap


def cap_mode(softcap: float | None, logit_scale: float) -> int:
    """MODE of `cap`: 1 with a soft-cap, else 0, or -1 where logit_scale is negative."""
    return 1 if softcap is not None else (0 if logit_scale >= 0 else -1)
