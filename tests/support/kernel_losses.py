"""What the tests of the loss share: the objective row by row, its arguments, the fused op."""

from __future__ import annotations

import math
from typing import Any

import torch
from rloo_kernels import fused_linear_rloo_loss, rloo_objective
from torch import Tensor

from tests.support.kernel_helpers import NAN, plain_head


def group_advantages(shaped: list[float], k: int, advantage: str) -> list[float]:
    """Advantages of groups of k, one number at a time; NaN: unscorable."""
    out = []
    for start in range(0, len(shaped), k):
        group = shaped[start : start + k]
        kept = [r for r in group if not math.isnan(r)]
        for i, r in enumerate(group):
            others = [x for j, x in enumerate(group) if j != i and not math.isnan(x)]
            if math.isnan(r) or not others:
                out.append(0.0)
            elif advantage == "rloo":
                out.append(r - sum(others) / len(others))
            else:
                mean = sum(kept) / len(kept)
                std = math.sqrt(sum((x - mean) ** 2 for x in kept) / (len(kept) - 1))
                out.append((r - mean) / (std + 1e-4 if advantage == "grpo" else 1))
    return out


def objective_reference(
    logps: Tensor,
    row_lengths: list[int],
    *,
    rewards=None,
    advantages=None,
    token_advantages=None,
    old_logps=None,
    ref_logps=None,
    mask=None,
    entropy=None,
    num_generations=0,
    beta=0.0,
    epsilon_low=0.2,
    epsilon_high=None,
    denominator=None,
    advantage="rloo",
    kl="reward",
    level="sequence",
    token_mean=False,
    normalize=False,
) -> dict[str, Any]:
    """loss (differentiable) and the fields of Objective, from the formulas, row by row.

    Advantages and a KL in the reward are constants; without old_logps the old ones are the new.
    """
    num_rows = len(row_lengths)
    starts = [sum(row_lengths[:i]) for i in range(num_rows)]
    tokens = [
        [t for t in range(s, s + n) if mask is None or bool(mask[t])]
        for s, n in zip(starts, row_lengths, strict=True)
    ]
    now = logps.detach()
    old = now if old_logps is None else old_logps
    ref = now if ref_logps is None else ref_logps
    kls = [float((now[t] - ref[t]).sum()) for t in tokens]

    penalty = 0.0 if kl.endswith("loss") else beta
    shaped, compared, scale = [NAN] * num_rows, [True] * num_rows, 1.0
    if rewards is not None:
        shaped = [float(r) - penalty * x for r, x in zip(rewards, kls, strict=True)]
        a = group_advantages(shaped, num_generations, advantage)
        for i in range(num_rows):
            group = shaped[i // num_generations * num_generations :][:num_generations]
            compared[i] = not math.isnan(shaped[i]) and sum(not math.isnan(r) for r in group) > 1
        if normalize:
            kept = [x for x, c in zip(a, compared, strict=True) if c]
            mean = sum(kept) / max(len(kept), 1)
            std = math.sqrt(sum((x - mean) ** 2 for x in kept) / max(len(kept) - 1, 1))
            a = [(x - mean) / (std + 1e-4) if c else 0.0 for x, c in zip(a, compared, strict=True)]
            scale = 1 / (std + 1e-4)
    elif advantages is not None:
        a = [0.0 if math.isnan(x) else float(x) for x in advantages]
    else:
        a = [float(token_advantages[t].sum()) for t in tokens]

    high = epsilon_low if epsilon_high is None else epsilon_high
    loss_per_row, low_share, high_share = [], [], []
    for i, t in enumerate(tokens):
        a_t = torch.full((len(t),), a[i], dtype=logps.dtype)
        if token_advantages is not None:
            a_t = token_advantages[t]
        elif rewards is not None and kl == "reward_to_go":
            paid = (now[t] - ref[t]).cumsum(0) - (now[t] - ref[t])
            a_t = a_t + beta * scale * paid if compared[i] else a_t * 0
        exponent = logps[t] - old[t]
        if level == "sequence":
            exponent, a_t = exponent.sum()[None], torch.tensor([a[i]], dtype=logps.dtype)
        ratio = exponent.exp()
        bounded = ratio.clamp(1 - epsilon_low, 1 + high)
        each = -torch.minimum(ratio * a_t, bounded * a_t)
        if kl.endswith("loss"):
            d = ref[t] - logps[t]
            k3 = d.exp() - d - 1
            each = each + beta * k3 * (ratio if kl == "corrected_loss" else 1)
        count = max(len(each), 1)
        loss_per_row.append(each.sum() / (count if token_mean else 1))
        low_share.append(float(((ratio < 1 - epsilon_low) & (a_t < 0)).sum()) / count)
        high_share.append(float(((ratio > 1 + high) & (a_t > 0)).sum()) / count)

    def row_sums(x):
        return [0.0 if x is None else float(x[t].sum()) for t in tokens]

    total = sum(loss_per_row, start=logps.sum() * 0)
    return {
        "loss": total / (denominator or max(num_rows, 1)),
        "loss_per_row": [float(x.detach()) for x in loss_per_row],
        "advantages": a,
        "kl": kls,
        "shaped_rewards": shaped,
        "logp_sum": row_sums(now),
        "log_ratio": row_sums(now - old),
        "token_ratio_sum": row_sums((now - old).exp()),
        "clipped_low": low_share,
        "clipped_high": high_share,
        "entropy_sum": row_sums(entropy),
        "num_tokens": [len(t) for t in tokens],
    }


# name -> (what is given, options); with rewards, groups of three rows
LOSSES: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "reinforce": (("advantages",), {}),
    "ratio": (("advantages", "old_logps"), {"epsilon_low": 0.1, "epsilon_high": 0.3}),
    "ratio-per-token": (("advantages", "old_logps"), {"level": "token", "denominator": 7.5}),
    "token-advantages": (("token_advantages",), {"level": "token"}),
    "token-advantages-ratio": (
        ("token_advantages", "old_logps"),
        {"level": "token", "token_mean": True},
    ),
    "advantages-corrected-k3": (
        ("advantages", "ref_logps"),
        {"level": "token", "kl": "corrected_loss", "beta": 0.3},
    ),
    "rloo": (("rewards",), {}),
    "rloo-ratio": (("rewards", "old_logps"), {}),
    "rloo-kl": (("rewards", "ref_logps"), {"beta": 0.3}),
    "rloo-kl-ratio": (("rewards", "ref_logps", "old_logps"), {"beta": 0.3, "denominator": 10.0}),
    "rloo-normalized": (("rewards",), {"normalize": True}),
    "rloo-kl-normalized": (
        ("rewards", "ref_logps", "old_logps"),
        {"beta": 0.3, "normalize": True},
    ),
    "kl-reported-only": (("rewards", "ref_logps"), {}),
    "grpo-advantages-kl": (("rewards", "ref_logps"), {"beta": 0.3, "advantage": "grpo"}),
    "reward-to-go": (
        ("rewards", "ref_logps"),
        {"beta": 0.3, "kl": "reward_to_go", "level": "token"},
    ),
    "reward-to-go-ratio-normalized": (
        ("rewards", "ref_logps", "old_logps"),
        {"beta": 0.3, "kl": "reward_to_go", "level": "token", "normalize": True},
    ),
    "grpo": (
        ("rewards", "ref_logps", "old_logps"),
        {"advantage": "grpo", "level": "token", "token_mean": True, "kl": "loss", "beta": 0.3},
    ),
    "grpo-on-policy": (
        ("rewards", "ref_logps"),
        {"advantage": "grpo", "level": "token", "token_mean": True, "kl": "loss", "beta": 0.3},
    ),
    "grpo-corrected": (
        ("rewards", "ref_logps", "old_logps"),
        {"advantage": "grpo", "level": "token", "kl": "corrected_loss", "beta": 0.3},
    ),
    "dr-grpo": (
        ("rewards", "old_logps"),
        {"advantage": "dr_grpo", "level": "token", "denominator": 12.0, "epsilon_high": 0.28},
    ),
}
# groups of three: ragged, with empty rows; one empty altogether; one whose second row is unscorable
LENGTHS = [3, 0, 2, 0, 0, 0, 1, 4, 2]
TOKENS = sum(LENGTHS)


