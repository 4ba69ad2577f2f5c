"""A resumed run repeats the uninterrupted one bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import IterableDataset
from transformers import MixtralConfig, MixtralForCausalLM

from rloo_fast.checkpoint.files import load_state
from tests.support.interrupted import (
    Crash,
    adapted_model,
    assert_same_run,
    crash_in,
    lora,
    make_other,
    renamed_head,
    scramble_random_numbers,
)
from tests.support.kill_resume import ROWS, make_trainer, metrics_of
from tests.support.tiny import make_model


def stream() -> IterableDataset:
    return IterableDataset.from_generator(lambda: iter(ROWS[:7]))


def experts() -> Any:
    return make_other(
        MixtralForCausalLM,
        MixtralConfig,
        intermediate_size=16,
        num_key_value_heads=1,
        num_local_experts=3,
    )


def lora_and_head() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=4, target_modules=["query_key_value"], modules_to_save=["lm_head"])


def lora_of_experts() -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=4, target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"]
    )


def named(*names: str) -> Any:
    """A model with adapters of these names, the last of which is trained."""
    from peft import LoraConfig, get_peft_model

    config = [LoraConfig(r=4, target_modules=["q_proj", "v_proj"]) for _ in names]
    model: Any = get_peft_model(make_model(), config[0], adapter_name=names[0])
    for name, other in zip(names[1:], config[1:], strict=True):
        model.add_adapter(name, other)
    model.set_adapter(names[-1])
    return model


def lora_of(**settings: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **settings)


# what is interrupted: (last step with a checkpoint, settings, what is made anew for every run);
# an epoch has 10 steps, or 5 with 8 rows
INTERRUPTED: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "mid-epoch": (3, {}, {}),
    "mid-second-epoch": (
        7,
        {"per_device_train_batch_size": 8, "max_steps": 9, "save_steps": 7},
        {},
    ),
    "mid-buffer-iterations": (3, {"num_iterations": 2}, {}),
    "mid-buffer-steps": (
        3,
        {
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "steps_per_generation": 4,
        },
        {},
    ),
    "mid-buffer-token-level": (3, {"num_iterations": 2, "token_level_kl": True}, {}),
    "epoch-boundary": (5, {"per_device_train_batch_size": 8, "max_steps": 7, "save_steps": 5}, {}),
    "epoch-boundary-logs": (
        5,
        {
            "per_device_train_batch_size": 8,
            "max_steps": 7,
            "save_steps": 5,
            "logging_strategy": "epoch",
            "eval_strategy": "epoch",
        },
        {},
    ),
    "between-logs": (4, {"logging_steps": 3, "save_steps": 2, "num_iterations": 3}, {}),
    "moving-reference": (3, {"sync_ref_model": True, "ref_model_sync_steps": 2}, {}),
    "stream": (3, {}, {"train_dataset": stream}),
    "lora": (3, {"disable_dropout": False}, {"peft_config": lora}),
    "lora-reference": (3, {}, {"model": adapted_model}),
    "adapter lora": (3, {}, {"model": lambda: named("lora")}),
    "adapter model": (3, {}, {"model": lambda: named("model")}),
    "adapters lora, b": (3, {}, {"model": lambda: named("lora", "b")}),
    "adapters b, ref": (3, {}, {"model": lambda: named("b", "ref")}),
    "lora, its biases": (3, {}, {"peft_config": lambda: lora_of(bias="lora_only")}),
    "lora, all biases": (3, {}, {"peft_config": lambda: lora_of(bias="all")}),
    "PiSSA": (3, {}, {"peft_config": lambda: lora_of(init_lora_weights="pissa")}),
    "schedule": (3, {"lr_scheduler_type": "cosine", "warmup_steps": 4}, {}),
    "evaluations": (
        4,
        {"eval_strategy": "steps", "eval_steps": 3, "eval_on_start": True, "save_steps": 2},
        {},
    ),
    "dropout": (
        3,
        {"disable_dropout": False, "gradient_checkpointing": True},
        {"model": lambda: make_model(attention_dropout=0.1)},
    ),
    "renamed-head": (3, {}, {"model": renamed_head}),
    "renamed-head-lora": (3, {}, {"model": renamed_head, "peft_config": lora_and_head}),
    "experts": (3, {}, {"model": experts}),
    "experts-lora": (3, {}, {"model": experts, "peft_config": lora_of_experts}),
}


@pytest.mark.parametrize("what", INTERRUPTED)
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path, what):
    step, settings, made = INTERRUPTED[what]

    def trainer(run: str) -> Any:
        return make_trainer(tmp_path / run, **settings, **{name: f() for name, f in made.items()})

    whole = trainer("whole")
    loss = whole.train().training_loss
    stopped = trainer("stopped")
    stopped.add_callback(crash_in(step + 1))
    with pytest.raises(Crash):
        stopped.train()
    scramble_random_numbers()
    resumed = trainer("stopped")
    resumed_loss = resumed.train(resume_from_checkpoint=True).training_loss

    assert_same_run(resumed, whole)
    assert resumed_loss == loss


def test_what_an_engine_leaves_out_is_refused(tmp_path):
    make_trainer(tmp_path, max_steps=3).train()
    trainer = make_trainer(tmp_path / "other", model=make_model(num_hidden_layers=1))
    trainer.run_state.resume_from = str(
        tmp_path / "checkpoint-3"
    )  # whose weights an engine has loaded

    with pytest.raises(ValueError, match=r"not in the model: model.layers.1.* and 9 more\."):
        trainer.run_state.restore()


def test_the_checkpoint_restores_completions_and_what_is_known_of_them(tmp_path):
    trainer = make_trainer(tmp_path, num_iterations=2, max_steps=3)
    trainer.train()

    (_, saved), = load_state(str(tmp_path / "checkpoint-3"), 0)["buffer"]["queue"]  # fmt: skip

    (_, kept), = trainer.buffer.queue  # fmt: skip
    assert saved["generation"]["completion_ids"] == kept.generation.completion_ids
    assert torch.equal(saved["generation"]["scores"], kept.generation.scores)
    for name in ("old_logps", "ref_logps", "advantages"):
        assert torch.equal(saved[name], getattr(kept, name))


def test_a_finished_run_that_is_resumed_stays_as_it_is(tmp_path):
    # in the middle of an epoch, where transformers takes one step more
    whole = make_trainer(tmp_path, num_iterations=2, logging_strategy="epoch")
    whole.train()
    lines = metrics_of(tmp_path)
    resumed = make_trainer(tmp_path, num_iterations=2, logging_strategy="epoch")
    resumed.train(resume_from_checkpoint=True)

    assert resumed.state.global_step == 6
    assert metrics_of(tmp_path) == lines
    assert_same_run(resumed, whole)


def test_evaluations_around_the_training_do_not_spoil_a_resumed_metrics_file(tmp_path):
    for resume in (False, True):
        trainer = make_trainer(tmp_path)
        trainer.evaluate()
        trainer.train(resume_from_checkpoint=resume)
        trainer.evaluate()
        if not resume:
            lines = metrics_of(tmp_path)

    assert metrics_of(tmp_path) == lines
    assert not (tmp_path / "metrics.1.jsonl").exists()
