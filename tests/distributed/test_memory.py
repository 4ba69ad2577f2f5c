"""What training engines keep for themselves, held against torch's allocator and DeepSpeed's
source. Two processes: end_to_end/test_train_engines."""

from __future__ import annotations

import inspect
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile, record_function

from rloo_fast.distributed.memory import (
    FUSED_ADAM,
    MASTERS,
    BucketMemory,
    ShardMemory,
    ZeroMemory,
    tensors_within,
)  # fmt: skip
from tests.support.cpu_engines import require_deepspeed
from tests.support.tiny import make_model


def reduced_at_once(_state, bucket):
    done = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


def test_ddps_buckets_are_what_it_leaves_allocated():
    model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(4)))
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            # gloo's thread may be the last to hold what it sends, and no free in it is recorded
            wrapped = DistributedDataParallel(model, bucket_cap_mb=1, init_sync=False)
            wrapped.register_comm_hook(None, reduced_at_once)
            for _ in range(2):
                wrapped(torch.ones(2, 256)).sum().backward()
                with record_function("frees are recorded inside a range"):
                    wrapped.zero_grad(set_to_none=True)
        left = sum(event.self_cpu_memory_usage for event in seen.key_averages())
        counted = BucketMemory(lambda: wrapped, 1).fixed_bytes()
        assert counted == sum(p.nbytes for p in model.parameters())
        assert counted == pytest.approx(left, rel=0.05)
    finally:
        torch.distributed.destroy_process_group()


def test_before_it_is_wrapped_a_model_has_no_buckets_but_will():
    model = make_model()
    trained = sum(p.nbytes for p in model.parameters())
    for processes, buckets in ((1, 0), (2, trained)):
        memory = BucketMemory(lambda: model, processes)
        assert memory.fixed_bytes() == 0
        assert memory.expected(model) == (2 * trained, buckets)
    next(model.parameters()).requires_grad_(False)
    frozen = next(model.parameters()).nbytes
    assert BucketMemory(lambda: None, 2).expected(model)[1] == trained - frozen


