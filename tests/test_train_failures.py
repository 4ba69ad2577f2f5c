"""What goes wrong on one of two ranks: all ranks skip the step, or all end, that rank's error first.

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
NAN_IN = [*ENGINES, "fsdp2+lora", "zero3+lora"]
REWARD_IN = ["ddp", "zero3", "fsdp2"]
PLANTED = "planted on the last rank"
SOON_S = 90.0  # imports included; a collective of gloo waits for half an hour


class Ended(NamedTuple):
    code: int
    errors: str
    seconds: float
    ranks: list[dict[str, Any]]  # engine -> what became of the run


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    """launch(failure, engines): two ranks of failure_worker.py."""
    require_deepspeed()
    tmp = tmp_path_factory.mktemp("failures")
    make_model().save_pretrained(tmp / "models" / "qwen2")

    def run(failure: str, engines: list[str]) -> Ended:
        out = tmp / failure
        out.mkdir()
        port = 20000 + os.getpid() % 20000
        nodes = ["--nnodes", "1", "--nproc_per_node", "2", "--master_port", str(port)]
        worker = [str(HERE / "failure_worker.py"), str(out), str(tmp / "models"), failure]
        command = [sys.executable, "-m", "torch.distributed.run", *nodes, *worker, *engines]
        path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        begin = time.perf_counter()
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280)
        ranks = [json.loads(path.read_text()) for path in sorted(out.glob("*.json"))]
        return Ended(done.returncode, done.stderr, time.perf_counter() - begin, ranks)

    return run


@pytest.fixture(scope="module")
def after_nan(launch):
    ended = launch("nan", NAN_IN)
    assert ended.code == 0, ended.errors[-3000:]
    return ended.ranks


@pytest.mark.parametrize("engine", NAN_IN)
def test_a_gradient_that_is_nan_on_one_rank_skips_the_step_on_all(engine, after_nan):
    first, second = (rank[engine] for rank in after_nan)
    assert first == second
    assert first["num_skipped"] == 1
    assert first["weights"][0] == first["weights"][1] != first["weights"][2]
    assert first["finite"]


@pytest.fixture(scope="module")
def after_reward(launch):
    return launch("reward", REWARD_IN)


@pytest.mark.parametrize("engine", REWARD_IN)
def test_a_reward_that_fails_on_one_rank_ends_the_run_on_all(engine, after_reward):
    waiting, failed = (rank[engine] for rank in after_reward.ranks)
    assert PLANTED in failed["text"]
    assert waiting["error"] == "PeerFailed"
    assert f"process 1 failed: {failed['error']}: {failed['text']}" == waiting["text"]
    assert any("checkpoint-1 holds" in note for note in failed["notes"])


def assert_ended_with(ended: Ended, first: str, later: str) -> None:
    """The run has failed, soon; `first` was said before anything that matches `later`."""
    assert ended.code != 0
    assert ended.seconds < SOON_S
    said = ended.errors.find(first)
    assert said >= 0, ended.errors[-3000:]
    assert later not in ended.errors[:said]


def test_after_a_failed_reward_processes_end_with_its_error(after_reward):
    assert_ended_with(after_reward, PLANTED, "ChildFailedError")


def test_an_error_in_the_forward_of_one_rank_ends_all_with_it(launch):
    ended = launch("forward", ["fsdp2"])
    assert_ended_with(ended, f"ArithmeticError: {PLANTED}", "Connection closed")


def test_no_memory_on_one_rank_ends_all_with_what_to_set(launch):
    ended = launch("out_of_memory", ["fsdp2"])
    assert_ended_with(ended, "set max_tokens_per_micro_batch=15", "Connection closed")
