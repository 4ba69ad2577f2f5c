"""Prompts that begin alike: the same samples, of fewer tokens run."""

from __future__ import annotations

import random
from contextlib import nullcontext

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rloo_fast.records import Sampling
from rloo_fast.rollout import HFEngine
from rloo_fast.rollout.hf_prefix import prefix_levels
from tests.policy.test_forward import MODELS, built
from tests.support.tiny import make_model

SAMPLING = Sampling(1.0, 1.0, 0, None, 1.0, 6, (1,))


def prompts_of(seed: int = 0, system: int = 30, question: int = 18) -> list[list[int]]:
    """Two questions behind a system prompt, conversations of several lengths behind each, and a
    prompt that has nothing in common with any."""
    rng = random.Random(seed)
    draw = lambda n: [rng.randint(2, 31) for _ in range(n)]  # noqa: E731
    start, found = draw(system), [[3, *draw(9)]]
    for _ in range(2):
        asked = start + draw(question)
        found += [asked + draw(n) for n in (1, 5, 9)]
    return found


def sampled(model, prompts, *, shares: bool, sampling=SAMPLING):
    """(rollout, prompt positions put through the model)"""
    engine = HFEngine(model, 0, autocast=nullcontext)
    engine.prefixes_can_be_shared = shares
    for tag, version in (("weights", 0), ("kv_cache", None)):
        engine.wake((tag,))
        if version is not None:
            engine.load_weights(0, ())
    engine.may_pad = True
    widths = []
    hook = model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: widths.append(args[0].numel() if args[0].shape[1] > 1 else 0)
    )
    rollout = engine.generate(prompts, sampling, [*range(len(prompts))], version=0)
    hook.remove()
    return rollout, sum(widths), engine


@pytest.mark.parametrize(
    "name", ["qwen2", "gpt_neox (pythia)", "gpt2: learned positions", "llama, tied (SmolLM2)"]
)
def test_the_same_samples_of_fewer_tokens(name):
    model = built(name).eval() if name != "qwen2" else make_model().eval()
    prompts = prompts_of(system=20, question=17)
    plain, many, _ = sampled(model, prompts, shares=False)
    ours, few, engine = sampled(model, prompts, shares=True)
    assert engine.prefixes_can_be_shared
    assert ours.completion_ids == plain.completion_ids
    for a, b in zip(ours.logps, plain.logps, strict=True):
        assert a == pytest.approx(b, abs=2e-5)
    assert few < 0.75 * many


def test_samples_of_one_prompt_and_of_others_that_begin_like_it():
    model, prompts = make_model().eval(), prompts_of()
    prompts = [ids for ids in prompts for _ in range(3)]
    plain, many, _ = sampled(model, prompts, shares=False)
    ours, few, _ = sampled(model, prompts, shares=True)
    assert ours.completion_ids == plain.completion_ids
    assert few < 0.75 * many


def test_a_repetition_penalty_counts_no_padding():
    model, prompts = make_model().eval(), prompts_of()
    penalty = Sampling(1.0, 1.0, 0, None, 1.7, 6, (1,))
    plain, _, _ = sampled(model, prompts, shares=False, sampling=penalty)
    ours, _, _ = sampled(model, prompts, shares=True, sampling=penalty)
    assert ours.completion_ids == plain.completion_ids


def test_a_sliding_window_runs_each_prompt_for_itself():
    """Its cache has a place for so many tokens, padding among them."""
    model = MODELS["gemma3: sliding window"]().eval()
    prompts = prompts_of(system=20, question=17)
    plain, _, _ = sampled(model, prompts, shares=False)
    ours, _, engine = sampled(model, prompts, shares=True)
    assert not engine.prefixes_can_be_shared
    assert ours.completion_ids == plain.completion_ids


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.integers(0, 60), st.integers(0, 40))
def test_levels_spell_the_prompts(seed, system, question):
    prompts = prompts_of(seed, system, question)[1:]
    levels = prefix_levels(prompts)
    if levels is None:
        return
    texts: list[list[int]] = [[]]
    for level in levels:
        texts = [
            texts[parent] + segment
            for parent, segment in zip(level.parents, level.segments, strict=True)
        ]
    assert texts == prompts
    assert sum(level.num_tokens for level in levels) <= 0.75 * len(prompts) * max(map(len, prompts))


def test_what_shares_little_is_not_cut():
    assert prefix_levels([[1, 2, 3], [1, 2, 4]]) is None
    assert prefix_levels([[1, 2, 3] * 20]) is None
