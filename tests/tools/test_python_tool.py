"""The tool `python`: a program of the model's, in the sandbox, for what it prints."""

from __future__ import annotations

import pytest

from rloo_fast.tools import RunTools, python_tool

USER = [{"role": "user", "content": "Compute."}]


@pytest.fixture(scope="module")
def tools():
    run = RunTools([python_tool(timeout_s=1.5, workers=2)], timeout_s=0.1)
    ((tool_set, _),) = run.open([{"prompt": USER}])
    yield tool_set
    run.end()


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("print(1 + 1)\n2 ** 10", "2\n1024"),
        ("x = 3", "[the program printed nothing]"),
        ("def f():\n    return 1 / 0\nf()", "ZeroDivisionError: division by zero"),
        ("print('half')\nwhile True: pass", "half\n[the program was ended: timeout]"),
        ("open('/etc/passwd').read()", "Permission denied"),
        ("import socket\nsocket.socket()", "Operation not permitted"),
        ("import os\nos.fork()", "[the program was ended: forbidden system call]"),
        ("1 +", "SyntaxError"),
    ],
)
def test_a_program_is_answered_by_what_it_prints(tools, code, said):
    result = tools.start("python", {"code": code}).result(timeout=30)
    assert said in result.content
    assert not result.failed  # a program that fails is an answer; and it has a limit of its own


def test_nothing_is_left_of_an_earlier_program(tools):
    tools.start("python", {"code": "import math\nmath.pi = 3\nx = 1"}).result(timeout=30)
    assert "NameError" in tools.start("python", {"code": "x"}).result(timeout=30).content
    pi = tools.start("python", {"code": "import math\nmath.pi"}).result(timeout=30)
    assert pi.content.startswith("3.14159")


def test_what_is_no_text_is_a_failure(tools):
    result = tools.start("python", {"code": 3}).result(timeout=30)
    assert result.failed
    assert "code must be a text, got int" in result.content
