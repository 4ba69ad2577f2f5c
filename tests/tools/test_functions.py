"""What may be a tool, and the schema that a model is shown of it."""

from __future__ import annotations

import functools

import pytest

from rloo_fast.tools.functions import Tool, check_names, tools_of
from rloo_fast.tools.loading import find_tools
from tests.support.tool_functions import Counter, add, slow_add


def without_docstring(a: int) -> int:
    return a


def without_hints(a):
    """Something.

    Args:
        a: A number.
    """
    return a


def generator(a: int):
    """Something.

    Args:
        a: A number.
    """
    yield a


async def async_generator(a: int):
    """Something.

    Args:
        a: A number.
    """
    yield a


def test_the_schema_is_transformers_own():
    from transformers.utils import get_json_schema

    tool = Tool.of(add)
    assert tool.name == "add"
    assert tool.schema == get_json_schema(add)
    assert tool.schema["function"]["parameters"]["required"] == ["a", "b"]
    assert (tool.is_async, Tool.of(slow_add).is_async) == (False, True)


def test_a_bound_method_has_no_self():
    schema = Tool.of(Counter().increase).schema["function"]
    assert [*schema["parameters"]["properties"]] == ["by"]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (without_docstring, "'without_docstring' has no schema"),
        (without_hints, "'without_hints' has no schema"),
        (generator, "'generator' is a generator"),
        (async_generator, "'async_generator' is a generator"),
    ],
)
def test_a_function_that_a_model_cannot_use_is_refused(function, message):
    with pytest.raises(ValueError, match=message):
        Tool.of(function)


@pytest.mark.parametrize("thing", [functools.partial(add, b=1), Counter(), 3, len])
def test_what_is_no_function_is_refused(thing):
    with pytest.raises(TypeError, match="write a function or a method around it"):
        Tool.of(thing)


def test_two_tools_of_one_name_are_refused():
    with pytest.raises(ValueError, match="several tools are called 'add'"):
        check_names(tools_of([add, slow_add, add]), "tools")


def test_tools_are_found_by_name():
    found = find_tools(
        ["tests.support.tool_functions:add", slow_add, "python"], execute_model_code=True
    )
    assert [tool.__name__ for tool in found] == ["add", "slow_add", "python"]
    assert find_tools(add, execute_model_code=False) == [add]


def test_model_code_has_to_be_allowed_where_it_is_named():
    from rloo_fast.tools import python

    with pytest.raises(ValueError, match="execute_model_code=True"):
        find_tools("python", execute_model_code=False)
    assert find_tools([python], execute_model_code=False) == [python]


def test_an_unknown_name_says_what_there_is():
    with pytest.raises(ValueError, match=r"'pyhton' is not a tool.*'python'"):
        find_tools("pyhton", execute_model_code=True)
