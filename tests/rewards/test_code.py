"""The reward `code`: from a completion to its program, from the program's tests to a number."""

from __future__ import annotations

import asyncio
import time

import pytest

from rloo_fast.rewards import load_reward_functions
from rloo_fast.rewards.code import UNREAD, CodeReward
from rloo_fast.verifiers.programs import extract_code

ADD = "def add(a, b):\n    return a + b\n"
TESTS = ["assert add(1, 2) == 3", "assert add(2, 2) == 4"]
ONE_OF_TWO = "def add(a, b):\n    return 3\n"


@pytest.fixture(scope="module")
def reward():
    made = CodeReward(timeout_s=5, workers=2)
    yield made
    made.sandbox.close()


def score(reward: CodeReward, completions, tests=TESTS, **columns):
    """Rewards, and what was logged."""
    logged = {}
    call = reward(completions, [tests] * len(completions), log_extra=logged.__setitem__, **columns)
    return asyncio.run(call), logged


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("x = 1", "x = 1"),
        ("Here:\n```python\nx = 1\n```\nDone.", "x = 1\n"),
        ("```python\nx = 1\n```\nBetter:\n```py\nx = 2\n```\n```\noutput\n```", "x = 2\n"),
        ("```\nx = 1\n```\nor\n```text\nx = 2\n```", "x = 2\n"),
        ("```python\nx = 1\nwhile", "x = 1\nwhile"),
        ("1. So:\n  ```Python3 title\n  if 1:\n    x = 1\n  ```", "if 1:\n  x = 1\n"),
        ("~~~python\nx = '```'\n~~~", "x = '```'\n"),
        ("```python\ndef f(): 1\n```\nUse:\n```python\nprint(f())\n```", "def f(): 1\n"),
        ("```python\nclass A: 1\n```\n```python\nasync def f(): 2\n```", "async def f(): 2\n"),
        ("```python\ndef f(): 1\n```\n```python\ndef f(: 2", "def f(: 2"),
        ("Use `x`:\n```python\ns = '```'\n```", "s = '```'\n"),
        ("```python\n```", ""),
        (
            '```py\ndef f():\n    """Use:\n    ```\n    f()\n    ```\n    """\n    return 1\n```',
            'def f():\n    """Use:\n    ```\n    f()\n    ```\n    """\n    return 1\n',
        ),
        (
            "> So:\n> ```python\n> def f():\n>     return 1\n> ```\n> Done.",
            "def f():\n    return 1\n",
        ),
        ("So:\n    ```python\n    def f(): 1\n    ```", "def f(): 1\n"),
        ("````python\nx = 1\n```\ny = 2\n````", "x = 1\n```\ny = 2\n"),
        ("- So:\n\n  ```{.python}\n  x = 1\n  ```\n\n```\n3\n```", "x = 1\n"),
    ],
    ids=[
        *("text", "block", "last", "other", "cut off", "indented", "tildes"),
        *("usage", "last that defines", "broken", "in a string", "empty"),
        *("a fence in a docstring", "quoted", "far indented", "longer fence", "attributes"),
    ],
)
def test_the_program_of_a_completion(text, code):
    assert extract_code(text) == code


@pytest.mark.parametrize(
    "later",
    [
        "def test_add():\n    assert add(1, 2) == 3",
        "class TestAdd:\n    def test(self): assert add(1, 2) == 3",
        "def main():\n    print(add(1, 2))\nmain()",
        "def double(x):\n    return add(x, x)",
    ],
)
def test_a_block_of_tests_or_of_use_does_not_replace_the_solution(later):
    text = f"```python\n{ADD}```\nAnd:\n```python\n{later}\n```"
    assert extract_code(text, TESTS) == ADD
    better = f"{text}\nBetter:\n```python\n{ONE_OF_TWO}```"
    assert extract_code(better, TESTS) == ONE_OF_TWO


F = "def f(x):\n    return x"
FENCED = f"```python\n{F}\n```"
LATER_STUB = "```python\ndef f(x: int) -> int: ...\n```"


