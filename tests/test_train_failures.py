"""What goes wrong on one of two ranks: all skip the step, or all end, that rank's error first.

The faults are planted by failure_worker.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import make_model
from cpu_engines import ENGINES, require_deepspeed

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent
NAN = [*(f"nan-{engine}" for engine in ENGINES), "nan-fsdp2-lora", "nan-zero3-lora"]
REWARD = ["reward-ddp", "reward-fsdp2", "reward-zero3"]
PLANTED = "planted on the last rank"
SOON_S = 120.0  # imports and all runs included; a collective of gloo waits for half an hour


class Ended(NamedTuple):
    code: int
    errors: str
    seconds: float
    ranks: list[dict[str, Any]]  # of each rank: {run: what became of it}


def launch(tmp: Path, runs: list[str]) -> Ended:
    """Two ranks of failure_worker.py."""
    require_deepspeed()
    make_model().save_pretrained(tmp / "models" / "qwen2")
    port = 20000 + os.getpid() % 20000
    nodes = ["--nnodes", "1", "--nproc_per_node", "2", "--master_port", str(port)]
    worker = [str(HERE / "failure_worker.py"), str(tmp), str(tmp / "models"), *runs]
    command = [sys.executable, "-m", "torch.distributed.run", *nodes, *worker]
    path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    begin = time.perf_counter()
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=500)
    seconds = time.perf_counter() - begin
    ranks = [json.loads((tmp / f"{rank}.json").read_text()) for rank in range(2)]
    return Ended(done.returncode, done.stderr, seconds, ranks)


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    return launch(tmp_path_factory.mktemp("failures"), [*NAN, *REWARD, "forward-zero3"])


@pytest.mark.parametrize("run", NAN)
def test_a_gradient_that_is_nan_on_one_rank_skips_the_step_on_all(run, ended):
    first, second = (rank[run] for rank in ended.ranks)
    assert first == second
    assert first["num_skipped"] == 1
    assert first["weights"][0] == first["weights"][1] != first["weights"][2]
    assert first["finite"]


@pytest.mark.parametrize("run", REWARD)
def test_a_reward_that_fails_on_one_rank_ends_the_run_on_all(run, ended):
    waiting, failed = (rank[run] for rank in ended.ranks)
    assert PLANTED in failed["text"]
    assert waiting["error"] == "PeerFailed"
    assert waiting["text"] == f"process 1 failed: {failed['error']}: {failed['text']}"
    assert any("checkpoint-1 holds" in note for note in failed["notes"])


def assert_ended_with(ended: Ended, sentence: str) -> None:
    """The run has failed, soon, and said so before the other rank said that it is alone."""
    assert ended.code != 0
    assert ended.seconds < SOON_S
    before, found, _ = ended.errors.partition(sentence)
    assert found, ended.errors[-3000:]
    assert "Connection closed" not in before


def test_an_error_in_the_forward_of_one_rank_ends_all(ended):
    assert_ended_with(ended, f"ArithmeticError: {PLANTED}")


def test_no_memory_on_one_rank_ends_all_with_what_to_set(tmp_path):
    ended = launch(tmp_path, ["out_of_memory-fsdp2"])
    assert_ended_with(ended, "set max_tokens_per_micro_batch=15")
