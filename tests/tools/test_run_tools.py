"""Environments of a run: found, reset for a row, one per trajectory, given back."""

from __future__ import annotations

import logging
import threading
import time

import pytest

from rloo_fast.tools import RunTools
from rloo_fast.tools.run_tools import EnvironmentFailed
from tests.support.tool_functions import Counter, add, wait

USER = [{"role": "user", "content": "Count."}]


class Plain:
    """An environment without a reward."""

    def reset(self, **row):
        self.row = row

    def look(self) -> str:
        """Look around."""
        return "nothing"


class Broken(Plain):
    def reset(self, **row):
        raise KeyError("map")


class Narrow(Plain):
    def reset(self, prompt):
        self.prompt = prompt


class NoReset:
    def look(self) -> str:
        """Look around."""
        return "nothing"


class Slow(Plain):
    def reset(self, **row):
        wait(5)


class Exits(Plain):
    def reset(self, **row):
        raise SystemExit("no room")


class AsyncReset(Plain):
    async def reset(self, **row):
        return "later"

    async def get_reward(self):
        return 2.0


def names(schemas):
    return [schema["function"]["name"] for schema in schemas]


def test_an_environment_is_reset_with_the_row_and_its_answer_ends_the_prompt():
    run = RunTools([add], Counter)
    row = {"prompt": USER, "start": 3}
    (tools, text), (others, _) = run.open([row, row])
    assert text == [{"role": "user", "content": "Count. It stands at 3."}]
    assert USER == [{"role": "user", "content": "Count."}]
    assert tools.environment.rows == [row]
    assert names(tools.schemas) == names(run.schemas(row)) == ["add", "increase", "wait"]
    assert tools.start("increase", {"by": 4}).result(5).content == "7"
    assert others.start("increase", {"by": 1}).result(5).content == "4"
    (reward,) = run.rewards()
    assert reward.__name__ == "Counter"
    assert reward(environments=[tools.environment, others.environment]) == [7.0, 4.0]


def test_instances_are_used_again_once_they_were_given_back():
    made = []

    def factory():
        made.append(Counter())
        return made[-1]

    run = RunTools(None, factory)
    first = run.open([{"prompt": USER}] * 2)
    second = run.open([{"prompt": USER}])
    assert len({id(tools.environment) for tools, _ in [*first, *second]}) == 3
    run.close([tools for tools, _ in [*first, *second]])
    run.open([{"prompt": USER}] * 3)
    assert len(made) == 3


def test_threads_have_their_environments_made_one_after_another():
    at_work, most = [], []

    def factory():
        at_work.append(1)
        most.append(len(at_work))
        time.sleep(0.05)
        at_work.pop()
        return Counter()

    run = RunTools(None, factory)
    threads = [threading.Thread(target=run.open, args=([{"prompt": USER}],)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 4


def test_an_environment_that_a_call_still_works_on_is_left_to_it():
    run = RunTools(None, Counter, timeout_s=0.1)
    ((tools, _),) = run.open([{"prompt": USER}])
    hung = tools.environment
    assert tools.start("wait", {"seconds": 2}).result(5).failed
    run.close([tools])
    ((again, _),) = run.open([{"prompt": USER}])
    assert again.environment is not hung


def test_rows_choose_among_several_environments():
    run = RunTools([add], {"count": Counter, "plain": Plain})
    rows = [{"prompt": USER, "environment": name} for name in ("count", "plain")]
    (count, _), (plain, text) = run.open(rows)
    assert names(count.schemas) == ["add", "increase", "wait"]
    assert names(plain.schemas) == ["add", "look"]
    assert plain.environment.row == {"prompt": USER}  # not the name
    assert text == USER
    (reward,) = run.rewards()
    assert reward(environments=[count.environment, plain.environment]) == [0.0, None]
    with pytest.raises(ValueError, match=r"environment='chess'.*'count', 'plain'"):
        run.open([{"prompt": USER, "environment": "chess"}])


def test_two_names_of_one_class_have_one_reward():
    run = RunTools(None, {"easy": Counter, "hard": lambda: Counter()})
    assert [reward.__name__ for reward in run.rewards()] == ["Counter"]


def test_a_row_without_a_prompt_gets_it_from_the_environment():
    ((_, text),) = RunTools(None, Counter).open([{"start": 1}])
    assert text == [{"role": "user", "content": " It stands at 1."}]


def test_a_prompt_of_blocks_gets_a_block():
    blocks = [{"role": "user", "content": [{"type": "text", "text": "Count."}]}]
    ((_, text),) = RunTools(None, Counter).open([{"prompt": blocks}])
    assert text[-1]["content"] == [
        {"type": "text", "text": "Count."},
        {"type": "text", "text": " It stands at 0."},
    ]


def test_an_async_reset_and_reward():
    import asyncio

    run = RunTools(None, AsyncReset)
    ((tools, text),) = run.open([{"prompt": USER}])
    assert text[-1]["content"] == "Count.later"
    assert asyncio.run(run.rewards()[0](environments=[tools.environment])) == [2.0]


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (Broken, "KeyError: 'map'"),
        (Slow, "reset did not return within 0.2 s"),
        (Exits, "SystemExit: no room"),
    ],
)
def test_a_reset_that_fails_ends_the_run_by_name(factory, message):
    with pytest.raises(EnvironmentFailed, match=rf"{factory.__name__}.reset failed.*{message}"):
        RunTools(None, factory, timeout_s=0.2).open([{"prompt": USER}])


@pytest.mark.parametrize(
    ("factory", "kind", "message"),
    [
        (NoReset, ValueError, "has no method `reset`"),
        ("Counter", TypeError, "must be a callable"),
        ({}, ValueError, "an empty dict"),
        ({"a": 3}, TypeError, r"environment_factory\['a'\] must be a callable"),
        (lambda: 1 / 0, ValueError, "raised ZeroDivisionError"),
    ],
)
def test_what_is_no_environment_is_refused(factory, kind, message):
    with pytest.raises(kind, match=message):
        RunTools(None, factory)


def test_names_of_tools_and_methods_must_differ():
    with pytest.raises(ValueError, match="tools and Counter: several tools are called 'wait'"):
        RunTools([wait], Counter)


def test_columns_are_checked_against_reset_and_names():
    RunTools(None, Narrow).check_columns(["prompt"])
    with pytest.raises(ValueError, match=r"Narrow.reset is called with.*def reset\(self, \*\*row"):
        RunTools(None, Narrow).check_columns(["prompt", "answer"])
    with pytest.raises(ValueError, match="each row names its environment in the column"):
        RunTools(None, {"a": Plain}).check_columns(["prompt"])


def test_the_first_failure_of_each_tool_is_logged(caplog):
    caplog.set_level(logging.WARNING, "rloo_fast")
    run = RunTools([add])
    for _ in range(2):
        ((tools, _),) = run.open([{"prompt": USER}])
        for name in ("add", "made_up", "another"):
            tools.start(name, {}).result(5)
    assert [record.args[0] for record in caplog.records] == ["add", "made_up"]
