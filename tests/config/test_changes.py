"""A configuration that is changed after it was made acts as if it had been made so."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from typing import Any, cast

import pytest
from datasets import Dataset
from transformers import HfArgumentParser

from rloo_fast import RLOOConfig, RLOOTrainer
from rloo_fast.config import refused
from rloo_fast.config.changes import FixedFields
from tests.support.cpu_engines import engine_fields, require_deepspeed
from tests.support.tiny import make_model, make_tokenizer


def config(**settings: Any) -> RLOOConfig:
    plain = {
        "output_dir": "out", "use_cpu": True, "bf16": False, "report_to": "none",
        "save_strategy": "no", "disable_tqdm": True, "per_device_train_batch_size": 4,
        "max_completion_length": 4, "max_steps": 2, "layout": "padded",
    }  # fmt: skip
    return RLOOConfig(**{**plain, **settings})


def values(args: RLOOConfig) -> dict[str, Any]:
    return {f.name: getattr(args, f.name) for f in dataclasses.fields(args) if f.init}


def changed(args: RLOOConfig, **settings: Any) -> RLOOConfig:
    for name, value in settings.items():
        setattr(args, name, value)
    args.settle()
    return args


# --- as if it had been given to the constructor

CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # made with, and set later
    "accumulation": ({}, {"gradient_accumulation_steps": 4}),
    "batch size": ({}, {"per_device_train_batch_size": 8}),
    "both": ({}, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}),
    "steps per generation": ({}, {"steps_per_generation": 2}),
    "generation batch size": ({}, {"generation_batch_size": 16}),
    "batch size, with steps per generation": (
        {"steps_per_generation": 2}, {"per_device_train_batch_size": 8},
    ),
    "batch size, with generation batch size": (
        {"generation_batch_size": 16}, {"per_device_train_batch_size": 8},
    ),
    "accumulation, with steps per generation": (
        {"steps_per_generation": 2}, {"gradient_accumulation_steps": 4},
    ),
    "num_generations": ({}, {"num_generations": 4}),
    "num_iterations": ({}, {"num_iterations": 2}),
    "accumulation of mini-batches": (
        {"num_mini_batches": 2}, {"gradient_accumulation_steps": 4},
    ),
    "batch size of episodes": (
        {"total_episodes": 32, "max_steps": -1}, {"per_device_train_batch_size": 8},
    ),
    "episodes": ({"max_steps": -1}, {"total_episodes": 32}),
    "more episodes": ({"total_episodes": 32, "max_steps": -1}, {"total_episodes": 64}),
    "a 2024 name": ({}, {"rloo_k": 4}),
    "token_level_kl": ({}, {"token_level_kl": True}),
    "a clip range": ({}, {"reward_clip_range": 3}),
    "JSON": ({}, {"generation_kwargs": '{"no_repeat_ngram_size": 3}'}),
    "an engine": ({}, {"rollout_engine": "vllm"}),
    "vLLM": ({}, {"use_vllm": True, "vllm_mode": "server"}),
    "evaluation": ({}, {"eval_strategy": "steps"}),
    "the reference moves": ({}, {"sync_ref_model": True}),
    "padding": ({}, {"pad_to_multiple_of": "8"}),
    "torch.compile": ({}, {"torch_compile": True}),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_a_field_set_later_is_as_one_that_was_given(name):
    given, later = CHANGES[name]
    assert values(changed(config(**given), **later)) == values(config(**{**given, **later}))


@pytest.mark.parametrize("name", [n for n in CHANGES if "episodes" not in n])
def test_replace_is_as_if_the_new_fields_had_been_given(name):
    given, later = CHANGES[name]
    replaced = dataclasses.replace(config(**given), **later)
    assert values(replaced) == values(config(**{**given, **later}))


@pytest.mark.parametrize("name", ["batch size of episodes", "episodes"])
def test_replace_counts_episodes_again(name):
    given, later = CHANGES[name]
    replaced = dataclasses.replace(config(**given), **later)
    assert replaced.max_steps == config(**{**given, **later}).max_steps


LAST_COUNTS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "the current name": ({"rloo_k": 4}, {"num_generations": 2}, {"num_generations": 2}),
    "the 2024 name": ({"kl_coef": 0.1}, {"kl_coef": 0.2}, {"beta": 0.2}),
    "steps": ({"generation_batch_size": 16}, {"steps_per_generation": 2},
              {"steps_per_generation": 2, "generation_batch_size": 8}),
    "completions": ({"steps_per_generation": 2}, {"generation_batch_size": 16},
                    {"steps_per_generation": 4, "generation_batch_size": 16}),
    "max_steps": ({"total_episodes": 32, "max_steps": -1}, {"max_steps": 3}, {"max_steps": 3}),
    "loss": ({"token_level_kl": True}, {"loss": "rloo"}, {"loss": "rloo"}),
    "use_vllm": ({"rollout_engine": "vllm"}, {"use_vllm": False}, {"use_vllm": False}),
    "the number it had": ({}, {"steps_per_generation": 1, "gradient_accumulation_steps": 4},
                          {"steps_per_generation": 1, "generation_batch_size": 4}),
    "mini-batches": ({"num_mini_batches": 2}, {"steps_per_generation": 3},
                     {"steps_per_generation": 3, "generation_batch_size": 12}),
}  # fmt: skip


@pytest.mark.parametrize("name", LAST_COUNTS)
def test_of_two_fields_that_say_the_same_the_last_counts(name):
    given, later, expected = LAST_COUNTS[name]
    args = changed(config(**given), **later)
    assert {field: getattr(args, field) for field in expected} == expected


def test_settling_twice_changes_nothing():
    args = changed(config(rloo_k=4, num_mini_batches=2), gradient_accumulation_steps=4)
    before = values(args)
    args.settle()
    assert values(args) == before


METHODS = {
    "set_training": (
        lambda args: args.set_training(batch_size=8, max_steps=3, gradient_accumulation_steps=2),
        {"generation_batch_size": 16, "steps_per_generation": 2, "max_steps": 3},
    ),
    "set_dataloader": (
        lambda args: args.set_dataloader(train_batch_size=2, eval_batch_size=4),
        {"generation_batch_size": 2, "per_device_eval_batch_size": 4},
    ),
    "set_evaluate": (
        lambda args: args.set_evaluate(strategy="steps", steps=5, batch_size=4),
        {"eval_strategy": "steps", "eval_steps": 5, "eval_delay": 0},
    ),
    "set_lr_scheduler": (
        lambda args: args.set_lr_scheduler(name="cosine", warmup_steps=1),
        {"lr_scheduler_type": "cosine", "warmup_steps": 1},
    ),
}


@pytest.mark.parametrize("name", METHODS)
def test_transformers_methods_that_set_fields(name):
    change, expected = METHODS[name]
    args = config()
    change(args)
    args.settle()
    assert {field: getattr(args, field) for field in expected} == expected


# --- checked again


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"num_generations": 3}, r"generation_batch_size \(4\) must be divisible by num_gen"),
        ({"num_generations": 1}, "num_generations must be >= 2"),
        ({"beta": -1.0}, "beta must be >= 0, got -1.0"),
        ({"temperature": 0.0}, "temperature must be > 0"),
        ({"auto_find_batch_size": True}, "not supported by RLOO"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha=5.0 is refused"),
        ({"steps_per_generation": 2, "generation_batch_size": 12}, "can not be both configured"),
        ({"generation_batch_size": 6}, r"\(6\) must be divisible by the global batch size \(4"),
        ({"fp16": True, "bf16": True}, "At most one of fp16 and bf16"),
        ({"vllm_server_port": 1}, "has no effect here, as use_vllm is False"),
        ({"generation_kwargs": {"temperature": 0.5}}, "may not set temperature"),
        ({"fsdp_config": {"version": 2}}, "no effect without fsdp=True"),
        ({"loss": "ppo"}, "loss must be one of"),
    ],
    ids=str,
)
def test_what_is_set_later_is_checked_when_the_trainer_is_made(settings, sentence):
    args = config()
    for name, value in settings.items():
        setattr(args, name, value)
    with pytest.raises(ValueError, match=sentence):
        RLOOTrainer(make_model(), varied, args, prompts(), processing_class=make_tokenizer())


def test_what_is_set_inside_of_a_field_is_checked_too():
    args = config(generation_kwargs={"no_repeat_ngram_size": 3})
    assert isinstance(args.generation_kwargs, dict)
    args.generation_kwargs["temprature"] = 1
    with pytest.raises(ValueError, match="'temprature' is not a sampling argument"):
        args.settle()


@pytest.fixture
def zero2():
    """Fields that ask for ZeRO-2, which nothing remembers afterwards."""
    require_deepspeed()
    yield engine_fields("zero2")
    engine_fields(None)


def test_an_object_that_equals_no_other_is_no_change():
    config_of_weights = object()
    args = config(model_init_kwargs={"quantization_config": config_of_weights})
    fixed, before = FixedFields(args), values(args)
    args.settle()
    fixed.check()
    assert values(args) == before
    assert isinstance(args.model_init_kwargs, dict)
    args.model_init_kwargs["quantization_config"] = object()
    with pytest.raises(ValueError, match="model_init_kwargs was"):
        fixed.check()


def test_deepspeed_counts_the_rows_of_a_batch_size_set_later(zero2):
    args = changed(
        config(**zero2),
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
    )
    made = cast(Any, args.deepspeed_plugin).deepspeed_config
    assert made["train_micro_batch_size_per_gpu"] == 8
    assert made["gradient_accumulation_steps"] == 1


def test_what_is_set_inside_of_the_accelerator_config_is_checked_too():
    args = config()
    cast(Any, args).accelerator_config.split_batches = True
    with pytest.raises(ValueError, match="split_batches=True has no effect"):
        args.settle()


def test_fp16_set_later_takes_the_place_of_a_bf16_that_was_chosen(monkeypatch):
    monkeypatch.setattr(refused, "_refuse_fp16", lambda args: None)
    args = config(bf16=True)
    args.fp16 = True
    args.settle()
    assert (args.fp16, args.bf16, args.mixed_precision) == (True, False, "fp16")


# --- made again


@pytest.mark.parametrize(
    "again",
    [
        lambda args: RLOOConfig(**args.to_dict()),
        lambda args: RLOOConfig(**json.loads(args.to_json_string())),
        lambda args: cast(Any, HfArgumentParser)(RLOOConfig).parse_dict(args.to_dict())[0],
        dataclasses.replace,
        copy.copy,
        copy.deepcopy,
        lambda args: pickle.loads(pickle.dumps(args)),
    ],
    ids=["to_dict", "json", "parse_dict", "replace", "copy", "deepcopy", "pickle"],
)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_accumulation_steps": 2, "num_iterations": 2, "rloo_k": 4, "kl_coef": 0.1},
        {"total_episodes": 32, "max_steps": -1, "stop_token": "eos", "reward_clip_range": 3},
        {"num_mini_batches": 2, "eval_strategy": "steps", "debug": "underflow_overflow"},
        {"rollout_engine": "vllm", "model_init_kwargs": {"dtype": "float32"}, "hub_token": None},
        {"use_liger_kernel": False, "lr_scheduler_type": "cosine", "pad_to_multiple_of": 8},
    ],
    ids=str,
)  # fmt: skip
def test_a_configuration_made_of_another_is_the_same(again, settings):
    args = config(**settings)
    assert values(again(args)) == values(args)


def test_a_hidden_token_is_none_and_no_word_of_its_own():
    args = RLOOConfig(**config(hub_token="secret").to_dict())
    assert args.hub_token is None


def test_to_dict_with_another_batch_size():
    args = RLOOConfig(**{**config().to_dict(), "per_device_train_batch_size": 8})
    assert (args.steps_per_generation, args.generation_batch_size) == (1, 8)


# --- in a run


def varied(completions, **_):
    return [float(i % 3) for i in range(len(completions))]


def prompts() -> Dataset:
    return Dataset.from_dict({"prompt": [f"w{i}" for i in range(26)]})


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"gradient_accumulation_steps": 4}, 16),
        ({"per_device_train_batch_size": 8}, 8),
        ({"steps_per_generation": 2}, 4),
        ({"num_iterations": 2}, 2),
    ],
    ids=str,
)
def test_completions_per_step_of_a_run(settings, expected, tmp_path):
    """TRL 1.16's numbers."""
    calls = []

    def reward(completions, **_):
        calls.append(len(completions))
        return varied(completions)

    args = config(output_dir=str(tmp_path))
    for name, value in settings.items():
        setattr(args, name, value)
    trainer = RLOOTrainer(make_model(), reward, args, prompts(), processing_class=make_tokenizer())
    assert trainer.args is args
    trainer.train()
    assert sum(calls) / trainer.state.global_step == expected
    accumulation = settings.get("gradient_accumulation_steps", 1)
    assert args.gradient_accumulation_steps == args.micro_steps_per_update == accumulation


