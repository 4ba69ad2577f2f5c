"""What makes room for the engine: counted right, moved as planned, and back to the last bit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn

from rloo_fast.offload.engine_room import EngineRoom, Holdings, measure
from rloo_fast.records import Sampling
from rloo_fast.rollout.cycle import RolloutCycle
from rloo_fast.rollout.engine import EngineState
from tests.support.fake_engine import FakeEngine
from tests.support.pretend_gpu import OPTIMIZERS, Side, snapshot

# Counting


def test_every_storage_on_the_gpu_is_counted_once():
    side = Side()
    side.step()
    params = sum(p.nbytes for p in side.policy.parameters())  # the tied head once
    buffers = sum(b.nbytes for b in side.policy.buffers())
    held = measure(side.policy, side.optimizer, side.reference, side.gpu)
    assert held == Holdings(params + buffers, 0, 2 * params, params + buffers)
    assert held.weights + held.optimizer + held.reference == side.gpu.used


def test_gradients_and_reward_models_are_counted():
    side, judge = Side(), nn.Linear(7, 3)
    side.gpu.put(*judge.parameters())
    grad = next(side.policy.parameters()).grad = torch.zeros_like(next(side.policy.parameters()))
    side.gpu.put(grad)
    held = measure(side.policy, side.optimizer, None, side.gpu, others=[judge])
    assert (held.gradients, held.others, held.reference) == (grad.nbytes, 24 * 4, 0)


def test_before_the_first_step_adams_state_is_estimated_right():
    side = Side()
    next(side.policy.parameters()).requires_grad_(False)
    without = measure(side.policy, None, side.reference, side.gpu)
    before = measure(side.policy, side.optimizer, side.reference, side.gpu)
    side.step()
    after = measure(side.policy, side.optimizer, side.reference, side.gpu)
    assert (before.optimizer, before.estimated) == (after.optimizer, True)
    assert not after.estimated
    assert without == before


def test_the_state_is_found_in_accelerates_wrapper():
    side = Side()
    side.step()
    plain = measure(side.policy, side.optimizer, None, side.gpu)
    wrapped = Accelerator(cpu=True).prepare(side.optimizer)
    assert type(wrapped) is AcceleratedOptimizer
    assert measure(side.policy, wrapped, None, side.gpu) == plain


# There and back


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_run_with_room_made_every_step_equals_one_without(kind):
    plain, moved = Side(kind), Side(kind)
    room = moved.room()
    for _ in range(4):
        room.make()
        assert moved.gpu.used == room.plan.holdings.weights
        room.give_back()
        assert moved.step() == plain.step()
    assert snapshot(moved.policy.parameters())[0][-1] == snapshot(plain.policy.parameters())[0][-1]
    for a, b in zip(moved.state_tensors(), plain.state_tensors(), strict=True):
        assert torch.equal(a, b)


def test_every_object_stride_and_bit_comes_back():
    side = Side()
    extra: Any = side.reference.model.layers[0]
    extra.register_buffer("strided", torch.arange(12, dtype=torch.bfloat16).view(3, 4).t())
    extra.register_buffer("view", extra.strided[1:3, 2])
    extra.register_buffer("nothing", torch.empty(0))
    extra.register_buffer("nan", torch.tensor([float("nan"), -0.0]))
    side.gpu.put(extra.strided, extra.view, extra.nan)
    side.step()
    tensors = [*side.reference.parameters(), *side.reference.buffers(), *side.state_tensors()]
    before, used, names = snapshot(tensors), side.gpu.used, list(side.reference.state_dict())
    room = side.room()
    room.make()
    assert not any(side.gpu.holds(t) for t in tensors)
    assert snapshot(tensors) == before  # whole on the host too
    room.give_back()
    assert snapshot(tensors) == before
    assert side.gpu.used == used
    assert list(side.reference.state_dict()) == names
    extra.strided[2, 2] = 77  # the view still looks into it
    assert extra.view[1] == 77


def test_tied_weights_are_moved_once_and_stay_tied():
    side = Side()
    room = side.room()
    room.make()
    head, embedding = side.reference.lm_head, side.reference.model.embed_tokens
    assert head.weight is embedding.weight
    room.give_back()
    assert head.weight is embedding.weight
    num = len([*side.reference.parameters(), *side.reference.buffers()])
    assert side.gpu.calls.count("copy") == 2 * num


def test_tensors_that_share_a_storage_are_moved_as_one():
    side = Side()
    layers: Any = side.reference.model.layers
    a, b = layers
    flat = torch.arange(64.0)
    a.register_buffer("left", flat[:40])
    b.register_buffer("right", flat[30:])
    side.gpu.put(a.left, b.right)
    room = side.room()
    room.make()
    assert a.left.untyped_storage().data_ptr() == b.right.untyped_storage().data_ptr()
    room.give_back()
    a.left[35] = -1
    assert b.right[5] == -1


def test_weights_that_policy_and_reference_share_stay():
    side = Side()
    shared = side.reference.model.embed_tokens.weight = side.policy.model.embed_tokens.weight
    side.room().make()
    assert side.gpu.holds(shared)
    assert not side.gpu.holds(side.reference.model.norm.weight)


def test_what_is_moved_frees_the_gpu_before_torchs_cache_is_emptied():
    side = Side()
    side.step()
    room = side.room()
    room.make()
    weights = room.plan.holdings.weights
    assert side.gpu.calls[-2:] == ["synchronize", f"release at {weights}"]
    assert side.gpu.calls.count("synchronize") == 1


def test_torchs_cache_is_emptied_where_nothing_has_to_move():
    side = Side()
    used = side.gpu.used
    room = side.room(free=10 * used)
    room.make()
    assert room.plan.moved == ()
    assert side.gpu.calls == ["synchronize", f"release at {used}"]


def test_only_what_the_plan_names_is_moved():
    side = Side()
    side.step()
    state = sum(t.nbytes for t in side.state_tensors() if t.ndim)
    room = side.room(free=state)
    room.make()
    assert room.plan.moved == ("gradients", "reference")
    assert all(side.gpu.holds(t) for t in side.state_tensors() if t.ndim)
    assert not any(side.gpu.holds(p) for p in side.reference.parameters())


def test_counters_that_lie_on_the_cpu_stay_there():
    side = Side()
    side.step()
    counters = [t for t in side.state_tensors() if not t.ndim]
    places = [t.data_ptr() for t in counters]
    room = side.room()
    room.make()
    room.give_back()
    assert [t.data_ptr() for t in counters] == places


def test_gradients_that_are_there_are_moved_not_lost():
    side = Side()
    parameter = next(side.policy.parameters())
    grad = parameter.grad = torch.randn_like(parameter)
    side.gpu.put(grad)
    before = snapshot([grad])
    room = side.room()
    room.make()
    assert not side.gpu.holds(grad)
    room.give_back()
    assert parameter.grad is grad
    assert side.gpu.holds(grad)
    assert snapshot([grad]) == before
    used, freed = side.gpu.used, grad.nbytes
    del grad
    parameter.grad = None
    assert side.gpu.used == used - freed  # nothing of the round holds on to it


def test_host_memory_is_used_again():
    side = Side()
    side.step()
    room = side.room()
    room.make()
    assert side.gpu.calls.count("new_host") > 0
    room.give_back()
    side.gpu.calls.clear()
    side.step()
    room.make()
    assert "new_host" not in side.gpu.calls


def test_what_was_moved_is_told_once_for_there_and_back():
    side, told = Side(), []
    side.step()
    room = side.room()
    room.on_move = lambda seconds, num_bytes: told.append((seconds, num_bytes))
    room.make()
    assert told == []
    room.give_back()
    room.give_back()
    ((seconds, num_bytes),) = told
    assert seconds > 0
    held = room.plan.holdings
    assert num_bytes == held.optimizer + held.reference


def test_twice_is_once_and_nothing_comes_back_that_did_not_go():
    side = Side()
    room = side.room()
    before = snapshot(side.reference.parameters())
    room.give_back()
    assert side.gpu.calls == []
    room.make()
    calls = list(side.gpu.calls)
    room.make()
    assert side.gpu.calls == calls
    assert room.is_made
    room.give_back()
    calls = list(side.gpu.calls)
    room.give_back()
    assert side.gpu.calls == calls
    assert not room.is_made
    assert snapshot(side.reference.parameters()) == before


@pytest.mark.parametrize("fails_at", [1, 4, 40])
def test_a_move_that_fails_leaves_everything_where_it_was(fails_at):
    side = Side()
    side.step()
    tensors = [*side.reference.parameters(), *side.state_tensors()]
    before, room = snapshot(tensors), side.room()
    for call, made in ((room.make, False), (room.give_back, True)):
        side.gpu.calls.clear()
        there = [side.gpu.holds(t) for t in tensors]
        side.gpu.fails_at = fails_at
        with pytest.raises(torch.OutOfMemoryError):
            call()
        assert room.is_made is made
        assert snapshot(tensors) == before
        assert [side.gpu.holds(t) for t in tensors] == there
        side.gpu.fails_at = None
        call()
        assert room.is_made is not made
    assert snapshot(tensors) == before


def test_a_checkpoint_that_is_saved_meanwhile_is_the_same(tmp_path):
    side = Side()
    side.step()
    room = side.room()
    state = copy.deepcopy(side.optimizer.state_dict())
    room.make()
    torch.save(side.optimizer.state_dict(), tmp_path / "optimizer.pt")
    saved = torch.load(tmp_path / "optimizer.pt")
    for number, entry in state["state"].items():
        assert all(torch.equal(saved["state"][number][name], t) for name, t in entry.items())


def test_the_plan_is_said_once_and_again_only_if_the_state_is_not_as_estimated():
    side, said = Side("momentum"), []
    params = sum(p.nbytes for p in side.policy.parameters())
    room = side.room(free=2 * params + 64, say=said.append)
    assert room.plan.moved == ("gradients", "reference")  # momentum needs half of what Adam does
    for _ in range(3):
        room.make()
        room.give_back()
        side.step()
    assert room.plan.moved == ()
    assert [line.count("estimated") for line in said] == [1, 0]


def test_an_engine_that_can_not_fit_is_refused_at_once():
    side = Side(total=1 << 16)
    with pytest.raises(ValueError, match="vllm_gpu_memory_utilization"):
        EngineRoom(side.policy, lambda: None, None, torch.device("cpu"), share=0.9, gpu=side.gpu)


def test_on_a_cpu_nothing_is_moved_and_one_line_says_so():
    side, said = Side(), []
    room = EngineRoom(
        side.policy, lambda: side.optimizer, side.reference, torch.device("cpu"), share=0.3,
        say=said.append,
    )  # fmt: skip
    places = [p.data_ptr() for p in side.reference.parameters()]
    room.make()
    assert room.is_made  # so that the trainer's order is checked without a GPU
    assert [p.data_ptr() for p in side.reference.parameters()] == places
    room.give_back()
    assert not room.is_made
    assert said == ["On a CPU there is nothing to move out of the rollout engine's way."]


def test_of_sharded_optimizer_state_this_process_part_moves_and_comes_back():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.testing._internal.distributed.fake_pg import FakeStore

    side = Side()
    side.step()
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (2,))
        first = next(iter(side.optimizer.state.values()))
        sharded = first["exp_avg"] = distribute_tensor(first["exp_avg"], mesh, [Shard(0)])
        mine = sharded._local_tensor
        side.gpu.put(mine)
        room = side.room()
        whole = sum(2 * p.nbytes for p in side.policy.parameters())
        assert room.plan.holdings.optimizer == whole - mine.nbytes
        assert mine.nbytes == sharded.nbytes // 2
        before = mine.clone()
        room.make()
        assert not side.gpu.holds(sharded._local_tensor)
        assert torch.equal(sharded.to_local(), before)
        room.give_back()
        assert side.gpu.holds(sharded._local_tensor)
        assert torch.equal(sharded.to_local(), before)
    finally:
        torch.distributed.destroy_process_group()


# With the rest


def test_room_is_made_while_the_engine_samples_and_only_then():
    side, seen = Side(), []
    room = side.room()
    cycle = RolloutCycle(FakeEngine(), lambda: 0, lambda: [], sleep_level=2, room=room)
    sampling = Sampling(1.0, 1.0, 0, None, 1.0, max_new_tokens=3, stop_token_ids=(1,))
    cycle.generate([[3]], sampling, [0], lambda *_: seen.append((room.is_made, side.gpu.used)))
    cycle.sleep()
    assert seen == [(True, room.plan.holdings.weights)]
    assert not room.is_made
    assert all(side.gpu.holds(p) for p in side.reference.parameters())


def test_what_was_moved_can_stay_away_while_reward_models_score():
    side = Side()
    room = side.room()
    cycle = RolloutCycle(FakeEngine(), lambda: 0, lambda: [], sleep_level=2, room=room)
    sampling = Sampling(1.0, 1.0, 0, None, 1.0, max_new_tokens=3, stop_token_ids=(1,))
    cycle.generate([[3]], sampling, [0])
    cycle.sleep(give_back=False)
    assert (cycle.engine.state, room.is_made) == (EngineState.ASLEEP, True)
    cycle.sleep()
    assert not room.is_made


def test_no_gradients_are_held_while_completions_are_scored(tmp_path):
    from tests.end_to_end.test_train_options import make_trainer

    seen = []

    def reward(completion_ids, **kwargs):
        seen.append([name for name, p in trainer.model.named_parameters() if p.grad is not None])
        return [float(len(ids)) for ids in completion_ids]

    trainer = make_trainer(tmp_path, reward_funcs=reward, max_steps=3)
    trainer.train()
    assert len(seen) >= 3
    assert not any(seen)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="moves memory of a real GPU")
def test_a_real_gpu_gets_its_memory_back_and_the_run_is_the_same():
    device = torch.device("cuda", 0)
    results = []
    for rounds in (False, True):
        torch.manual_seed(0)
        policy = nn.Linear(4096, 4096, device=device)
        reference = copy.deepcopy(policy).requires_grad_(False)
        optimizer = torch.optim.AdamW(policy.parameters(), lr=0.01)
        total = torch.cuda.mem_get_info(device)[1]
        room: Any = EngineRoom(policy, lambda o=optimizer: o, reference, device, share=0.0,
                         reserve=total - (110 << 20))  # fmt: skip
        for _ in range(3):
            if rounds:
                before = torch.cuda.memory_allocated(device)
                room.make()
                freed = before - torch.cuda.memory_allocated(device)
                assert freed >= room.plan.bytes_moved - (0 if optimizer.state else 129 << 20)
                room.give_back()
                assert torch.cuda.memory_allocated(device) == before
            x = torch.linspace(-1, 1, 4096, device=device)
            (policy(x) - reference(2 * x)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(snapshot(p.cpu() for p in policy.parameters()))
    assert [entry[-1] for entry in results[0]] == [entry[-1] for entry in results[1]]
