"""What training engines keep on the GPU: DDP's buckets, FSDP2's shards, ZeRO's flat buffers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..offload.engine_memory import EngineMemory


class BucketMemory(EngineMemory):
    """DDP: the buckets that gradients are reduced in, as large as the gradients, are never freed.

    They belong to C++: no tensor shows them. One process has none.
    """

    def __init__(self, wrapped: Callable[[], nn.Module | None], num_processes: int):
        self._wrapped, self._num_processes = wrapped, num_processes

    def fixed_bytes(self) -> int:
        wrapped = self._wrapped()
        if not isinstance(wrapped, DistributedDataParallel):
            return 0
        # bytes of each, as "936448, 1067008"
        sizes = str(wrapped._get_ddp_logging_data().get("bucket_sizes", ""))
        return sum(int(size) for size in sizes.split(",") if size.strip())

    def expected(self, model: nn.Module) -> tuple[int, int]:
        state, _ = super().expected(model)
        return state, state // 2 if self._num_processes > 1 else 0


class ShardMemory(EngineMemory):
    """FSDP2: every process has Adam's state of its own shards."""

    def __init__(self, num_shards: int):
        self._num_shards = num_shards

    def expected(self, model: nn.Module) -> tuple[int, int]:
        # before train() none is split, and after a forward some are whole
        whole = sum(p.nbytes for p in _trained(model))  # a DTensor's nbytes are the whole tensor's
        return 2 * whole // self._num_shards, 0


class ZeroMemory(EngineMemory):
    """ZeRO: float32 master weights, gradients in flat buffers, and buckets to reduce them in.

    `engine()`: DeepSpeed's engine, None before there is one. Its own offload_states moves what it
    can: with stages 1 and 2 masters and optimizer state, of any optimizer; with stage 3 the
    gradients and buckets, and masters and optimizer state if the optimizer is DeepSpeed's FusedAdam
    (it asserts that). Others' are moved storage by storage, as are those of its BF16_Optimizer (of
    stage 1 with grad_accum_dtype fp32), which has no offload_states. Buckets of stages 1 and 2
    stay, and beside offload_param, where it refuses, all that it alone can move.
    """

    def __init__(self, engine: Callable[[], Any], stage: int, num_processes: int):
        self._engine, self._stage, self._num_processes = engine, stage, num_processes

    def moves_optimizer(self) -> bool:
        engine = self._engine()
        if engine is None or not _offers_to_move(engine):
            return False
        inner = type(engine.optimizer.optimizer)
        return self._stage < 3 or (inner.__module__, inner.__name__) == FUSED_ADAM

    def with_optimizer(self) -> list[Tensor]:
        engine = self._engine()
        if engine is None:
            return []
        return [master for name in MASTERS for master in getattr(engine.optimizer, name, ())]

    def moved_by_itself(self) -> list[Tensor]:
        engine = self._engine()
        if engine is None or self._stage < 3 or not _offers_to_move(engine):
            return []
        zero = engine.optimizer
        buckets = [bucket.buffer for bucket in zero.ipg_buckets.values()]
        flat = [zero.grad_partitions_flat_buffer, *buckets]
        return [tensor for tensor in flat if tensor is not None]

    def fixed(self) -> list[Tensor]:
        engine = self._engine()
        return [] if engine is None else list(tensors_within(engine.optimizer))

    def expected(self, model: nn.Module) -> tuple[int, int]:
        numbers = [getattr(p, "ds_numel", p.numel()) for p in _trained(model)]
        masters = 4 * sum(numbers) // self._num_processes
        return 3 * masters, 0  # exp_avg, exp_avg_sq and the weights in float32

    def move_out(self) -> None:
        engine = self._engine()
        if engine is None or not _offers_to_move(engine):
            return
        names = ["optim_states", "hp_params"] if self.moves_optimizer() else []
        names += ["lp_grads", "contiguous_grad_buffer"] if self._stage == 3 else []
        config: Any = import_module("deepspeed.runtime.zero.offload_config")
        engine.offload_states(
            include=[config.OffloadStateTypeEnum[name] for name in names],
            pin_memory=torch.cuda.is_available(),
            non_blocking=False,
        )

    def move_back(self) -> None:
        engine = self._engine()
        if engine is not None and getattr(engine.optimizer, "offloaded_states", ()):
            engine.reload_states()


FUSED_ADAM = ("deepspeed.ops.adam.fused_adam", "FusedAdam")
# where this process' float32 weights are: in the optimizer of stages 1 and 2, of stage 3, and in
# BF16_Optimizer
MASTERS = (
    "single_partition_of_fp32_groups",
    "fp32_partitioned_groups_flat",
    "fp32_groups_flat_partition",
)


def _trained(model: nn.Module) -> list[Any]:
    return [p for p in model.parameters() if p.requires_grad]


def _offers_to_move(engine: Any) -> bool:
    """Whether DeepSpeed moves states: it refuses where it keeps the weights on the host."""
    config = engine.zero_offload_param()
    keeps_weights = config is not None and config.device.value != "none"
    return hasattr(engine.optimizer, "offload_states") and not keeps_weights


def tensors_within(holder: Any) -> Iterator[Tensor]:
    """Every tensor that DeepSpeed's `holder` has: in its attributes, in what is in them, and in the
    attributes of tensors."""
    waiting, seen = [holder], set()
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            yield value
            waiting += [*vars(value).values(), *([] if value.grad is None else [value.grad])]
        elif isinstance(value, Mapping):
            waiting += value.values()
        elif isinstance(value, list | tuple | set | frozenset):
            waiting += value
            waiting += getattr(value, "__dict__", {}).values()
        elif type(value).__module__.startswith("deepspeed") and not isinstance(value, nn.Module):
            waiting += getattr(value, "__dict__", {}).values()
