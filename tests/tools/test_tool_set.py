"""Calls of tools: what a model reads of them, and that each ends in time whatever it does."""

from __future__ import annotations

import sys
import threading
import time
from fractions import Fraction

import pytest

from rloo_fast.tools.calls import Caller
from rloo_fast.tools.functions import tools_of
from rloo_fast.tools.tool_set import ToolResult, ToolSet
from tests.support.tool_functions import Counter, add, block, divide, slow_add, thread_name, wait


def exit_now() -> str:
    """End the program."""
    sys.exit("enough")


def return_odd(kind: str) -> object:
    """Return something odd.

    Args:
        kind: Of what.
    """
    return ODD[kind]


class Silent:
    def __str__(self):
        raise RuntimeError("no text")


class SilentError(Exception):
    def __str__(self):
        raise RuntimeError("no text")


def raise_silently() -> str:
    """Raise."""
    raise SilentError


ODD = {
    "none": None,
    "surrogate": "a\ud800b",
    "silent": Silent(),
    "list": [1, 2],
    "blocks": [{"type": "text", "text": "two"}],
    "odd blocks": [{"type": "text", "text": "two", "rank": Fraction(1, 2), "seen": {1: (True,)}}],
    "image": [{"type": "image", "image": "x.png"}],
    "dict": {"a": 1},
}
TOOLS = [add, divide, wait, slow_add, block, thread_name, exit_now, return_odd, raise_silently]


@pytest.fixture
def caller():
    caller = Caller(timeout_s=0.3, threads=4)
    yield caller
    caller.close()


def tool_set(caller, **options):
    return ToolSet(tools_of(TOOLS), caller, **options)


def result(tools, name, /, **arguments) -> ToolResult:
    return tools.start(name, arguments).result(timeout=5)


@pytest.mark.parametrize("name", ["add", "slow_add"])
def test_a_call_is_answered_with_its_text(caller, name):
    found = result(tool_set(caller), name, a=2, b=3)
    assert (found.content, found.failed, found.ends) == ("5", False, False)
    assert 0 <= found.seconds < 5


@pytest.mark.parametrize(
    ("name", "arguments", "content"),
    [
        ("divide", {"a": 1, "b": 0}, "{'error': 'division by zero'}"),
        ("nothing", {}, "{'error': 'Tool nothing not found.'}"),
        ("add", {"a": 1}, "missing 1 required positional argument: 'b'"),
        ("add", {"a": 1, "b": 2, "c": 3}, "unexpected keyword argument 'c'"),
        ("add", ["a"], "must be an object with names"),
        ("add", '{"a": 1}', "must be an object with names"),
        ("add", None, "must be an object with names"),
        ("exit_now", {}, "enough"),
        ("raise_silently", {}, "SilentError"),
        ("return_odd", {"kind": "silent"}, "no text"),
        ("return_odd", {"kind": "image"}, "only text can be read"),
    ],
)
def test_a_call_that_fails_answers_with_the_error(caller, name, arguments, content):
    found = tool_set(caller).start(name, arguments).result(timeout=5)
    assert found.failed
    assert not found.ends
    assert content in found.content


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("none", "None"),
        ("surrogate", "a?b"),
        ("list", "[1, 2]"),
        ("blocks", [{"type": "text", "text": "two"}]),
        # as a checkpoint can hold it
        ("odd blocks", [{"type": "text", "text": "two", "rank": "1/2", "seen": {"1": [True]}}]),
        ("dict", "{'a': 1}"),
    ],
)
def test_whatever_is_returned_becomes_something_to_read(caller, kind, content):
    found = result(tool_set(caller), "return_odd", kind=kind)
    assert (found.content, found.failed) == (content, False)


def test_a_failure_ends_the_trajectory_where_the_run_says_so(caller):
    tools = tool_set(caller, failure_ends=True)
    assert result(tools, "divide", a=1, b=0).ends
    assert result(tools, "nothing").ends
    assert not result(tools, "divide", a=1, b=2).ends


