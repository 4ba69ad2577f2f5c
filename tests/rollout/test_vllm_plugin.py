"""Inside a server: one tensor-parallel worker fetches a bucket, and all go on, or all raise."""

from __future__ import annotations

import pytest
import safetensors.torch
import torch

from rloo_fast.rollout.vllm.fetch import NotFetched
from tests.support.tiny import require_vllm

require_vllm()
pytestmark = pytest.mark.vllm
WEIGHTS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}


class Group:
    """vLLM's group of two workers, of which the first runs before the second."""

    world_size = 2

    def __init__(self):
        self.rank_in_group, self.said = 0, []

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


@pytest.fixture
def fetched_by(monkeypatch):
    """fetched_by(fetch): what each of two workers has after it, or its error."""
    from rloo_fast.rollout.vllm import plugin as vllm_plugin

    def run(fetch):
        group, found, asked = Group(), [], []
        monkeypatch.setattr(vllm_plugin, "get_tp_group", lambda: group)
        monkeypatch.setattr(vllm_plugin, "fetch", lambda *a: asked.append(a) or fetch())
        for group.rank_in_group in (0, 1):
            worker = vllm_plugin.PulledWeights.__new__(vllm_plugin.PulledWeights)
            worker.device, worker._room = torch.device("cpu"), 5
            try:
                found.append(worker._fetched("url"))
            except NotFetched as error:
                found.append(error)
        assert len(asked) == 1
        assert not group.said, "the second worker would wait for ever"
        return found

    return run


def test_one_worker_fetches_and_both_have_it(fetched_by):
    blob = safetensors.torch.save(WEIGHTS)
    for token, size, weights in fetched_by(lambda: ("token", blob)):
        assert (token, size) == ("token", len(blob))
        assert weights.keys() == WEIGHTS.keys()
        assert all(torch.equal(weights[name], tensor) for name, tensor in WEIGHTS.items())


@pytest.mark.parametrize("error", [NotFetched(), MemoryError("no room"), None])
def test_what_one_worker_could_not_fetch_no_worker_waits_for(error, fetched_by):
    def fetch():
        if error is not None:
            raise error
        return "token", b"no safetensors file"

    assert [type(found) for found in fetched_by(fetch)] == [NotFetched, NotFetched]
