"""Log-probs and gradients of trajectories: those of each strand run alone, in every layout."""

from __future__ import annotations

import pytest
import torch

from rloo_fast.batching.layouts import LAYOUTS
from rloo_fast.policy.forward import Policy
from rloo_fast.records import LossInputs
from tests.policy.test_forward import built, by_own_logits, differences, micro_batch
from tests.support.batches import trajectory_batch

MODELS = ["qwen2", "llama, tied (SmolLM2)", "gemma3: sliding window", "LoRA"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_each_sampled_token_has_the_log_prob_of_its_strand(name, layout):
    logp, gradient = differences(built(name), layout, trajectory_batch(4))
    assert logp < 1e-5
    assert gradient < 1e-4


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("level", ["sequence", "token"])
def test_the_ratio_of_a_sequence_is_over_all_strands_of_its_row(layout, level):
    """L = -sum_i min(rho_i A_i, clip(rho_i) A_i), rho_i = exp(sum over every counted token)."""
    model, batch = built("qwen2"), trajectory_batch(4)
    reference = by_own_logits(model, batch, 1.0)
    generator = torch.Generator().manual_seed(0)
    old = reference.detach() + 0.1 * torch.randn(len(reference), generator=generator)
    advantages = torch.randn(batch.num_rows, generator=generator)
    log_ratio = (reference - old).split(batch.num_tokens)
    objective = reference.new_zeros(())
    for row, change in enumerate(log_ratio):
        ratio = change.exp() if level == "token" else change.sum(0, keepdim=True).exp()
        clipped = ratio.clamp(0.8, 1.2)
        objective = objective + torch.minimum(
            ratio * advantages[row], clipped * advantages[row]
        ).sum() * bool(len(change))
    theirs = torch.autograd.grad(-objective, list(model.parameters()))
    made = micro_batch(layout, batch)
    found, _ = Policy(model, temperature=1.0).loss(
        made,
        LossInputs(advantages=advantages, old_logps=old),
        {"denominator": 1, "level": level, "epsilon_low": 0.2, "epsilon_high": 0.2},
    )
    ours = torch.autograd.grad(found.loss, list(model.parameters()))
    if level == "token":
        assert found.loss.item() == pytest.approx(-objective.item(), rel=1e-5)
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm() + 1e-7


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tokens_of_tools_weigh_nothing(layout):
    """The gradient does not depend on what is predicted at their places, but on what they say."""
    model, batch = built("qwen2"), trajectory_batch(4)
    made = micro_batch(layout, batch)
    read = torch.zeros(made.input_ids.numel(), dtype=torch.bool)
    read[made.logit_index] = True
    assert not read.all()
    assert (
        len(made.targets)
        == sum(batch.num_tokens)
        < sum(len(ids) for r in range(batch.num_rows) for ids, _ in batch.strands(r))
    )
    entropy = Policy(model, temperature=1.0).logps(made).entropy
    assert len(entropy) == sum(batch.num_tokens)
