"""Collectives over two gloo processes, and over one."""

from __future__ import annotations

import json

import pytest
import torch
from accelerate import Accelerator

from rloo_fast.distributed.collectives import (
    any_process,
    gather_objects,
    gather_rows,
)
from tests.support.launch import run_worker_processes


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What each of two processes got."""
    out = tmp_path_factory.mktemp("collectives") / "found.json"
    done = run_worker_processes("collectives_worker", str(out))
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.mark.distributed
def test_every_process_gets_the_same_answer(both):
    assert both[0] == both[1]


@pytest.mark.distributed
def test_a_flag_of_either_process_is_seen_by_both(both):
    assert both[0]["any"] == {"none": False, "first": True, "last": True, "all": True}


@pytest.mark.distributed
def test_objects_come_in_rank_order(both):
    assert both[0]["objects"] == [{"rank": 0, "texts": []}, {"rank": 1, "texts": ["x"]}]


@pytest.mark.distributed
def test_rows_come_in_rank_order_with_their_columns(both):
    assert both[0]["rows"] == {"number": [0, 1, 2, 3], "half": [0.5, 0, 0.5, 1]}


@pytest.mark.distributed
def test_processes_on_gpus_get_the_same_over_the_host(both):
    assert both[0]["on_gpu"] == {"any": both[0]["any"], "rows": both[0]["rows"]}


def test_one_process_answers_for_itself():
    accelerator = Accelerator(cpu=True)
    assert any_process(accelerator, True) is True
    assert any_process(accelerator, False) is False
    assert gather_objects(accelerator, "mine") == ["mine"]
    rows = gather_rows(accelerator, {"n": torch.tensor([3, 4])})
    assert (rows["n"].dtype, rows["n"].tolist()) == (torch.float64, [3.0, 4.0])


def test_rows_of_all_processes_come_in_one_collective():
    class Two:
        num_processes, device, calls = 2, torch.device("cpu"), 0

        def gather(self, matrix):
            self.calls += 1
            return torch.cat([matrix, matrix + 10])

    two = Two()
    found = gather_rows(two, {"a": torch.tensor([1, 2]), "b": torch.tensor([3, 4])})
    assert {n: c.tolist() for n, c in found.items()} == {"a": [1, 2, 11, 12], "b": [3, 4, 13, 14]}
    assert two.calls == 1
