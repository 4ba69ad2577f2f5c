"""The clipped objective against plain loops and TRL's formulas, and its laws."""

from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rloo_kernels import leave_one_out
from rloo_kernels.loss.advantages import BY_GROUP

from tests.support.kernel_helpers import NAN, bounds, nan_in_new_memory  # noqa: F401
from tests.support.kernel_losses import (
    LENGTHS,
    LOSSES,
    TOKENS,
    assert_objective,
    backward,
    log_probs,
    make_loss,
    objective_reference,
)

pytestmark = pytest.mark.usefixtures("nan_in_new_memory")
SEED = st.integers(0, 10**6)
several = settings(max_examples=60, deadline=None, derandomize=True)
losses = pytest.mark.parametrize("name", list(LOSSES))
masks = pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])


def close(got, want, rtol=1e-9, atol=1e-9):
    torch.testing.assert_close(got, want, rtol=rtol, atol=atol, equal_nan=True)


# --- against the formulas


@masks
@losses
def test_loss_gradient_and_all_fields_equal_the_formulas(name, masked):
    logps = log_probs()
    loss = make_loss(name, logps, masked)
    leaf = logps.clone().requires_grad_()
    want = objective_reference(leaf, LENGTHS, **loss, entropy=-logps)
    want["loss"].backward()
    found, gradient = backward(logps, bounds(LENGTHS), **loss, entropy=-logps)
    assert_objective(found, want)
    close(gradient, leaf.grad)
    close(found.coefficients, leaf.grad)


@st.composite
def batches(draw):
    """(row lengths of whole groups, K): whole groups of length 0 are among them."""
    k = draw(st.integers(2, 4))
    groups = draw(st.integers(1, 3))
    return draw(st.lists(st.integers(0, 4), min_size=k * groups, max_size=k * groups)), k


@pytest.mark.parametrize("kl", ["reward", "loss", "corrected_loss", "reward_to_go"])
@pytest.mark.parametrize("advantage", ["rloo", "grpo", "dr_grpo"])
@several
@given(batches(), SEED)
def test_ragged_groups_equal_the_formulas(advantage, kl, batch, seed):
    (lengths, k), random = batch, Random(seed)
    level = random.choice(["sequence", "token"]) if kl == "reward" else "token"

    def numbers(scale, count):
        return torch.tensor([random.gauss(0, scale) for _ in range(count)], dtype=torch.double)

    logps, rewards = numbers(0.3, sum(lengths)), numbers(1, len(lengths))
    rewards[torch.tensor([random.random() < 0.2 for _ in lengths])] = NAN
    old, own = numbers(0.3, len(logps)), numbers(1, len(logps)) > 0.5
    loss = {
        "rewards": rewards,
        "old_logps": torch.where(own, logps, old), "ref_logps": numbers(0.3, len(logps)),
        "num_generations": k, "beta": random.choice([0.0, 0.2]), "advantage": advantage,
        "kl": kl, "level": level, "normalize": random.random() < 0.5,
        "token_mean": level == "token" and random.random() < 0.5,
    }  # fmt: skip
    leaf = logps.clone().requires_grad_()
    want = objective_reference(leaf, lengths, **loss)
    want["loss"].backward()
    loss["old_logps"] = torch.where(own, NAN, old)  # NaN: the token's own
    found, gradient = backward(logps, bounds(lengths), **loss)
    assert_objective(found, want, rtol=1e-8, atol=1e-8)
    close(gradient, leaf.grad, rtol=1e-8, atol=1e-8)


@masks
@losses
def test_fp32_is_as_exact_as_fp32_can_be(name, masked):
    logps = log_probs()
    loss = make_loss(name, logps, masked)
    exact, want = backward(logps, bounds(LENGTHS), **loss)
    in_fp32 = {key: x.float() if isinstance(x, torch.Tensor) and key != "mask" else x
               for key, x in loss.items()}  # fmt: skip
    found, got = backward(logps.float(), bounds(LENGTHS), **in_fp32)
    assert {x.dtype for x in found if x is not None} == {torch.float32}
    close(got.double(), want, rtol=1e-4, atol=1e-5)
    close(found.loss.double(), exact.loss, rtol=1e-4, atol=1e-5)


def trl_grpo_loss(logps, old, ref, rewards, mask, k, beta, low, high, kind, longest):
    """TRL 1.16's GRPO loss of padded rows: trl_math E, token-level ratio, k3 in the loss; of the
    kind "grpo" with bias correction and scale_rewards="group", of the other without."""
    grouped = rewards.view(-1, k)
    mean, std = (f(dim=1).repeat_interleave(k) for f in (grouped.mean, grouped.std))
    a = ((rewards - mean) / (std + 1e-4 if kind == "grpo" else 1))[:, None]
    ratio, d = (logps - old).exp(), ref - logps
    token_loss = -torch.min(ratio * a, ratio.clamp(1 - low, 1 + high) * a)
    token_loss = token_loss + beta * (d.exp() - d - 1) * (ratio if kind == "grpo" else 1)
    if kind == "grpo":
        return ((token_loss * mask).sum(-1) / mask.sum(-1).clamp(min=1)).mean()
    return (token_loss * mask).sum() / (len(rewards) * longest)


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo"])
def test_grpo_is_that_of_trl(kind):
    torch.manual_seed(0)
    shape, k = (6, 5), 3
    logps, old, ref = (-torch.rand(shape).double() for _ in range(3))
    rewards = torch.randn(6).double()
    mask = torch.arange(5) < torch.tensor([5, 3, 0, 1, 4, 2])[:, None]
    leaf = logps.clone().requires_grad_()
    want = trl_grpo_loss(leaf, old, ref, rewards, mask, k, 0.04, 0.2, 0.28, kind, longest=5)
    want.backward()
    found, gradient = backward(
        logps, rewards=rewards, old_logps=old, ref_logps=ref, mask=mask, num_generations=k,
        beta=0.04, epsilon_high=0.28, advantage=kind, level="token",
        kl="corrected_loss" if kind == "grpo" else "loss",
        token_mean=kind == "grpo", denominator=None if kind == "grpo" else 6 * 5,
    )  # fmt: skip
    close(found.loss.detach(), want.detach())
    close(gradient, leaf.grad)
    close(found.advantages, BY_GROUP[kind](rewards.view(-1, k)).view(-1))