@pytest.mark.parametrize(
    "text",
    [
        f"<think>\n```python\ndef f(x): pass\n```\n</think>\n{FENCED}",
        f"<think>\n```python\ndef f(x): pass\n```\n</think>{FENCED}",
        f"<answer>\n{FENCED}\n</answer>",
        f"<answer>{FENCED}</answer>",
        f"<answer>{FENCED}\n</answer>\n",
        f"<details>\n{FENCED}</details>",
        f"Here it is: {FENCED}",
        f"1. {FENCED.replace(chr(10), chr(10) + '   ')}",
        f"> {FENCED.replace(chr(10), chr(10) + '> ')}",
        f"- a\n  - b\n\n    {FENCED.replace(chr(10), chr(10) + '    ')}",
        f"\ufeff{FENCED}",
        f"\u200b{FENCED}",
        f"````markdown\n# Solution\n{FENCED}\n````",
        FENCED.replace("```", "~~~"),
        FENCED.replace("\n", "\r\n"),
        FENCED.replace("python", 'python title="f.py" {1}'),
        FENCED.replace("python", "language-python") + "\n```text\n4\n```",
        FENCED.replace("python", "ipython3") + "\n```\n4\n```",
        f"{FENCED}\nIn short:\n{LATER_STUB}",
        f"{FENCED}\n```python\nshow = lambda: print(f(2))\n```",
        f"# Heading\n{FENCED}\n\n[f]: x\n===\n***\n```text\nf\n```",
        FENCED[:-4],
    ],
)
def test_what_models_write_around_a_program(text):
    code = extract_code(text, ["assert f(1) == 1"])
    assert code.replace("\r\n", "\n").strip() == F


def test_a_solution_may_be_a_lambda():
    text = "```python\nf = lambda x: x\n```\n```python\nprint(f(2))\n```"
    assert extract_code(text, ["assert f(1) == 1"]) == "f = lambda x: x\n"


@pytest.mark.parametrize(
    "text",
    [
        "[a]: b\n" * 20_000,
        "[a\n" * 20_000,
        "<a\n" * 20_000,
        "# a\n" * 20_000,
        ">" * 50_000,
        "- " * 20_000,
        " " * 500_000,
        "<a>```" * 20_000,
        "a ```" * 20_000,
        ("a" + "`" * 99 + " ") * 5_000,
    ],
    ids=[
        *("references", "brackets", "html", "headings", "quotes", "lists", "spaces", "tags"),
        *("fences in a line", "backticks"),
    ],
)
def test_no_text_takes_long_to_read(text):
    started = time.process_time()
    extract_code(f"{text}\n\n{FENCED}", ["assert f(1) == 1"])
    assert time.process_time() - started < 3


@pytest.mark.parametrize(
    ("program", "test"),
    [
        ("def add(a, b):\n    if a < 0: exit()\n    return a + b", "assert add(1, 2) == 3"),
        ("def add(a, b): return a + b\nexit()", "assert add(1, 2) == 3"),
        ("import sys\ndef add(a, b): return a + b\nsys.exit(0)", "assert add(1, 2) == 3"),
        (
            "import inspect\ndef add(a, b):\n    return a + b\nclass A:\n    x = 1\n"
            "def lines(): return [len(inspect.getsource(x).splitlines()) for x in (add, A)]",
            "assert lines() == [2, 2]",
        ),
    ],
    ids=["exit", "exit at the end", "sys.exit at the end", "inspect.getsource"],
)
def test_what_plain_python_has_a_program_has(reward, program, test):
    assert score(reward, [f"```python\n{program}\n```"], [test])[0] == [1.0]


def test_a_text_that_markdown_takes_long_for_costs_itself_alone(reward, monkeypatch):
    monkeypatch.setattr("rloo_fast.rewards.code.READ_LIMIT_S", 1.0)
    logged = {}
    completions = ["- a\n" * 200_000 + "```", f"```python\n{ADD}```"]
    call = reward(
        completions,
        [TESTS] * 2,
        log_extra=logged.__setitem__,
        log_metric=logged.__setitem__,
    )
    assert asyncio.run(call) == [0.0, 1.0]
    assert logged == {"verdict": [f"passed 0/2: {UNREAD}", "passed 2/2"], "over_limit": 1}


def test_all_tests_are_worth_1_a_part_of_them_its_half_none_0(reward):
    completions = [ADD, ONE_OF_TWO, "def add(a, b): return 0", "def add(", "while True: pass"]
    rewards, logged = score(reward, [f"```python\n{text}\n```" for text in completions])
    assert rewards == [1.0, 0.25, 0.0, 0.0, 0.0]
    assert logged["verdict"] == [
        "passed 2/2",
        "passed 1/2: wrong answer",
        "passed 0/2: wrong answer",
        "passed 0/2: syntax error",
        "passed 0/2: timeout",
    ]


@pytest.mark.parametrize("credit", [0.0, 1.0])
def test_what_a_part_is_worth_can_be_chosen(credit):
    reward = CodeReward(partial_credit=credit, workers=1)
    rewards, _ = score(reward, [ONE_OF_TWO, ADD])
    reward.sandbox.close()
    assert rewards == [credit / 2, 1.0]


