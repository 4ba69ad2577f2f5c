"""Verifiers in processes: limits end one answer, not the run; nothing outlives its owner."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import pytest
import reasoning_gym

from rloo_fast.rewards.reasoning_gym import reasoning_gym_reward
from rloo_fast.sandbox import capabilities
from rloo_fast.verifiers import NoProcess, OverLimit, VerifierError, Verifiers, worker
from tests.support.paths import python_path


@pytest.fixture(scope="module")
def entry():
    made = reasoning_gym.create_dataset("countdown", size=1, seed=0)[0]
    return json.loads(json.dumps({**made, "config": {}}))


@pytest.fixture(scope="module")
def verifiers():
    made = Verifiers("reasoning_gym", time_s=2, memory_mib=256, count=1)
    yield made
    made.close()


def ask(verifiers, entry, answer, task="countdown"):
    return verifiers.submit(task, entry, answer).result(60)


@pytest.mark.parametrize(
    ("answer", "what"),
    [("9**9**9**9", "time"), ("9**9**8 + 1", "time"), ("[0] * 10**10", "memory")],
)
def test_an_answer_over_a_limit_is_ended_and_the_next_has_its_due(verifiers, entry, answer, what):
    task = "n_queens" if answer.startswith("[") else "countdown"
    if task == "countdown":
        with pytest.raises(OverLimit, match=what):
            ask(verifiers, entry, answer)
    else:
        made = reasoning_gym.create_dataset("n_queens", size=1, seed=0)[0]
        board = json.loads(json.dumps({**made, "config": {}}))
        assert ask(verifiers, board, answer, task)[0] < 1
    assert ask(verifiers, entry, entry["answer"]) == [1.0, ""]


@pytest.fixture
def quick():
    made = Verifiers("reasoning_gym", time_s=0.3, memory_mib=512, count=1)
    yield made
    made.close()


def test_what_a_verifier_builds_first_is_not_the_answers_time(quick):
    made = reasoning_gym.create_dataset("arc_agi", size=1, seed=0)[0]  # reads 800 tasks: > 0.3 s
    entry = json.loads(json.dumps({**made, "config": {}}))
    assert quick.submit("arc_agi", entry, "1 2").result(300) == [0.05, ""]  # its own word for that


def test_a_wait_for_a_processor_is_not_the_answers_time(quick, entry, monkeypatch):
    started = worker.Worker.send

    def send_and_stop(self, jobs, time_s):
        os.kill(self._pid, signal.SIGSTOP)
        threading.Timer(1.0, os.kill, (self._pid, signal.SIGCONT)).start()
        started(self, jobs, time_s)

    monkeypatch.setattr(worker.Worker, "send", send_and_stop)
    assert ask(quick, entry, "1")[0] < 1
    monkeypatch.setattr(worker, "WAITING", 1)
    with pytest.raises(OverLimit, match="time"):
        ask(quick, entry, "2")


def test_a_wrong_entry_is_an_error_and_costs_no_process(verifiers, entry):
    with pytest.raises(VerifierError, match="KeyError"):
        ask(verifiers, {**entry, "metadata": {}}, entry["answer"], "tower_of_hanoi")
    assert ask(verifiers, entry, entry["answer"]) == [1.0, ""]


@pytest.mark.parametrize("times", [1, 2])
def test_a_worker_killed_by_someone_else_costs_nothing_twice_it_is_the_answers_fault(
    verifiers, entry, monkeypatch, times
):
    def killed(self, *question):
        kills.append(self._pid)
        if len(kills) <= times:
            os.kill(self._pid, signal.SIGKILL)
        return ask_of(self, *question)

    ask(verifiers, entry, "1")
    kills: list[int] = []
    ask_of = worker.Worker.send
    monkeypatch.setattr(worker.Worker, "send", killed)
    if times == 1:
        assert ask(verifiers, entry, entry["answer"]) == [1.0, ""]
    else:
        with pytest.raises(OverLimit, match="memory"):
            ask(verifiers, entry, entry["answer"])
    monkeypatch.undo()
    assert ask(verifiers, entry, entry["answer"]) == [1.0, ""]


def test_the_process_that_workers_come_from_is_replaced_if_it_is_killed(verifiers, entry):
    ask(verifiers, entry, "1")
    source = verifiers._crew._source._process
    os.kill(source.pid, signal.SIGKILL)
    source.wait()
    assert ask(verifiers, entry, entry["answer"]) == [1.0, ""]
    assert verifiers._crew._source._process.pid != source.pid


def test_a_process_that_does_not_start_is_told(monkeypatch):
    monkeypatch.setattr(worker, "START", "import sys; sys.exit('no room {} {} {} {}')")
    broken = Verifiers("accuracy", count=2)
    for _ in range(2):
        with pytest.raises(NoProcess, match=r"did not start \(exit status 1\)"):
            broken.submit("5", "5").result(60)
    broken.close()


def test_close_ends_what_runs_and_cancels_what_waits(entry):
    busy = Verifiers("reasoning_gym", time_s=60, count=1)
    ask(busy, entry, "1")
    source = busy._crew._source._process.pid
    pids = [source, *children(source)]
    running = busy.submit("countdown", entry, "9**9**9**9")
    time.sleep(0.2)
    waiting = busy.submit("countdown", entry, "1")
    started = time.monotonic()
    busy.close()
    assert time.monotonic() - started < 5
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)
    assert waiting.cancelled()
    with pytest.raises(OverLimit):
        running.result(0)


def test_a_forked_process_has_workers_of_its_own_and_leaves_ours(verifiers, entry):
    ask(verifiers, entry, "1")
    child = os.fork()
    if not child:
        ok = False
        try:
            ok = ask(verifiers, entry, entry["answer"]) == [1.0, ""]
            verifiers.close()
        finally:
            os._exit(0 if ok else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert ask(verifiers, entry, entry["answer"]) == [1.0, ""]


def test_answers_that_were_sent_together_with_one_over_the_limit_have_their_due(verifiers, entry):
    answers = [entry["answer"], "9**9**9**9", *[entry["answer"], "1"] * 10]
    asked = [verifiers.submit("countdown", entry, answer) for answer in answers]
    found = [future.exception() or future.result()[0] for future in asked]
    assert isinstance(found.pop(1), OverLimit)
    assert found == [1.0, *[1.0, ask(verifiers, entry, "1")[0]] * 10]


def test_an_answer_longer_than_a_message_is_over_the_limit(verifiers, entry):
    with pytest.raises(OverLimit, match="length"):
        ask(verifiers, entry, "1" * 4_000_000)
    many = [verifiers.submit("countdown", entry, "1" * 1_000_000) for _ in range(6)]
    assert all(future.result(60)[0] < 1 for future in many)


@pytest.mark.skipif(not capabilities()["available"], reason="no sandbox on this machine")
def test_a_worker_is_shut_in_and_knows_no_secret(verifiers, entry, monkeypatch):
    monkeypatch.setenv("A_SECRET", "hunter2")
    with_secret = Verifiers("reasoning_gym", count=1)
    ask(with_secret, entry, "1")
    crew = with_secret._crew
    assert crew is not None
    source = crew._source
    assert source is not None
    pids = [source._process.pid, *children(source._process.pid)]
    assert len(pids) == 2
    for pid in pids:
        with open(f"/proc/{pid}/environ", "rb") as environment:
            assert b"hunter2" not in environment.read()
    with open(f"/proc/{pids[1]}/status") as status:
        facts = dict(line.split(":\t") for line in status if ":\t" in line)
    assert facts["Seccomp"].strip() == "2"
    assert facts["NoNewPrivs"].strip() == "1"
    with_secret.close()
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)


def test_nothing_outlives_a_trainer_that_is_killed():
    code = (
        "import json, os, sys, time\nfrom rloo_fast.verifiers import Verifiers\n"
        "v = Verifiers('reasoning_gym', time_s=60, count=1)\n"
        "v.submit('countdown', {'config': {}, 'answer': '1'}, '9**9**9**9')\n"
        "while v._crew is None or not v._crew._workers: time.sleep(0.05)\n"
        "time.sleep(0.3)\nprint(v._crew._source._process.pid, flush=True)\ntime.sleep(60)"
    )
    trainer = subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": python_path()},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert trainer.stdout is not None
    source = int(trainer.stdout.readline())
    wait_until(lambda: len(children(source)) == 1)
    pids = [source, *children(source)]
    trainer.send_signal(signal.SIGKILL)
    trainer.wait()
    wait_until(lambda: not any(is_running(pid) for pid in pids))


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_completion_over_the_limit_scores_0_or_none_and_is_counted(entry):
    text = json.dumps({**entry, "config": {}})
    completions = [entry["answer"], "9**9**9**9"]
    for value in (0.0, None):
        logged = {}
        rewards = reasoning_gym_reward(
            completions,
            ["countdown"] * 2,
            [text] * 2,
            log_metric=logged.__setitem__,
            time_limit_s=1.0,
            over_limit_reward=value,
        )
        assert rewards == [1.0, value]
        assert logged == {"accuracy": 0.5, "over_limit": 1}


def children(pid: int) -> list[int]:
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(child) for child in file.read().split()]


def is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
