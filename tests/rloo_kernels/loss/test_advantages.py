"""Rewards -> advantages against plain loops: leave-one-out, GRPO, scaling, reward-to-go; laws."""

import math
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rloo_kernels import leave_one_out, rloo_advantages, token_level_advantages
from rloo_kernels.loss.advantages import (
    comparable_rows,
    group_normalized,
    nan_moments,
    scaled_advantages,
    whiten,
)

from tests.support.kernel_helpers import bounds
from tests.support.kernel_losses import group_advantages

NAN = math.nan
REWARD = st.floats(-100, 100, width=32)
SEED = st.integers(0, 10**6)
several = settings(max_examples=60, deadline=None, derandomize=True)


@st.composite
def groups(draw, unscorable=False):
    """(P, K) rewards in float64, some NaN on request."""
    num_prompts, k = draw(st.integers(1, 5)), draw(st.integers(2, 6))
    value = st.one_of(REWARD, st.just(NAN)) if unscorable else REWARD
    row = st.lists(value, min_size=k, max_size=k)
    rows = draw(st.lists(row, min_size=num_prompts, max_size=num_prompts))
    return torch.tensor(rows, dtype=torch.double)


@st.composite
def lengths(draw, min_size=1):
    """Tokens per row; rows without any are among them."""
    return draw(st.lists(st.integers(0, 5), min_size=min_size, max_size=6))


def close(got, want, atol=1e-9):
    want = torch.as_tensor(want, dtype=torch.double)
    torch.testing.assert_close(got.double(), want, rtol=1e-9, atol=atol, equal_nan=True)


def loop(rewards, advantage="rloo"):
    """Advantages of rewards (P, K), one number at a time."""
    found = group_advantages(rewards.view(-1).tolist(), rewards.shape[1], advantage)
    return torch.tensor(found, dtype=torch.double).view(rewards.shape)


# --- leave-one-out


@several
@given(groups(unscorable=True))
def test_leave_one_out_equals_a_loop(rewards):
    close(leave_one_out(rewards), loop(rewards))


@pytest.mark.parametrize(("rewards", "want"), [
    ([[1.0, 3.0]], [[-2.0, 2.0]]),
    ([[0.0, 0.0, 3.0]], [[-1.5, -1.5, 3.0]]),
    ([[NAN, 1.0, 2.0]], [[0.0, -1.0, 1.0]]),
    ([[NAN, 5.0]], [[0.0, 0.0]]),
    ([[NAN, NAN]], [[0.0, 0.0]]),
], ids=str)  # fmt: skip
def test_leave_one_out_by_hand(rewards, want):
    close(leave_one_out(torch.tensor(rewards)), want)


@several
@given(groups())
def test_advantages_of_a_group_sum_to_zero(rewards):
    close(leave_one_out(rewards).sum(1), torch.zeros(len(rewards)))


@several
@given(groups())
def test_advantage_is_the_scaled_distance_from_the_mean(rewards):
    k = rewards.shape[1]
    close(leave_one_out(rewards), k / (k - 1) * (rewards - rewards.mean(1, keepdim=True)))


@several
@given(groups(unscorable=True), st.lists(REWARD, min_size=5, max_size=5))
def test_a_constant_added_to_a_group_changes_nothing(rewards, constants):
    shift = torch.tensor(constants, dtype=torch.double)[: len(rewards), None]
    close(leave_one_out(rewards + shift), leave_one_out(rewards))


@several
@given(groups(unscorable=True))
def test_groups_do_not_see_each_other(rewards):
    alone = torch.cat([leave_one_out(row[None]) for row in rewards])
    assert torch.equal(leave_one_out(rewards), alone)


@pytest.mark.parametrize("shape", [(3, 1), (4,), (2, 2, 2)], ids=str)
def test_leave_one_out_needs_two_samples(shape):
    with pytest.raises(ValueError, match="K >= 2"):
        leave_one_out(torch.zeros(shape))


# --- GRPO


@several
@given(groups(unscorable=True))
def test_group_normalized_equals_a_loop(rewards):
    close(group_normalized(rewards), loop(rewards, "grpo"), atol=1e-8)


