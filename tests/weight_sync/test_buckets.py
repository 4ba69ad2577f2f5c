"""What is sent to a rollout engine is what a checkpoint of the policy would hold."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    Qwen2Config,
)

from rloo_fast.weight_sync import adapted as weight_sync
from rloo_fast.weight_sync.adapted import check_can_stream
from rloo_fast.weight_sync.buckets import named_weights, weight_buckets

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
CONFIGS = {
    "gpt_neox": GPTNeoXConfig(**SIZES),
    "llama": LlamaConfig(**SIZES, num_key_value_heads=1),
    "qwen2-tied": Qwen2Config(**SIZES, num_key_value_heads=1, tie_word_embeddings=True),
    "mixtral": MixtralConfig(**SIZES, num_key_value_heads=1, num_local_experts=3),
    "gpt2": GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=64),
}


def make(name, dtype=torch.float32):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name])).to(dtype)


def sent(model, max_bytes=10**9):
    pairs = [pair for bucket in weight_buckets(model, max_bytes) for pair in bucket]
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


def assert_same(ours, saved, atol=0.0):
    assert ours.keys() == saved.keys()
    for name, tensor in saved.items():
        assert ours[name].dtype == tensor.dtype
        assert (ours[name] - tensor).abs().max() <= atol, name


@pytest.mark.parametrize("name", CONFIGS)
def test_names_and_values_are_those_of_a_checkpoint(name, tmp_path):
    model = make(name)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert_same(sent(model), saved)
    assert_same(sent(model, max_bytes=5000), saved)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_a_loaded_model_is_sent_like_a_new_one(name, tmp_path):
    make(name).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same(sent(loaded), load_file(tmp_path / "model.safetensors"))


def test_buckets_are_bounded():
    for bucket in weight_buckets(make("llama"), 10_000):
        sizes = [tensor.nbytes for _, tensor in bucket]
        assert sum(sizes) <= 10_000 or len(sizes) == 1
    together = [len(bucket) for bucket in weight_buckets(make("llama"), 30_000)]
    assert 1 < len(together) < sum(together)


def test_a_bucket_is_emptied_when_the_next_one_is_asked_for():
    buckets = list(weight_buckets(make("llama"), 10_000))
    assert len(buckets) > 1
    assert not any(buckets)


def test_a_bucket_never_cuts_a_layer_whose_checkpoint_is_cut_otherwise():
    layers = []
    for bucket in weight_buckets(make("mixtral"), 1):
        layers.append({name.split(".")[2] for name, _ in bucket if ".layers." in name})
    assert all(len(found) <= 1 for found in layers)
    assert [found for found in layers if found] == [{"0"}, {"1"}]


def adapted(name, dtype=torch.float32, adapter_name="default", **config):
    settings = LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "lora_alpha": 10, **config})
    model = get_peft_model(make(name, dtype), settings, adapter_name=adapter_name)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


ADAPTERS = {
    "llama": ("llama", {"target_modules": ["q_proj", "down_proj"]}),
    "rank-stabilised": ("llama", {"target_modules": ["v_proj"], "use_rslora": True}),
    "fused qkv": ("gpt_neox", {"target_modules": ["query_key_value", "dense_h_to_4h"]}),
    "transposed (gpt2)": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "embeddings and lm_head": ("llama", {"target_modules": ["embed_tokens", "lm_head"]}),
    "modules_to_save": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "tied": ("qwen2-tied", {"target_modules": "all-linear"}),
    "bias": ("gpt_neox", {"target_modules": ["query_key_value"], "bias": "all"}),
    "bias of its layers": ("qwen2-tied", {"target_modules": ["q_proj"], "bias": "lora_only"}),
    "a rank of its own": (
        "llama",
        {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 2}},
    ),
    "PiSSA": ("llama", {"target_modules": ["q_proj"], "init_lora_weights": "pissa"}),
    "some tokens": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]}),
    "some tokens, tied": (
        "qwen2-tied",
        {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]},
    ),
}


@pytest.mark.parametrize("case", ADAPTERS)
def test_adapters_are_sent_as_the_merged_model(case, tmp_path):
    model = adapted(ADAPTERS[case][0], **ADAPTERS[case][1])
    check_can_stream(model)
    merged = copy.deepcopy(model).merge_and_unload()
    merged.save_pretrained(tmp_path)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert_same(sent(model), load_file(tmp_path / "model.safetensors"), atol=1e-6)
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("case", ["fused qkv", "transposed (gpt2)", "embeddings and lm_head"])
def test_a_sum_of_a_few_rows_at_a_time_is_the_whole_sum(case, monkeypatch):
    model = adapted(ADAPTERS[case][0], **ADAPTERS[case][1])
    whole = sent(model)
    monkeypatch.setattr(weight_sync, "SCRATCH_BYTES", 5 * 4 * 32)  # five rows of most matrices
    assert_same(sent(model), whole, atol=1e-6)


def test_a_bfloat16_weight_is_rounded_once_after_a_float32_sum():
    model = adapted("llama", torch.bfloat16, target_modules=["q_proj"])
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    exact = layer.base_layer.weight.double() + 10 / 4 * (b.double() @ a.double())
    found = dict(named_weights(model))["model.layers.0.self_attn.q_proj.weight"]
    assert found.dtype == torch.bfloat16
    assert (found == exact.to(torch.bfloat16)).double().mean() > 0.999


@pytest.mark.parametrize("name", ["lora", "lora_A", "model", "b", "base_layer", "q_proj", "0"])
def test_an_adapter_may_have_any_name(name, tmp_path):
    config = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    assert_same(
        sent(adapted("llama", adapter_name=name, **config)), sent(adapted("llama", **config))
    )


REFUSED = {
    "parameters": (
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.gate_proj.weight"]},
        "another kind .*ParamWrapper",
    ),
    "replicated layers": (
        {"target_modules": ["q_proj"], "layer_replication": [[0, 2], [1, 2]]},
        "layer_replication makes more layers",
    ),
    "MiCA": ({"target_modules": ["q_proj"], "init_lora_weights": "mica"}, "MiCALinearVariant"),
    "DoRA": ({"target_modules": ["q_proj"], "use_dora": True}, "another kind"),
    "bias": ({"target_modules": ["q_proj"], "lora_bias": True}, "lora_bias"),
    "tied lm_head": ({"target_modules": ["lm_head"]}, "ties its lm_head"),
    "tied, saved": (
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        "ties its lm_head",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_adapters_that_plain_weights_cannot_express_are_refused(case):
    config, sentence = REFUSED[case]
    with pytest.raises(ValueError, match=sentence):
        check_can_stream(adapted("qwen2-tied", **config))


def test_other_tuners_are_refused():
    config = IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[])
    with pytest.raises(ValueError, match="another kind"):
        check_can_stream(get_peft_model(make("llama"), config))
