"""A tree of shared tokens is each row run alone, whatever the tree and however it is run."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rloo_fast.batching.budget import TokenBudget
from rloo_fast.batching.planner import Planner
from rloo_fast.models.adapters import base_causal_lm
from rloo_fast.policy.attention import flash_shared
from rloo_fast.policy.attention import interface as attention
from rloo_fast.policy.forward import Policy
from rloo_fast.records import LossInputs
from tests.policy.test_forward import TREE, built, by_own_logits, differences, micro_batch
from tests.support import flash_stand_in
from tests.support.batches import tree_batch
from tests.support.tiny import make_model

MODEL = "llama, tied (SmolLM2)"


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.integers(1, 8), st.integers(2, 6))
def test_random_trees(seed, num_groups, depth):
    batch = tree_batch(seed, num_groups=num_groups, depth=depth)
    if not any(batch.num_tokens):
        return
    logp, gradient = differences(built(MODEL), "shared_prefix", batch)
    assert logp < 1e-5
    assert gradient < 1e-4


@pytest.mark.parametrize("name", [MODEL, "LoRA", "gemma3: sliding window"])
def test_gradient_checkpointing(name):
    model = built(name)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert base_causal_lm(model).is_gradient_checkpointing
    logp, gradient = differences(model, "shared_prefix", TREE)
    assert logp < 1e-5
    assert gradient < 1e-4


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_flash_attention_for_each_depth(kv_heads, monkeypatch):
    """By stand-ins for its kernels, whose arguments torch's own ops take (test_flash_shared.py)."""
    calls = []

    def forward(*args):
        calls.append(args)
        return flash_stand_in.forward(*args)

    monkeypatch.setattr(flash_shared, "flash_forward", forward)
    monkeypatch.setattr(flash_shared, "flash_backward", flash_stand_in.backward)
    monkeypatch.setattr(attention, "_backend", lambda *_: "varlen")
    model = make_model(num_key_value_heads=kv_heads)
    logp, gradient = differences(model, "shared_prefix", TREE)
    assert logp < 1e-5
    assert gradient < 1e-4
    assert len(calls) == 2 * 2 * 7  # two forwards through two layers of the tree of depth 7


def gradients_of(model, batches, advantages_of):
    policy = Policy(model, temperature=1.0)
    model.zero_grad()
    logps = {}
    for batch in batches:
        token_advantages = [advantages_of[row] for row in batch.rows]
        given = torch.cat(token_advantages) if token_advantages else torch.zeros(0)
        objective, _ = policy.loss(
            batch, LossInputs(token_advantages=given), {"denominator": 1, "level": "token"}
        )
        objective.loss.backward()
        bounds = batch.cu_seqlens.tolist()
        for number, row in enumerate(batch.rows):
            logps[row] = objective.logps[bounds[number] : bounds[number + 1]]
    grads = {name: p.grad for name, p in model.named_parameters()}
    return torch.cat([logps[row] for row in sorted(logps)]), grads


@pytest.mark.parametrize("few_sizes", [False, True], ids=["", "compile sizes"])
@pytest.mark.parametrize("budget", [40, 90, 1000])
def test_any_plan_has_the_same_log_probs_and_gradients(budget, few_sizes):
    """However groups that share tokens are spread over micro-batches, or cut."""
    model, batch = built(MODEL), tree_batch(25, num_groups=8)
    planner = Planner(
        TokenBudget(1, budget),
        device=torch.device("cpu"),
        pad_token_id=0,
        few_sizes=few_sizes,
        multiple_of=4,
    )
    planner.layout_name = "shared_prefix"
    rng = random.Random(budget)
    advantages = [torch.tensor([rng.gauss(0, 1) for _ in range(n)]) for n in batch.num_tokens]
    plans = planner.plan(batch, range(batch.num_rows), split=True)
    assert (len(plans) == 1) == (budget == 1000)
    batches = [planner.micro_batch(batch, plan) for plan in plans]
    logps, grads = gradients_of(model, batches, advantages)
    torch.testing.assert_close(logps, by_own_logits(model, batch, 1.0), rtol=0, atol=1e-5)
    alone = [micro_batch("padded", batch, [[row]]) for row in range(batch.num_rows)]
    _, want = gradients_of(model, alone, advantages)
    for name, grad in want.items():
        assert (grads[name] - grad).norm() <= 1e-5 * grad.norm(), name


def test_a_shared_sampled_token_gets_the_gradient_of_each_row():
    """Rows that agree in what they sampled: its log-prob is run once, and read by each."""
    model, batch = built(MODEL), tree_batch(25, num_groups=8)
    found = micro_batch("shared_prefix", batch)
    index = found.logit_index.tolist()
    assert len(index) > len({*index}) + batch.num_rows  # not the last tokens of prompts alone
    assert len(index) == sum(batch.num_tokens)
    ones = [torch.ones(n) for n in batch.num_tokens]
    _, both = gradients_of(model, [found], ones)
    alone = [micro_batch("shared_prefix", batch, [[row]]) for row in range(batch.num_rows)]
    _, want = gradients_of(model, alone, ones)
    for name, grad in want.items():
        assert (both[name] - grad).norm() <= 1e-5 * grad.norm(), name