@several
@given(groups())
def test_group_normalized_is_trl_s_formula(rewards):
    """TRL 1.16, scale_rewards="group": (r - mean of the group) / (std of the group + 1e-4)."""
    mean, std = rewards.mean(1, keepdim=True), rewards.std(1, keepdim=True)
    close(group_normalized(rewards), (rewards - mean) / (std + 1e-4), atol=1e-8)


@several
@given(groups(unscorable=True))
def test_normalized_groups_do_not_see_each_other(rewards):
    alone = torch.cat([group_normalized(row[None]) for row in rewards])
    assert torch.equal(group_normalized(rewards), alone)


@several
@given(groups())
def test_group_normalized_has_mean_zero_and_at_most_unit_std(rewards):
    found = group_normalized(rewards)
    close(found.sum(1), torch.zeros(len(rewards)), atol=1e-7)
    assert (found.std(1) <= 1 + 1e-9).all()


def test_rloo_without_a_scale_is_grpo_times_its_std():
    """A = K / (K - 1) (R - mean): the two differ by a factor per group."""
    torch.manual_seed(0)
    rewards = torch.randn(3, 4).double()
    factor = 4 / 3 * (rewards.std(1, keepdim=True) + 1e-4)
    close(leave_one_out(rewards), factor * group_normalized(rewards))


@pytest.mark.parametrize("shape", [(3, 1), (4,)], ids=str)
def test_group_normalized_needs_two_samples(shape):
    with pytest.raises(ValueError, match="K >= 2"):
        group_normalized(torch.zeros(shape))


# --- advantages of a batch


@pytest.mark.parametrize("advantage", ["rloo", "grpo", "dr_grpo"])
@several
@given(rewards=groups(unscorable=True))
def test_rows_are_prompt_major(advantage, rewards):
    got = rloo_advantages(rewards.view(-1), rewards.shape[1], advantage=advantage)
    close(got, loop(rewards, advantage).view(-1), atol=1e-8)


@pytest.mark.parametrize("options", [{}, {"normalize": True}, {"advantage": "grpo"}], ids=str)
@several
@given(groups(unscorable=True), SEED)
def test_the_order_of_groups_does_not_matter(options, rewards, seed):
    order = torch.randperm(len(rewards), generator=torch.Generator().manual_seed(seed))
    k = rewards.shape[1]
    given_order = rloo_advantages(rewards.view(-1), k, **options).view(-1, k)
    close(rloo_advantages(rewards[order].view(-1), k, **options).view(-1, k), given_order[order])


@several
@given(groups(unscorable=True))
def test_normalized_advantages(rewards):
    """(A - mean) / (std + 1e-4), both over the rows that have something to compare with."""
    k = rewards.shape[1]
    advantages = loop(rewards).view(-1).tolist()
    scorable = [[not math.isnan(r) for r in row] for row in rewards.tolist()]
    counted = [s and sum(row) > 1 for row in scorable for s in row]
    kept = [a for a, c in zip(advantages, counted, strict=True) if c]
    mean = sum(kept) / len(kept) if kept else 0.0
    squares = sum((a - mean) ** 2 for a in kept)
    std = math.sqrt(squares / (len(kept) - 1)) if len(kept) > 1 else 0.0
    want = [(a - mean) / (std + 1e-4) if c else 0.0 for a, c in zip(advantages, counted)]  # noqa: B905
    close(rloo_advantages(rewards.view(-1), k, normalize=True), want, atol=1e-8)


def test_normalized_advantages_have_mean_zero_and_std_one_over_scorable_rows():
    torch.manual_seed(0)
    rewards = 5 + 3 * torch.randn(400)
    rewards[::7] = NAN
    got = rloo_advantages(rewards, 4, normalize=True)
    assert (got[::7] == 0).all()
    kept = got[~rewards.isnan()]
    assert abs(kept.mean()) < 1e-5
    assert abs(kept.std() - 1) < 1e-3


def test_equal_rewards_stay_without_signal_when_normalized():
    assert (rloo_advantages(torch.full((8,), 0.5), 4, normalize=True) == 0).all()


