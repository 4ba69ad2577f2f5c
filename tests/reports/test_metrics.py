"""Logged numbers against values worked out by hand from TRL's definitions."""

import math

import pytest
import torch
from rloo_kernels import rloo_objective

from rloo_fast.reports.metric_names import is_timing
from rloo_fast.reports.metrics import Metrics, rollout_metrics, update_metrics

NAN = math.nan


def columns(**values):
    return {name: torch.tensor(v, dtype=torch.double) for name, v in values.items()}


# --- one generation batch: two prompts with two completions each

ROLLOUT = columns(
    length=[4, 2, 6, 6],
    tokens=[4, 2, 6, 0],  # the last one is masked
    truncated=[0, 0, 1, 1],
    reward_0=[1.0, 3.0, NAN, 5.0],
    reward_1=[NAN, NAN, NAN, 2.0],
    reward=[1.0, 3.0, NAN, 7.0],
    score=[0.5, 1.5, NAN, 2.0],
    kl=[0.4, -0.2, 1.0, 0.0],
    shaped_reward=[0.3, 1.6, NAN, 2.0],
    surprisal=[3.0, 5.0, 10.0, 0.0],
    # token versions 3 3 4 4 | 4 4 | 1 1 1 1 3 3 | masked, of a policy at version 4
    staleness_sum=[2, 0, 14, 0],
    staleness_max=[1, 0, 3, 0],
    stale_tokens=[2, 0, 6, 0],
    num_versions=[2, 1, 2, 0],
)

EXPECTED = {
    "completions/mean_length": 4.5,
    "completions/min_length": 2,
    "completions/max_length": 6,
    "completions/clipped_ratio": 0.5,
    "completions/mean_terminated_length": 3,
    "completions/min_terminated_length": 2,
    "completions/max_terminated_length": 4,
    "rewards/first/mean": 3,
    "rewards/first/std": 2,  # unbiased, of 1, 3, 5
    "rewards/second/mean": 2,
    "rewards/second/std": NAN,  # of one value
    "reward": 11 / 3,
    "reward_std": math.sqrt(28 / 3),  # 1, 3, 7 around 11 / 3
    "frac_reward_zero_std": 0.5,  # only one scorable reward in the second group
    "kl": 1.2 / 12,  # per counted token
    "objective/kl": 0.3,  # per completion
    "objective/non_score_reward": -0.15,
    "objective/rlhf_reward": 1.3,
    "objective/scores": 4 / 3,
    "objective/entropy": 4.5,
    "val/num_eos_tokens": 2,
    "staleness/mean": 16 / 12,
    "staleness/max": 3,
    "staleness/frac_stale_tokens": 8 / 12,
    "staleness/versions_per_completion": 5 / 3,
}


@pytest.fixture(scope="module")
def rollout():
    return rollout_metrics(ROLLOUT, ["first", "second"], 2, beta=0.5)


@pytest.mark.parametrize("name", EXPECTED)
def test_rollout_metric(rollout, name):
    assert rollout[name] == pytest.approx(EXPECTED[name], nan_ok=True)


def test_no_other_rollout_metric(rollout):
    assert rollout.keys() == EXPECTED.keys()


def test_no_staleness_is_logged_where_the_policy_sampled_every_row(rollout):
    fresh = {name: 0 * ROLLOUT[name] for name in ("staleness_sum", "staleness_max", "stale_tokens")}
    found = rollout_metrics({**ROLLOUT, **fresh}, ["first", "second"], 2, beta=0.5)
    assert rollout.keys() - found.keys() == {n for n in EXPECTED if n.startswith("staleness/")}


def test_kl_is_not_logged_without_a_reference():
    assert "kl" not in rollout_metrics(ROLLOUT, ["first", "second"], 2, beta=0.0)


def test_no_kl_is_logged_where_no_token_counts():
    masked = {**ROLLOUT, **columns(tokens=[0] * 4, truncated=[1] * 4, kl=[0] * 4)}
    found = rollout_metrics(masked, [], 2, beta=0.5)
    of_kl = ("kl", "objective/kl", "objective/non_score_reward", "objective/rlhf_reward")
    assert all(math.isnan(found[name]) for name in of_kl)


def test_terminated_lengths_are_zero_where_none_terminated():
    rows = {**ROLLOUT, "truncated": torch.ones(4)}
    found = rollout_metrics(rows, ["first", "second"], 2, beta=0.5)
    assert [found[f"completions/{s}_terminated_length"] for s in ("min", "mean", "max")] == [0] * 3


def test_zero_std_counts_equal_groups():
    rows = {**ROLLOUT, "shaped_reward": torch.tensor([0.1, 0.1, 0.1, 0.2], dtype=torch.double)}
    assert rollout_metrics(rows, ["first"], 2, beta=0.5)["frac_reward_zero_std"] == 0.5