def test_partial_credit_beyond_1_is_refused():
    with pytest.raises(ValueError, match="partial_credit must be between 0 and 1, got 2"):
        CodeReward(partial_credit=2)


def test_a_chat_completion_is_read_as_its_text(reward):
    rewards, _ = score(reward, [[{"role": "assistant", "content": f"Sure:\n```python\n{ADD}```"}]])
    assert rewards == [1.0]


def test_columns_of_mbpp(reward):
    setup = "pair = Pair(1, 2)"
    columns = {"test_setup_code": [setup, None], "test_imports": [["from math import floor"], None]}
    program = "class Pair:\n    def __init__(self, *xs): self.xs = xs\n"
    program += "def add(p): return sum(p.xs)"
    tests = ["assert floor(add(pair)) == 3"]
    rewards, logged = score(reward, [program, program], tests, **columns)
    assert rewards == [1.0, 0.0]
    assert logged["verdict"][1] == "passed 0/1: raised NameError"


@pytest.mark.parametrize("tests", [None, []])
def test_a_row_without_tests_has_no_reward(reward, tests):
    assert score(reward, [ADD], tests) == ([None], {"verdict": ["no tests"]})


def test_others_run_while_programs_do(reward):
    """Async calls share one thread: none may block it."""

    async def both():
        sleeper = "import time\ntime.sleep(1)\ndef add(a, b): return a + b"
        scoring = asyncio.create_task(reward([sleeper], [TESTS[:1]]))
        ticks = 0
        while not scoring.done():
            await asyncio.sleep(0.01)
            ticks += 1
        return ticks, scoring.result()

    ticks, rewards = asyncio.run(both())
    assert ticks > 5
    assert rewards == [1.0]


def test_who_stops_waiting_cancels_it_for_nobody_else(reward):
    async def two():
        slow = "import time\ntime.sleep(0.5)\ndef add(a, b): return a + b"
        # The first ones keep both workers busy, so that `slow` still waits for one.
        others = [asyncio.create_task(reward([f"{slow}\n# {i}"], [TESTS[:1]])) for i in range(2)]
        impatient = asyncio.create_task(reward([slow], [TESTS[:1]]))
        patient = asyncio.create_task(reward([slow], [TESTS[:1]]))
        await asyncio.sleep(0.1)
        impatient.cancel()
        await asyncio.wait(others)
        return await patient

    assert asyncio.run(two()) == [1.0]


def test_groups_are_scored_while_others_are_sampled():
    named = {"code": {"timeout_s": 5, "workers": 1}}
    rewards = load_reward_functions("code", reward_kwargs=named, execute_model_code=True)
    assert rewards.names == ["code"]
    texts = [ADD, ONE_OF_TWO]
    decode = lambda rows, _: [texts[row] for row in rows]  # noqa: E731
    with rewards.begin(
        ["p", "q"], {"test_list": [TESTS] * 2}, [[0], [1]], decode=decode
    ) as scoring:
        scoring.finished(0, [1])
        deadline = time.monotonic() + 30
        while scoring.batch.rewards[0, 0] != 1.0:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert scoring.end([[1], [2]]).tolist() == [[1.0], [0.25]]
    rewards.close()


def test_a_dataset_without_tests_is_an_error():
    rewards = load_reward_functions("code", execute_model_code=True)
    with pytest.raises(ValueError, match="'code' needs `test_list`"):
        rewards.check_columns(["answer"])


@pytest.mark.parametrize(
    ("column", "value", "came"),
    [
        ("test_list", "assert f()", "'assert f.*type str"),
        ("test_list", [1], r"\[1\]"),
        ("test_imports", "import math", "'import math'"),
    ],
)
def test_a_column_that_holds_no_lists_is_refused(reward, column, value, came):
    columns = {"test_list": [TESTS] * 2} | {column: [None, value]}
    with pytest.raises(ValueError, match=f"`{column}` must hold lists .* sample 1 .* has {came}"):
        asyncio.run(reward([ADD] * 2, **columns))


def test_the_first_unaskable_test_is_warned_of(caplog):
    reward = CodeReward(workers=1)
    test = "assert add(lambda: 1, 2)"
    rewards, logged = score(reward, [ADD, ADD + "# again"], [test])
    reward.sandbox.close()
    assert rewards == [0.0, 0.0]
    assert logged["verdict"][1].startswith("passed 0/1: unaskable test: an argument of type func")
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert test in caplog.text
