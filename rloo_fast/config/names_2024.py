"""Field names of TRL's 2024 trainer (v0.15.1), accepted beside the current ones.

They mean what they say. Where the 2024 code did something else (`token_level_kl` changed nothing,
`whiten_rewards` was never read, `reward_clip_range` acted only with `normalize_reward`), the name's
promise is kept, not the code's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Concatenate, ParamSpec, TypeVar

Self = TypeVar("Self")
Parameters = ParamSpec("Parameters")

RENAMED = {
    "rloo_k": "num_generations",
    "kl_coef": "beta",
    "cliprange": "epsilon",
    "num_ppo_epochs": "num_iterations",
    "response_length": "max_completion_length",
    "normalize_reward": "normalize_rewards",
    "normalize_advantage": "normalize_advantages",
    "local_rollout_forward_batch_size": "rollout_forward_batch_size",
}


def _old(text: str) -> Any:
    return field(default=None, metadata={"help": text})


@dataclass
class Names2024:
    """Fields of the 2024 trainer that have another name, or another unit, today."""

    rloo_k: int | None = _old("2024 name of num_generations.")
    kl_coef: float | None = _old("2024 name of beta.")
    cliprange: float | None = _old("2024 name of epsilon.")
    num_ppo_epochs: int | None = _old("2024 name of num_iterations.")
    response_length: int | None = _old("2024 name of max_completion_length.")
    normalize_reward: bool | None = _old("2024 name of normalize_rewards.")
    normalize_advantage: bool | None = _old("2024 name of normalize_advantages.")
    local_rollout_forward_batch_size: int | None = _old("2024 name of rollout_forward_batch_size.")
    num_mini_batches: int | None = _old(
        "Optimizer steps per pass over a generation batch: steps_per_generation becomes "
        "gradient_accumulation_steps times this."
    )
    total_episodes: int | None = _old("Length of the run in completions; sets max_steps.")
    token_level_kl: bool | None = _old("2024 name of loss=reinforce_pp; false: nothing is said.")


_COMPUTED = "it is computed from the batch sizes of a device, the accumulation and the processes"
_IN_PYTHON = "in Python, give RLOOTrainer a peft_config with it"
SCRIPT_OPTIONS = {  # of the 2024 scripts, that are written differently today
    "torch_dtype": "its name is dtype",
    "exp_name": "write run_name",
    "dataset_num_proc": "leave it out, prompts are tokenised as they are needed",
    "dataset_text_field": "the column is called prompt; dataset_map makes it of another one",
    "max_length": "write max_prompt_length",
    "non_eos_penalty": "write missing_eos_penalty and the number to subtract",
    "penalty_reward_value": "write missing_eos_penalty and the number to subtract",
    "truncate_token": "write stop_token",
    "truncate_token_id": "write stop_token_id",
    "sanity_check": "leave it out; max_steps makes a run short",
    "ignore_bias_buffers": "leave it out",
    "gradient_checkpointing_use_reentrant": 'write gradient_checkpointing_kwargs '
    """'{"use_reentrant": ...}'""",
    **dict.fromkeys(
        (
            "num_total_batches", "world_size", "micro_batch_size", "mini_batch_size", "batch_size",
            "local_batch_size", "local_mini_batch_size",
        ),
        _COMPUTED,
    ),
    **dict.fromkeys(
        (
            "lora_modules_to_save", "lora_task_type", "use_rslora", "use_dora",
        ),
        _IN_PYTHON,
    ),
}  # fmt: skip

ARGUMENTS = {  # of the trainer, then and now
    "config": "write args=",
    "policy": "write model=",
    "ref_policy": "leave it out: the reference is the model as it is when the trainer is made",
    "reward_model": "write reward_funcs=, a list of models, functions and names",
    "data_collator": "leave it out: datasets hold text, which the trainer tokenises",
    "tokenizer": "write processing_class=",
}


def refuses_arguments_2024(
    init: Callable[Concatenate[Self, Parameters], None],
) -> Callable[Concatenate[Self, Parameters], None]:
    """Let the constructor raise a TypeError that says what to write for a 2024 argument today."""

    @functools.wraps(init)
    def checked(self: Self, *args: Parameters.args, **kwargs: Parameters.kwargs) -> None:
        old = [
            f"{name}= is of the 2024 trainer: {say}"
            for name, say in ARGUMENTS.items()
            if name in kwargs
        ]
        if old:
            raise TypeError("; ".join(old) + ".")
        init(self, *args, **kwargs)

    return checked
