"""What RLOOConfig checks once it has its values: ranges, settings not offered, batch sizes."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rloo_kernels.advantages import BY_GROUP
from transformers import GenerationConfig

from .losses import LOSSES
from .packing import LAYOUTS

if TYPE_CHECKING:
    from .config import RLOOConfig


def clean(args: RLOOConfig) -> None:
    """Bring values that may be written in several ways into one form."""
    args.reward_clip_range = _clip_range(args.reward_clip_range)
    args.pad_to_multiple_of = _multiple(args.pad_to_multiple_of)
    if args.overlap_rewards is None:
        args.overlap_rewards = args.use_vllm
    for name in (
        "model_init_kwargs", "generation_kwargs", "chat_template_kwargs", "vllm_engine_kwargs",
        "reward_kwargs",
    ):  # fmt: skip
        value = getattr(args, name)
        if value is not None and not isinstance(value, dict):
            raise ValueError(
                f"{name} must be a dict, or its JSON on a command line, got {value!r:.80}."
            )


def _clip_range(clip: Any) -> list[float] | None:
    if clip is None:
        return None
    numbers = [clip] if isinstance(clip, (int, float)) else clip
    try:
        low, high = (-numbers[0], numbers[0]) if len(numbers) == 1 else numbers
        if low < high:
            return [float(low), float(high)]
    except (TypeError, ValueError):  # text, or more than two
        pass
    raise ValueError(
        "reward_clip_range must be (min, max) with min < max, or one number c > 0 for (-c, c), "
        f"got {clip!r}."
    )


def _multiple(value: Any) -> int | None:
    if value is None or str(value).lower() in ("auto", "none", "null"):
        return None
    number = int(value) if str(value).isdecimal() else 0
    if number < 1:
        raise ValueError(f"pad_to_multiple_of must be 'auto' or an integer >= 1, got {value!r}.")
    return number


def _optional(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or holds(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and value >= 1


COUNTS = (
    "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
    "num_iterations", "max_completion_length", "ref_model_sync_steps", "max_nonfinite_steps",
    "vllm_tensor_parallel_size", "weight_sync_bucket_mib",
)  # fmt: skip
OPTIONAL_COUNTS = (
    "num_generations_eval", "steps_per_generation", "generation_batch_size",
    "rollout_forward_batch_size", "num_completions_to_print", "max_tokens_per_micro_batch",
    "vllm_max_model_length", "max_prompt_length",
)  # fmt: skip
# field: (what its value must satisfy, the same in words)
RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "num_generations": (
        lambda k: isinstance(k, int) and k >= 2,
        ">= 2 for a leave-one-out baseline",
    ),
    **dict.fromkeys(COUNTS, (_is_count, "an integer >= 1")),
    **dict.fromkeys(OPTIONAL_COUNTS, (_optional(_is_count), "an integer >= 1, or left out")),
    "temperature": (lambda t: 0 < t < math.inf, "> 0"),
    "top_p": (lambda p: 0 < p <= 1, "in (0, 1]"),
    "top_k": (_optional(lambda k: k >= 0), ">= 0; 0 keeps all tokens"),
    "min_p": (_optional(lambda p: 0 <= p <= 1), "in [0, 1]"),
    "repetition_penalty": (lambda p: p > 0, "> 0; 1 changes nothing"),
    "beta": (lambda b: 0 <= b < math.inf, ">= 0"),
    "epsilon": (lambda e: e >= 0, ">= 0"),
    "epsilon_high": (_optional(lambda e: e >= 0), ">= 0, or left out"),
    "ref_model_mixup_alpha": (lambda a: 0 <= a <= 1, "in [0, 1]"),
    "reward_weights": (
        _optional(lambda ws: all(math.isfinite(w) for w in ws)),
        "a list of finite numbers, one per reward function",
    ),
    "reward_timeout_s": (_optional(lambda s: s > 0), "> 0 seconds, or left out"),
    "num_sample_generations": (_optional(lambda n: n >= 0), ">= 0, or left out"),
    "layout": (lambda name: name in ("auto", *LAYOUTS), f"one of {('auto', *LAYOUTS)}"),
    "advantage": (lambda name: name in BY_GROUP, f"one of {tuple(BY_GROUP)}"),
    "loss": (lambda name: name in LOSSES, f"one of {tuple(LOSSES)}"),
    "reward_model_output": (lambda name: name in ("logit", "probability"), "logit or probability"),
    "reward_model_position": (lambda name: name in ("last", "eos"), "last or eos"),
    "reward_model_dtype": (
        lambda name: name in (None, "auto", "bfloat16", "float16", "float32"),
        "auto, bfloat16, float16, float32, or left out",
    ),
    "reward_processes": (lambda n: isinstance(n, int) and n >= 0, "an integer >= 0"),
    "vllm_mode": (lambda mode: mode in ("colocate", "server"), "'colocate' or 'server'"),
    "vllm_model_impl": (
        lambda name: name in ("vllm", "transformers", "auto"),
        "'vllm', 'transformers' or 'auto'",
    ),
    "vllm_gpu_memory_utilization": (lambda share: 0 < share <= 1, "in (0, 1]"),
    "vllm_server_timeout": (lambda s: s > 0, "> 0 seconds"),
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


def check_ranges(args: RLOOConfig) -> None:
    for name, (holds, expected) in RANGES.items():
        value = getattr(args, name)
        try:
            fine = holds(value)
        except TypeError:  # None or text in place of a number
            fine = False
        if not fine:
            raise ValueError(f"{name} must be {expected}, got {value!r}.")
    if args.sync_ref_model and args.beta == 0:
        raise ValueError(
            "sync_ref_model=True needs a reference model, which beta=0 does not keep: set beta > 0 "
            "or sync_ref_model=False."
        )
    _merge_adapter(args)
    _loss(args)
    _generation_kwargs(args)


def _merge_adapter(args: RLOOConfig) -> None:
    merged = args.merge_adapter
    if merged is not None and Path(merged).resolve() == Path(str(args.output_dir)).resolve():
        raise ValueError(
            f"merge_adapter={merged!r} is output_dir too, where what is trained would take its "
            "place: choose another output_dir."
        )


def _loss(args: RLOOConfig) -> None:
    in_loss = [name for name, kind in LOSSES.items() if kind.kl == "loss"]
    if not args.use_bias_correction_kl and args.loss not in in_loss:
        raise ValueError(
            f"use_bias_correction_kl=False has no effect with loss={args.loss!r}, whose KL is in "
            f"the reward: leave it out, or choose a loss of {in_loss}."
        )
    if args.loss == "reinforce_pp" and args.advantage == "grpo":
        raise ValueError(
            "advantage='grpo' divides rewards by the standard deviation of their group, but the KL "
            "to go of loss='reinforce_pp' is not divided: choose advantage='rloo' or 'dr_grpo', "
            "with normalize_advantages=True to scale both."
        )


# keys of generation_kwargs that the rest of the step must know of: the field that says it
SAID_ELSEWHERE = {
    "temperature": "temperature",
    "max_new_tokens": "max_completion_length",
    "max_length": "max_completion_length",
    "eos_token_id": "stop_token_id",
    "stop_strings": "stop_token_id",
    "num_return_sequences": "num_generations",
    "pad_token_id": "the tokenizer's pad_token",
}
SAID_ELSEWHERE_VLLM = {
    "temperature": "temperature",
    "max_tokens": "max_completion_length",
    "stop_token_ids": "stop_token_id",
    "stop": "stop_token_id",
    "n": "num_generations",
    "seed": "seed",
    **dict.fromkeys(("logprobs", "detokenize", "ignore_eos"), "nothing, rollouts need theirs"),
}


def _generation_kwargs(args: RLOOConfig) -> None:
    given = args.generation_kwargs or {}
    assert isinstance(given, dict)
    said = SAID_ELSEWHERE_VLLM if args.use_vllm else SAID_ELSEWHERE
    for name in given:
        if name in said:
            raise ValueError(
                f"generation_kwargs may not set {name}, which the loss depends on as well: set "
                f"{said[name]}."
            )
    if args.use_vllm:
        return  # its SamplingParams are checked when the engine starts
    known = vars(GenerationConfig())
    for name in given:
        if name not in known or name.startswith(("output_", "return_", "_")):
            raise ValueError(
                f"generation_kwargs: {name!r} is not a sampling argument of transformers' "
                "GenerationConfig."
            )
    cache = args.cache_implementation
    try:
        GenerationConfig(**{"do_sample": True, "cache_implementation": cache, **given})
    except (TypeError, ValueError) as error:
        raise ValueError(f"cache_implementation or generation_kwargs: {error}") from error


def batch_sizes(args: RLOOConfig) -> None:
    # the trainer works through the micro-steps itself and runs transformers' loop with 1; a
    # pickled config keeps the number that was asked for
    if not args._micro_steps_per_update:
        args._micro_steps_per_update = args.gradient_accumulation_steps
    per_micro_step = args.per_device_train_batch_size * args.world_size
    steps, size = args.steps_per_generation, args.generation_batch_size
    if steps is not None and size is not None and size != steps * per_micro_step:
        raise ValueError(
            f"steps_per_generation={steps} means {steps * per_micro_step} completions, but "
            f"generation_batch_size is {size}: set one of the two."
        )
    if steps is None:
        if size is not None and size % per_micro_step:
            raise ValueError(
                f"generation_batch_size must be a multiple of per_device_train_batch_size x "
                f"processes = {per_micro_step}, got {size}."
            )
        steps = size // per_micro_step if size is not None else args.micro_steps_per_update
    args.steps_per_generation = steps
    args.generation_batch_size = steps * per_micro_step
    if args.generation_batch_size % args.num_generations:
        raise ValueError(
            f"generation_batch_size ({args.generation_batch_size} completions: per device "
            f"{args.per_device_train_batch_size} x {steps} micro-steps x {args.world_size} "
            f"processes) must be a multiple of num_generations ({args.num_generations}), so "
            "that it holds whole groups."
        )
    _eval_batch_size(args)
    _episodes(args)


def _eval_batch_size(args: RLOOConfig) -> None:
    if args.eval_strategy == "no":
        return
    k = args.num_generations_eval or args.num_generations
    rows = args.per_device_eval_batch_size * args.world_size
    if rows % k:
        raise ValueError(
            f"per_device_eval_batch_size x processes ({rows}) must be a multiple of the "
            f"completions per prompt in evaluation ({k})."
        )


def _episodes(args: RLOOConfig) -> None:
    """total_episodes (completions) -> max_steps (optimizer steps), as in the 2024 trainer."""
    if args.total_episodes is None:
        return
    batches = math.ceil(args.total_episodes / int(args.generation_batch_size or 1))
    micro_steps = batches * args.num_iterations * int(args.steps_per_generation or 1)
    steps = math.ceil(micro_steps / args.micro_steps_per_update)
    if args.max_steps not in (-1, steps):
        raise ValueError(
            f"total_episodes={args.total_episodes} means {steps} optimizer steps, but max_steps "
            f"is {args.max_steps}: set one of the two."
        )
    args.max_steps = steps
