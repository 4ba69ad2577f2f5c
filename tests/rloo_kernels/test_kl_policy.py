"""kl_policy: the KL in the reward is the sampling policy's, or the present one's."""

from __future__ import annotations

import pytest
import torch
from rloo_kernels import (
    fused_linear_rloo_loss,
    linear_logprob,
    rloo_advantages,
    rloo_loss,
    rloo_objective,
    token_level_advantages,
)
from rloo_kernels.loss.packed import segment_sum

BOUNDS = torch.tensor([0, 3, 6, 8, 10])
N, D, V, BETA = 10, 4, 9, 0.3


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.fixture
def given():
    torch.manual_seed(0)
    return {
        "hidden": draw(N, D), "weight": draw(V, D), "ids": torch.randint(V, (N,)),
        "rewards": draw(4), "old": -draw(N).abs(), "ref": -draw(N).abs(),
        "mask": torch.arange(N) != 4,
    }  # fmt: skip


def by_op(op, given, mask, **options):
    """(objective, gradient by the hidden states)."""
    hidden = given["hidden"].clone().requires_grad_()
    options = {"num_generations": 2, "old_logps": given["old"], "mask": mask, **options}
    if op == "fused":
        out = fused_linear_rloo_loss(hidden, given["weight"], given["ids"], BOUNDS, **options)
    elif op == "logits":
        out = rloo_loss(hidden @ given["weight"].T, given["ids"], BOUNDS, **options)
    else:
        logps = linear_logprob(hidden, given["weight"], given["ids"], mask=mask)
        out = rloo_objective(logps, BOUNDS, **options)
    return out, torch.autograd.grad(out.loss, hidden)[0]


@pytest.mark.parametrize("op", ["fused", "logits", "logps"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_the_sampling_policys_kl_is_subtracted_from_the_reward(given, op, masked, normalize):
    mask = given["mask"] if masked else None
    kl = given["old"] - given["ref"]
    kl = kl if mask is None else kl * mask
    shaped = given["rewards"] - BETA * segment_sum(kl, BOUNDS)
    advantages = rloo_advantages(shaped, 2, normalize=normalize)
    found, gradient = by_op(
        op, given, mask, rewards=given["rewards"], ref_logps=given["ref"], beta=BETA,
        kl_policy="sampling", normalize=normalize,
    )  # fmt: skip
    expected, right = by_op(op, given, mask, advantages=advantages, ref_logps=given["ref"])
    assert torch.allclose(gradient, right)
    assert torch.allclose(found.shaped_rewards, shaped)
    assert torch.allclose(found.advantages, advantages)
    for name in ("loss", "kl", "log_ratio", "clipped_low", "coefficients"):
        assert torch.allclose(getattr(found, name), getattr(expected, name)), name


def test_the_sampling_policys_kl_as_reward_to_go(given):
    kl = given["old"] - given["ref"]
    advantages = rloo_advantages(given["rewards"] - BETA * segment_sum(kl, BOUNDS), 2)
    per_token = token_level_advantages(advantages, kl, BOUNDS, BETA)
    common = {"level": "token", "ref_logps": given["ref"]}
    _, gradient = by_op(
        "fused", given, None, rewards=given["rewards"], beta=BETA, kl="reward_to_go",
        kl_policy="sampling", **common,
    )  # fmt: skip
    _, right = by_op("fused", given, None, token_advantages=per_token, **common)
    assert torch.allclose(gradient, right)


@pytest.mark.parametrize("op", ["fused", "logits", "logps"])
def test_the_present_policys_kl_is_the_default(given, op):
    logps = linear_logprob(given["hidden"], given["weight"], given["ids"])
    shaped = given["rewards"] - BETA * segment_sum(logps - given["ref"], BOUNDS)
    common = {"rewards": given["rewards"], "ref_logps": given["ref"], "beta": BETA}
    for options in ({}, {"kl_policy": "present"}):
        found, _ = by_op(op, given, None, **common, **options)
        assert torch.allclose(found.shaped_rewards, shaped)


@pytest.mark.parametrize("op", ["fused", "logits", "logps"])
def test_without_old_log_probs_the_two_are_one(given, op):
    common = {"rewards": given["rewards"], "ref_logps": given["ref"], "beta": BETA}
    found = [
        by_op(op, given, None, **common, old_logps=None, kl_policy=policy)
        for policy in ("present", "sampling")
    ]
    assert torch.equal(found[0][1], found[1][1])
    assert torch.equal(found[0][0].shaped_rewards, found[1][0].shaped_rewards)


def test_a_kl_in_the_loss_is_always_the_present_policys(given):
    common = {
        "rewards": given["rewards"], "ref_logps": given["ref"], "beta": BETA, "kl": "loss",
        "level": "token",
    }  # fmt: skip
    found = [by_op("fused", given, None, **common, kl_policy=p) for p in ("present", "sampling")]
    assert torch.equal(found[0][1], found[1][1])


def test_another_name_is_refused(given):
    with pytest.raises(ValueError, match="kl_policy must be one of"):
        by_op("fused", given, None, advantages=given["rewards"], kl_policy="old")
