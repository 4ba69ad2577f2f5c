"""Every method that the installed peft offers: trained with its start as the reference, or refused.

`python -m tests.models.test_peft_methods` prints the table: KL before any update, how far the
reference has moved after two of them, how far sampler and trainer are apart; or the sentence.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from transformers import LlamaConfig, LlamaForCausalLM

from rloo_fast import RLOOConfig, RLOOTrainer
from rloo_fast.models.reference import reference_weights
from rloo_fast.weight_sync.sampler_check import SamplerMismatch
from tests.support.tiny import make_model, make_tokenizer

IDS = torch.arange(6, 14)[None]
TARGETS = ["q_proj", "v_proj"]
TOKENS = {"num_virtual_tokens": 2}
# what a method needs beside target_modules, to fit a model of hidden size 32
NEEDS: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 100},
    "ADAPTION_PROMPT": {"adapter_len": 2, "adapter_layers": 2, "target_modules": None},
    "C3A": {"block_size": 16},
    "CARTRIDGE": {**TOKENS, "num_frozen_tokens": 0},
    "CPT": {"cpt_token_ids": [6, 7], "cpt_tokens_type_mask": [1, 2]},
    "FOURIERFT": {"n_frequency": 64},
    "LN_TUNING": {"target_modules": ["input_layernorm", "norm"]},
    "MISS": {"r": 4},
    "MULTITASK_PROMPT_TUNING": {**TOKENS, "num_tasks": 1},
    "PREFIX_TUNING": TOKENS,
    "PROMPT_TUNING": TOKENS,
    "PSOFT": {"r": 4},
    "P_TUNING": {**TOKENS, "encoder_hidden_size": 8},
    "ROAD": {"group_size": 16},
    "SHIRA": {"r": 4},
    "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"], "token_indices": [6, 7, 8]},
    "VBLORA": {"vector_length": 16, "num_vectors": 8},
    "WAVEFT": {"n_frequency": 64},
}
PROMPTS = "adds tokens to the prompt"
ROUND = "PeftModel.forward does more than the model's layers"
REFUSED = {
    "ADAMSS": "scikit-learn is required",
    **dict.fromkeys(
        (
            "CARTRIDGE",
            "CPT",
            "MULTITASK_PROMPT_TUNING",
            "PREFIX_TUNING",
            "PROMPT_TUNING",
            "P_TUNING",
        ),
        PROMPTS,
    ),
    "LILY": "the logits of a token change with the tokens after it",
    "POLY": "task_ids should not be None",
    "SHADOW": "a trial run failed",
    "XLORA": ROUND,
    "LoRA, LoftQ": "scipy",
    "LoRA, replicated layers": "a trial run failed",
    "aLoRA": "act from some tokens of the prompt on",
}
RANDOM = {"PVERA"}  # draws random numbers in training
LORA: dict[str, dict[str, Any]] = {
    "LoRA, rank pattern": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 32}},
    "LoRA, rank-stabilised": {"use_rslora": True},
    "LoRA, gaussian": {"init_lora_weights": "gaussian"},
    "LoRA, drawn at random": {"init_lora_weights": False},
    "LoRA, PiSSA": {"init_lora_weights": "pissa"},
    "LoRA, PiSSA by iterations": {"init_lora_weights": "pissa_niter_4"},
    "LoRA, OLoRA": {"init_lora_weights": "olora"},
    "LoRA, orthogonal": {"init_lora_weights": "orthogonal", "r": 4},
    "LoRA, MiCA": {"init_lora_weights": "mica"},
    "LoRA, LoftQ": {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 8}},
    "DoRA": {"use_dora": True},
    "LoRA, bias all": {"bias": "all"},
    "LoRA, bias lora_only": {"bias": "lora_only"},
    "LoRA, lora_bias": {"lora_bias": True},
    "LoRA, embeddings": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "LoRA, modules_to_save": {"modules_to_save": ["lm_head", "embed_tokens", "norm"]},
    "LoRA, trainable tokens": {"trainable_token_indices": [6, 7, 8]},
    "LoRA, replicated layers": {"layer_replication": [[0, 2], [1, 2]]},
    "LoRA, parameters": {"target_parameters": ["gate_proj.weight"]},
    "aLoRA": {"alora_invocation_tokens": [6, 7]},
}


def llama() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2, pad_token_id=0,
        num_attention_heads=4, max_position_embeddings=128, eos_token_id=1, initializer_range=0.2,
    ))  # fmt: skip


def cases() -> dict[str, Any]:
    """Name -> what makes its configuration."""
    found: dict[str, Any] = {}
    for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items():
        fields = {"target_modules": TARGETS, **NEEDS.get(kind.value, {})}
        if kind.value == "XLORA":
            fields |= {"hidden_size": 32, "adapters": {"0": saved_lora(), "1": saved_lora(2)}}
        if "target_modules" not in config.__dataclass_fields__:
            del fields["target_modules"]
        found[kind.value] = lambda config=config, fields=fields: config(
            task_type="CAUSAL_LM", **fields
        )
    for name, fields in LORA.items():
        found[name] = lambda fields=fields: LoraConfig(
            task_type="CAUSAL_LM", **{"target_modules": TARGETS, **fields}
        )
    return found


@cache
def saved_lora(seed: int = 1) -> str:
    folder = tempfile.mkdtemp()
    model = get_peft_model(make_model(), LoraConfig(target_modules=TARGETS))
    trained(model, seed).save_pretrained(folder)
    return folder


def trained(model: PeftModel, seed: int = 1) -> PeftModel:
    """With adapters that are no longer at their start."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def rewards(completions: list[str], **_: Any) -> list[float]:
    return [float(len(text) % 5) for text in completions]


