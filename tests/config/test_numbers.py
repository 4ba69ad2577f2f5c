"""Every number that a run can be told has a range: what means nothing is refused before a model.

A new field with a number must be entered in RIGHT, with values that users rightly give.
"""

from __future__ import annotations

import dataclasses
import math
import typing

import pytest

from rloo_fast import RLOOConfig
from rloo_fast.cli.arguments import NUMBERS, TrainArguments
from rloo_fast.config.names_2024 import RENAMED
from rloo_fast.config.ranges import RANGES, check_value, is_valid
from rloo_fast.config.refused import REFUSED

INF, NAN = math.inf, math.nan
COUNT = (1, 7, 2**20)
LEFT_OUT = (None, *COUNT)
# field: values that are right; of those that are not, what is special to it
RIGHT: dict[str, tuple] = {
    "per_device_train_batch_size": COUNT, "per_device_eval_batch_size": COUNT,
    "gradient_accumulation_steps": COUNT, "num_iterations": COUNT, "max_completion_length": COUNT,
    "ref_model_sync_steps": COUNT, "max_nonfinite_steps": COUNT, "vllm_tensor_parallel_size": COUNT,
    "weight_sync_bucket_mib": COUNT, "num_generations": (2, 64),
    "num_generations_eval": LEFT_OUT, "steps_per_generation": LEFT_OUT,
    "generation_batch_size": LEFT_OUT, "rollout_forward_batch_size": LEFT_OUT,
    "num_completions_to_print": LEFT_OUT, "max_tokens_per_micro_batch": LEFT_OUT,
    "vllm_max_model_length": LEFT_OUT, "max_prompt_length": LEFT_OUT, "ddp_bucket_cap_mb": LEFT_OUT,
    "num_mini_batches": LEFT_OUT, "total_episodes": (*LEFT_OUT, 2**40),
    "num_train_epochs": (0.5, 3, 3.0, 1e6), "max_steps": (-1, 1, 10**9),
    "learning_rate": (0, 0.0, 1e-6, 1), "warmup_steps": (0, 0.1, 500), "weight_decay": (0, 0.1),
    "adam_beta1": (0, 0.9), "adam_beta2": (0, 0.999), "adam_epsilon": (0, 1e-8),
    "max_grad_norm": (0, 1.0, INF, None), "logging_steps": (0, 0.1, 10),
    "save_steps": (-1, 0.5, 10),
    "eval_steps": (None, 0.1, 10), "eval_delay": (None, 0, 2.5),
    "save_total_limit": (None, -1, 0, 1), "seed": (0, 42, 2**32 - 1),
    "dataloader_num_workers": (0, 8), "ddp_timeout": (1, 1800), "local_rank": (-1, 0, 3),
    "temperature": (0.1, 1, 2.0), "top_p": (0.1, 1, 1.0), "top_k": (None, 0, 50, 50.0),
    "min_p": (None, 0, 0.5, 1), "repetition_penalty": (0.5, 1), "beta": (0, 0.05, 3),
    "router_aux_loss_coef": (None, 0, 0.001), "epsilon": (0, 0.2, INF),
    "epsilon_high": (None, 0.28, INF), "ref_model_mixup_alpha": (0, 0.6, 1),
    "max_sampling_rounds": COUNT, "soft_punish_cache": LEFT_OUT, "curriculum": (None, 0.01, 1),
    "reward_weights": (None, [1.0, 0, -2]), "missing_eos_penalty": (None, 0, 1.0, -1.0),
    "reward_timeout_s": (None, 0.1, 3600), "num_sample_generations": (None, 0, 10),
    "stop_token_id": (None, 0, 151643), "reward_model_label": (None, 0, 1, "POSITIVE"),
    "reward_processes": (0, 8), "view_mib": (0, 1, 256), "vllm_server_port": (1, 8000, 65535),
    "vllm_gpu_memory_utilization": (0.3, 1), "vllm_server_timeout": (0.5, 240),
    "logp_diff_warn": (None, 0, 1.0, INF), "logp_diff_stop": (None, 0, 1.0, INF),
    "importance_sampling_cap": (0.5, 2),
    "max_staleness": (0, 1, 4), "max_inflight_tasks": (-1, 1, 256), "weight_sync_steps": COUNT,
    "queue_maxsize": (-1, 1, 1024), "max_tool_calling_iterations": LEFT_OUT,
    "tool_timeout_s": (None, 0.1, 60), "trajectory_timeout_s": (None, 0.1, 60),
    "tool_threads": (0, 1, 32),
}  # fmt: skip
OF_THEIR_OWN = (
    "pad_to_multiple_of", "reward_clip_range", "reward_over_limit", "vllm_group_port",
)  # below, or in test_rloo_config.py  # fmt: skip
NEVER = (NAN, -INF, True, False, "1", "x", -7, 10**40, [1.0], {}, 1j)
RIGHT_THOUGH = {  # (field, one of NEVER that means something there)
    ("save_total_limit", -7), ("missing_eos_penalty", -7), ("reward_model_label", "1"),
    ("reward_model_label", "x"), ("reward_weights", "[1.0]"),
    *((name, 10**40) for name in (
        "num_train_epochs", "max_steps", "learning_rate", "warmup_steps", "weight_decay",
        "adam_epsilon", "max_grad_norm", "logging_steps", "save_steps", "eval_steps", "eval_delay",
        "temperature", "repetition_penalty", "beta", "router_aux_loss_coef", "epsilon",
        "epsilon_high", "missing_eos_penalty", "logp_diff_warn", "logp_diff_stop",
        "importance_sampling_cap",
    )),
}  # fmt: skip


