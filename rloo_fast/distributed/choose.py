"""Which training engine a run has, and whether its processes are those that the engine needs."""

from __future__ import annotations

import os
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from .base import TrainingEngine


def make_training_engine(accelerator: Accelerator) -> TrainingEngine:
    if accelerator.distributed_type == DistributedType.FSDP:
        from .fsdp2 import FSDP2, adjust

        adjust(accelerator.state.fsdp_plugin)
        return FSDP2(accelerator)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        from .zero import Zero, Zero3

        plugin: Any = accelerator.state.deepspeed_plugin
        return (Zero3 if plugin.zero_stage == 3 else Zero)(accelerator)
    return TrainingEngine(accelerator)


def launched_with(engine: str) -> bool:
    """Whether `accelerate launch` was told to use the engine ("FSDP")."""
    return os.environ.get(f"ACCELERATE_USE_{engine}", "false").lower() == "true"


def check_processes(num_processes: int, process_index: int) -> None:
    """Raise ValueError where a launcher has started other processes than accelerate knows of.

    Each of them would train a model of its own, and write it where the others write theirs.
    """
    known = {"WORLD_SIZE": num_processes, "OMPI_COMM_WORLD_SIZE": num_processes}
    known |= {"RANK": process_index, "OMPI_COMM_WORLD_RANK": process_index}
    launched = {name: os.environ.get(name, "") for name in known}
    if launched["WORLD_SIZE"].isdecimal():  # torchrun within mpirun
        del launched["OMPI_COMM_WORLD_SIZE"], launched["OMPI_COMM_WORLD_RANK"]
    for name, number in launched.items():
        if number.isdecimal() and int(number) != known[name]:
            raise ValueError(
                f"{name}={number} says that several processes were launched, but for accelerate "
                f"this is process {process_index} of {num_processes}: each would train a model of "
                "its own into the same output_dir. On CPUs, set use_cpu=True (--use_cpu). On GPUs, "
                "launch with torchrun or accelerate launch, and see that torch finds the GPUs "
                f"(torch.cuda.is_available() is {torch.cuda.is_available()}). For one process, "
                f"start without a launcher, and unset {name}."
            )


def makes_fsdp(distributed_type: DistributedType) -> bool:
    """Whether accelerate sets up FSDP when asked to; on CPUs it takes DDP without a word."""
    return distributed_type not in (DistributedType.NO, DistributedType.MULTI_CPU)


def check_launch(args: Any) -> None:
    """Raise ValueError where the processes are not those that the engine needs.

    `args`: TrainingArguments; no model needs to be loaded yet.
    """
    wants_fsdp = args.fsdp_plugin_args is not None or launched_with("FSDP")
    if wants_fsdp and not makes_fsdp(args.distributed_state.distributed_type):
        where = "CPUs" if args.device.type == "cpu" else "one GPU"
        raise ValueError(
            f"FSDP2 needs several processes with a GPU each, and this is process "
            f"{args.process_index} of {args.world_size} on {where}, where accelerate would leave "
            "the model whole without a word: leave fsdp out (with accelerate launch: take the "
            "configuration accelerate/ddp). What splits the model over CPUs is "
            "--use_cpu --deepspeed recipe:deepspeed/zero3."
        )
    if args.n_gpu > 1:
        raise ValueError(
            "RLOOTrainer does not support `nn.DataParallel`, but several GPUs are visible to one "
            "process: launch with `accelerate launch` or `torchrun`, or show one GPU with "
            "CUDA_VISIBLE_DEVICES."
        )