def make_loss(name: str, logps: Tensor, masked: bool = False, seed: int = 0) -> dict[str, Any]:
    """Arguments of the loss called `name` for rows of LENGTHS, whose log-probs are near `logps`."""
    give, options = LOSSES[name]
    random = torch.Generator().manual_seed(seed)
    num_rows, num_tokens = len(LENGTHS), sum(LENGTHS)

    def normal(*shape):
        return torch.randn(*shape, generator=random, dtype=torch.double)

    made = {
        "rewards": normal(num_rows),
        "advantages": normal(num_rows),
        "token_advantages": normal(num_tokens),
        "old_logps": logps.detach().double() + 0.3 * normal(num_tokens),
        "ref_logps": logps.detach().double() + 0.5 * normal(num_tokens),
    }
    made["rewards"][7] = made["advantages"][0] = NAN
    made["advantages"][2] = made["token_advantages"][1] = 0.0
    given: dict[str, Any] = {key: made[key] for key in give}
    if masked:
        given["mask"] = torch.rand(num_tokens, generator=random) < 0.6
    if "rewards" in give:
        given["num_generations"] = 3
    return given | options


def assert_objective(found, want: dict, rtol=1e-9, atol=1e-9) -> None:
    """Every field of `want` is that of `found`, an Objective."""
    for name, value in want.items():
        got = getattr(found, name).detach()
        torch.testing.assert_close(
            got.double(), torch.as_tensor(value, dtype=torch.double).detach(),
            rtol=rtol, atol=atol, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}",
        )  # fmt: skip