def test_one_completion_per_prompt_has_no_spread():
    assert rollout_metrics(ROLLOUT, ["first"], 1, beta=0.5)["frac_reward_zero_std"] == 1


def test_rewards_that_never_applied_are_nan():
    rows = {**ROLLOUT, "reward_0": torch.full((4,), NAN)}
    found = rollout_metrics(rows, ["first"], 2, beta=0.5)
    assert math.isnan(found["rewards/first/mean"])


# --- the same batch, with what the sampler said of its tokens

SAMPLING = columns(
    logp_diff_tokens=[4, 0, 6, 0],  # the second was not run
    logp_diff_sum=[0.2, 0, 0.3, 0],
    logp_diff_outside=[0.1, 0, 0.3, 0],
    logp_diff_max=[0.15, 0, 0.1, 0],
    importance_count=[4, 2, 6, 0],
    importance_raw=[4.0, 2.0, 12.0, 0],
    importance_raw_max=[1.5, 1.0, 5.0, 0],
    importance_clipped=[4.0, 2.0, 9.0, 0],
    importance_squared=[4.0, 2.0, 18.0, 0],
    importance_at_cap=[0, 0, 3, 0],
)


def test_sampling_metrics():
    found = rollout_metrics({**ROLLOUT, **SAMPLING}, ["first", "second"], 2, beta=0.5)
    assert {name: value for name, value in found.items() if name not in EXPECTED} == {
        "sampling/logp_diff_mean": pytest.approx(0.05),
        "sampling/logp_diff_judged": pytest.approx(0.04),
        "sampling/logp_diff_max": 0.15,
        "sampling/importance_raw_mean": 1.5,
        "sampling/importance_raw_max": 5,
        "sampling/importance_clipped_mean": 1.25,
        "sampling/frac_clipped": 0.25,
        "sampling/ess": 15**2 / (12 * 24),
    }


# --- one optimizer step: four completions in two micro-batches

UPDATE = columns(
    ran=[1, 1, 1, 1],
    tokens=[4, 2, 3, 1],
    entropy=[8.0, 3.0, 6.0, 3.0],
    clipped_low=[1, 0, 0, 0],
    clipped_high=[0, 0, 1, 0],
    log_ratio=[0.1, -0.2, 0.3, 0.0],
    token_ratio=[4.4, 1.6, 3.9, 1.1],
    loss=[1.0, -2.0, 4.0, 3.0],
)
UPDATED = {
    "entropy": 2,  # of 20 nats over 10 tokens
    "clip_ratio/low_mean": 0.25,
    "clip_ratio/low_min": 0,
    "clip_ratio/high_mean": 0.25,
    "clip_ratio/high_max": 1,
    "clip_ratio/region_mean": 0.5,
    "policy/approxkl_avg": 0.5 * 0.14 / 4,
    "policy/clipfrac_avg": 0.5,
    "policy/entropy_avg": 2,
    "loss/policy_avg": 1.5,
    "val/ratio": (1.0 + 1.25) / 2,  # 6 / 6 and 5 / 4 per token
    "val/ratio_var": 0.03125,  # 2 (0.125)^2 / (2 - 1)
}


@pytest.fixture(scope="module")
def update():
    return update_metrics(UPDATE, torch.tensor([0, 0, 1, 1]))


@pytest.mark.parametrize("name", UPDATED)
def test_update_metric(update, name):
    assert update[name] == pytest.approx(UPDATED[name])


def test_no_other_update_metric(update):
    assert update.keys() == UPDATED.keys()


def test_one_micro_batch_has_no_variance():
    assert update_metrics(UPDATE, torch.zeros(4, dtype=torch.long))["val/ratio_var"] == 0


def test_a_micro_batch_without_tokens_does_not_count_in_the_ratio():
    rows = {**UPDATE, **columns(tokens=[4, 2, 0, 0], token_ratio=[4.4, 1.6, 0, 0])}
    assert update_metrics(rows, torch.tensor([0, 0, 1, 1]))["val/ratio"] == pytest.approx(1.0)


def test_a_step_without_tokens_is_finite():
    nothing = {name: torch.zeros(2, dtype=torch.double) for name in UPDATE}
    nothing["ran"] += 1
    found = update_metrics(nothing, torch.zeros(2, dtype=torch.long))
    assert found["val/ratio"] == 1
    assert found["entropy"] == 0


