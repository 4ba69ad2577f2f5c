"""The values that a field may have: every number of RLOOConfig, and names of one thing of several.

A number means something here or is refused: nan never does, infinity only as "no limit", true and
text never in place of a number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from ..batching.layouts import LAYOUTS
from ..objective.losses import ADVANTAGES, LOSSES

Test = Callable[[Any], bool]

TOO_MANY = 2**31  # of anything that is counted
MAX_PROCESSES = 4096  # that one process starts
MAX_VIEW_MIB = 2**20  # a TiB
MAX_SECONDS = 1e9  # what a clock of the system can wait for


def _optional(holds: Test) -> Test:
    return lambda value: value is None or holds(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and 1 <= value < TOO_MANY


def _from(low: int, high: float = math.inf) -> Test:
    """An integer of these."""
    return lambda value: isinstance(value, int) and low <= value <= high


def _finite_from(low: float) -> Test:
    return lambda value: low <= value < math.inf


def _is_over_limit(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value in (None, "error", "none") or (is_number and math.isfinite(value))


COUNTS_BEFORE = (
    "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
)  # fmt: skip
COUNTS = (
    "num_iterations", "max_completion_length", "ref_model_sync_steps", "max_nonfinite_steps",
    "vllm_tensor_parallel_size", "weight_sync_bucket_mib", "weight_sync_steps",
    "max_sampling_rounds",
)  # fmt: skip
OPTIONAL_COUNTS = (
    "num_generations_eval", "steps_per_generation", "generation_batch_size",
    "rollout_forward_batch_size", "num_completions_to_print", "max_tokens_per_micro_batch",
    "vllm_max_model_length", "max_prompt_length", "soft_punish_cache",
    "max_tool_calling_iterations",
)  # fmt: skip
# field: (what its value must satisfy, the same in words)
Ranges = dict[str, tuple[Test, str | Callable[[], str]]]
# what transformers, or the names of 2024, work with before the others are checked
BEFORE: Ranges = {
    **dict.fromkeys(COUNTS_BEFORE, (_is_count, "an integer >= 1")),
    "num_mini_batches": (_optional(_is_count), "an integer >= 1, or left out"),
    "total_episodes": (_optional(_from(1, 2**53)), "an integer >= 1, or left out"),
    "num_train_epochs": (_finite_from(0), ">= 0"),
    "max_steps": (
        lambda n: isinstance(n, int) and (n == -1 or n >= 1),
        "an integer >= 1, or -1: as num_train_epochs says",
    ),
    "learning_rate": (_finite_from(0), ">= 0"),
    "warmup_steps": (_finite_from(0), ">= 0; below 1: a share of the run"),
    "weight_decay": (_finite_from(0), ">= 0"),
    "adam_beta1": (lambda b: 0 <= b < 1, "in [0, 1)"),
    "adam_beta2": (lambda b: 0 <= b < 1, "in [0, 1)"),
    "adam_epsilon": (_finite_from(0), ">= 0"),
    "max_grad_norm": (_optional(lambda n: n >= 0), ">= 0; 0 clips nothing"),
    "logging_steps": (_finite_from(0), ">= 0; below 1: a share of the run"),
    "eval_steps": (_optional(_finite_from(0)), ">= 0, or left out; below 1: a share of the run"),
    "save_steps": (
        lambda n: n == -1 or 0 <= n < math.inf,
        ">= 0; below 1: a share of the run; -1: never",
    ),
    "eval_delay": (_optional(_finite_from(0)), ">= 0"),
    "save_total_limit": (
        _optional(_from(-TOO_MANY, TOO_MANY)),
        "an integer, or left out; below 1: no limit",
    ),
    "seed": (_from(0, 2**32 - 1), "an integer from 0 to 4294967295"),
    "dataloader_num_workers": (_from(0, MAX_PROCESSES), f"an integer from 0 to {MAX_PROCESSES}"),
    "ddp_timeout": (_from(1, MAX_SECONDS), "an integer >= 1, in seconds"),
    "local_rank": (_from(-1, TOO_MANY), "an integer >= -1"),
    "ddp_bucket_cap_mb": (_optional(_is_count), "an integer >= 1, or left out"),
}
RANGES: Ranges = {
    **BEFORE,
    "num_generations": (
        _from(2, TOO_MANY),
        ">= 2 for a leave-one-out baseline: RLOO requires at least 2 generations per prompt to "
        "calculate the advantages",
    ),
    **dict.fromkeys(COUNTS, (_is_count, "an integer >= 1")),
    **dict.fromkeys(OPTIONAL_COUNTS, (_optional(_is_count), "an integer >= 1, or left out")),
    "temperature": (lambda t: 0 < t < math.inf, "> 0"),
    "top_p": (lambda p: 0 < p <= 1, "in (0, 1]"),
    "top_k": (
        _optional(lambda k: k == int(k) and 0 <= k < TOO_MANY),
        ">= 0, without a fraction; 0 keeps all tokens",
    ),
    "min_p": (_optional(lambda p: 0 <= p <= 1), "in [0, 1]"),
    "repetition_penalty": (lambda p: 0 < p < math.inf, "> 0; 1 changes nothing"),
    "beta": (_finite_from(0), ">= 0"),
    "router_aux_loss_coef": (_optional(_finite_from(0)), ">= 0, or left out"),
    "epsilon": (lambda e: e >= 0, ">= 0"),
    "epsilon_high": (_optional(lambda e: e >= 0), ">= 0, or left out"),
    "ref_model_mixup_alpha": (lambda a: 0 <= a <= 1, "in [0, 1]"),
    "reward_weights": (
        _optional(lambda ws: all(math.isfinite(w) and w is not True for w in ws)),
        "a list of finite numbers, one per reward function",
    ),
    "curriculum": (_optional(lambda c: 0 < c <= 1), "in (0, 1], or left out"),
    "missing_eos_penalty": (_optional(math.isfinite), "a finite number, or left out"),
    "reward_over_limit": (_is_over_limit, "'error', 'none' or a finite number"),
    **dict.fromkeys(
        ("reward_timeout_s", "tool_timeout_s", "trajectory_timeout_s"),
        (
            _optional(lambda s: 0 < s <= MAX_SECONDS),
            f"> 0 seconds (at most {MAX_SECONDS:.0g}), or left out",
        ),
    ),
    "tool_failure": (lambda what: what in ("answer", "end"), "'answer' or 'end'"),
    "tool_threads": (_from(0, MAX_PROCESSES), f"an integer from 0 to {MAX_PROCESSES}"),
    "num_sample_generations": (_optional(_from(0, TOO_MANY)), ">= 0, or left out"),
    "stop_token_id": (_optional(_from(0, TOO_MANY)), "an integer >= 0, or left out"),
    "reward_model_label": (
        _optional(lambda x: isinstance(x, str) or _from(0, TOO_MANY)(x)),
        "the number of a label, from 0 on, or its name, or left out",
    ),
    "layout": (
        lambda name: name in ("auto", *LAYOUTS),
        lambda: f"one of {('auto', *LAYOUTS)}, or one of your own as file.py:NAME",
    ),
    "advantage": (lambda name: name in ADVANTAGES, f"one of {tuple(ADVANTAGES)}"),
    "loss": (
        lambda name: name in LOSSES,
        lambda: f"one of {tuple(LOSSES)}, or one of your own as file.py:NAME",
    ),
    "reward_model_output": (lambda name: name in ("logit", "probability"), "logit or probability"),
    "reward_model_position": (lambda name: name in ("last", "eos"), "last or eos"),
    "reward_model_dtype": (
        lambda name: name in (None, "auto", "bfloat16", "float16", "float32"),
        "auto, bfloat16, float16, float32, or left out",
    ),
    "reward_processes": (_from(0, MAX_PROCESSES), f"an integer >= 0, at most {MAX_PROCESSES}"),
    "view_mib": (_from(0, MAX_VIEW_MIB), f"an integer from 0 to {MAX_VIEW_MIB}"),
    "log_format": (lambda name: name in ("dict", "line"), "'dict' or 'line'"),
    "max_staleness": (_from(0, TOO_MANY), "an integer >= 0; 0: sampled, then trained"),
    **dict.fromkeys(
        ("max_inflight_tasks", "queue_maxsize"),
        (
            lambda n: n == -1 or _is_count(n),
            "an integer >= 1, or -1: as many as max_staleness lets",
        ),
    ),
    "vllm_mode": (lambda mode: mode in ("colocate", "server"), "'colocate' or 'server'"),
    "vllm_lora": (lambda way: way in ("merged", "adapter"), "'merged' or 'adapter'"),
    "vllm_weight_transfer": (
        lambda way: way in ("auto", "nccl", "gloo", "http"),
        "'auto', 'nccl', 'gloo' or 'http'",
    ),
    "vllm_model_impl": (
        lambda name: name in ("vllm", "transformers", "auto"),
        "'vllm', 'transformers' or 'auto'",
    ),
    "vllm_gpu_memory_utilization": (lambda share: 0 < share <= 1, "in (0, 1]"),
    "vllm_server_port": (_from(1, 65535), "an integer from 1 to 65535"),
    "vllm_server_timeout": (
        lambda s: 0 < s <= MAX_SECONDS,
        f"> 0 seconds, at most {MAX_SECONDS:.0g}",
    ),
    "logp_diff_warn": (_optional(lambda d: d >= 0), ">= 0; 0: never"),
    "logp_diff_stop": (_optional(lambda d: d >= 0), ">= 0; 0: never"),
    "truncated_importance_sampling": (
        _optional(lambda level: level in ("token", "sequence")),
        "'token', 'sequence' or left out",
    ),
    "importance_sampling_cap": (lambda cap: 0 < cap < math.inf, "> 0"),
    "stop_token": (
        _optional(lambda token: token == "eos"),
        "'eos' (write the id of another token as stop_token_id)",
    ),
}


def is_valid(name: str, value: Any) -> bool:
    """Whether `value` is in the range of the field `name`."""
    try:
        return not isinstance(value, bool) and RANGES[name][0](value)
    except (TypeError, ValueError, OverflowError):  # text or None in place of a number; infinity
        return False


def in_words(name: str) -> str:
    """What a value of the field must be."""
    words = RANGES[name][1]
    return words if isinstance(words, str) else words()


def check_value(name: str, value: Any) -> None:
    """Raise ValueError unless `value` is in the range of the field `name`."""
    if not is_valid(name, value):
        raise ValueError(f"{name} must be {in_words(name)}, got {value!r:.80}.")


def check_values(args: Any, names: Iterable[str]) -> None:
    """`check_value` of these fields, as far as this version of transformers has them."""
    for name in names:
        if hasattr(args, name):
            check_value(name, getattr(args, name))
