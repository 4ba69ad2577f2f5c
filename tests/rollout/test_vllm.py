"""The real vLLM engine, in this process, on a CPU: what it samples from is what was sent to it."""

from __future__ import annotations

import gc
import os
import random
import sys
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig, Qwen2Config

from rloo_fast.records import Sampling
from rloo_fast.rollout.engine import EngineError, EngineState, StaleWeights
from rloo_fast.rollout.stops import Stops
from rloo_fast.rollout.vllm.colocate import check_generation_kwargs
from rloo_fast.rollout.vllm.files import saved_configuration
from rloo_fast.rollout.vllm.package import import_vllm
from rloo_fast.weight_sync.buckets import weight_buckets
from tests.support.tiny import make_model, make_tokenizer, require_vllm

require_vllm()

pytestmark = [pytest.mark.slow, pytest.mark.vllm]
SIZES = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
MODELS = {
    "gpt_neox": lambda: GPTNeoXConfig(**SIZES),
    "llama": lambda: LlamaConfig(**SIZES, num_key_value_heads=1),
    "qwen2-tied": lambda: Qwen2Config(**SIZES, num_key_value_heads=1, tie_word_embeddings=True),
}
SAMPLING = Sampling(
    temperature=0.7, top_p=1.0, top_k=0, min_p=None, repetition_penalty=1.0, max_new_tokens=12,
    stop_token_ids=(1, 7),
)  # fmt: skip
LONG = [20 + i % 70 for i in range(150)]  # more than a block of the prefix cache: 128 on a CPU
PROMPTS = [LONG] * 4 + [[9, 10, 11]] * 4
BUCKET = 20_000  # bytes: several buckets


def make(name):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(MODELS[name]()).float().eval()


@pytest.fixture(scope="module", params=MODELS)
def served(request):
    """(model, its engine); the engine sleeps."""
    from rloo_fast.rollout.vllm.colocate import VLLMEngine

    model = make(request.param)
    engine = VLLMEngine(
        model,
        dtype=torch.float32,
        sleeps=True,
        engine_kwargs={"kv_cache_memory_bytes": 32 << 20, "max_num_seqs": 16},
    )
    yield model, engine
    engine.close()


@pytest.fixture
def ready(served):
    """The same, with version 0 of changed weights loaded; asleep again afterwards."""
    model, engine = served
    change(model)
    if engine.state is not EngineState.ASLEEP:
        engine.sleep(2)
    engine.wake(("weights",))
    engine.load_weights(0, weight_buckets(model, BUCKET))
    engine.wake(("kv_cache",))
    yield model, engine
    if engine.state is EngineState.WEIGHTS_AWAKE:  # a load that was meant to fail
        engine.load_weights(0, weight_buckets(model, BUCKET))
    engine.sleep(2)


def change(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))


def logps(model, prompt, completion, temperature=0.7):
    with torch.no_grad():
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    scores = torch.log_softmax(logits / temperature, -1)
    return scores.gather(1, torch.tensor(completion)[:, None])[:, 0]


def largest_difference(model, rollout, prompts=PROMPTS):
    rows = zip(prompts, rollout.completion_ids, rollout.logps, strict=True)
    return max((logps(model, p, ids) - torch.tensor(lps)).abs().max() for p, ids, lps in rows)


def reload(model, engine, version):
    engine.sleep(2)
    engine.wake(("weights",))
    engine.load_weights(version, weight_buckets(model, BUCKET))
    engine.wake(("kv_cache",))


def test_log_probs_are_the_models(ready):
    model, engine = ready
    rollout = engine.generate(PROMPTS, SAMPLING, list(range(8)), version=0)
    assert largest_difference(model, rollout) < 1e-5
    assert rollout.weights_version == 0


def test_log_probs_follow_the_weights_also_for_prompts_seen_before(ready):
    model, engine = ready
    engine.generate(PROMPTS, SAMPLING, list(range(8)), version=0)
    for version in (1, 2):
        change(model)
        reload(model, engine, version)
        rollout = engine.generate(PROMPTS, SAMPLING, list(range(8)), version=version)
        assert largest_difference(model, rollout) < 1e-5


def test_another_version_is_refused(ready):
    _, engine = ready
    with pytest.raises(StaleWeights, match="holds weights 0, the policy is at 1"):
        engine.generate(PROMPTS, SAMPLING, list(range(8)), version=1)


