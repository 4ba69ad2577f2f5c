"""Programs that are run for what they print: bounded, shut in as candidates are, each anew."""

from __future__ import annotations

import pytest

from rloo_fast.sandbox import Sandbox
from rloo_fast.sandbox.client import CUT, OUTPUT_BYTES


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(timeout_s=1.5, memory_mib=256, workers=1) as sandbox:
        yield sandbox


@pytest.mark.parametrize(
    ("program", "text", "why"),
    [
        ("print(6 * 7)", "42\n", ""),
        ("'a' * 3", "'aaa'\n", ""),
        ("print('a')\nNone", "a\n", ""),
        ("import sys\nprint('b', file=sys.stderr)\nsys.exit(3)", "b\n3\n", ""),
        ("if __name__ == '__main__': print('main')", "main\n", ""),
        ("print('\\ud800')", "?\n", ""),
        ("print('begun')\nwhile True: pass", "begun\n", "timeout"),
        ("import os\nos.kill(1, 9)", "", "forbidden system call"),
        ("import ctypes\nctypes.string_at(0)", "", "crashed"),
    ],
)
def test_what_a_program_prints(sandbox, program, text, why):
    output = sandbox.run(program).result()
    assert (output.text, output.why) == (text, why)


def test_a_traceback_has_the_program_s_lines_alone(sandbox):
    text = sandbox.run("def f(x):\n    return x['a']\nf({})").result().text
    lines = [line.strip() for line in text.splitlines()]
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[1:3] == ['File "program", line 3, in <module>', "f({})"]
    assert lines[-1] == "KeyError: 'a'"
    assert "script.py" not in text


def test_output_is_bounded(sandbox):
    text = sandbox.run("print('é' * 10**6)").result().text
    assert len(text.encode()) <= OUTPUT_BYTES + len(CUT) + 4
    assert text.endswith(CUT)


def test_more_output_than_a_file_may_have_ends_the_program_s_writing(sandbox):
    output = sandbox.run("for _ in range(10**4): print('x' * 10**4)").result()
    assert output.text.startswith("xxx")


def test_programs_and_tests_share_the_processes(sandbox):
    assert str(sandbox.check("def f(): return 1", ["assert f() == 1"])) == "passed 1/1"
    assert sandbox.run("f()").result().text.endswith("NameError: name 'f' is not defined\n")
