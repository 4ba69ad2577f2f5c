"""What RLOOConfig checks once it has its values: forms, settings not offered, batch sizes."""

from __future__ import annotations

import math
from collections.abc import Container
from pathlib import Path
from typing import Any, cast

from rloo_kernels.lm_head.fp8 import why_no_fp8
from transformers import GenerationConfig

from ..batching.layouts import LAYOUTS
from ..masking import shown
from ..objective.losses import LOSSES
from .changes import Derived, given
from .code_files import load_module
from .fields import RLOOFields
from .ranges import RANGES, check_values, in_words, is_valid


def clean(args: RLOOFields) -> None:
    """Bring values that may be written in several ways into one form."""
    args.eval_delay = args.eval_delay or 0  # transformers' set_evaluate() makes it None
    args.reward_clip_range = clip_range(args.reward_clip_range)
    args.pad_to_multiple_of = _multiple(args.pad_to_multiple_of)
    args.loss = _registered("loss", args.loss, LOSSES)
    args.layout = _registered("layout", args.layout, LAYOUTS)
    for name in (
        "model_init_kwargs", "generation_kwargs", "chat_template_kwargs", "vllm_engine_kwargs",
        "reward_kwargs",
    ):  # fmt: skip
        value = getattr(args, name)
        if value is not None and not isinstance(value, dict):
            raise ValueError(
                f"{name} must be a dict, or its JSON on a command line, got {shown(value)}."
            )
    _stop_strings(args)


def _stop_strings(args: RLOOFields) -> None:
    """`stop` as a list, taken out of generation_kwargs where it is said there."""
    given = dict(cast(Any, args.generation_kwargs) or {})
    said = {"stop": args.stop} | {
        f"generation_kwargs[{name!r}]": given.pop(name)
        for name in ("stop", "stop_strings")
        if name in given
    }
    lists = {name: _texts(value) for name, value in said.items() if value is not None}
    if any(strings != next(iter(lists.values())) for strings in lists.values()):
        raise ValueError(
            "stop strings were given twice, and differ: "
            + ", ".join(f"{name}={strings!r}" for name, strings in lists.items())
            + ". Set stop alone."
        )
    args.stop = next(iter(lists.values()), None) or None
    strings: list[Any] = list(args.stop or ())
    if wrong := [text for text in strings if not (isinstance(text, str) and text)]:
        raise ValueError(f"stop must be a list of texts, none of them empty, got {wrong[0]!r}.")
    included = given.pop("include_stop_str_in_output", None)
    if included is not None:
        args.include_stop_str_in_output = bool(included)
    if args.generation_kwargs is not None:
        args.generation_kwargs = given


def _texts(value: Any) -> list[Any]:
    if not isinstance(value, (str, list, tuple)):
        raise ValueError(f"stop must be a text or a list of texts, got {value!r}.")
    return [value] if isinstance(value, str) else list(cast(Any, value))


def clip_range(clip: Any) -> list[float] | None:
    """(min, max), one number c for (-c, c), or None. Raises ValueError for anything else."""
    if clip is None:
        return None
    is_number = isinstance(clip, (int, float)) and not isinstance(clip, bool)
    numbers: Any = [clip] if is_number else clip
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


def _registered(field: str, value: str, table: Container[str]) -> str:
    """The NAME of "path/to/file.py:NAME" or "package.module:NAME", whose import registers it in
    `table`; any other value as it is."""
    where, colon, name = str(value).rpartition(":")
    if not colon:
        return value
    load_module(where, f"{field}={value!r}")
    if name not in table:
        raise ValueError(f"{field}={value!r}: {where} does not register a {field} named {name!r}.")
    return name


def check_ranges(args: RLOOFields) -> None:
    check_values(args, RANGES)
    if args.sync_ref_model and args.beta == 0:
        raise ValueError(
            "You passed `sync_ref_model=True` while `beta=0.0`, which keeps no reference model: "
            "set beta > 0 or sync_ref_model=False."
        )
    if args.reference_head_fp8:
        _reference_head_fp8(args)
    if args.reward_over_limit != "error" and args.reward_timeout_s is None:
        raise ValueError(
            f"reward_over_limit={args.reward_over_limit!r} needs reward_timeout_s, the limit in "
            "seconds."
        )
    _merge_adapter(args)
    _loss(args)
    _generation_kwargs(args)


def _reference_head_fp8(args: RLOOFields) -> None:
    if args.beta == 0:
        raise ValueError(
            "reference_head_fp8=True has no effect with beta=0, which keeps no reference model: "
            "leave it out, or set beta > 0."
        )
    if (reason := why_no_fp8(args.device)) is not None:
        raise ValueError(f"reference_head_fp8=True cannot be used here: {reason}. Leave it out.")


def _merge_adapter(args: RLOOFields) -> None:
    merged = args.merge_adapter
    if merged is not None and Path(merged).resolve() == Path(str(args.output_dir)).resolve():
        raise ValueError(
            f"merge_adapter={merged!r} is output_dir too, where what is trained would take its "
            "place: choose another output_dir."
        )


