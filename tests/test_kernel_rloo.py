"""Leave-one-out, normalisation and the clipped objective against plain loops, and their laws."""

import math
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rloo_kernels import (
    leave_one_out,
    rloo_advantages,
    rloo_objective,
    token_level_advantages,
)
from rloo_kernels.rloo import (
    comparable_rows,
    nan_moments,
    scaled_advantages,
    segment_exclusive_cumsum,
    segment_ids,
    segment_sum,
    whiten,
)

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


def bounds(row_lengths):
    return torch.tensor([0, *row_lengths]).cumsum(0)


def close(got, want, atol=1e-9):
    want = torch.as_tensor(want, dtype=torch.double)
    torch.testing.assert_close(got.double(), want, rtol=1e-9, atol=atol, equal_nan=True)


def leave_one_out_loop(rows):
    """A_i = R_i - mean of the other scorable rewards of the group, one number at a time."""
    out = []
    for row in rows:
        for i, reward in enumerate(row):
            others = [r for j, r in enumerate(row) if j != i and not math.isnan(r)]
            nothing = math.isnan(reward) or not others
            out.append(0.0 if nothing else reward - sum(others) / len(others))
    return torch.tensor(out, dtype=torch.double).view(len(rows), -1)


# --- leave-one-out


@several
@given(groups(unscorable=True))
def test_leave_one_out_equals_a_loop(rewards):
    close(leave_one_out(rewards), leave_one_out_loop(rewards.tolist()))


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


# --- advantages of a batch


@several
@given(groups(unscorable=True))
def test_rows_are_prompt_major(rewards):
    got = rloo_advantages(rewards.view(-1), rewards.shape[1])
    close(got, leave_one_out_loop(rewards.tolist()).view(-1))


@several
@given(groups(unscorable=True))
def test_normalized_advantages(rewards):
    """(A - mean) / (std + 1e-4), both over the rows that have something to compare with."""
    k = rewards.shape[1]
    advantages = leave_one_out_loop(rewards.tolist()).view(-1).tolist()
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
    close(got, leave_one_out_loop([scaled[:2], scaled[2:]]).view(-1))


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


# --- segments


@several
@given(lengths(), SEED)
def test_segment_operations_equal_loops(row_lengths, seed):
    random = Random(seed)
    rows = [[random.uniform(-1, 1) for _ in range(n)] for n in row_lengths]
    values = torch.tensor([v for row in rows for v in row], dtype=torch.double)
    cu = bounds(row_lengths)
    close(segment_sum(values, cu), [sum(row) for row in rows])
    before = [sum(row[:t]) for row in rows for t in range(len(row))]
    close(segment_exclusive_cumsum(values, cu), torch.tensor(before, dtype=torch.double))
    owners = [i for i, row in enumerate(rows) for _ in row]
    assert segment_ids(cu).tolist() == owners


def test_segments_without_any_row():
    nothing = torch.empty(0)
    assert segment_sum(nothing, torch.tensor([0])).shape == (0,)
    assert segment_exclusive_cumsum(nothing, torch.tensor([0])).shape == (0,)


def test_segment_sum_hands_every_token_its_row_s_gradient():
    values = torch.zeros(5, requires_grad=True)
    segment_sum(values, bounds([2, 0, 3])).backward(torch.tensor([1.0, 5.0, 7.0]))
    assert values.grad.tolist() == [1, 1, 7, 7, 7]


# --- token-level KL


@several
@given(lengths(min_size=2), SEED)
def test_token_level_advantages_are_rewards_to_go(row_lengths, seed):
    """A_it = (score_i - beta sum over s >= t of KL_is) - mean over j != i of R_j."""
    random = Random(seed)
    beta, num_rows = 0.3, len(row_lengths)
    kl = [[random.uniform(-1, 1) for _ in range(n)] for n in row_lengths]
    scores = [random.uniform(-2, 2) for _ in range(num_rows)]
    rewards = [s - beta * sum(row) for s, row in zip(scores, kl, strict=True)]
    want = []
    for i in range(num_rows):
        baseline = sum(r for j, r in enumerate(rewards) if j != i) / (num_rows - 1)
        want += [scores[i] - beta * sum(kl[i][t:]) - baseline for t in range(len(kl[i]))]
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


