"""The update: how many forwards it runs, and what its gradient does not depend on."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import make_model, make_tokenizer
from datasets import Dataset
from test_trl_parity import MAX_NEW, Injected, Recorder, first_reward

from rloo_fast import RLOOConfig, RLOOTrainer, models
from rloo_fast.types import Rollout

PROMPTS = Dataset.from_dict({"prompt": [f"w{i} w{i + 1}" for i in range(16)]})


class AllTruncated(Injected):
    def generate(self, prompt_ids, sampling, seed):
        return Rollout([[7] * MAX_NEW for _ in prompt_ids], ["length"] * len(prompt_ids))


def train(tmp_path, engine=Injected, model=None, reward=first_reward, peft_config=None, **fields):
    settings = {
        "per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": MAX_NEW,
        "max_steps": 1, "learning_rate": 0.01, "optim": "sgd", "max_grad_norm": 0.0,
        "logging_steps": 1, "save_strategy": "no", "report_to": "none", "use_cpu": True,
        "disable_tqdm": True, "shuffle_dataset": False, "beta": 0.2,
        "gradient_checkpointing": False, **fields,
    }  # fmt: skip
    recorder = Recorder()
    trainer = RLOOTrainer(
        model or make_model(),
        reward,
        RLOOConfig(str(tmp_path), **settings),
        PROMPTS,
        processing_class=make_tokenizer(),
        callbacks=[recorder],
        peft_config=peft_config,
    )
    trainer.engine = trainer.collector.engine = engine(settings["num_generations"])
    trainer.train()
    trainer.gradient = recorder.gradients[0] if recorder.gradients else None
    return trainer


@pytest.mark.parametrize(
    ("fields", "policy", "reference"),
    [
        ({}, 1, 1),
        ({"beta": 0.0}, 1, 0),
        ({"beta": 0.0, "normalize_advantages": True}, 1, 0),
        ({"gradient_accumulation_steps": 3}, 3, 3),
        ({"normalize_advantages": True}, 2, 1),
        ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}, 8, 4),
        ({"num_iterations": 2, "max_steps": 2}, 2, 1),
        ({"steps_per_generation": 2, "max_steps": 2}, 4, 2),
    ],
    ids=[
        "on-policy with KL: one", "without KL: no reference", "normalised without KL: one",
        "three micro-batches", "normalised with KL: two", "groups split: two",
        "two iterations: one each", "two updates per rollout: old log-probs first",
    ],
)  # fmt: skip
def test_number_of_forwards(fields, policy, reference, tmp_path):
    trainer = train(tmp_path, **fields)
    assert trainer.policy.num_forwards == policy
    assert (trainer.reference.num_forwards if trainer.reference else 0) == reference


def assert_same_gradient(a, b):
    largest = max(g.norm() for g in b.values())
    for name, gradient in b.items():
        assert (a[name] - gradient).norm() <= 1e-5 * max(gradient.norm(), 1e-2 * largest), name


@pytest.mark.parametrize("token_level_kl", [False, True])
@pytest.mark.parametrize("micro_batches", [2, 8])
def test_the_gradient_does_not_depend_on_micro_batches(micro_batches, token_level_kl, tmp_path):
    rows = {"per_device_train_batch_size": 16 // micro_batches}
    split = train(
        tmp_path, gradient_accumulation_steps=micro_batches, token_level_kl=token_level_kl, **rows
    )
    whole = train(tmp_path, per_device_train_batch_size=16, token_level_kl=token_level_kl)
    assert_same_gradient(split.gradient, whole.gradient)


def test_a_constant_added_to_the_rewards_changes_no_gradient(tmp_path):
    def shifted(completion_ids, **kwargs):
        return [reward + 3.0 for reward in first_reward(completion_ids)]

    assert_same_gradient(
        train(tmp_path, reward=shifted).gradient, train(tmp_path, reward=first_reward).gradient
    )


def test_a_step_of_masked_completions_alone_changes_nothing(tmp_path):
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    trainer = train(
        tmp_path, engine=AllTruncated, model=model, mask_truncated_completions=True, max_steps=2
    )
    assert trainer.state.global_step == 2
    assert all(torch.equal(before[name], w) for name, w in model.state_dict().items())


def test_dropout_is_off_by_default_in_adapters_too(tmp_path):
    from peft import LoraConfig

    lora = LoraConfig(lora_dropout=0.3, target_modules=["q_proj"])
    assert not models.has_dropout(train(tmp_path, peft_config=lora).model)
    kept = train(tmp_path, peft_config=lora, disable_dropout=False)
    assert models.has_dropout(kept.model)
    assert kept.policy.num_forwards == 3  # reference, KL without dropout, the update
