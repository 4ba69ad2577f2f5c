"""What RLOOConfig checks once it has its values: ranges, settings not offered, batch sizes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import Trainer

    from .config import RLOOConfig


def refuse_engines(args: RLOOConfig) -> None:
    for engine in ("deepspeed", "fsdp"):
        if getattr(args, engine):
            raise ValueError(
                f"{engine} is not in this version: train with one process, or several with "
                "`accelerate launch --multi_gpu`."
            )


def refuse_launcher(trainer: Trainer) -> None:
    """Raise ValueError for engines that the environment, not a field, has chosen."""
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        raise ValueError(
            "DeepSpeed and FSDP are not in this version: launch with `accelerate launch "
            "--multi_gpu`, or as one process."
        )
    if trainer.args.n_gpu > 1:
        raise ValueError(
            "several GPUs are visible to one process: launch with `accelerate launch`, or show "
            "one with CUDA_VISIBLE_DEVICES."
        )


def clean(args: RLOOConfig) -> None:
    clip = args.reward_clip_range
    if isinstance(clip, (int, float)):
        clip = [clip]
    if clip is not None:
        clip = [float(c) for c in clip]
        clip = [-clip[0], clip[0]] if len(clip) == 1 else clip
        if len(clip) != 2 or not clip[0] < clip[1]:
            raise ValueError(
                f"reward_clip_range must be (min, max) with min < max, or one number c > 0 for "
                f"(-c, c), got {args.reward_clip_range}."
            )
    args.reward_clip_range = clip
    pad = args.pad_to_multiple_of
    if isinstance(pad, str):
        pad = None if pad.lower() in ("auto", "none", "null") else int(pad)
    args.pad_to_multiple_of = pad


def check_ranges(args: RLOOConfig) -> None:
    def need(ok: bool, sentence: str) -> None:
        if not ok:
            raise ValueError(sentence)

    k = args.num_generations
    need(
        k is not None and k >= 2,
        f"num_generations must be >= 2 for a leave-one-out baseline, got {k}.",
    )
    need(args.temperature > 0, f"temperature must be > 0, got {args.temperature}.")
    need(0 < args.top_p <= 1, f"top_p must lie in (0, 1], got {args.top_p}.")
    need(args.top_k is None or args.top_k >= 0, f"top_k must be >= 0, got {args.top_k}.")
    need(args.beta >= 0, f"beta must be >= 0, got {args.beta}.")
    need(args.num_iterations >= 1, f"num_iterations must be >= 1, got {args.num_iterations}.")
    need(
        args.max_completion_length >= 1,
        f"max_completion_length must be >= 1 token, got {args.max_completion_length}.",
    )
    need(args.epsilon >= 0, f"epsilon must be >= 0, got {args.epsilon}.")
    need(
        args.max_nonfinite_steps >= 1,
        f"max_nonfinite_steps must be >= 1, got {args.max_nonfinite_steps}.",
    )
    need(
        args.layout in ("auto", "padded"),
        f"layout must be 'auto' or 'padded', got {args.layout!r}.",
    )
    need(
        args.stop_token in (None, "eos"),
        f"stop_token must be 'eos', got {args.stop_token!r}; write the id of another token as "
        "stop_token_id.",
    )
    need(
        not args.sync_ref_model or args.beta > 0,
        "sync_ref_model=True needs a reference model, which beta=0 does not keep: set beta > 0 "
        "or sync_ref_model=False.",
    )


def refuse(args: RLOOConfig) -> None:
    """Settings that this version does not carry out: a sentence each, with what to write."""
    if args.use_vllm:
        raise ValueError(
            "use_vllm=True: rollouts by vLLM are not in this version. Leave use_vllm=False: "
            "completions are then sampled with transformers' generate."
        )
    if args.use_transformers_continuous_batching or args.use_transformers_paged:
        raise ValueError(
            "use_transformers_continuous_batching=True is not in this version. Leave it False: "
            "completions are then sampled with transformers' generate."
        )
    for name, spec in args.__dataclass_fields__.items():
        if name.startswith(("vllm_", "transformers_continuous_")) and (
            getattr(args, name) != spec.default
        ):
            raise ValueError(
                f"{name} has no effect here, as its engine is not in this version: leave it out."
            )
    refused = {  # field: (values that are fine, why the others are not)
        "auto_find_batch_size": (
            (False,),
            "it would split groups; lower per_device_train_batch_size and raise "
            "gradient_accumulation_steps by the same factor, which does not change the result",
        ),
        "label_smoothing_factor": ((0.0,), "RLOO has no labels; leave it at 0"),
        "ds3_gather_for_generation": ((True,), "ZeRO-3 is not in this version; leave it True"),
        "log_multimodal": ((True,), "there are no images here; leave it True"),
        "torch_compile": ((False,), "it is not in this version; leave it False"),
        "neftune_noise_alpha": (
            (None, 0.0),
            "noise in the embeddings makes the update's log-probs differ from the sampled "
            "ones; leave it out",
        ),
        "train_sampling_strategy": (("random",), "see shuffle_dataset; leave it out"),
    }
    for name, (fine, why) in refused.items():
        value = getattr(args, name, fine[0])  # not every transformers version has every field
        if value not in fine:
            raise ValueError(f"{name}={value!r} is refused: {why}.")
    parallel = getattr(args, "parallelism_config", None)
    if parallel is not None and (parallel.cp_enabled or parallel.sp_enabled):
        raise ValueError(
            "context and sequence parallelism (cp_size, sp_size > 1) are not in this version: "
            "set both to 1."
        )


def batch_sizes(args: RLOOConfig) -> None:
    # the trainer works through the micro-steps itself and runs transformers' loop with 1; a
    # pickled config keeps the number that was asked for
    if not hasattr(args, "_micro_steps_per_update"):
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
    """total_episodes (completions) -> max_steps (optimizer steps), as the 2024 trainer
    counted."""
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
