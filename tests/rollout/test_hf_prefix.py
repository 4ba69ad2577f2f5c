"""Prompts that begin alike: the same samples, of fewer tokens run."""

from __future__ import annotations

import random
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, BloomConfig, OPTConfig

from rloo_fast.records import Sampling
from rloo_fast.rollout import HFEngine
from rloo_fast.rollout.hf_prefix import prefix_levels
from tests.policy.test_forward import MODELS, built
from tests.rollout.test_hf import CONFIGS, assert_same, draw, make_engine, shapes_run
from tests.support import vision
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


# Models

ALIKE = [3 + i % 20 for i in range(24)]
PROMPTS = [ALIKE + tail for tail in ([9, 10, 11, 12, 13], [9, 14], [20, 21, 22]) for _ in range(4)]
OTHERS = {
    "bloom": lambda: BloomConfig(vocab_size=32, hidden_size=32, n_layer=2, n_head=4),
    "opt": lambda: OPTConfig(
        vocab_size=32, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, word_embed_proj_dim=32,
    ),
}  # fmt: skip


def model_of(name):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config({**CONFIGS, **OTHERS}[name]())
    for parameter in model.parameters():  # so that its distributions are not flat
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("name", ["gpt_neox", "llama", "mixtral", *OTHERS])
def test_positions_of_every_kind_are_those_of_the_prompt_alone(name):
    model = model_of(name)
    engine = make_engine(model)
    assert_same(draw(engine, PROMPTS), draw(make_engine(model, rows_per_call=1), PROMPTS))
    assert engine.prefixes_can_be_shared
    seen = shapes_run(model)
    draw(engine, PROMPTS)
    assert seen[0] == (1, len(ALIKE))


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "falcon_h1", "mamba"])
def test_models_that_count_padding_run_every_prompt(name):
    model = model_of(name)
    engine = make_engine(model)
    assert_same(draw(engine, PROMPTS), draw(make_engine(model, rows_per_call=1), PROMPTS))
    seen = shapes_run(model)
    draw(engine, PROMPTS)
    assert all(rows > 1 for rows, _ in seen)


@pytest.mark.parametrize("family", vision.MODELS)
def test_vision_models_sample_the_same_text(family):
    model = vision.make_vision_model(family)
    prompts = [[9 + i % 20 for i in range(24)] + tail for tail in ([9, 10, 11], [9]) for _ in "ab"]
    alone = draw(make_engine(model, rows_per_call=1), prompts)
    assert_same(draw(make_engine(model), prompts), alone)