def test_what_transformers_reads_in_train_may_be_set_on_either_object(tmp_path):
    args = config(output_dir=str(tmp_path), learning_rate=1e-3)
    trainer = RLOOTrainer(make_model(), varied, args, prompts(), processing_class=make_tokenizer())
    args.max_steps, trainer.args.learning_rate, args.logging_steps = 3, 1e-2, 1
    trainer.train()
    assert trainer.state.global_step == 3
    assert trainer.state.log_history[0]["learning_rate"] == 1e-2


@pytest.mark.parametrize(
    ("name", "value"), [("beta", 0.2), ("per_device_train_batch_size", 8), ("num_iterations", 2)]
)
def test_what_is_read_once_cannot_be_set_after_the_trainer_is_made(name, value, tmp_path):
    args = config(output_dir=str(tmp_path))
    was = getattr(args, name)
    trainer = RLOOTrainer(make_model(), varied, args, prompts(), processing_class=make_tokenizer())
    setattr(args, name, value)
    sentence = f"{name} was {was!r} when the trainer was made and is {value!r} now: set it before"
    with pytest.raises(ValueError, match=sentence):
        trainer.train()


def test_a_second_trainer_takes_what_was_set_since(tmp_path):
    args = config(output_dir=str(tmp_path))
    for beta in (0.1, 0.2):
        args.beta = beta
        trainer = RLOOTrainer(
            make_model(), varied, args, prompts(), processing_class=make_tokenizer()
        )
        assert trainer.beta == beta


def test_accumulation_cannot_change_during_a_run():
    args = config(gradient_accumulation_steps=2)
    fixed = FixedFields(args)
    with args.accumulating_by_ourselves():
        fixed.check()
        assert args.to_dict()["gradient_accumulation_steps"] == 2
        copied = pickle.loads(pickle.dumps(args))  # training_args.bin of a checkpoint
        assert values(copied) == values(config(gradient_accumulation_steps=2))
        assert copied.micro_steps_per_update == 2
        args.gradient_accumulation_steps = 4
        with pytest.raises(ValueError, match="gradient_accumulation_steps was set to 4 during"):
            fixed.check()
    assert args.gradient_accumulation_steps == 2