def test_whitened_rewards():
    """Unit variance over all scorable rows, mean kept; then leave-one-out."""
    rewards = [1.0, 5.0, NAN, 3.0]
    mean, variance = 3.0, 4.0
    scaled = [(r - mean) / math.sqrt(variance + 1e-8) + mean for r in rewards]
    close(whiten(torch.tensor(rewards).double()), scaled)
    got = rloo_advantages(torch.tensor(rewards).double(), 2, whiten_rewards=True)
    close(got, loop(torch.tensor(scaled).view(2, 2)).view(-1))


@pytest.mark.parametrize(("values", "mean", "std"), [
    ([NAN, 2.0, 4.0], 3.0, math.sqrt(2)), ([NAN, 2.0], 2.0, 0.0), ([NAN], NAN, NAN),
], ids=str)  # fmt: skip
def test_moments_leave_out_nan(values, mean, std):
    close(torch.stack(nan_moments(torch.tensor(values).double())), [mean, std])


@pytest.mark.parametrize(("rewards", "k"), [
    (torch.zeros(7), 2), (torch.zeros(4), 1), (torch.zeros(2, 2), 2),
], ids=["half-a-group", "one-sample", "two-dimensional"])  # fmt: skip
def test_whole_groups_are_asked_for(rewards, k):
    with pytest.raises(ValueError, match="whole groups of num_generations >= 2"):
        rloo_advantages(rewards, k)


# --- token-level KL


@several
@given(lengths(min_size=2), SEED)
def test_token_level_advantages_are_rewards_to_go(row_lengths, seed):
    """A_it = (reward_i - beta sum over s >= t of KL_is) - mean over j != i of R_j."""
    random = Random(seed)
    beta, num_rows = 0.3, len(row_lengths)
    kl = [[random.uniform(-1, 1) for _ in range(n)] for n in row_lengths]
    before_kl = [random.uniform(-2, 2) for _ in range(num_rows)]
    rewards = [s - beta * sum(row) for s, row in zip(before_kl, kl, strict=True)]
    want = []
    for i in range(num_rows):
        baseline = sum(r for j, r in enumerate(rewards) if j != i) / (num_rows - 1)
        want += [before_kl[i] - beta * sum(kl[i][t:]) - baseline for t in range(len(kl[i]))]
    advantages = rloo_advantages(torch.tensor(rewards).double(), num_rows)
    packed = torch.tensor([v for row in kl for v in row]).double()
    got = token_level_advantages(advantages, packed, bounds(row_lengths), beta)
    close(got, torch.tensor(want, dtype=torch.double), atol=1e-6)


@pytest.mark.parametrize("whiten_rewards", [False, True], ids=["", "whitened"])
def test_the_kl_to_go_is_scaled_as_the_rewards_are(whiten_rewards):
    """Normalised: the advantage differs along a row by beta KL in units of the same std."""
    rewards, cu = torch.tensor([100.0, -40.0, 10.0, -70.0]).double(), bounds([3] * 4)
    advantages, scale = scaled_advantages(rewards, 2, normalize=True, whiten_rewards=whiten_rewards)
    close(advantages, rloo_advantages(rewards, 2, normalize=True, whiten_rewards=whiten_rewards))
    got = token_level_advantages(advantages, torch.ones(12).double(), cu, 0.5 * scale)
    close(got.view(4, 3).diff(dim=1), torch.full((4, 2), 0.5 * float(scale)))
    raw = rloo_advantages(rewards, 2, whiten_rewards=whiten_rewards)
    unit = 1 / rewards.std() if whiten_rewards else 1.0
    assert float(scale) == pytest.approx(float(unit / (raw.std() + 1e-4)))


def test_rows_without_a_baseline_get_no_token_level_advantage():
    """An unscorable row, and the only scorable one of a group, are not moved by their KL either."""
    rewards, cu = torch.tensor([NAN, 1.0, NAN, 2.0, 4.0, NAN]), bounds([2] * 6)
    compared = comparable_rows(rewards, 3)
    assert compared.tolist() == [False, False, False, True, True, False]
    got = token_level_advantages(rloo_advantages(rewards, 3), torch.ones(12), cu, 0.5, compared)
    assert got.tolist() == [0, 0, 0, 0, 0, 0, -2.0, -1.5, 2.0, 2.5, 0, 0]