def test_a_part_of_a_fused_weight_that_was_not_sent_is_named(ready):
    model, engine = ready
    engine.sleep(2)
    engine.wake(("weights",))

    def all_but_one():
        for bucket in weight_buckets(model, BUCKET):
            kept = ("layers.1.self_attn.k_proj.weight", "layers.1.attention.query_key_value.weight")
            yield [(name, tensor) for name, tensor in bucket if not name.endswith(kept)]

    with pytest.raises(EngineError, match=r"did not cover.*layers\.1\.\w+\.(qkv_proj|query_key)"):
        engine.load_weights(1, all_but_one())
    with pytest.raises(EngineError, match="must be 'ready'"):
        engine.generate(PROMPTS, SAMPLING, list(range(8)), version=1)


def test_a_completion_follows_from_its_prompt_and_seed(ready):
    _, engine = ready
    seeds = [2**62 + i for i in range(8)]
    rollout = engine.generate(PROMPTS, SAMPLING, seeds, version=0)
    order = [5, 0, 7, 2]
    some = engine.generate(
        [PROMPTS[i] for i in order], SAMPLING, [seeds[i] for i in order], version=0
    )
    assert some.completion_ids == [rollout.completion_ids[i] for i in order]
    assert len({tuple(ids) for ids in rollout.completion_ids[:4]}) == 4


def test_a_completion_ends_with_its_first_stop_token(ready):
    _, engine = ready
    rollout = engine.generate(PROMPTS * 4, SAMPLING, list(range(32)), version=0)
    for ids, reason in zip(rollout.completion_ids, rollout.finish_reasons, strict=True):
        stops = [i for i, token in enumerate(ids) if token in (1, 7)]
        assert stops == ([len(ids) - 1] if reason == "stop" else [])
        assert reason == "stop" or len(ids) == 12
    assert set(rollout.finish_reasons) == {"stop", "length"}


@pytest.mark.parametrize("include", [True, False])
def test_a_completion_ends_where_a_stop_string_does(with_text, include):
    model, engine = with_text
    sampling = replace(
        SAMPLING, stop_token_ids=(1,), stop_strings=("w1", "w3 w"), include_stop_strings=include
    )
    prompts = [[9, 10, 11], [12]] * 8
    rollout = engine.generate(prompts, sampling, list(range(16)), version=0)
    stops, count = Stops(sampling, make_tokenizer()), 0
    rows = zip(prompts, rollout.completion_ids, rollout.finish_reasons, strict=True)
    for prompt, ids, reason in rows:
        end = stops.end(prompt, ids)
        assert end == (len(ids) if reason == "stop" else None)
        count += reason == "stop" and ids[-1] != 1
    assert count > 4
    assert largest_difference(model, rollout, prompts) < 1e-5


@pytest.fixture(scope="module")
def with_text():
    """(model, its engine, which knows the text of tokens)."""
    from rloo_fast.rollout.vllm.colocate import VLLMEngine

    model = make_model(hidden_size=128, intermediate_size=64).eval()
    engine = VLLMEngine(
        model,
        dtype=torch.float32,
        tokenizer=make_tokenizer(),
        engine_kwargs={"kv_cache_memory_bytes": 32 << 20, "max_num_seqs": 16},
    )
    engine.wake(("weights",))
    engine.load_weights(0, weight_buckets(model, BUCKET))
    engine.wake(("kv_cache",))
    yield model, engine
    engine.close()


def test_completions_are_handed_over_as_they_finish(ready):
    _, engine = ready
    found = {}
    rollout = engine.generate(
        PROMPTS, SAMPLING, list(range(8)), version=0, on_finished=found.__setitem__
    )
    assert [found[i] for i in range(8)] == rollout.completion_ids


def test_an_error_while_completions_are_used_leaves_nothing_behind(ready):
    model, engine = ready

    def fail(index, ids):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        engine.generate(PROMPTS, SAMPLING, list(range(8)), version=0, on_finished=fail)
    assert not engine.llm.llm_engine.has_unfinished_requests()
    rollout = engine.generate(PROMPTS, SAMPLING, list(range(8)), version=0)
    assert largest_difference(model, rollout) < 1e-5


def test_a_prompt_that_is_too_long_is_refused_with_the_setting(ready):
    _, engine = ready
    with pytest.raises(EngineError, match="vllm_max_model_length"):
        engine.generate([[5] * 300], SAMPLING, [0], version=0)