def test_rows_that_were_not_run_count_where_they_are_known():
    """Neither clipped nor of any loss; their ratio and, without a first pass, entropy unknown."""
    nan = float("nan")
    rows = columns(
        ran=[1, 1, 0, 0],
        tokens=[4, 2, 30, 4],
        entropy=[8.0, 3.0, nan, 9.0],
        clipped_low=[1, 0, 0, 0],
        clipped_high=[0, 0, 0, 0],
        log_ratio=[0.1, -0.2, 0, 0],
        token_ratio=[4.4, 1.6, 0, 0],
        loss=[1.0, -2.0, 0, 0],
    )
    found = update_metrics(rows, torch.tensor([0, 0, -1, -1]))
    assert found["entropy"] == pytest.approx(20 / 10)
    assert found["clip_ratio/low_mean"] == 0.25
    assert found["policy/approxkl_avg"] == pytest.approx(0.5 * 0.05 / 2)
    assert found["loss/policy_avg"] == -0.25
    assert found["val/ratio"] == 1


def test_a_step_of_which_nothing_was_run_has_no_entropy():
    rows = {name: torch.zeros(2, dtype=torch.double) for name in UPDATE}
    rows["entropy"] += float("nan")
    found = update_metrics(rows, torch.tensor([-1, -1]))
    assert math.isnan(found["entropy"])
    assert math.isnan(found["policy/approxkl_avg"])
    assert found["val/ratio"] == 1


def test_the_2024_clip_share_is_where_the_clipped_loss_is_larger():
    """1[-A clip(rho) > -A rho], counted one by one."""
    torch.manual_seed(0)
    log_ratio, advantages = torch.randn(50) / 2, torch.randn(50)
    cu = torch.arange(51)
    found = rloo_objective(
        log_ratio, cu, advantages=advantages, old_logps=torch.zeros(50), denominator=50,
    )  # fmt: skip
    zeros = torch.zeros(50, dtype=torch.double)
    rows = {
        "ran": zeros + 1, "tokens": zeros + 1, "entropy": zeros,
        "clipped_low": found.clipped_low.double(),
        "clipped_high": found.clipped_high.double(), "log_ratio": zeros, "token_ratio": zeros + 1,
        "loss": zeros,
    }  # fmt: skip
    count = 0
    for d, a in zip(log_ratio.tolist(), advantages.tolist(), strict=True):
        ratio = math.exp(d)
        count += -a * min(max(ratio, 0.8), 1.2) > -a * ratio
    share = update_metrics(rows, torch.zeros(50, dtype=torch.long))["policy/clipfrac_avg"]
    assert 0 < count < 50
    assert share == pytest.approx(count / 50)


# --- averaging


def test_a_flush_averages_what_came_since_the_last_one():
    metrics = Metrics()
    metrics.add("train", {"reward": 1.0})
    metrics.add("train", {"reward": 2.0})
    assert metrics.flush("train") == {"reward": 1.5}
    metrics.add("train", {"reward": 5.0})
    assert metrics.flush("train") == {"reward": 5.0}


def test_a_flush_leaves_out_nan_and_names_that_are_only_nan():
    metrics = Metrics()
    for value in (1.0, NAN, 3.0):
        metrics.add("train", {"reward": value, "never": NAN})
    assert metrics.flush("train") == {"reward": 2.0}


def test_training_and_evaluation_are_kept_apart():
    metrics = Metrics()
    metrics.add("train", {"reward": 1.0})
    metrics.add("eval", {"reward": 9.0})
    assert metrics.flush("eval") == {"reward": 9.0}
    assert metrics.flush("train") == {"reward": 1.0}


def test_a_running_total_is_not_averaged():
    metrics = Metrics()
    for total in (10, 20, 30):
        metrics.set_last("train", "num_tokens", total)
    assert metrics.flush("train") == {"num_tokens": 30}


def test_a_restored_state_goes_on_averaging():
    metrics, resumed = Metrics(), Metrics()
    metrics.add("train", {"reward": 1.0})
    resumed.load_state_dict(metrics.state_dict())
    resumed.add("train", {"reward": 3.0, "other": 1.0})
    assert resumed.flush("train") == {"reward": 2.0, "other": 1.0}


def test_a_state_is_a_copy():
    metrics = Metrics()
    metrics.add("train", {"reward": 1.0})
    state = metrics.state_dict()
    metrics.add("train", {"reward": 3.0})
    assert state == {"reward": [1.0]}


@pytest.mark.parametrize("name", [
    "time/rollout_s", "throughput/completion_tokens_per_s", "step_time", "eps", "train_runtime",
    "train_samples_per_second", "eval_runtime", "eval_steps_per_second", "eval_time/reward_s",
])  # fmt: skip
def test_names_that_depend_on_the_clock(name):
    assert is_timing(name)


@pytest.mark.parametrize("name", [
    "loss", "reward", "episode", "epoch", "num_tokens", "eval_loss", "val/ratio", "lr", "kl",
    "rewards/time_limit/mean", "epsilon",
])  # fmt: skip
def test_names_that_do_not(name):
    assert not is_timing(name)
