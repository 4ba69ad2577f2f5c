"""Models of which the real vLLM keeps more, or something else, than the parameters it is sent.

Each engine is the only one of its time: vLLM makes the groups of experts once per process.
"""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, LlamaConfig, Qwen3MoeConfig

from rloo_fast import RLOOConfig
from rloo_fast.config.rloo_config import as_dict
from rloo_fast.rollout.engine import EngineError
from rloo_fast.rollout.vllm.colocate import VLLMEngine
from rloo_fast.rollout.vllm.model import loose_tensors
from rloo_fast.weight_sync.buckets import weight_buckets
from tests.support.tiny import require_vllm

require_vllm()

pytestmark = [pytest.mark.slow, pytest.mark.vllm]
SIZES = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
CACHE = {"kv_cache_memory_bytes": 32 << 20}


def test_experts_with_re_laid_weights_are_refused():
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    config = Qwen3MoeConfig(**SIZES, **experts, num_key_value_heads=1, head_dim=32)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(EngineError, match=r"experts of .* backend CPU.*use_vllm=False"):
        VLLMEngine(model, dtype=torch.float32, engine_kwargs=CACHE)


def test_slopes_of_alibi_are_found_in_vllms_model():
    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "hidden_size": 64, "n_layer": 2, "n_head": 2}
    model = AutoModelForCausalLM.from_config(BloomConfig(**sizes)).float().eval()
    engine = VLLMEngine(model, dtype=torch.float32, engine_kwargs=CACHE)
    try:
        found = engine.llm.apply_model(lambda m: [t for t in loose_tensors(m) if t.numel() == 2])
        expected = torch.tensor([2**-4, 2**-8])  # 2^(-8 i / heads): Press et al. 2022, section 3
        assert len(found[0]) == 2
        assert all(torch.equal(slopes, expected) for slopes in found[0])
    finally:
        engine.close()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_head_in_float32_computes_with_the_weights_that_are_sent(tied, tmp_path):
    """docs/rollouts.md, as given on the command line: logits in bf16 are off by up to 2^-9."""
    text = '{"hf_overrides": {"head_dtype": "float32"}, "kv_cache_memory_bytes": 33554432}'
    args = RLOOConfig(str(tmp_path), use_cpu=True, use_vllm=True, vllm_engine_kwargs=text)
    config = LlamaConfig(**SIZES, num_key_value_heads=1, tie_word_embeddings=tied)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).bfloat16()
    engine = VLLMEngine(model, dtype=torch.bfloat16, engine_kwargs=as_dict(args.vllm_engine_kwargs))
    try:
        for version in range(2):
            with torch.no_grad():
                model.lm_head.weight.normal_()
            if version:
                engine.sleep(2)
            engine.wake(("weights",))
            engine.load_weights(version, weight_buckets(model, 2**20))
            hidden = torch.randn(5, 64).bfloat16()
            [logits] = engine.llm.apply_model(lambda m, h=hidden: m.compute_logits(h).clone())
            exact = hidden.double() @ model.lm_head.weight.double().T
            assert logits.dtype == torch.float32
            torch.testing.assert_close(logits.double(), exact, rtol=1e-5, atol=1e-4)
            assert (exact.bfloat16() - exact).abs().max() > 1e-2  # what it would be
            engine.wake(("kv_cache",))
    finally:
        engine.close()