# --- layouts and laws


@losses
def test_padded_rows_equal_packed_ones(name):
    logps = log_probs()
    loss = make_loss(name, logps)
    packed, gradient = backward(logps, bounds(LENGTHS), **loss, entropy=-logps)
    valid = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]

    def padded(x):
        out = torch.full(valid.shape, NAN, dtype=torch.double)  # padding holds anything
        return out.masked_scatter(valid, x)

    loss = {key: padded(x) if isinstance(x, torch.Tensor) and x.shape == (TOKENS,) else x
            for key, x in loss.items()}  # fmt: skip
    found, got = backward(padded(logps), **loss, mask=valid, entropy=padded(-logps))
    assert (got[~valid] == 0).all()
    close(got[valid], gradient)
    close(found.coefficients[valid], packed.coefficients)
    names = [n for n in found._fields if n not in ("coefficients", "logps", "entropy")]
    assert_objective(found, {n: getattr(packed, n) for n in names})


@several
@given(batches(), SEED)
def test_on_policy_gradient_is_minus_advantage_over_denominator(batch, seed):
    """dL/dlogp_it = - A_i m_it / denominator, exactly: the ratio is 1."""
    (lengths, k), random = batch, torch.Generator().manual_seed(seed)
    rewards = torch.randn(len(lengths), generator=random)
    logps = torch.randn(sum(lengths), generator=random)
    mask = torch.rand(sum(lengths), generator=random) < 0.7
    loss = {"rewards": rewards, "mask": mask, "num_generations": k, "denominator": 7}
    _, gradient = backward(logps, bounds(lengths), **loss)
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    a = leave_one_out(rewards.view(-1, k)).view(-1)[owner]
    torch.testing.assert_close(gradient, torch.where(mask, -a / 7, 0.0), rtol=1e-6, atol=0)
    given_old = backward(logps, bounds(lengths), **loss, old_logps=logps)[1]
    assert torch.equal(given_old, gradient)
    by_token = backward(logps, bounds(lengths), **loss, level="token")[1]
    torch.testing.assert_close(by_token, gradient)


@losses
def test_the_order_of_groups_does_not_matter(name):
    """Groups 2, 0, 1: the same loss, the gradients of the same tokens."""
    logps = log_probs()
    loss = make_loss(name, logps)
    rows = torch.tensor([6, 7, 8, 0, 1, 2, 3, 4, 5])
    starts = bounds(LENGTHS)
    tokens = torch.cat([torch.arange(starts[r], starts[r + 1]) for r in rows])
    by_shape = {(TOKENS,): tokens, (len(LENGTHS),): rows}
    moved = {key: x[by_shape[tuple(x.shape)]] if isinstance(x, torch.Tensor) else x
             for key, x in loss.items()}  # fmt: skip
    want, gradient = backward(logps, starts, **loss)
    found, got = backward(logps[tokens], bounds([LENGTHS[r] for r in rows]), **moved)
    close(found.loss, want.loss)
    close(got, gradient[tokens])


@pytest.mark.parametrize("name", [n for n in LOSSES if n.startswith(("rloo", "reward"))])
def test_a_constant_added_to_the_rewards_of_a_group_changes_nothing(name):
    logps = log_probs()
    loss = make_loss(name, logps)
    _, want = backward(logps, bounds(LENGTHS), **loss)
    loss["rewards"] = loss["rewards"] + torch.tensor([5.0, -3, 100]).repeat_interleave(3)
    close(backward(logps, bounds(LENGTHS), **loss)[1], want, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", [n for n in LOSSES if "normalized" not in n])
def test_micro_batches_of_whole_groups_add_up(name):
    """One call or one per group, each with the step's denominator: the same gradient."""
    logps = log_probs()
    loss = make_loss(name, logps) | {"denominator": 9.0}
    want = backward(logps, bounds(LENGTHS), **loss)[1]
    parts = []
    for r in range(0, 9, 3):
        t0, t1 = sum(LENGTHS[:r]), sum(LENGTHS[: r + 3])
        of = {(TOKENS,): slice(t0, t1), (9,): slice(r, r + 3)}
        part = {key: x[of[tuple(x.shape)]] if isinstance(x, torch.Tensor) else x
                for key, x in loss.items()}  # fmt: skip
        parts.append(backward(logps[t0:t1], bounds(LENGTHS[r : r + 3]), **part)[1])
    close(torch.cat(parts), want)