def numeric_fields(cls) -> list[str]:
    """Fields whose type has an int or a float in it."""
    hints = typing.get_type_hints(cls)

    def has_number(kind) -> bool:
        return kind in (int, float) or any(map(has_number, typing.get_args(kind)))

    return [
        f.name for f in dataclasses.fields(cls)
        if f.init and typing.get_origin(hints[f.name]) is not dict and has_number(hints[f.name])
    ]  # fmt: skip


def test_every_number_has_a_range():
    placed = {*RIGHT, *REFUSED, *RENAMED, *OF_THEIR_OWN}
    assert sorted({*numeric_fields(RLOOConfig)} - placed) == []
    assert sorted({*numeric_fields(TrainArguments)} - {*NUMBERS}) == []
    assert RIGHT.keys() <= RANGES.keys()


@pytest.mark.parametrize("name", RIGHT)
def test_a_number_is_right_or_refused(name):
    for value in RIGHT[name]:
        assert is_valid(name, value), value
    for value in (*NEVER, *(() if INF in RIGHT[name] else (INF,))):
        if name == "reward_weights" and value in ({}, [1.0]):
            continue
        means_something = any(name == n and value is not True and value == v
                              for n, v in RIGHT_THOUGH)  # fmt: skip
        assert is_valid(name, value) == means_something, value
    with pytest.raises(ValueError, match=f"^{name} must be .*, got nan"):
        check_value(name, NAN)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_train_epochs", -1.0), ("num_train_epochs", NAN), ("max_steps", -5), ("max_steps", 0),
        ("learning_rate", NAN), ("learning_rate", "1e-5"), ("weight_decay", -0.1),
        ("max_grad_norm", -1.0), ("max_grad_norm", NAN), ("adam_beta2", 1.0), ("seed", -1),
        ("logging_steps", INF), ("save_steps", INF), ("eval_steps", -2), ("warmup_steps", NAN),
        ("missing_eos_penalty", NAN), ("reward_timeout_s", INF), ("top_k", INF),
        ("gradient_accumulation_steps", True), ("vllm_server_port", 70000), ("kl_coef", NAN),
        ("pad_to_multiple_of", NAN), ("reward_clip_range", [NAN, 1.0]), ("reward_clip_range", True),
        ("reward_weights", [NAN]), ("num_mini_batches", "2"), ("total_episodes", 0),
    ],
)  # fmt: skip
def test_a_configuration_refuses_it_by_its_name(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"^{RENAMED.get(name, name)} must be "):
        RLOOConfig(str(tmp_path), use_cpu=True, bf16=False, **{name: value})


@pytest.mark.parametrize(
    "settings",
    [
        {"max_grad_norm": 0.0}, {"max_grad_norm": None}, {"num_train_epochs": 0.25},
        {"max_steps": -1}, {"warmup_steps": 0.1}, {"save_steps": -1}, {"save_total_limit": 0},
        {"epsilon": INF}, {"missing_eos_penalty": -1.0}, {"reward_clip_range": [-INF, 1.0]},
        {"eval_steps": 0.5, "eval_strategy": "steps"}, {"learning_rate": 0.0},
    ],
)  # fmt: skip
def test_what_users_rightly_give_is_kept(tmp_path, settings):
    config = RLOOConfig(str(tmp_path), use_cpu=True, bf16=False, **settings)
    assert {name: getattr(config, name) for name in settings} == settings
