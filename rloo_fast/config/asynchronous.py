"""What cannot be sampled ahead of the trainer (max_staleness), or by several servers: refused."""

from __future__ import annotations

from .fields import RLOOFields

ONLY_AHEAD = ("max_inflight_tasks", "weight_sync_steps", "queue_maxsize")


def refuse_asynchronous(args: RLOOFields) -> None:
    """Raise ValueError for options that contradict each other, with what to write."""
    if args.vllm_mode == "server" and (args.max_staleness or len(args.server_urls) > 1):
        _refuse_server_options(args)
    if not args.max_staleness:
        defaults = {name: args.__dataclass_fields__[name].default for name in ONLY_AHEAD}
        if wrong := [name for name in ONLY_AHEAD if getattr(args, name) != defaults[name]]:
            raise ValueError(
                f"{' and '.join(wrong)} has no effect with max_staleness=0, where completions are "
                "sampled when their step needs them: set max_staleness, or leave it out."
            )
        return
    _refuse_engine(args)
    _refuse_reuse(args)


def _refuse_server_options(args: RLOOFields) -> None:
    why = "max_staleness" if args.max_staleness else "several servers"
    if args.vllm_enable_sleep_mode:
        raise ValueError(
            f"vllm_enable_sleep_mode=True with {why} is refused: a server that samples while the "
            "policy is trained needs its memory. Give the servers devices of their own, and leave "
            "vllm_enable_sleep_mode out."
        )
    if args.vllm_lora == "adapter":
        raise ValueError(
            f"vllm_lora='adapter' with {why} is not in this version: leave it 'merged', and the "
            "servers get whole weights."
        )


def _refuse_engine(args: RLOOFields) -> None:
    """By its name; one of the user's own is looked at when it is loaded."""
    if args.rollout_engine is not None and args.rollout_engine != "vllm_server":
        named = args.rollout_engine in ("transformers", "vllm")
    else:
        named = args.vllm_mode != "server" or not args.use_vllm
    if named:
        raise ValueError(
            f"max_staleness={args.max_staleness} needs an engine that samples while the policy is "
            "trained, on devices of its own; in the training processes they take turns. Start "
            "`vllm serve` on other devices and set use_vllm=True, vllm_mode='server' and "
            "vllm_server_base_url, or leave max_staleness at 0."
        )


def _refuse_reuse(args: RLOOFields) -> None:
    n = args.max_staleness
    if args.num_iterations > 1:
        raise ValueError(
            f"max_staleness={n} with num_iterations={args.num_iterations} is refused: later passes "
            "would train tokens that are older than the bound. Leave num_iterations at 1; stale "
            "completions are reuse enough."
        )
    if int(args.steps_per_generation or 0) != args.micro_steps_per_update:
        raise ValueError(
            f"max_staleness={n} needs a generation batch per optimizer step: "
            f"steps_per_generation is {args.steps_per_generation} and gradient_accumulation_steps "
            f"{args.micro_steps_per_update}. Leave steps_per_generation and generation_batch_size "
            "out."
        )
    if args.weight_sync_steps > n + 1:
        raise ValueError(
            f"weight_sync_steps={args.weight_sync_steps} would leave the engine more than "
            f"max_staleness={n} steps behind: set it to {n + 1} or less."
        )
    size = int(args.generation_batch_size or 0)
    for name, least, what in (
        ("max_inflight_tasks", args.num_generations, "the completions of one prompt"),
        ("queue_maxsize", size, "the completions of one step"),
    ):
        if -1 < getattr(args, name) < least:
            raise ValueError(
                f"{name}={getattr(args, name)} must be at least {least}, {what}, or the run would "
                "wait forever: raise it, or leave it out."
            )
