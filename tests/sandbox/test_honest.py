"""Honest programs and tests, in the ways in which people and models write them, score."""

from __future__ import annotations

import pytest

from rloo_fast.sandbox import Sandbox
from tests.support.sandbox_honest import PROGRAMS, TEST, TESTS


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(timeout_s=10, workers=2) as made:
        yield made


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_right_program_passes(sandbox, name):
    assert str(sandbox.check(PROGRAMS[name], [TEST])) == "passed 1/1"


@pytest.mark.parametrize("name", TESTS)
def test_a_right_test_is_passed(sandbox, name):
    program, test = TESTS[name]
    assert str(sandbox.check(program, [test])) == "passed 1/1"
