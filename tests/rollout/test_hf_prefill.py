"""What all prompts of a call begin with runs once, and samples are those of each prompt alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, OPTConfig

from rloo_fast.rollout.hf_prefill import num_common
from tests.rollout.test_hf import (
    CONFIGS,
    PAD_LESS,
    SAMPLING,
    assert_same,
    draw,
    make_engine,
    make_tried_engine,
    shapes_run,
)
from tests.support.tiny import make_model
from tests.support.vision import MODELS, make_vision_model

SYSTEM = [3 + i % 20 for i in range(24)]
TAILS = [[9, 10, 11, 12, 13], [9, 14], [20, 21, 22]]
PROMPTS = [SYSTEM + tail for tail in TAILS for _ in range(4)]
SHARING = ["gpt_neox", "llama", "gpt2", "mixtral"]
OTHERS = {
    "bloom": lambda: BloomConfig(vocab_size=32, hidden_size=32, n_layer=2, n_head=4),
    "opt": lambda: OPTConfig(
        vocab_size=32, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, word_embed_proj_dim=32,
    ),
}  # fmt: skip


def model_of(name):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(({**CONFIGS, **PAD_LESS, **OTHERS})[name]())
    for parameter in model.parameters():  # so that its distributions are not flat
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def alone(model, prompts=PROMPTS, **kwargs):
    """Each row in a call of its own."""
    return draw(make_engine(model, rows_per_call=1), prompts, **kwargs)


@pytest.mark.parametrize("name", [*SHARING, *OTHERS])
def test_the_beginning_runs_once_for_all_prompts(name):
    model = model_of(name)
    expected = alone(model)
    engine = make_engine(model)
    draw(engine, PROMPTS)  # which tries
    seen = shapes_run(model)
    assert_same(draw(engine, PROMPTS), expected)
    width = max(map(len, PROMPTS))
    assert seen[:3] == [(1, 24), (3, width - 24 - 1), (12, 1)]


def test_prompts_with_one_sample_each_go_on_from_copies():
    model = make_model()
    prompts = [SYSTEM + tail for tail in TAILS]
    expected = alone(model, prompts)
    engine = make_engine(model)
    draw(engine, prompts)
    seen = shapes_run(model)
    assert_same(draw(engine, prompts), expected)
    assert seen[:2] == [(1, 24), (3, 5)]


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "falcon_h1", "mamba", *PAD_LESS])
def test_models_that_count_padding_run_every_prompt(name):
    model = model_of(name)
    engine = make_engine(model)
    assert_same(draw(engine, PROMPTS), alone(model))
    assert not engine.may_share_beginnings


@pytest.mark.parametrize("family", MODELS)
def test_vision_models_sample_the_same_text(family):
    model = make_vision_model(family)
    prompts = [[9 + i % 20 for i in range(24)] + tail for tail in TAILS for _ in range(2)]
    assert_same(draw(make_engine(model), prompts), alone(model, prompts))


def test_a_repetition_penalty_counts_the_prompts_own_tokens():
    model, sampling = make_model(), replace(SAMPLING, repetition_penalty=1.5)
    assert_same(draw(make_engine(model), PROMPTS, sampling), alone(model, sampling=sampling))


def test_a_prompt_that_is_the_beginning_itself_and_few_tokens_are_not_shared_in_full():
    model = make_model()
    prompts = [SYSTEM, [*SYSTEM, 9], [*SYSTEM, 9, 10]]
    engine = make_tried_engine(model)
    draw(engine, prompts)
    seen = shapes_run(model)
    assert_same(draw(engine, prompts), alone(model, prompts))
    assert seen[0] == (1, len(SYSTEM) - 2)
    short = [SYSTEM[:8] + tail for tail in TAILS]
    seen.clear()
    draw(engine, short)
    assert seen[0] == (3, 13)


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ([[1, 2, 3], [1, 2]], 2),
        ([[1, 2], [3]], 0),
        ([[1, 5, 2], [1, 5, 3], [1, 4, 9]], 1),
        ([[]], 0),
    ],
)
def test_what_prompts_have_in_common(prompts, expected):
    assert num_common(prompts) == expected
