"""What a run saves loads in vLLM: a whole model, and adapters on top of it."""

from __future__ import annotations

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tests.reports.test_outputs import make_trainer
from tests.support.tiny import make_tokenizer, require_vllm

require_vllm()
pytestmark = [pytest.mark.slow, pytest.mark.vllm]
PROMPTS = [[6, 7, 8, 9], [12, 13], [20, 6, 30]]
NEW_TOKENS = 12


def greedy(model):
    ids = [torch.tensor([prompt]) for prompt in PROMPTS]
    settings = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
    return [model.generate(i, **settings)[0, i.shape[1] :].tolist() for i in ids]


def test_greedy_tokens_of_a_saved_model_and_of_saved_adapters(tmp_path):
    base, adapter = tmp_path / "model", tmp_path / "adapter"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=128,
        initializer_range=0.2, pad_token_id=0, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "start")
    make_tokenizer().save_pretrained(tmp_path / "start")
    whole = make_trainer(tmp_path / "start", base)
    whole.train()
    whole.save_model()
    lora = LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear")
    adapted = make_trainer(base, adapter, lora)
    adapted.train()
    adapted.save_model()
    wanted = {
        None: greedy(AutoModelForCausalLM.from_pretrained(base)),
        adapter: greedy(AutoPeftModelForCausalLM.from_pretrained(adapter)),
    }
    assert wanted[None] != wanted[adapter]

    from rloo_fast.rollout.vllm.colocate import VLLMEngine  # which leaves this process as it was

    settings = {
        "model": str(base), "load_format": "auto", "enable_lora": True, "max_lora_rank": 8,
        "kv_cache_memory_bytes": 32 << 20, "max_num_seqs": 8,
    }  # fmt: skip
    engine = VLLMEngine(whole.model, dtype=torch.float32, engine_kwargs=settings)
    try:
        for path, tokens in wanted.items():
            assert generate(engine.llm, path) == tokens, path
    finally:
        engine.close()


def generate(llm, adapter):
    from vllm import SamplingParams  # pyright: ignore[reportMissingImports]
    from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]

    params = SamplingParams(
        temperature=0, max_tokens=NEW_TOKENS, min_tokens=NEW_TOKENS, detokenize=False
    )
    request = LoRARequest("ours", 1, str(adapter)) if adapter else None
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    outputs = llm.generate(prompts, params, lora_request=request, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]
