"""Where advantages are made: before the update, out of the forward, or after the first update."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from rloo_kernels import leave_one_out, token_level_advantages

from rloo_fast.objective.advantages import AdvantageMaker
from rloo_fast.objective.losses import LOSSES
from rloo_fast.objective.settings import LossSettings
from rloo_fast.records import LossInputs, PolicyRows
from tests.support.batches import prepared_batch

LENGTHS = [2, 3, 0, 1]  # of two groups of K = 2; the third row is masked
SCORES = torch.tensor([1.0, 0.25, -2.0, 0.5])
N = sum(LENGTHS)


def settings(**fields: Any) -> LossSettings:
    return LossSettings(
        **{
            "row": LOSSES["rloo"],
            "beta": 0.1,
            "epsilon_low": 0.2,
            "epsilon_high": 0.2,
            "advantage": "rloo",
            "normalize_advantages": False,
            "whiten_rewards": False,
            "bias_corrected_kl": True,
            "truncated_importance_sampling": None,
            "importance_sampling_cap": 2.0,
            "max_completion_length": 3,
            **fields,
        }
    )


def maker(**fields: Any) -> AdvantageMaker:
    return AdvantageMaker(settings(**fields), Accelerator(cpu=True))


def batch(**known: Any):
    return prepared_batch(
        prompt_ids=[[5]] * 4,
        completion_ids=[[7] * n for n in (2, 3, 2, 1)],
        num_tokens=LENGTHS,
        scores=SCORES,
        sampler_logps=torch.full((N,), -1.0),
        prepared=known,
    )


def by_row(values: torch.Tensor) -> torch.Tensor:
    return torch.stack([part.sum() for part in values.split(LENGTHS)])


def test_without_a_kl_in_the_reward_they_are_known_from_the_scores():
    found = maker(beta=0.0).known_before_update(batch())
    assert torch.equal(found.advantages, leave_one_out(SCORES.view(2, 2)).view(-1))
    assert torch.equal(found.policy_rows.shaped_reward, SCORES)
    assert found.policy_rows.surprisal.isnan().all()


def test_a_policy_pass_before_the_update_puts_the_kl_into_the_rewards():
    old, ref = torch.randn(N), torch.randn(N)
    found = maker().known_before_update(batch(old_logps=old, ref_logps=ref))
    shaped = SCORES - 0.1 * by_row(old - ref)
    torch.testing.assert_close(found.policy_rows.shaped_reward, shaped)
    torch.testing.assert_close(found.advantages, leave_one_out(shaped.view(2, 2)).view(-1))
    torch.testing.assert_close(found.policy_rows.surprisal, -by_row(old))


def test_on_policy_with_a_kl_they_come_out_of_the_forward():
    given = batch(ref_logps=torch.randn(N))
    assert maker().known_before_update(given) is given  # nothing can be known yet
    found = maker().loss_inputs(given, [0, 1])
    assert torch.equal(found.rewards, SCORES[:2])
    assert torch.equal(found.ref_logps, given.ref_logps[:5])
    assert found.old_logps is found.advantages is found.token_advantages is None


@pytest.mark.parametrize("loss", ["rloo", "reinforce_pp"])
def test_after_the_first_update_they_are_those_of_its_forward(loss):
    logps, ref, made = torch.randn(N), torch.randn(N), torch.tensor([0.5, -0.5, 1.0, -1.0])
    rows = PolicyRows(torch.zeros(4), SCORES, torch.zeros(4))
    found = maker(row=LOSSES[loss]).after_first_update(batch(ref_logps=ref), logps, rows, made)
    assert torch.equal(found.old_logps, logps)
    assert found.policy_rows is rows
    if loss == "rloo":
        assert torch.equal(found.advantages, made)
    else:  # with the KL to go of every token
        bounds, compared = torch.tensor([0, 2, 5, 5, 6]), torch.ones(4, dtype=torch.bool)
        want = token_level_advantages(made, logps - ref, bounds, 0.1, compared)
        torch.testing.assert_close(found.advantages, want)


def test_what_was_known_before_stays_after_the_first_update():
    known = torch.tensor([1.0, -1.0, 2.0, -2.0])
    rows = PolicyRows(torch.zeros(4), SCORES, torch.zeros(4))
    given = batch(advantages=known)
    found = maker().after_first_update(given, torch.randn(N), rows, torch.full((4,), torch.nan))
    assert found.advantages is known


def test_later_updates_have_a_ratio_to_the_policy_that_sampled():
    old, known = torch.randn(N), torch.tensor([1.0, -1.0, 2.0, -2.0])
    later = batch(on_policy=False, old_logps=old, advantages=known)
    found = maker(beta=0.0).loss_inputs(later, [1, 3])
    assert torch.equal(found.old_logps, old[[2, 3, 4, 5]])
    assert torch.equal(found.advantages, known[[1, 3]])


def test_token_level_importance_weights_make_them_per_token():
    old, known = torch.tensor([-1.0, 0.0, -2.0, -1.0, -1.0, -1.0]), torch.tensor([1.0, -1.0, 2, -2])
    given = batch(old_logps=old, advantages=known)
    found = maker(beta=0.0, truncated_importance_sampling="token").loss_inputs(given, [0, 1])
    weights = (old[:5] + 1).exp().clamp(max=2.0)
    torch.testing.assert_close(
        found.token_advantages, weights * torch.tensor([1.0, 1.0, -1.0, -1.0, -1.0])
    )
    assert given.advantages is known  # unweighted


def test_a_filler_weighs_nothing():
    found = maker().loss_inputs(batch(), [])
    assert found._replace(advantages=None, ref_logps=None) == LossInputs()
    assert len(found.advantages) == len(found.ref_logps) == 0


def test_nobody_writes_into_an_earlier_record():
    given = batch()
    with pytest.raises(dataclasses.FrozenInstanceError):
        given.advantages = SCORES
    with pytest.raises(dataclasses.FrozenInstanceError):
        given.generation.scores = SCORES