# --- the objective


def objective_loop(logps, old, advantages, low, high, denominator, token_level):
    """Rows of numbers -> (loss, its gradient, share clipped low, high), one number at a time."""
    loss, gradient, clipped_low, clipped_high = 0.0, [], [], []
    for i, (new_row, old_row) in enumerate(zip(logps, old, strict=True)):
        differences = [n - o for n, o in zip(new_row, old_row, strict=True)]
        if token_level:
            ratios, given = [math.exp(d) for d in differences], advantages[i]
        else:
            ratios, given = [math.exp(sum(differences))], [advantages[i]]
        slopes, lows, highs = [], [], []
        for ratio, a in zip(ratios, given, strict=True):
            bounded = min(max(ratio, 1 - low), 1 + high)
            loss -= min(ratio * a, bounded * a) / denominator
            lows.append(float(a < 0 and ratio < 1 - low))
            highs.append(float(a > 0 and ratio > 1 + high))
            slopes.append(0.0 if lows[-1] or highs[-1] else -ratio * a / denominator)
        gradient += slopes if token_level else slopes * len(new_row)
        clipped_low.append(sum(lows) / max(len(lows), 1))
        clipped_high.append(sum(highs) / max(len(highs), 1))
    return loss, gradient, clipped_low, clipped_high


@pytest.mark.parametrize("token_level", [False, True], ids=["sequence", "token"])
@several
@given(row_lengths=lengths(), seed=SEED)
def test_objective_equals_a_loop(token_level, row_lengths, seed):
    random = Random(seed)

    def numbers(scale):
        return [[random.gauss(0, scale) for _ in range(n)] for n in row_lengths]

    logps, old = numbers(0.2), numbers(0.2)
    advantages = numbers(1) if token_level else [random.gauss(0, 1) for _ in row_lengths]
    low, high, denominator = 0.15, 0.25, 2 * len(row_lengths)
    want = objective_loop(logps, old, advantages, low, high, denominator, token_level)

    def packed(rows):
        return torch.tensor([v for row in rows for v in row], dtype=torch.double)

    leaf = packed(logps).requires_grad_()
    got = rloo_objective(
        leaf,
        packed(old),
        packed(advantages) if token_level else torch.tensor(advantages, dtype=torch.double),
        bounds(row_lengths),
        epsilon_low=low,
        epsilon_high=high,
        denominator=denominator,
        token_level=token_level,
    )
    got.loss.backward()
    close(got.loss.detach(), want[0])
    close(leaf.grad, torch.tensor(want[1], dtype=torch.double))
    close(got.clipped_low, want[2])
    close(got.clipped_high, want[3])
    close(got.per_row_loss.sum() / denominator, want[0])
    differences = [
        [n - o for n, o in zip(a, b, strict=True)] for a, b in zip(logps, old, strict=True)
    ]
    close(got.log_ratio, [sum(row) for row in differences])
    close(got.token_ratio_sum, [sum(math.exp(d) for d in row) for row in differences])


def objective(log_ratio, advantage, **changes):
    """The objective of one row with one token, and its gradient."""
    logps = torch.tensor([float(log_ratio)], requires_grad=True)
    options = {"epsilon_low": 0.2, "epsilon_high": 0.3, "denominator": 1, **changes}
    found = rloo_objective(
        logps, torch.zeros(1), torch.tensor([float(advantage)]), torch.tensor([0, 1]), **options
    )
    found.loss.backward()
    return found, logps.grad.item()


