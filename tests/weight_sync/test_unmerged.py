"""The policy as frozen weights and an adapter apart: together they are what is sent merged."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from rloo_fast.rollout.build import make_engine
from rloo_fast.rollout.settings import EngineSettings
from rloo_fast.rollout.vllm.lora import room_for
from rloo_fast.weight_sync.unmerged import (
    PREFIX,
    Parted,
    adapter_shape,
    check_can_send_unmerged,
    policy_buckets,
)
from tests.support.tiny import InjectedEngine, make_model


class Sending(InjectedEngine):
    shares_weights = False


CONFIGS = {
    "plain": [LoraConfig(r=4, target_modules=["q_proj", "down_proj"])],
    "patterns": [
        LoraConfig(
            r=4, lora_alpha=12, target_modules="all-linear", use_rslora=True,
            rank_pattern={"q_proj": 6}, alpha_pattern={"v_proj": 5},
        )
    ],
    "two active": [
        LoraConfig(r=4, target_modules=["q_proj"]),
        LoraConfig(r=3, lora_alpha=9, target_modules=["q_proj", "o_proj"]),
    ],
}  # fmt: skip


def policy_of(*configs, **overrides):
    policy = get_peft_model(make_model(**overrides), configs[0])
    for number, config in enumerate(configs[1:]):
        policy.add_adapter(f"more{number}", config)
    policy.base_model.set_adapter(list(policy.peft_config))
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return policy


def sent(policy, parts, dtype=torch.float32, max_bytes=5000):
    stream = Parted(policy_buckets(policy, max_bytes, dtype, parts))
    return dict(stream), stream.adapter


@pytest.mark.parametrize("name", CONFIGS)
def test_base_and_adapter_are_the_merged_weights(name):
    policy = policy_of(*CONFIGS[name])
    merged, nothing = sent(policy, "merged")
    base, adapter = sent(policy, "base+adapter")
    assert not nothing
    assert base.keys() == merged.keys()
    for weight, expected in merged.items():
        layer = PREFIX + weight.removesuffix(".weight")
        actual = base[weight]
        if (a := adapter.pop(f"{layer}.lora_A.weight", None)) is not None:
            assert not torch.allclose(actual, expected, atol=1e-4)
            actual = actual + adapter.pop(f"{layer}.lora_B.weight") @ a
        assert torch.allclose(actual, expected, atol=1e-5), weight
    assert not adapter
    check_can_send_unmerged(policy)


def test_the_adapter_alone_is_a_small_part_in_the_engines_dtype():
    policy = policy_of(*CONFIGS["patterns"])
    base, adapter = sent(policy, "adapter", torch.bfloat16)
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    assert not base
    assert sum(t.nbytes for t in adapter.values()) == 2 * trained
    buckets = list(policy_buckets(policy, 5000, torch.bfloat16, "adapter"))
    assert all(sum(t.nbytes for _, t in bucket) <= 5000 for bucket in buckets)
    assert adapter_shape(policy) == (
        6, ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")
    )  # fmt: skip


def test_ranks_of_adapters_that_act_together_add_up_and_one_that_does_not_act_stays():
    policy = policy_of(*CONFIGS["two active"])
    assert adapter_shape(policy) == (7, ("o_proj", "q_proj"))
    policy.set_adapter("default")
    assert adapter_shape(policy) == (4, ("q_proj",))
    assert all(len(t) == 4 for n, t in sent(policy, "adapter")[1].items() if "lora_A" in n)


def test_what_is_sent_does_not_change_with_the_policy():
    policy = policy_of(*CONFIGS["plain"])
    _, adapter = sent(policy, "adapter")
    before = {name: tensor.clone() for name, tensor in adapter.items()}
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter.items())


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"modules_to_save": ["lm_head"]}, "lm_head.modules_to_save.default.weight is trained"),
        ({"bias": "all"}, "q_proj.base_layer.bias is trained as well"),
        ({"trainable_token_indices": [3]}, "is trained as well, and an adapter cannot hold it"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "is an embedding"),
        ({"use_dora": True}, "DoraLinear"),
        ({"lora_bias": True}, "lora_bias=True"),
    ],
)
def test_what_an_adapter_in_vllm_cannot_hold_is_refused(fields, said):
    policy = policy_of(LoraConfig(**{"r": 4, "target_modules": ["q_proj"], **fields}))
    settings = EngineSettings(policy, None, dtype=torch.float32, sends_adapter=True)
    with pytest.raises(ValueError, match=said):
        make_engine(Sending, settings)


def test_a_policy_without_lora_is_refused():
    with pytest.raises(ValueError, match="has no active LoRA: pass a peft_config"):
        check_can_send_unmerged(make_model())


def test_a_weight_that_is_trained_beside_the_adapter_is_refused():
    policy = policy_of(*CONFIGS["plain"])
    policy.base_model.model.model.norm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"model\.norm\.weight is trained as well"):
        check_can_send_unmerged(policy)


def test_room_for_a_rank():
    assert [room_for(rank) for rank in (1, 2, 8, 17, 512)] == [1, 8, 8, 32, 512]
    with pytest.raises(ValueError, match="rank 513 together, and vLLM takes 512 at most"):
        room_for(513)
