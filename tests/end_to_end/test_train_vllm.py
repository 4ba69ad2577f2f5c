"""Runs with the real vLLM engine in the trainer's process: the policy that samples is the one that
is trained, and each way in which it might not be is planted and caught."""

from __future__ import annotations

import json

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig, Qwen2Config

from rloo_fast import RLOOConfig, RLOOTrainer
from rloo_fast.rollout.engine import EngineError
from rloo_fast.weight_sync.sampler_limits import COARSE
from tests.support.planted_faults import (
    FAULTS,
    PLANTED_AFTER,
    RUN,
    initial_weights,
    outcome,
    skipped_sync_that_claims_to_have_been_made,
)
from tests.support.tiny import make_tokenizer, require_vllm

require_vllm()
pytestmark = [pytest.mark.slow, pytest.mark.vllm]

SIZES = {
    "vocab_size": 32, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.2,
    "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1,
}  # fmt: skip
MODELS = {
    "gpt_neox": lambda: GPTNeoXConfig(**SIZES),
    "llama": lambda: LlamaConfig(**SIZES, num_key_value_heads=1),
    "qwen2-tied": lambda: Qwen2Config(**SIZES, num_key_value_heads=1, tie_word_embeddings=True),
}
ENGINE = {"kv_cache_memory_bytes": 32 << 20, "max_num_seqs": 32}
# prompts fill blocks of the prefix cache, and come back in every step
PROMPTS = Dataset.from_dict(
    {"prompt": [" ".join(f"w{(i * 7 + j) % 26}" for j in range(150)) for i in range(4)]}
)


def share_of_w3(completion_ids, **kwargs):
    return [sum(token == 9 for token in ids) / max(len(ids), 1) for ids in completion_ids]


def make_trainer(tmp_path, name="llama", peft_config=None, dataset=PROMPTS, **fields):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MODELS[name]()).float()
    settings = {
        "per_device_train_batch_size": 16, "num_generations": 4, "max_completion_length": 8,
        "max_steps": 4, "learning_rate": 0.02, "beta": 0.01, "logging_steps": 1,
        "save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True,
        "shuffle_dataset": False, "gradient_checkpointing": False, "use_vllm": True,
        "vllm_enable_sleep_mode": True, "vllm_engine_kwargs": ENGINE,
        "weight_sync_bucket_mib": 1, **fields,
    }  # fmt: skip
    return RLOOTrainer(
        model, share_of_w3, RLOOConfig(str(tmp_path), **settings), dataset,
        processing_class=make_tokenizer(), peft_config=peft_config,
    )  # fmt: skip


@pytest.fixture
def trainer_of(tmp_path):
    """make_trainer, with the engine closed at the end."""
    made = []

    def make(*args, **fields):
        made.append(make_trainer(tmp_path, *args, **fields))
        return made[-1]

    yield make
    for trainer in made:
        trainer.rollouts.close()


def logged(trainer, name):
    return [row[name] for row in trainer.state.log_history if name in row]


@pytest.mark.parametrize("name", MODELS)
def test_sampler_and_trainer_agree_in_every_step(name, trainer_of):
    trainer = trainer_of(name, max_steps=12)
    trainer.train()
    assert len(logged(trainer, "sampling/logp_diff_max")) == 12
    assert max(logged(trainer, "sampling/logp_diff_max")) < 1e-4
    rewards = logged(trainer, "reward")
    assert sum(rewards[-3:]) > sum(rewards[:3]) + 0.5


def test_adapters_reach_the_engine(trainer_of):
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    trainer = trainer_of("gpt_neox", peft_config=lora)
    trainer.train()
    before = logged(trainer, "sampling/logp_diff_max")
    assert len(before) == 4
    assert max(before) < 1e-4


@pytest.mark.parametrize("sleeps", [False, True])
def test_an_adapter_is_trained_unmerged_in_the_engine(sleeps, trainer_of):
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    trainer = trainer_of(
        peft_config=lora, vllm_lora="adapter", vllm_enable_sleep_mode=sleeps, max_steps=3
    )
    trainer.train()
    assert max(logged(trainer, "sampling/logp_diff_max")) < 1e-4
    policy = trainer.accelerator.unwrap_model(trainer.model)
    adapter = sum(p.nbytes for p in policy.parameters() if p.requires_grad) / 2**30
    whole = sum(p.nbytes for p in policy.parameters()) / 2**30
    # nothing is dropped in sleep on a CPU
    assert logged(trainer, "sync/gib") == pytest.approx([whole, adapter, adapter])


def test_an_engine_that_never_sleeps_gets_the_weights_of_every_step(trainer_of):
    trainer = trainer_of(vllm_enable_sleep_mode=False)
    trainer.train()
    assert max(logged(trainer, "sampling/logp_diff_max")) < 1e-4
    assert len(logged(trainer, "sync/gib")) == 4


def test_the_sync_is_logged(trainer_of):
    trainer = trainer_of(max_steps=2)
    trainer.train()
    size = sum(p.nbytes for p in trainer.model.parameters()) / 2**30
    assert logged(trainer, "sync/gib") == pytest.approx([size, size])
    assert min(logged(trainer, "time/weight_sync_s")) > 0


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_planted_fault_is_caught(fault, trainer_of):
    name, error, sentence = FAULTS[fault]
    trainer = trainer_of(name)
    fault(trainer, initial_weights(trainer))
    weights = {}

    def remember(step):
        weights[step] = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}

    with pytest.raises(error, match=sentence) as caught:
        trainer.train()
    print(f"\n{fault.__name__}: step {trainer.state.global_step + 1}, {str(caught.value)[:300]}")
    assert trainer.state.global_step < 4


def test_in_bf16_a_run_is_its_own_measure(trainer_of):
    """As the table of planted_faults: rounding of 0.02 to 0.03 passes, 0.34 does not."""
    trainer = trainer_of(bf16=True, **RUN)
    seen = outcome(trainer, skipped_sync_that_claims_to_have_been_made)
    assert 0.01 < max(seen.means[:PLANTED_AFTER]) < 0.06
    assert seen.warned[0] > PLANTED_AFTER
    assert seen.caught.startswith("log-probs")
    assert seen.means[-1] < COARSE.stop


def test_what_was_trained_is_saved_when_the_engine_dies(trainer_of, tmp_path):
    trainer = trainer_of(max_steps=5)
    engine, run = trainer.rollouts.engine, trainer.rollouts.engine._run
    calls = []

    def dies(*args):
        calls.append(1)
        if len(calls) == 3:
            raise EngineError("generating with vLLM failed. What may help: a smaller ...")
        yield from run(*args)

    engine._run = dies
    with pytest.raises(EngineError) as caught:
        trainer.train()
    assert "checkpoint-2 holds the 2 steps done" in caught.value.__notes__[0]
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["global_step"] == 2
    resumed = trainer_of(max_steps=5)
    resumed.train(resume_from_checkpoint=True)
    whole = trainer_of(max_steps=5)
    whole.train()
    for (name, a), (_, b) in zip(
        resumed.model.named_parameters(), whole.model.named_parameters(), strict=True
    ):
        assert torch.equal(a, b), name
