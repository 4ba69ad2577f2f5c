"""The training engine's settings: what is refused with it, and what must agree with our step."""

from __future__ import annotations

import os
from typing import Any, cast

import torch

from ..distributed.choose import check_processes, launched_with
from .fields import RLOOFields


def prepare_engine(args: RLOOFields) -> None:
    """Raise ValueError for an engine's settings that cannot work; make the others agree with ours.

    The engine is chosen by a field (`deepspeed`, `fsdp`), or by `accelerate launch`.
    """
    launched: Any = args  # whose properties transformers leaves without types
    check_processes(launched.world_size, launched.process_index)
    if args.fsdp_config and not args.fsdp:
        raise ValueError("fsdp_config has no effect without fsdp=True: set it, or leave both out.")
    plugin = args.deepspeed_plugin
    fsdp = args.fsdp_plugin_args is not None or launched_with("FSDP")
    if plugin is None and not fsdp:
        return
    name = "FSDP2" if plugin is None else "DeepSpeed"
    _refuse_precision(args, name)
    if plugin is None:
        _check_fsdp(args)
    else:
        _check_deepspeed(args, cast(Any, plugin).deepspeed_config)


def _refuse_precision(args: RLOOFields, name: str) -> None:
    if args.fp16:
        raise ValueError(
            f"fp16=True with {name} is not in this version, as the loss would not know the "
            "engine's loss scale: set bf16=True."
        )
    if args.torch_compile:
        raise ValueError(f"torch_compile=True with {name} is not in this version: leave it out.")


def _check_fsdp(args: RLOOFields) -> None:
    given = args.fsdp_plugin_args or {}
    version = int(given.get("fsdp_version", os.environ.get("FSDP_VERSION", 1)))
    if version != 2:
        raise ValueError(
            "FSDP is offered in version 2 only: set fsdp_version: 2 in accelerate's configuration, "
            'or fsdp_config={"version": 2}.'
        )


def _check_deepspeed(args: RLOOFields, config: dict[str, Any]) -> None:
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if stage not in (1, 2, 3):
        raise ValueError(
            f"DeepSpeed is offered with zero_optimization.stage 1, 2 or 3, got {stage!r}: in place "
            "of stage 0 leave deepspeed out, which trains with DDP."
        )
    if not args.use_cpu and not torch.cuda.is_available():
        raise ValueError("DeepSpeed found no GPU: to train on CPUs, set use_cpu=True.")
    hf_config = getattr(args, "hf_deepspeed_config", None)
    if hf_config is not None and hf_config.mismatches:
        raise ValueError(
            "DeepSpeed's configuration and the arguments disagree:\n"
            + "\n".join(hf_config.mismatches)
            + '\nSet these values to "auto" there.'
        )
    if config.get("bf16", {}).get("check_grad_overflow") is False:
        raise ValueError(
            "bf16.check_grad_overflow=false in DeepSpeed's configuration would apply a gradient "
            "that is not finite: leave it out."
        )
    if config.get("tensor_parallel", {}).get("autotp_size", 1) > 1:
        raise ValueError("DeepSpeed's tensor_parallel is not in this version: leave it out.")
    _agree(args, config)


def _agree(args: RLOOFields, config: dict[str, Any]) -> None:
    """The engine counts a step's micro-batches as one, since how many there are is our choice."""
    steps = config.get("gradient_accumulation_steps", "auto")
    if steps not in ("auto", 1, args.gradient_accumulation_steps):
        raise ValueError(
            f"gradient_accumulation_steps is {steps} in DeepSpeed's configuration and "
            f"{args.gradient_accumulation_steps} in the arguments: leave it out of the first."
        )
    config["gradient_accumulation_steps"] = 1
    config["train_micro_batch_size_per_gpu"] = args.per_device_train_batch_size
    config.pop("train_batch_size", None)  # the engine multiplies the others
    config.setdefault("gradient_clipping", args.max_grad_norm)  # none otherwise
