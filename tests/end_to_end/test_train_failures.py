"""What goes wrong on one of two ranks: all skip the step, or all end, that rank's error first.

The faults are planted by failure_worker.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.support.cpu_engines import ENGINES, require_deepspeed
from tests.support.launch import HANGS_S, torchrun
from tests.support.paths import SUPPORT, python_path
from tests.support.tiny import make_model

pytestmark = [pytest.mark.slow, pytest.mark.distributed]
NAN = [*(f"nan-{engine}" for engine in ENGINES), "nan-fsdp2-lora", "nan-zero3-lora"]
REWARD = ["reward-ddp", "reward-fsdp2", "reward-zero3"]
PLANTED = "planted on the last rank"
SOON_S = 900.0  # on a machine that has more to do; a collective of gloo waits for half an hour


class Ended(NamedTuple):
    code: int
    errors: str
    seconds: float
    ranks: list[dict[str, Any]]  # of each rank: {run: what became of it}, {} if it was ended first


def launch(tmp: Path, runs: list[str]) -> Ended:
    """Two ranks of failure_worker.py."""
    require_deepspeed()
    make_model().save_pretrained(tmp / "models" / "qwen2")
    begin = time.perf_counter()
    done = subprocess.run(
        [*torchrun(2), str(SUPPORT / "failure_worker.py"), str(tmp), str(tmp / "models"), *runs],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": python_path()},
        capture_output=True,
        text=True,
        timeout=HANGS_S,
    )
    seconds = time.perf_counter() - begin
    files = [tmp / f"{rank}.json" for rank in range(2)]
    ranks = [json.loads(file.read_text()) if file.exists() else {} for file in files]
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