def test_the_training_process_stays_as_it_was():
    from rloo_fast.rollout.vllm.colocate import VLLMEngine

    model = make("gpt_neox")  # vLLM runs transformers' code for it, and patches its class
    classes = {cls: dict(vars(cls)) for m in model.modules() for cls in type(m).__mro__[:-1]}
    torch.set_float32_matmul_precision("high")  # as tf32=True does
    process = process_state()
    torch.manual_seed(5)
    random.seed(5)
    expected = torch.rand(3), random.random(), model(torch.tensor([LONG])).logits
    torch.manual_seed(5)
    random.seed(5)
    cores = os.sched_getaffinity(0)
    engine = VLLMEngine(
        model, dtype=torch.float32, engine_kwargs={"kv_cache_memory_bytes": 32 << 20}
    )
    try:
        assert torch.equal(torch.rand(3), expected[0])
        assert random.random() == expected[1]
        assert all(dict(vars(cls)) == before for cls, before in classes.items())
        assert torch.equal(model(torch.tensor([LONG])).logits, expected[2])
        assert os.sched_getaffinity(0) == cores
        assert process_state() == process
        for threads in (2, 1):
            torch.set_num_threads(threads)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_float32_matmul_precision("highest")
        engine.close()


def process_state():
    """What vLLM changes of a process when it starts, on a CPU or a GPU."""
    cuda = torch.backends.cuda
    return {
        **{k: v for k, v in os.environ.items() if not k.startswith("VLLM_")},
        "threads": torch.get_num_threads(),
        "precision": torch.get_float32_matmul_precision(),
        "cudnn": cuda.cudnn_sdp_enabled(),
        "other kernels": (cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled()),
        "frozen objects": gc.get_freeze_count(),
        "excepthook": sys.excepthook,
    }


def test_the_same_model_finds_what_was_compiled_for_it_before(served, tmp_path):
    model, engine = served
    found = engine.llm.llm_engine.vllm_config
    of_this_run = found.compute_hash()
    twin = AutoModelForCausalLM.from_config(model.config)
    twin.config._name_or_path = "elsewhere"
    path = saved_configuration(twin, None, import_vllm().envs.VLLM_CACHE_ROOT, str(tmp_path))
    assert found.model_config.model == str(path)
    found.model_config.model = str(tmp_path)  # a path of one run enters vLLM's key
    assert found.compute_hash() != of_this_run
    found.model_config.model = str(path)
    assert found.compute_hash() == of_this_run


def test_nothing_is_made_of_tokens_that_come_before_the_last(ready, monkeypatch):
    _, engine = ready
    step, outputs = engine.llm.llm_engine.step, []

    def counted():
        outputs.extend(found := step())
        return found

    monkeypatch.setattr(engine.llm.llm_engine, "step", counted)
    engine.generate(PROMPTS, SAMPLING, list(range(8)), version=0)
    assert len(outputs) == 8
    assert all(output.finished for output in outputs)


def test_a_prefix_cache_in_use_is_not_taken_for_emptied(ready):
    """What the stand-in of test_vllm_sleep says is what vLLM says."""
    _, engine = ready
    params = engine._params(SAMPLING, 0, 1)
    engine.llm.llm_engine.add_request("under way", {"prompt_token_ids": LONG}, params)
    engine.llm.llm_engine.step()
    assert engine.llm.reset_prefix_cache() is False
    engine.llm.llm_engine.abort_request(["under way"])
    engine.llm.llm_engine.step()
    assert engine.llm.reset_prefix_cache() is True


@pytest.mark.parametrize("given", [{"min_new_tokens": 2}, {"top_p": 3.0}])
def test_settings_that_vllm_does_not_take_are_refused(given):
    check_generation_kwargs({"min_tokens": 2})
    with pytest.raises(ValueError, match=r"^generation_kwargs: vLLM's SamplingParams say: .*p"):
        check_generation_kwargs(given)


def test_completions_match_a_regular_expression():
    from rloo_fast.rollout.vllm.colocate import VLLMEngine

    torch.manual_seed(0)
    sizes = {**SIZES, "vocab_size": 32, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes))
    engine = VLLMEngine(
        model,
        dtype=torch.float32,
        regex="(w3|w1)+",
        tokenizer=make_tokenizer(),
        engine_kwargs={"kv_cache_memory_bytes": 32 << 20},
    )
    try:
        engine.wake(("weights",))
        engine.load_weights(0, weight_buckets(model, BUCKET))
        engine.wake(("kv_cache",))
        rollout = engine.generate([[9, 10]] * 8, SAMPLING, list(range(8)), version=0)
    finally:
        engine.close()
    w1, w3 = make_tokenizer().convert_tokens_to_ids(["w1", "w3"])
    assert all(set(ids) <= {w1, w3, 1} for ids in rollout.completion_ids)
    assert len({tuple(ids) for ids in rollout.completion_ids}) > 2