def _loss(args: RLOOFields) -> None:
    in_loss = [name for name, kind in LOSSES.items() if kind.kl == "loss"]
    if not args.use_bias_correction_kl and args.loss not in in_loss:
        raise ValueError(
            f"use_bias_correction_kl=False has no effect with loss={args.loss!r}, whose KL is in "
            f"the reward: leave it out, or choose a loss of {in_loss}."
        )
    why = LOSSES[args.loss].refused_advantages.get(args.advantage)
    if why is not None:
        raise ValueError(
            f"advantage={args.advantage!r} cannot be used with loss={args.loss!r}: {why}."
        )


# keys of generation_kwargs that the rest of the step must know of: the field that says it
SAID_ELSEWHERE = {
    "temperature": "temperature",
    "max_new_tokens": "max_completion_length",
    "max_length": "max_completion_length",
    "eos_token_id": "stop_token_id",
    "num_return_sequences": "num_generations",
    "pad_token_id": "the tokenizer's pad_token",
}
SAID_ELSEWHERE_VLLM = {
    "temperature": "temperature",
    "max_tokens": "max_completion_length",
    "stop_token_ids": "stop_token_id",
    "n": "num_generations",
    "seed": "seed",
    **dict.fromkeys(
        ("logprobs", "detokenize", "ignore_eos", "flat_logprobs", "output_kind"),
        "nothing, rollouts need theirs",
    ),
    **dict.fromkeys(
        ("skip_special_tokens", "spaces_between_special_tokens", "stream_interval"),
        "nothing, rollouts need theirs",
    ),
}


def _generation_kwargs(args: RLOOFields) -> None:
    given = args.generation_kwargs or {}
    assert isinstance(given, dict)
    said = SAID_ELSEWHERE_VLLM if args.use_vllm else SAID_ELSEWHERE
    for name in given:
        if name in said:
            raise ValueError(
                f"generation_kwargs may not set {name}, which the loss depends on as well: set "
                f"{said[name]}."
            )
    for name in ("top_p", "min_p", "repetition_penalty"):
        if given.get(name) is not None and not is_valid(name, given[name]):
            raise ValueError(
                f"generation_kwargs: {name} must be {in_words(name)}, got {given[name]!r}."
            )
    if args.use_vllm:
        return  # its SamplingParams are checked when the engine starts
    known: dict[str, Any] = vars(GenerationConfig())
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


def batch_sizes(args: RLOOFields) -> None:
    """steps_per_generation and generation_batch_size, each from the other, or from the step's."""
    per_micro_step = args.per_device_train_batch_size * args.num_processes
    steps, size = given(args.steps_per_generation), given(args.generation_batch_size)
    if args.num_mini_batches is not None:
        steps = args.num_mini_batches * args.micro_steps_per_update
    if steps is not None and size is not None and size != steps * per_micro_step:
        raise ValueError(
            "'generation_batch_size' and 'steps_per_generation' can not be both configured at the "
            f"same time, unless they agree: steps_per_generation={steps} means "
            f"{steps * per_micro_step} completions, but generation_batch_size is {size}: set one "
            "of the two."
        )
    if steps is None and size is not None:
        if size % per_micro_step:
            raise ValueError(
                f"generation_batch_size ({size}) must be divisible by the global batch size "
                f"({per_micro_step}: per_device_train_batch_size x processes)."
            )
        steps = size // per_micro_step
    else:
        steps = steps or args.micro_steps_per_update
        size = steps * per_micro_step
        args.generation_batch_size = Derived(size)
    if given(args.steps_per_generation) is None:
        args.steps_per_generation = Derived(steps)
    if size % args.num_generations:
        raise ValueError(
            f"generation_batch_size ({size}) must be divisible by "
            f"num_generations ({args.num_generations}), so that it holds whole groups. It is "
            f"{args.per_device_train_batch_size} completions per device x {steps} micro-steps x "
            f"{args.num_processes} processes."
        )
    if args.eval_strategy != "no":
        check_eval_batch_size(args, args.num_generations_eval or args.num_generations)
    _episodes(args)


def check_eval_batch_size(args: RLOOFields, num_generations: int) -> None:
    """Raise ValueError unless an evaluation batch holds whole groups."""
    if args.per_device_eval_batch_size * args.num_processes % num_generations:
        raise ValueError(
            f"The global eval batch size ({args.per_device_eval_batch_size} * "
            f"{args.num_processes}) must be divisible by the number of generations used for "
            f"evaluation ({num_generations}): change per_device_eval_batch_size or "
            "num_generations_eval."
        )


def _episodes(args: RLOOFields) -> None:
    """total_episodes (completions) -> max_steps (optimizer steps), as in the 2024 trainer."""
    if isinstance(args.max_steps, Derived):
        args.max_steps = -1
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
    args.max_steps = Derived(steps)
