"""Reward functions in worker processes, which import them from the top level of this file."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from transformers import TrainerState

from rloo_fast.rewards import RewardError, RewardTimeout, load_reward_functions
from tests.rewards.test_overlap import (
    HIDDEN,
    WAIT_S,
    K,
    P,
    Scripted,
    collect,
    make_collector,
    number_of,
    numbers,
    wait_for,
)

GROUPS = [[0, 1], [2, 3], [4, 5]]


def prompts_with(folder):
    """Rows whose column `folder` lets functions leave files behind."""
    return [{"prompt": f"w{i}", "folder": str(folder), "number": i} for i in range(P)]


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def meets_the_other(completions, number, folder, log_extra, log_metric, **kwargs):
    """The calls for prompts 0 and 1 wait for each other."""
    mine = Path(folder[0])
    (mine / str(number[0])).touch()
    if number[0] < 2:
        wait_for((mine / str(1 - number[0])).exists)
    log_extra("pid", [os.getpid()] * len(completions))
    log_extra("text", completions)
    log_metric("largest", number_of(completions[-1]))
    return numbers(completions)


def dies(completions, **kwargs):
    os._exit(3)


def raises(completions, **kwargs):
    raise KeyError("gold")


class Picky(Exception):
    """Pickle takes it apart, but cannot build it again."""

    def __init__(self, what, why):
        super().__init__(f"{what}: {why}")


def raises_picky(completions, **kwargs):
    raise Picky("gold", "missing")


def returns_nan_for_w5(completions, **kwargs):
    return (float("nan") if c == "w5" else 0.0 for c in completions)


def hangs_on_w2(completions, folder, **kwargs):
    if "w2" in completions:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
        pids = Path(folder[0]) / "new"
        pids.write_text(f"{os.getpid()} {child.pid}")
        pids.rename(Path(folder[0]) / "pids")
        time.sleep(1000)
    return numbers(completions)


def forks_on_w0(completions, **kwargs):
    if "w0" in completions:
        os.fork()
    return numbers(completions)


def fails_on_w0(completions, **kwargs):
    if "w0" in completions:
        raise KeyError("gold")
    return numbers(completions)


def steps_of(trainer_state, completions, **kwargs):
    trainer_state.max_steps = -1
    return [trainer_state.global_step] * len(completions)


def calls_are_counted(completions, folder, **kwargs):
    Path(folder[0], f"{os.getpid()}-{time.monotonic_ns()}").touch()
    return [len(completions)] * len(completions)


async def pid_here(completions, **kwargs):
    return [float(os.getpid())] * len(completions)


def test_groups_are_scored_in_two_processes_at_the_same_time_during_generation(tmp_path):
    seen = lambda: wait_for((tmp_path / "1").exists)  # noqa: E731
    collected = collect(
        Scripted([[2, 3], [0, 1], seen, [4, 5]]),
        [meets_the_other, pid_here],
        prompts=prompts_with(tmp_path),
        reward_processes=2,
        log_completions=True,
    )
    pids = collected.texts.extra["pid"]
    assert collected.batch.rows.rewards[:, 0].tolist() == [0, 1, 2, 3, 4, 5]
    assert set(collected.batch.rows.rewards[:, 1].tolist()) == {os.getpid()}
    assert len(set(pids[:4])) == 2
    assert os.getpid() not in pids
    assert collected.texts.extra["text"] == [f"w{i}" for i in range(6)]
    assert collected.logged["largest"] == 3
    assert HIDDEN[0] > 0


def test_without_overlap_a_worker_gets_one_call(tmp_path):
    collected = collect(
        Scripted(GROUPS),
        calls_are_counted,
        prompts=prompts_with(tmp_path),
        reward_processes=2,
        overlap_rewards=False,
    )
    assert len(list(tmp_path.iterdir())) == 1
    assert collected.batch.rows.rewards[:, 0].tolist() == [6] * 6


def test_worker_gets_a_copy_of_the_trainer_state():
    rewards = load_reward_functions(steps_of, processes=1)
    found = []
    for step in (4, 5):
        state = TrainerState(global_step=step, max_steps=10)
        found += rewards(["w0"], ["w1"], [[7]], {}, trainer_state=state)[0].tolist()
        assert state.max_steps == 10
    rewards.close()
    assert found == [4, 5]


def test_function_of_a_file_runs_in_a_worker(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "def length(completions, **kwargs):\n    return [len(c) for c in completions]\n"
    )
    rewards = load_reward_functions([f"{file}:length", "exact_match"], processes=1)
    found = rewards(["w0"], ["w1"], [[7]], {"answer": ["w1"]})
    rewards.close()
    assert found.tolist() == [[2, 1]]


def test_function_that_cannot_be_sent_is_refused_at_once():
    def local(**kwargs):
        return []

    with pytest.raises(ValueError, match=r"'local' cannot be sent.*top level of a module or file"):
        load_reward_functions([numbers, local], processes=2)


# --- errors


def test_worker_that_dies_is_named_and_replaced(tmp_path):
    rewards = load_reward_functions([numbers, dies], processes=2)
    with pytest.raises(RewardError, match=r"'dies' died \(exit code 3\)"):
        collect(Scripted(GROUPS), None, rewards=rewards)
    rewards.functions.pop()
    assert rewards(["w0"], ["w1"], [[7]], {}).tolist() == [[1]]
    rewards.close()


def test_function_that_forks_answers_once():
    rewards = load_reward_functions(forks_on_w0, processes=1)
    for number in (0, 1, 2):
        assert rewards(["p"], [f"w{number}"], [[7]], {}).tolist() == [[number]]
    rewards.close()


def test_error_in_a_worker_is_the_same_as_here():
    with pytest.raises(RewardError) as e:
        collect(Scripted(GROUPS), raises, reward_processes=1)
    assert str(e.value) == "Reward function 'raises' raised KeyError: 'gold'"
    assert isinstance(e.value.__cause__, KeyError)
    assert 'raise KeyError("gold")' in e.value.__notes__[0]


def test_error_that_cannot_be_sent_is_told():
    with pytest.raises(RewardError, match="'raises_picky' raised Picky: gold: missing"):
        collect(Scripted(GROUPS), raises_picky, reward_processes=1)


def test_wrong_value_names_its_row_in_the_batch():
    with pytest.raises(ValueError, match=r"returned nan for sample 5 \(prompt 'w2'.*'w5'"):
        collect(Scripted(GROUPS), returns_nan_for_w5, reward_processes=1)


def test_hung_worker_is_killed_with_what_it_started_and_replaced(tmp_path):
    rewards = load_reward_functions(hangs_on_w2, processes=1, timeout_s=2.0)
    with pytest.raises(RewardTimeout, match=r"'hangs_on_w2' still ran after 2\.0 s"):
        collect(Scripted(GROUPS), None, prompts=prompts_with(tmp_path), rewards=rewards)
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    wait_for(lambda: not any(map(is_alive, pids)))
    columns = {"folder": [str(tmp_path)], "number": [0]}
    assert rewards(["w0"], ["w1"], [[7]], columns).tolist() == [[1]]
    rewards.close()


def test_other_calls_end_with_the_first_error(tmp_path):
    """One function fails in one process while the other would run on in the other."""
    steps = [[2, 3], lambda: wait_for((tmp_path / "pids").exists), [0, 1]]
    rewards = load_reward_functions([hangs_on_w2, fails_on_w0], processes=2)
    collector = make_collector(Scripted(steps), None, rewards=rewards)
    with pytest.raises(RewardError, match="'fails_on_w0' raised KeyError"):
        collector(prompts_with(tmp_path), K, 0, "eval", TrainerState())
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    wait_for(lambda: not any(map(is_alive, pids)))
    rewards.close()


SCRIPT = """
import os, signal, time
from rloo_fast.rewards import load_reward_functions

def hangs(folder, **kwargs):
    with open(folder[0] + "/new", "w") as file:
        file.write(str(os.getpid()))
    os.rename(folder[0] + "/new", folder[0] + "/pids")
    time.sleep(1000)

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    load_reward_functions(hangs, processes=1)(["w0"], ["w2"], [[7]], {"folder": ["FOLDER"]})
"""


@pytest.mark.slow
def test_interrupted_script_ends_and_leaves_no_process(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.replace("FOLDER", str(tmp_path)))
    run = subprocess.Popen([sys.executable, str(script)], stderr=subprocess.PIPE)
    try:
        wait_for((tmp_path / "pids").exists)
        run.send_signal(signal.SIGINT)
        assert b"KeyboardInterrupt" in run.communicate(timeout=WAIT_S)[1]
    finally:
        run.kill()
    pid = int((tmp_path / "pids").read_text())
    wait_for(lambda: not is_alive(pid))


@pytest.mark.slow
def test_script_that_would_start_training_in_a_worker_is_told_so(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.replace('if __name__ == "__main__":', "if True:"))
    run = subprocess.run([sys.executable, str(script)], capture_output=True, timeout=WAIT_S)
    assert b'under `if __name__ == "__main__":`' in run.stderr