class Row(NamedTuple):
    kl: float = 0.0  # before any update
    drift: float = 0.0  # of the reference's log-probs, after two updates
    moved: float = 0.0  # the policy's, in the same two
    sampler: float = 0.0  # largest difference of a log-prob between sampler and trainer
    refused: str = ""


def run(name: str, how: str) -> Row:
    """Two updates of a tiny model, its adapters as peft_config= ("new") or in it ("passed in")."""
    config = cases()[name]
    base = llama() if name == "ADAPTION_PROMPT" else make_model()
    base.config.use_cache = name != "XLORA"
    try:
        if how == "new":
            model, adapters = base, config()
        else:
            model, adapters = trained(get_peft_model(base, config())), None
    except (ValueError, TypeError, ImportError) as error:
        return Row(refused=f"peft: {error}")
    args = RLOOConfig(
        tempfile.mkdtemp(), per_device_train_batch_size=4, num_generations=2, max_steps=2,
        max_completion_length=6, beta=0.5, learning_rate=0.03, logging_steps=1, use_cpu=True,
        bf16=False, disable_tqdm=True, report_to="none", save_strategy="no", logp_diff_stop=1e-4,
    )  # fmt: skip
    data = Dataset.from_dict({"prompt": ["w1", "w2", "w3", "w4"]})
    try:
        trainer = RLOOTrainer(
            model, rewards, args, data, processing_class=make_tokenizer(), peft_config=adapters
        )
    except (ValueError, ImportError) as error:
        return Row(refused=str(error))
    start = logps(trainer.model)
    try:
        trainer.train()
    except SamplerMismatch as error:
        return Row(refused=str(error))
    with reference_weights(trainer.model):
        reference = logps(trainer.model)
    logs = [log for log in trainer.state.log_history if "kl" in log]
    return Row(
        max(abs(logs[0]["kl"]), abs(logs[0]["objective/kl"])),
        float((reference - start).abs().max()),
        float((logps(trainer.model) - start).abs().max()),
        max(log["sampling/logp_diff_max"] for log in logs),
    )


@torch.no_grad()
def logps(model: Any) -> torch.Tensor:
    """By peft's own forward."""
    training = model.training
    found = model.eval()(input_ids=IDS).logits.log_softmax(-1)
    model.train(training)
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", ["new", "passed in"])
@pytest.mark.parametrize("name", cases())
def test_the_reference_is_the_policy_as_it_was_passed_in(name, how):
    row = run(name, how)
    if name in REFUSED:
        assert REFUSED[name] in row.refused
        return
    if name in RANDOM and row.refused:  # where noise is not judged, it is trained like the rest
        return
    assert not row.refused
    assert row.kl <= 1e-6
    assert row.drift == 0
    assert row.moved > 1e-3
    assert row.sampler <= 1e-5 or name in RANDOM


def table() -> None:
    print(f"{'method':32} {'how':10} {'KL':>8} {'drift':>8} {'moved':>8} {'sampler':>8}")
    for name in cases():
        for how in ("new", "passed in"):
            row = run(name, how)
            numbers = " ".join(f"{x:8.1e}" for x in row[:4])
            print(f"{name:32} {how:10} {' '.join(row.refused.split()) or numbers}", flush=True)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    table()
