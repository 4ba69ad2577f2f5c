"""What of vLLM's set-up follows from the processes and the GPUs it runs on."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

logger = logging.getLogger(__name__)

CPU_CACHE_BYTES = 512 * 2**20
# the first that is set counts, as for torch
ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")


def placement(*, on_cpu: bool, sleeps: bool, tensor_parallel_size: int) -> dict[str, Any]:
    """Arguments of vllm.LLM.

    Its own all-reduce shares memory between processes, which stops them without a traceback where
    the memory is of torch's expandable segments, and looks for the GPUs of all in each process: it
    is switched off for either, and NCCL's is used. CUDA graphs go to the host while the engine
    sleeps, unless NCCL calls among them may pin their memory (it does by default; vLLM forbids it
    too late for a process that has used NCCL).
    """
    placed: dict[str, Any] = {}
    if dist.is_initialized() and dist.get_world_size() > 1:
        placed["distributed_executor_backend"] = "external_launcher"
    if on_cpu:
        return placed | {"enforce_eager": True, "kv_cache_memory_bytes": CPU_CACHE_BYTES}
    placed["moe_backend"] = "triton"  # others re-lay the experts' weights
    if tensor_parallel_size > 1 and (why := _why_no_shared_memory(tensor_parallel_size)):
        logger.info("vLLM's own all-reduce is left out, NCCL's is used: %s.", why)
        placed["disable_custom_all_reduce"] = True
    if sleeps and (tensor_parallel_size == 1 or os.environ.get("NCCL_GRAPH_REGISTER") == "0"):
        placed["sleep_mode_offload_cudagraph"] = True
    return placed


def check_all_reduce(settings: dict[str, Any]) -> None:
    """Raise ValueError for the settings of vllm.LLM with which its processes would be killed."""
    size = settings["tensor_parallel_size"]
    asked = settings.get("disable_custom_all_reduce") is False
    if asked and size > 1 and uses_expandable_segments():
        raise ValueError(
            "vllm_engine_kwargs: disable_custom_all_reduce=False ends every process without a word "
            "where PYTORCH_ALLOC_CONF or PYTORCH_CUDA_ALLOC_CONF has expandable_segments:True: "
            "take one of the two out."
        )


def _why_no_shared_memory(tensor_parallel_size: int) -> str:
    """Empty: the processes of an engine can share the memory of their GPUs."""
    if uses_expandable_segments():
        return "it does not work with torch's expandable_segments:True"
    visible = torch.cuda.device_count() if torch.cuda.is_available() else tensor_parallel_size
    if visible < tensor_parallel_size:
        return f"each process sees {visible} of the {tensor_parallel_size} GPUs of its engine"
    return ""


def uses_expandable_segments() -> bool:
    """Whether torch's CUDA allocator is told to; a change while it runs counts."""
    if torch.cuda.is_initialized():
        live = torch.cuda.memory._snapshot().get("allocator_settings", {})
        if "expandable_segments" in live:
            return bool(live["expandable_segments"])
    told = next((os.environ[name] for name in ALLOCATOR_VARIABLES if os.environ.get(name)), "")
    options = [option.partition(":") for option in told.split(",")]
    return any(
        name.strip() == "expandable_segments" and value.strip().lower() in ("true", "1")
        for name, _, value in options
    )


@contextmanager
def launched_as_here(*, on_cpu: bool) -> Iterator[None]:
    """Inside, RANK and LOCAL_RANK are what vLLM takes them for: this process' number, and that of
    its GPU among those it sees. Afterwards they are as before.

    A launcher that shows every process one GPU (Slurm) counts local ranks beyond it; another
    (mpirun) sets neither.
    """
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        yield
        return
    before = {name: os.environ.get(name) for name in ("RANK", "LOCAL_RANK")}
    os.environ["RANK"] = str(dist.get_rank())
    if not on_cpu:
        os.environ["LOCAL_RANK"] = str(torch.cuda.current_device())
    else:
        os.environ.setdefault("LOCAL_RANK", os.environ["RANK"])
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