# --- the objective of log-probs


def log_probs(seed=0, size=TOKENS):
    return -torch.rand(size, generator=torch.Generator().manual_seed(seed)).double() * 3


def backward(logps, cu_seqlens=None, **loss):
    """(Objective, dloss / dlogps)"""
    leaf = logps.detach().clone().requires_grad_()
    found = rloo_objective(leaf, cu_seqlens, **loss)
    found.loss.backward()
    return found, leaf.grad


# --- a head and the fused op

NEEDS = {"all": (1, 1, 1), "frozen-head": (1, 0, 0), "frozen-hidden": (0, 1, 0), "none": (0, 0, 0)}
D, V = 5, 11
HEAD = {"temperature": 0.7, "softcap": 2.0, "logit_scale": 1.3}


def make_head(dtype=torch.double, num_rows=TOKENS, size=D, vocab_size=V, bias=True, seed=0):
    """(hidden, weight, ids, bias or None)"""
    torch.manual_seed(seed)
    hidden, weight = torch.randn(num_rows, size).to(dtype), torch.randn(vocab_size, size).to(dtype)
    b = torch.randn(vocab_size).to(dtype) if bias else None
    return hidden, weight, torch.randint(vocab_size, (num_rows,)), b


def leaves_of(inputs, need):
    hidden, weight, _, bias = inputs
    return [None if x is None else x.detach().clone().requires_grad_(bool(w))
            for x, w in zip((hidden, weight, bias), NEEDS[need], strict=True)]  # fmt: skip


def fused(hidden, weight, ids, cu_seqlens=None, bias=None, rows=64, **options):
    chunk_bytes = rows * weight.shape[0] * weight.element_size()
    return fused_linear_rloo_loss(
        hidden, weight, ids, cu_seqlens, bias=bias, chunk_bytes=chunk_bytes, return_entropy=True,
        **options,
    )  # fmt: skip


def gradients(found, leaves):
    """dloss / d leaf, None where none is wanted."""
    wanted = [x for x in leaves if x is not None and x.requires_grad]
    grads = iter(torch.autograd.grad(found.loss, wanted) if wanted else ())
    return [next(grads) if x is not None and x.requires_grad else None for x in leaves]


def reference_log_probs(inputs):
    hidden, weight, ids, bias = (x.double() if x.is_floating_point() else x for x in inputs)
    return plain_head(hidden, weight, ids, bias, **HEAD)[0]