@pytest.mark.parametrize("name", ["wait", "block"])
def test_a_call_that_hangs_fails_in_time_and_others_go_on(caller, name):
    tools, start = tool_set(caller), time.monotonic()
    found = result(tools, name, seconds=3)
    assert time.monotonic() - start < 1.5
    assert found.failed
    assert found.content == f"{{'error': '{name} did not return within 0.3 s'}}"
    assert not tools.is_free  # something still works on it
    assert result(tool_set(caller), "add", a=1, b=1).content == "2"
    time.sleep(1)  # a blocked loop is given up, and replaced
    assert result(tool_set(caller), "slow_add", a=1, b=1).content == "2"
    assert caller.num_left_behind == 1
    time.sleep(2)
    assert caller.num_left_behind == (name == "block")  # the thread has come back


def test_more_calls_than_threads_hang_and_the_next_is_answered(caller):
    hung = [tool_set(caller).start("wait", {"seconds": 2}) for _ in range(6)]
    start = time.monotonic()
    assert result(tool_set(caller), "add", a=1, b=1).content == "2"
    assert time.monotonic() - start < 1.5
    assert all(future.result(timeout=5).failed for future in hung)


def test_async_calls_run_at_the_same_time(caller):
    tools, start = tool_set(caller), time.monotonic()
    futures = [tools.start("slow_add", {"a": i, "b": 0}) for i in range(50)]
    assert [future.result(timeout=5).content for future in futures] == [str(i) for i in range(50)]
    assert time.monotonic() - start < 0.3 + 50 * 0.02


def test_calls_of_one_trajectory_run_in_their_order_those_of_several_at_a_time():
    caller = Caller(timeout_s=10, threads=8)
    counter = Counter()
    counter.seen = []

    def note(number: int) -> int:
        """Note a number, the early ones slowly.

        Args:
            number: The number.
        """
        time.sleep(0.02 * (5 - number))
        counter.seen.append(number)
        return number

    tools = ToolSet(tools_of([note]), caller)
    futures = [tools.start("note", {"number": i}) for i in range(5)]
    assert [future.result(timeout=5).content for future in futures] == ["0", "1", "2", "3", "4"]
    assert counter.seen == [0, 1, 2, 3, 4]

    gate = threading.Barrier(4, timeout=5)

    def meet() -> str:
        """Wait for the others."""
        gate.wait()
        return "met"

    futures = [ToolSet(tools_of([meet]), caller).start("meet", {}) for _ in range(4)]
    assert [future.result(timeout=5).content for future in futures] == ["met"] * 4
    caller.close()


def test_without_threads_tools_run_where_they_are_started():
    caller = Caller(timeout_s=0.02, threads=0)
    tools = tool_set(caller)
    assert result(tools, "thread_name").content == threading.current_thread().name
    assert result(tools, "wait", seconds=0.3).content == "waited"  # nobody could end it
    assert result(tools, "slow_add", a=1, b=1).failed  # those that are async have their limit
    caller.close()


def test_no_limit_is_no_limit():
    caller = Caller(timeout_s=None, threads=1)
    assert result(tool_set(caller), "wait", seconds=0.5).content == "waited"
    caller.close()


def test_failures_are_told(caller):
    told = []
    tools = tool_set(caller, on_failure=lambda name, error: told.append((name, type(error))))
    result(tools, "divide", a=1, b=0)
    result(tools, "add", a=1, b=0)
    assert told == [("divide", ZeroDivisionError)]


def test_a_caller_works_again_after_it_was_closed(caller):
    for _ in range(3):
        assert result(tool_set(caller), "add", a=1, b=1).content == "2"
        assert result(tool_set(caller), "slow_add", a=1, b=1).content == "2"
        caller.close()


def test_calls_that_no_thread_has_begun_end_with_the_threads():
    caller, told = Caller(timeout_s=None, threads=1), []
    busy, waiting = (tool_set(caller, on_failure=lambda *given: told.append(given)) for _ in "ab")
    begun = busy.start("wait", {"seconds": 1})
    time.sleep(0.2)
    calls = [waiting.start("add", {"a": 1, "b": 1}) for _ in range(3)]  # one behind the other
    caller.close()
    found = [call.result(timeout=0.5) for call in calls]
    assert all(one.failed and "the run has ended" in one.content for one in found)
    assert waiting.is_free
    assert begun.result(timeout=5).content == "waited"
    assert not told, "it is no failure of the tool"