def test_fsdp2_and_zero_split_the_state_that_is_expected():
    model = make_model()
    trained = sum(p.nbytes for p in model.parameters())
    assert ShardMemory(4).expected(model) == (2 * trained // 4, 0)
    half = make_model().bfloat16()  # whose masters and state are float32 all the same
    for split in (model, half):
        assert ZeroMemory(lambda: None, 2, 4).expected(split) == (3 * trained // 4, 0)


class Recording:
    """In place of DeepSpeed's engine: what is asked of it."""

    def __init__(self, inner: type = torch.optim.AdamW, offload_param: str | None = None):
        self.asked: list[Any] = []
        self.offload_param = offload_param
        self.optimizer = SimpleNamespace(
            optimizer=inner.__new__(inner), offloaded_states=set(), offload_states=None,
            single_partition_of_fp32_groups=[torch.ones(3)],
            fp32_partitioned_groups_flat=[torch.ones(3)],
            grad_partitions_flat_buffer=torch.ones(5),
            ipg_buckets={
                torch.float32: SimpleNamespace(buffer=torch.ones(7)),
                torch.bfloat16: SimpleNamespace(buffer=None),
            },
        )  # fmt: skip

    def zero_offload_param(self):
        if self.offload_param is None:
            return None
        return SimpleNamespace(device=SimpleNamespace(value=self.offload_param))

    def offload_states(self, include, pin_memory, non_blocking):
        self.asked.append(sorted(state.value for state in include))
        self.optimizer.offloaded_states |= set(include)

    def reload_states(self):
        self.asked.append("back")
        self.optimizer.offloaded_states.clear()


FusedAdam = type(FUSED_ADAM[1], (), {"__module__": FUSED_ADAM[0]})


@pytest.mark.parametrize(
    ("stage", "engine", "states"),
    [
        (1, Recording(), ["hp_params", "optim_states"]),
        (2, Recording(), ["hp_params", "optim_states"]),
        (3, Recording(), ["contiguous_grad_buffer", "lp_grads"]),
        (
            3, Recording(FusedAdam),
            ["contiguous_grad_buffer", "hp_params", "lp_grads", "optim_states"],
        ),
    ],
)  # fmt: skip
def test_deepspeed_is_asked_for_what_it_can_move(stage, engine, states):
    require_deepspeed()
    memory = ZeroMemory(lambda: engine, stage, 2)
    assert memory.moves_optimizer() is ("optim_states" in states)
    assert sum(len(t) for t in memory.moved_by_itself()) == (12 if stage == 3 else 0)
    memory.move_out()
    memory.move_back()
    memory.move_back()  # nothing is left to bring back
    assert engine.asked == [states, "back"]


def test_weights_that_deepspeed_keeps_on_the_host_leave_moving_to_us():
    engine = Recording(offload_param="cpu")
    memory = ZeroMemory(lambda: engine, 3, 2)
    memory.move_out()
    memory.move_back()
    assert not memory.moves_optimizer()
    assert memory.moved_by_itself() == []
    assert engine.asked == []


def test_an_optimizer_of_deepspeeds_that_moves_nothing_leaves_it_to_us():
    engine = Recording()
    masters = [torch.ones(3)]
    engine.optimizer = SimpleNamespace(fp32_groups_flat_partition=masters)
    memory = ZeroMemory(lambda: engine, 1, 2)
    memory.move_out()
    memory.move_back()
    assert not memory.moves_optimizer()
    assert memory.with_optimizer() == masters
    assert engine.asked == []


def test_before_there_is_an_engine_there_is_nothing_to_move():
    memory = ZeroMemory(lambda: None, 3, 2)
    memory.move_out()
    memory.move_back()
    assert [*memory.with_optimizer(), *memory.moved_by_itself(), *memory.fixed()] == []


def test_deepspeeds_source_is_as_is_assumed_here():
    require_deepspeed()
    zero = "deepspeed.runtime.zero"
    third: Any = import_module(f"{zero}.stage3").DeepSpeedZeroOptimizer_Stage3
    moving = inspect.getsource(third.offload_states)
    assert "self.optimizer.__class__ == deepspeed.ops.adam.fused_adam.FusedAdam" in moving
    first: Any = import_module(f"{zero}.stage_1_and_2").DeepSpeedZeroOptimizer
    assert "FusedAdam" not in inspect.getsource(first.offload_states)
    assert "contiguous_grad_buffer" not in inspect.getsource(first.offload_states)
    of_bf16: Any = import_module("deepspeed.runtime.bf16_optimizer").BF16_Optimizer
    for masters, kind in zip(MASTERS, (first, third, of_bf16), strict=True):
        assert f"self.{masters}" in inspect.getsource(kind)
        assert hasattr(kind, "offload_states") is (kind is not of_bf16)
        assert "self.offloaded_states" in inspect.getsource(kind) or kind is of_bf16
    known: Any = import_module(f"{zero}.offload_config").OffloadStateTypeEnum
    assert {state.name for state in known} == {
        "optim_states", "hp_params", "lp_params", "lp_grads", "contiguous_grad_buffer",
    }  # fmt: skip


def test_tensors_are_found_wherever_deepspeed_may_keep_them():
    class Holder:
        __module__ = "deepspeed.runtime.zero.stage3"

    def tensor(number) -> Any:
        return torch.full((1,), float(number))

    holder: Any = Holder()
    inner: Any = Holder()
    inner.buffers = {torch.float32: [tensor(1), (tensor(2),)], "none": None}
    flat = tensor(3)
    flat.ds_tensor = tensor(4)
    flat.grad = tensor(5)
    group: Any = type("Group", (list,), {})([tensor(6)])
    group.flat_partition = tensor(7)
    holder.all = [inner, flat, group, holder]
    holder.other = SimpleNamespace(mine=tensor(8))
    holder.model = nn.Linear(1, 1)
    assert sorted(t.item() for t in tensors_within(holder)) == [1, 2, 3, 4, 5, 6, 7]
