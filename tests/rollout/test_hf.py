"""The transformers engine: a completion follows from prompt, weights, settings and its own seed."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    FalconH1Config,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
    RecurrentGemmaConfig,
    RobertaConfig,
    RobertaForCausalLM,
)

from rloo_fast.records import Sampling
from rloo_fast.rollout import HFEngine
from rloo_fast.rollout.engine import EngineError
from tests.support.tiny import make_model
from tests.support.vision import MODELS, make_vision_model

SAMPLING = Sampling(
    temperature=1.0, top_p=1.0, top_k=0, min_p=None, repetition_penalty=1.0, max_new_tokens=12,
    stop_token_ids=(1, 7),
)  # fmt: skip
PROMPTS = [[9, 10, 11]] * 8 + [[12]] * 8
UNEQUAL = [[9, 10, 11, 12, 13, 14, 15, 16, 17]] * 4 + [[12]] * 4 + [[20, 21, 22, 23]] * 4
TINY = {
    "vocab_size": 32, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1,
}  # fmt: skip
SHORT_WINDOW = {"head_dim": 8, "sliding_window": 4}
CONFIGS = {
    "gpt_neox": lambda: GPTNeoXConfig(**TINY),
    "llama": lambda: LlamaConfig(**TINY),
    "gemma2": lambda: Gemma2Config(**TINY, **SHORT_WINDOW),
    "gemma3": lambda: Gemma3TextConfig(**TINY, **SHORT_WINDOW),
    "gpt2": lambda: GPT2Config(vocab_size=32, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "mixtral": lambda: MixtralConfig(**TINY, num_local_experts=4),
    "falcon_h1": lambda: FalconH1Config(
        **TINY, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1
    ),
    "mamba": lambda: MambaConfig(vocab_size=32, hidden_size=32, num_hidden_layers=2, state_size=8),
}
# whose states padding would run through
PAD_LESS = {
    "recurrent_gemma": lambda: RecurrentGemmaConfig(
        **{**TINY, "num_key_value_heads": 1}, lru_width=32, attention_window_size=64
    ),
    "bart": lambda: BartConfig(
        vocab_size=32, d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48,
        max_position_embeddings=64, init_std=0.2,
    ),
}  # fmt: skip
RECURRENT = ("falcon_h1", "mamba")


def make_tried_engine(model, **kwargs) -> HFEngine:
    """An engine that has found out before whether prompts may be padded."""
    engine = make_engine(model, **kwargs)
    draw(engine, [[9]])
    return engine


def make_engine(model=None, **kwargs) -> HFEngine:
    engine = HFEngine(model or make_model(), 0, **{"autocast": nullcontext, **kwargs})
    engine.wake(("weights",))
    engine.load_weights(0, ())
    engine.wake(("kv_cache",))
    return engine


def draw(engine, prompts=PROMPTS, sampling=SAMPLING, seeds=None, first_seed=0, **kwargs):
    seeds = range(first_seed, first_seed + len(prompts)) if seeds is None else seeds
    return engine.generate(prompts, sampling, list(seeds), version=0, **kwargs)


def shapes_run(model) -> list[tuple[int, ...]]:
    """(rows, tokens) of every forward from here on."""
    seen = []
    model.get_input_embeddings().register_forward_hook(lambda _, x, y: seen.append(y.shape[:2]))
    return seen


def assert_same(rollout, other):
    assert rollout.completion_ids == other.completion_ids
    assert rollout.finish_reasons == other.finish_reasons
    for mine, its in zip(rollout.logps, other.logps, strict=True):
        torch.testing.assert_close(torch.tensor(mine), torch.tensor(its), rtol=0, atol=1e-5)


@pytest.fixture
def engine():
    return make_engine()


def test_the_models_own_generation_settings_do_not_leak_in(engine):
    plain = draw(engine)
    config = engine.model.generation_config
    config.top_k, config.top_p, config.repetition_penalty = 1, 0.5, 3.0
    config.min_p, config.no_repeat_ngram_size = 0.9, 1
    assert draw(engine) == plain
    assert engine.model.generation_config is config
    assert (config.top_k, config.min_p) == (1, 0.9)


def test_a_completion_ends_with_its_first_stop_token(engine):
    rollout = draw(engine, PROMPTS * 4)
    rows = zip(rollout.completion_ids, rollout.finish_reasons, rollout.logps, strict=True)
    for ids, reason, logps in rows:
        stops = [i for i, token in enumerate(ids) if token in (1, 7)]
        assert stops == ([len(ids) - 1] if reason == "stop" else [])
        assert reason == "stop" or len(ids) == 12
        assert len(logps) == len(ids)
    assert {"stop", "length"} == set(rollout.finish_reasons)


def test_the_seed_decides_and_the_global_random_state_stays(engine):
    before = torch.random.get_rng_state()
    first = draw(engine)
    assert torch.random.get_rng_state().equal(before)
    torch.rand(3)
    assert draw(engine) == first
    assert draw(engine, first_seed=100) != first


@pytest.mark.parametrize("rows_per_call", [None, 1, 3, 5])
def test_a_row_does_not_depend_on_the_rows_beside_it(rows_per_call):
    together = draw(make_engine(), UNEQUAL)
    order = torch.randperm(len(UNEQUAL), generator=torch.Generator().manual_seed(0)).tolist()
    engine = make_engine(rows_per_call=rows_per_call)
    shuffled = draw(engine, [UNEQUAL[i] for i in order], seeds=order)
    assert_same(shuffled, replace(
        together,
        completion_ids=[together.completion_ids[i] for i in order],
        finish_reasons=[together.finish_reasons[i] for i in order],
        logps=[together.logps[i] for i in order],
    ))  # fmt: skip


def test_a_repetition_penalty_does_not_count_padding():
    """With pad = stop token 0, a penalised pad would make the padded row end later."""
    sampling = replace(SAMPLING, repetition_penalty=5.0, stop_token_ids=(0,))
    engine = make_engine()
    beside = draw(engine, [[12]] * 8 + [[9, 10, 11, 12]], sampling)
    alone = draw(engine, [[12]] * 8, sampling)
    assert beside.completion_ids[:8] == alone.completion_ids


def test_training_mode_comes_back(engine):
    engine.model.train()
    draw(engine)
    assert engine.model.training


def test_the_model_runs_in_eval_mode():
    model = make_model(attention_dropout=0.5)
    expected = draw(make_engine(model))
    model.train()
    assert draw(make_engine(model)) == expected


def test_the_model_runs_under_autocast():
    model, dtypes = make_model(), set()
    model.lm_head.register_forward_hook(lambda *args: dtypes.add(args[-1].dtype))
    draw(make_engine(model, autocast=lambda: torch.autocast("cpu", torch.bfloat16)))
    assert dtypes == {torch.bfloat16}


def test_calls_hold_prompts_of_like_length_and_rows_come_back_in_order():
    model, told = make_model(), {}
    prompts = [[9], [10] * 20, [11], [12] * 20, [13], [14] * 19]
    sampling = replace(SAMPLING, max_new_tokens=1)
    engine = make_tried_engine(model, rows_per_call=3)
    seen = shapes_run(model)
    rollout = draw(engine, prompts, sampling, on_finished=told.__setitem__)
    assert seen == [(3, 20), (3, 1)]
    assert [told[i] for i in range(6)] == rollout.completion_ids
    assert_same(rollout, draw(make_engine(model), prompts, sampling))


def sampled_as_without_a_copied_cache(model):
    """(engine, shapes of the ids it ran): its samples are those of an engine that runs all rows."""
    plain = make_engine(model)
    plain.cache_can_be_copied = False
    expected = draw(plain, UNEQUAL)
    engine = make_tried_engine(model)
    seen = shapes_run(model)
    assert_same(draw(engine, UNEQUAL), expected)
    return engine, seen


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in RECURRENT])
def test_a_prompt_runs_once_for_all_its_samples(name):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]())
    _, seen = sampled_as_without_a_copied_cache(model)
    assert seen[:2] == [(3, 8), (12, 1)]
    assert all(tokens == 1 for _, tokens in seen[1:])


@pytest.mark.parametrize("name", RECURRENT)
def test_a_model_with_recurrent_state_runs_each_prompt_for_each_sample(name, caplog):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]())
    engine = make_engine(model)
    one_by_one = draw(make_engine(model, rows_per_call=1), UNEQUAL)
    assert_same(draw(engine, UNEQUAL), one_by_one)
    seen = shapes_run(model)
    draw(engine, UNEQUAL)
    assert seen[0] == (12, 9)
    assert caplog.text.count("more than its prompt's keys and values") == 1


@pytest.mark.parametrize(
    "extra", [{"cache_implementation": "static"}, {"use_cache": False}, {"prefill_chunk_size": 4}]
)
def test_settings_of_the_cache_are_obeyed(extra, engine, caplog):
    expected = draw(engine, UNEQUAL)
    sampling = replace(SAMPLING, extra=extra)
    for _ in range(2):
        assert_same(draw(engine, UNEQUAL, sampling), expected)
    assert caplog.text.count(f"{next(iter(extra))}=") == 1


def test_padding_to_a_multiple():
    model = make_model()
    expected = draw(make_engine(model), UNEQUAL)
    engine = make_tried_engine(model, pad_to_multiple_of=8)
    seen = shapes_run(model)
    assert_same(draw(engine, UNEQUAL), expected)
    assert seen[0] == (3, 15)


@pytest.mark.parametrize("name", PAD_LESS)
def test_a_model_that_padding_changes_gets_prompts_of_one_length(name, caplog):
    """Log-probs of samples are those of the prompt and completion alone, without padding."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(PAD_LESS[name]()).eval()
    rollout = draw(make_engine(model), UNEQUAL)
    assert "each call has prompts of one length" in caplog.text
    for prompt, completion, logps in zip(
        UNEQUAL, rollout.completion_ids, rollout.logps, strict=True
    ):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + completion]), use_cache=False).logits
        own = logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        own = own.gather(-1, torch.tensor(completion)[:, None])[:, 0]
        assert torch.allclose(own, torch.tensor(logps), atol=1e-5)


