"""Inside a server: one tensor-parallel worker gets a bucket, and all go on, or all raise."""

from __future__ import annotations

import threading
import time
from contextlib import closing

import pytest
import torch

from rloo_fast.rollout.vllm.fetch import NotFetched
from rloo_fast.rollout.vllm.group import GroupBroken
from rloo_fast.rollout.vllm.receiver import Arrival, ahead, shared

WEIGHTS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}
CPU = torch.device("cpu")


class Group:
    """vLLM's group of two workers: what the first one says, the second one hears."""

    world_size = 2

    def __init__(self, rank, said):
        self.rank_in_group, self.said = rank, said

    def broadcast_object(self, value, src):
        return self._broadcast(value)

    def broadcast_tensor_dict(self, value, src):
        return self._broadcast(value)

    def _broadcast(self, value):
        if self.rank_in_group == 0:
            self.said.append(value)
            return value
        assert value is None
        return self.said.pop(0)


def both(arrivals, most=9):
    """What each of two workers gets, `most` buckets of it, and the error at its end."""
    said, found = [], []
    for rank in (0, 1):
        got, error = [], None
        try:
            with closing(shared(arrivals if rank == 0 else None, Group(rank, said), CPU)) as come:
                for arrived in come:
                    got.append(arrived)
                    if rank == 0 and len(got) == most:
                        raise MemoryError("no room")
        except Exception as caught:
            error = caught
        found.append((got, type(error)))
    assert not said, "the second worker would wait for ever"
    return found


def numbered(count, error=None):
    for number in range(count):
        yield Arrival("token", number, WEIGHTS)
    if error is not None:
        raise error


def test_one_worker_receives_and_both_have_it():
    for got, error in both(numbered(3)):
        assert error is type(None)
        assert [arrived.nbytes for arrived in got] == [0, 1, 2]
        for arrived in got:
            assert arrived.token == "token"
            assert arrived.weights.keys() == WEIGHTS.keys()
            assert all(torch.equal(arrived.weights[n], tensor) for n, tensor in WEIGHTS.items())


@pytest.mark.parametrize(
    ("error", "kinds"),
    [
        (NotFetched(), (NotFetched, NotFetched)),
        (MemoryError("no room"), (NotFetched, NotFetched)),
        (ValueError("no safetensors file"), (NotFetched, NotFetched)),
        (GroupBroken("the trainer is gone"), (GroupBroken, NotFetched)),
    ],
)
@pytest.mark.parametrize("before", [0, 2])
def test_what_one_worker_could_not_get_no_worker_waits_for(error, kinds, before):
    found = both(numbered(before, error))
    assert tuple(kind for _, kind in found) == kinds
    assert [len(got) for got, _ in found] == [before, before]


def test_when_the_first_worker_takes_no_more_the_others_do_not_either():
    assert [kind for _, kind in both(numbered(3), most=2)] == [MemoryError, NotFetched]


def test_the_next_bucket_comes_while_one_is_loaded():
    came = [threading.Event() for _ in range(4)]

    def coming():
        for number, event in enumerate(came):
            event.set()
            yield number

    for number in ahead(coming()):
        if number < 3:
            assert came[number + 1].wait(10)
        time.sleep(0.02)
        assert number > 1 or not came[number + 2].is_set(), "two at a time, and no more"


def test_an_error_of_what_comes_is_told_after_what_has_come():
    source = ahead(numbered(2, ValueError("cut")))
    assert [next(source).nbytes, next(source).nbytes] == [0, 1]
    with pytest.raises(ValueError, match="cut"):
        next(source)