@pytest.mark.parametrize("token_level", [False, True], ids=["sequence", "token"])
@pytest.mark.parametrize(("ratio", "advantage", "loss", "slope", "side"), [
    (1.5, 2.0, -2.6, 0.0, "high"),
    (1.5, -2.0, 3.0, 3.0, None),
    (0.5, 2.0, -1.0, -1.0, None),
    (0.5, -2.0, 1.6, 0.0, "low"),
    (1.1, 2.0, -2.2, -2.2, None),
    (1.5, 0.0, 0.0, 0.0, None),
])  # fmt: skip
def test_clipping_sides(ratio, advantage, loss, slope, side, token_level):
    found, gradient = objective(math.log(ratio), advantage, token_level=token_level)
    assert found.loss.item() == pytest.approx(loss, rel=1e-6)
    assert gradient == pytest.approx(slope, rel=1e-6)
    clipped = (found.clipped_low.item(), found.clipped_high.item())
    assert clipped == (float(side == "low"), float(side == "high"))


@pytest.mark.parametrize("token_level", [False, True], ids=["sequence", "token"])
@pytest.mark.parametrize(("advantage", "loss"), [(2.0, -2.6), (0.0, 0.0)])
def test_a_ratio_beyond_fp32_that_is_clipped_has_gradient_zero(advantage, loss, token_level):
    """exp(100) is inf in fp32: neither inf * 0 nor 0 * inf may reach the loss or the gradient."""
    found, gradient = objective(100.0, advantage, token_level=token_level)
    assert found.loss.item() == pytest.approx(loss, rel=1e-6)
    assert gradient == 0


def test_a_ratio_beyond_fp32_that_is_not_clipped_is_seen_as_not_finite():
    found, gradient = objective(100.0, -1.0)
    assert not math.isfinite(found.loss.item())
    assert not math.isfinite(gradient)


def test_nan_log_probs_are_seen_as_not_finite():
    found, gradient = objective(NAN, 1.0)
    assert math.isnan(found.loss.item())
    assert math.isnan(gradient)


@several
@given(lengths(), SEED)
def test_on_policy_gradient_is_minus_advantage_over_denominator(row_lengths, seed):
    """dL/dlogp_it = - A_i m_it / denominator, exactly: the ratio is 1."""
    random = Random(seed)
    cu = bounds(row_lengths)
    logps = torch.randn(int(cu[-1])).requires_grad_()
    advantages = torch.tensor([random.gauss(0, 1) for _ in row_lengths])
    rloo_objective(
        logps, logps, advantages, cu, epsilon_low=0.2, epsilon_high=0.2, denominator=7
    ).loss.backward()
    want = [-a / 7 for a, n in zip(advantages, row_lengths, strict=True) for _ in range(n)]
    torch.testing.assert_close(logps.grad, torch.tensor(want), rtol=1e-6, atol=0)


def test_on_policy_both_levels_have_the_same_gradient_without_kl():
    cu, advantages = bounds([3, 0, 2]), torch.tensor([0.5, 3.0, -1.0])
    gradients = []
    for token_level in (False, True):
        logps = torch.tensor([-1.0, -2.0, -0.5, -3.0, -0.1], requires_grad=True)
        a = (
            token_level_advantages(advantages, torch.randn(5), cu, 0.0)
            if token_level
            else advantages
        )
        rloo_objective(
            logps, logps, a, cu,
            epsilon_low=0.2, epsilon_high=0.2, denominator=3, token_level=token_level,
        ).loss.backward()  # fmt: skip
        gradients.append(logps.grad)
    torch.testing.assert_close(*gradients)
    assert gradients[0].abs().sum() > 0


def test_only_the_new_log_probs_get_a_gradient():
    tensors = [torch.zeros(2, requires_grad=True) for _ in range(3)]
    logps, old, advantages = tensors
    rloo_objective(
        logps, old, advantages + 1, torch.tensor([0, 1, 2]),
        epsilon_low=0.2, epsilon_high=0.2, denominator=2,
    ).loss.backward()  # fmt: skip
    assert [t.grad is not None for t in tensors] == [True, False, False]


def test_fp64_in_fp64_out():
    found = rloo_objective(
        torch.zeros(1).double(), torch.zeros(1).double(), torch.ones(1).double(),
        torch.tensor([0, 1]), epsilon_low=0.2, epsilon_high=0.2, denominator=1,
    )  # fmt: skip
    assert {x.dtype for x in found} == {torch.double}