@pytest.mark.parametrize("pad", [0, 1])
def test_a_model_that_generate_gives_other_positions_is_refused(pad):
    """RoBERTa counts positions from its padding index on, generate from 0; and it skips padding, so
    that one in the trial's prompt (as 0 was) could make the last positions equal by chance."""
    config = RobertaConfig(**{**TINY, "pad_token_id": pad}, is_decoder=True)
    with pytest.raises(EngineError, match="RobertaForCausalLM's forward computes"):
        draw(make_engine(RobertaForCausalLM(config)), PROMPTS)


@pytest.mark.parametrize("family", MODELS)
def test_what_a_model_keeps_for_decoding_is_given_the_samples_rows(family):
    """Text alone; Qwen's keep `rope_deltas`, a row per prompt of the prefill."""
    model = make_vision_model(family)
    engine, seen = sampled_as_without_a_copied_cache(model)
    assert engine.cache_can_be_copied
    assert getattr(model.model, "rope_deltas", None) is None  # nothing is left of the call
    assert all(tokens == 1 for _, tokens in seen[1:])


def test_a_state_of_another_shape_is_not_guessed_at(caplog):
    """A module that keeps what has no row per prompt: nothing is shared, samples are right."""
    model = make_model()
    expected = draw(make_engine(model), UNEQUAL)
    layer = model.model.layers[0]
    layer.register_forward_hook(lambda layer, *_: setattr(layer, "seen", torch.zeros(7)))
    engine = make_engine(model)
    assert_same(draw(engine, UNEQUAL), expected)
    assert not engine.cache_can_be_copied
    assert "a prompt runs through it for each sample" in caplog.text
