"""No text of a model becomes code, in any task of reasoning-gym, and right answers are still right.

The guard is set up in processes of its own here, without the walls of a sandbox, so that what a
text could do would be seen.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import reasoning_gym
from reasoning_gym.factory import DATASETS

from rloo_fast.rewards.builtin import BUILTINS
from rloo_fast.verifiers import guard, gym_answers
from tests.support.paths import ROOT, python_path

TASKS = sorted(DATASETS.keys() - {"composite"})
# Each makes the file MARK, replaces the verifier, or ends its process, if it is run.
HOSTILE = [
    "__import__('os').system('touch MARK')",
    "open('MARK', 'w')",
    "[open('MARK', 'w')]",
    "[[open('MARK', 'w').write('x') for _ in (1,)]]",
    "(lambda: open('MARK', 'w'))()",
    "().__class__.__base__.__subclasses__()",
    "eval(chr(111)+chr(112)+chr(101)+chr(110)+chr(40)+chr(39)+chr(77)+chr(39)+chr(41))",
    "exec('import sys; sys.exit(3)')",
    'S(\'open("MARK", "w")\')',
    'sympify(\'open("MARK", "w")\')',
    'sin(\'open("MARK", "w")\')',
    "Symbol('x').__init__.__globals__",
    "preview(x, viewer='file', filename='MARK')",
    "lambdify(x, \"open('MARK', 'w')\")(1)",
    "parse_expr(\"open('MARK', 'w')\")",
    "[exit(3)]",
    "setattr(__builtins__, 'float', lambda *a: 1.0)",
]


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        ("1 + 2 * (3 - 4) ** 5 / 6 // 7 % 8", True),
        ("[[1, 2], [3, -4.5e3]]", True),
        ("{'a': (1, 2), 3: None}", True),
        ("Integer(3)*Symbol('x')**Integer(2) + sqrt(Float('2.5'))", True),
        ("Function('f')(x1)", True),
        ("x.real", False),
        ("open('x')", False),
        ("chr(1)", False),
        ("[i for i in x]", False),
        ("lambda: 1", False),
        ("__import__('os')", False),
        ("getattr(x, 'y')", False),
        ("f'{x!r}'", True),
        ("(x := 3)", True),
    ],
)
def test_what_is_arithmetic(text, allowed):
    code = compile(text, "<string>", "eval", dont_inherit=True)
    assert guard.is_arithmetic(code) == allowed


def test_statements_are_none():
    for text in ("import os", "from os import *", "def f(): pass", "class x: pass", "del open"):
        code = compile(text, "<string>", "exec", dont_inherit=True)
        assert not guard.is_arithmetic(code), text


GUARDED = """
import json, os, sys
from rloo_fast.verifiers import gym_answers, guard
problems = json.loads(sys.stdin.read())
gym_answers.verify(*problems[0])
guard.set_up()
found = []
for task, entry, answer in problems:
    try:
        found.append(gym_answers.verify(task, entry, answer)[0])
    except Exception as error:
        found.append(repr(error))
    if os.listdir(".") != []:
        sys.exit(f"{task} has run {answer}")
print(json.dumps(found))
"""


def in_a_guarded_process(problems, folder) -> list:
    done = subprocess.run(
        [sys.executable, "-P", "-c", GUARDED],
        input=json.dumps(problems, default=str),
        env={"PYTHONPATH": python_path(), "PATH": "/usr/bin:/bin"},
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def entries():
    """A problem of every task; `config` as load_reasoning_gym writes it."""
    made = {task: reasoning_gym.create_dataset(task, size=1, seed=1) for task in TASKS}
    return {
        task: (made[task], json.loads(json.dumps({**made[task][0], "config": {}}, default=str)))
        for task in TASKS
    }


@pytest.mark.slow
def test_the_right_answer_of_every_task_is_worth_what_it_was(entries, tmp_path):
    problems = [(task, entry, entry["answer"]) for task, (_, entry) in entries.items()]
    guarded = in_a_guarded_process(problems, tmp_path)
    unguarded = [made.score_answer(entry["answer"], entry) for made, entry in entries.values()]
    assert dict(zip(TASKS, guarded, strict=True)) == dict(zip(TASKS, unguarded, strict=True))
    assert len(TASKS) > 100
    assert sum(score == 1 for score in guarded) > 95


@pytest.mark.slow
def test_no_task_runs_what_an_answer_says(entries, tmp_path):
    problems = [(task, entry, text) for task, (_, entry) in entries.items() for text in HOSTILE]
    scores = in_a_guarded_process(problems, tmp_path)
    nothing = in_a_guarded_process([(t, e, "?") for t, (_, e) in entries.items()], tmp_path)
    for (task, _, text), score in zip(problems, scores, strict=True):
        # game_of_life_halting takes all that is not "True" for a "False"
        assert score < 1 or nothing[TASKS.index(task)] == 1, (task, text)


@pytest.mark.parametrize("answer", ["nan", "NaN", "-nan", "nani", "nan+nanj", "inf + nani"])
def test_not_a_number_is_no_answer(answer):
    made = reasoning_gym.create_dataset("complex_arithmetic", size=1, seed=1)
    entry = json.loads(json.dumps({**made[0], "config": {}}))
    assert answer.startswith("inf") or made.score_answer(answer, entry) == 1  # to the library
    assert gym_answers.verify("complex_arithmetic", entry, answer) == [0.0, "NaN is no answer"]


@pytest.mark.parametrize("answer", ["nun,nan,man", "banana", "Nan said no", "inf", "i"])
def test_a_word_may_be_nan(answer):
    assert not gym_answers._is_nan(answer)


def test_without_the_guard_an_answer_is_run(entries, tmp_path, monkeypatch):
    """Else the tests above would show nothing."""
    monkeypatch.chdir(tmp_path)
    gym_answers.verify("n_queens", entries["n_queens"][1], "[open('MARK', 'w')]")
    assert (tmp_path / "MARK").exists()


def test_the_page_says_what_every_builtin_does_with_an_answer():
    page = (ROOT / "docs" / "rewards.md").read_text()
    section = page.split("## What they do with a model's text")[1].split("\n## ")[0]
    named = {name for row in re.findall(r"^\| (`.*?) \|", section, re.M) for name in ticks(row)}
    assert named == set(BUILTINS)


def ticks(text: str) -> list[str]:
    return re.findall("`(.*?)`", text)
