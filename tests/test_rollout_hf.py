"""The transformers engine: what it samples follows from the settings and the seed alone."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from conftest import make_model

from rloo_fast.rollout import HFEngine
from rloo_fast.types import Sampling

SAMPLING = Sampling(
    temperature=1.0, top_p=1.0, top_k=0, min_p=None, repetition_penalty=1.0, max_new_tokens=12,
    stop_token_ids=(1, 7),
)  # fmt: skip
PROMPTS = [[9, 10, 11]] * 8 + [[12]] * 8


@pytest.fixture
def engine():
    return HFEngine(make_model(), 0, autocast=nullcontext)


def test_the_models_own_generation_settings_do_not_leak_in(engine):
    plain = engine.generate(PROMPTS, SAMPLING, seed=3)
    config = engine.model.generation_config
    config.top_k, config.top_p, config.repetition_penalty = 1, 0.5, 3.0
    config.min_p, config.no_repeat_ngram_size = 0.9, 1
    assert engine.generate(PROMPTS, SAMPLING, seed=3) == plain
    assert engine.model.generation_config is config
    assert (config.top_k, config.min_p) == (1, 0.9)


def test_settings_are_obeyed(engine):
    greedy = engine.generate(PROMPTS, replace(SAMPLING, top_k=1), seed=3).completion_ids
    assert all(ids == greedy[0] for ids in greedy[:8])
    sampled = engine.generate(PROMPTS, SAMPLING, seed=3).completion_ids
    assert len({tuple(ids) for ids in sampled[:8]}) > 4


def test_a_completion_ends_with_its_first_stop_token(engine):
    rollout = engine.generate(PROMPTS * 4, SAMPLING, seed=0)
    for ids, reason in zip(rollout.completion_ids, rollout.finish_reasons, strict=True):
        stops = [i for i, token in enumerate(ids) if token in (1, 7)]
        assert stops == ([len(ids) - 1] if reason == "stop" else [])
        assert reason == "stop" or len(ids) == 12
    assert {"stop", "length"} == set(rollout.finish_reasons)


def test_the_seed_decides_and_the_global_random_state_stays(engine):
    before = torch.random.get_rng_state()
    first = engine.generate(PROMPTS, SAMPLING, seed=5)
    assert torch.random.get_rng_state().equal(before)
    torch.rand(3)
    assert engine.generate(PROMPTS, SAMPLING, seed=5) == first
    assert engine.generate(PROMPTS, SAMPLING, seed=6) != first


def test_training_mode_comes_back(engine):
    engine.model.train()
    engine.generate(PROMPTS, SAMPLING, seed=0)
    assert engine.model.training
