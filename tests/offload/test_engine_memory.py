"""What is counted beside weights, optimizer state and reference, and what training engines move."""

from __future__ import annotations

import pytest
import torch

from rloo_fast.offload.engine_memory import EngineMemory
from rloo_fast.offload.engine_room import OF_THE_DRIVER, EngineRoom, measure
from rloo_fast.offload.memory_plan import GIB
from tests.support.pretend_gpu import Side, snapshot


def test_what_nobody_named_is_counted_and_stays():
    side, forgotten = Side(), torch.ones(1000)
    side.gpu.put(forgotten)
    held = measure(side.policy, side.optimizer, None, side.gpu, allocated=side.gpu.allocated())
    of_reference = sum(t.nbytes for t in [*side.reference.parameters(), *side.reference.buffers()])
    assert held.buffers == forgotten.nbytes + of_reference  # which was not named either


def test_what_the_sleeping_engine_holds_is_of_its_own_share():
    side = Side()
    room = side.room()
    room.make()
    graphs = side.gpu.new_block(5000)  # left by the engine that is started now
    room.give_back()
    side.step()
    room.make()
    assert not room.plan.holdings.estimated
    assert room.plan.holdings.buffers == 0
    room.give_back()
    assert len(graphs) == 5000


def test_what_is_forgotten_leaves_less_for_the_engine():
    side = Side()
    side.step()
    room, forgotten = side.room(), torch.ones(10_000)
    room.plan = None
    side.gpu.put(forgotten)
    with pytest.raises(ValueError, match="of the training engine's buffers"):
        room.make()


def test_the_room_takes_the_best_share_where_nobody_gave_one():
    side = Side(total=10**9)
    held = measure(side.policy, None, None, side.gpu)
    needs = {None: 0.85, 10**8: 0.3, 5 * 10**8: 0.5}
    for need, share in needs.items():
        room = EngineRoom(
            side.policy, lambda: None, None, torch.device("cpu"), share=None, need=need, reserve=0,
            say=lambda line: None, gpu=side.gpu,
        )  # fmt: skip
        assert room.share == share
        assert room.plan is not None
        assert room.plan.engine == int(share * 10**9)
        assert room.plan.holdings.weights == held.weights


def test_the_best_share_leaves_other_processes_their_memory():
    side = Side(total=100 * GIB)
    side.gpu.of_others = 40 * GIB
    room = EngineRoom(
        side.policy, lambda: None, side.reference, torch.device("cpu"), share=None, reserve=0,
        say=lambda line: None, gpu=side.gpu,
    )  # fmt: skip
    assert room.share == 0.6  # of the 40, the driver's is in the reserve
    assert room.plan is not None
    assert room.plan.holdings.buffers == 40 * GIB - OF_THE_DRIVER


# What the training engine keeps


class Kept(EngineMemory):
    """Masters that are moved with the optimizer's state, and a buffer that the engine frees."""

    def __init__(self, side, *, moves_optimizer=False):
        self.masters, self.bucket = torch.ones(300), torch.ones(200)
        self.by_itself, self.calls, self.fails = moves_optimizer, [], False
        side.gpu.put(self.masters, self.bucket)

    def moves_optimizer(self):
        return self.by_itself

    def with_optimizer(self):
        return [self.masters]

    def moved_by_itself(self):
        return [self.bucket]

    def fixed(self):
        return [self.masters, self.bucket]  # counted already

    def fixed_bytes(self):
        return 40

    def move_out(self):
        self.calls.append("out")
        if self.fails:
            raise RuntimeError("no host memory")

    def move_back(self):
        self.calls.append("back")


def test_what_a_training_engine_keeps_is_counted_once():
    side = Side()
    side.step()
    kept = Kept(side)
    state = sum(t.nbytes for t in side.state_tensors() if t.ndim)
    held = measure(side.policy, side.optimizer, None, side.gpu, memory=kept)
    assert (held.optimizer, held.buffers) == (state + 1200 + 800, 40)


def test_masters_are_moved_with_the_optimizers_state_and_the_rest_by_the_engine():
    side = Side()
    side.step()
    kept = Kept(side)
    room = side.room(memory=kept)
    before = snapshot([kept.masters])
    room.make()
    assert not side.gpu.holds(kept.masters)
    assert snapshot([kept.masters]) == before
    assert side.gpu.holds(kept.bucket)
    room.give_back()
    assert side.gpu.holds(kept.masters)
    assert kept.calls == ["out", "back"]


def test_views_that_a_training_engine_has_follow_what_they_look_at():
    side = Side()
    side.step()
    kept = Kept(side)
    fragment = kept.masters[10:20]
    room = side.room(memory=kept)
    kept.fixed = lambda: [kept.masters, kept.bucket, fragment]
    room.make()
    assert not side.gpu.holds(fragment)
    room.give_back()
    kept.masters[12] = 77
    assert fragment[2] == 77


def test_an_optimizer_that_the_engine_moves_is_left_to_it():
    side = Side()
    side.step()
    kept = Kept(side, moves_optimizer=True)
    room = side.room(memory=kept)
    room.make()
    assert all(side.gpu.holds(t) for t in [kept.masters, *side.state_tensors()] if t.ndim)
    assert not any(side.gpu.holds(p) for p in side.reference.parameters())
    assert kept.calls == ["out"]


def test_an_engine_is_left_alone_where_its_optimizer_stays():
    side = Side()
    side.step()
    kept = Kept(side)
    room = side.room(memory=kept, free=10**9)
    room.make()
    room.give_back()
    assert kept.calls == ["back"]  # nothing to undo


def test_an_engine_that_fails_to_move_its_part_is_taken_back():
    side = Side()
    side.step()
    kept = Kept(side)
    room = side.room(memory=kept)
    kept.fails = True
    with pytest.raises(RuntimeError, match="no host memory"):
        room.make()
    assert kept.calls == ["out", "back"]
    assert not room.is_made
    assert all(side.gpu.holds(t) for t in [kept.masters, *side.reference.parameters()])
