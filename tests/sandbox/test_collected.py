"""Tests that nobody calls: run as unittest and pytest do, and never passed without a question."""

from __future__ import annotations

import pytest

from rloo_fast.sandbox import Sandbox

RIGHT = "def f(x):\n    if x < 0: raise ValueError('too low')\n    return x / 3\n"
WRONG = "def f(x): return 0.5\n"
CASE = (
    "import unittest\nclass TestF(unittest.TestCase):\n"
    "    def setUp(self): self.x = 6\n"
    "    def test_value(self): self.assertEqual(f(self.x), 2)\n"
    "    def test_each(self):\n        for x in (3, 9):\n"
    "            with self.subTest(x=x): self.assertAlmostEqual(f(x), x / 3)\n"
    "    def test_error(self):\n        with self.assertRaises(ValueError): f(-1)\n"
)
# a test that RIGHT passes and WRONG does not
STYLES = {
    "function": "def test_f():\n    assert f(6) == 2",
    "two functions": "def test_a(): assert f(1.5) == 0.5\ndef test_b(): assert f(6) == 2",
    "called": "def test_f():\n    assert f(6) == 2\ntest_f()",
    "class": "class TestF:\n    def setup_method(self): self.x = 6\n"
    "    def test_it(self): assert f(self.x) == 2",
    "raises": "import pytest\ndef test_f():\n"
    "    with pytest.raises(ValueError, match='low') as e:\n        f(-1)\n"
    "    assert 'too' in str(e.value)",
    "approx": "from pytest import approx\ndef test_f():\n    assert f(1) == approx(0.3333333)\n"
    "    assert [f(1), f(2)] == approx([1 / 3, 2 / 3])\n    assert {1: f(3)} == approx({1: 1.0})",
    "parametrize": "import pytest\n@pytest.mark.parametrize('x, y', [(1.5, 0.5), (6, 2)])\n"
    "@pytest.mark.parametrize('sign', [1])\ndef test_f(x, y, sign): assert f(x) == sign * y",
    "unittest": CASE,
    "unittest with main": CASE + "unittest.main(exit=False)",
    "unittest with main, guarded": CASE + "if __name__ == '__main__':\n    unittest.main()",
    "unittest, main imported": CASE + "from unittest import main\nmain(argv=[''], exit=False)",
}
SETUP_STYLES = {
    "check": ("def check(candidate):\n    assert candidate(6) == 2", "check(f)"),
    "case in the setup": (CASE, "unittest.main(exit=False)"),
}
# a test that asks nothing
SILENT = {
    "uncalled check": "def check(candidate):\n    assert candidate(6) == 2",
    "uncalled check, named": "def check(candidate):\n    assert candidate(6) == 2\ncandidate = f",
    "main without cases": "import unittest\nunittest.main(exit=False)",
    "true": "assert True",
    "nothing": "",
    "comment": "# assert f(6) == 2",
    "empty test": "def test_f(): pass",
    "only named": "assert f",
    "only caught": "try:\n    pass\nexcept f: pass",
}


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(timeout_s=10, workers=1) as made:
        yield made


def verdicts(sandbox: Sandbox, test: str, setup: str = "") -> tuple[str, str]:
    right, wrong = (sandbox.check(program, [test], setup) for program in (RIGHT, WRONG))
    return str(right), wrong.why


@pytest.mark.parametrize("name", STYLES)
def test_tests_that_nobody_calls_are_run(sandbox, name):
    right, why = verdicts(sandbox, STYLES[name])
    assert right == "passed 1/1"
    assert why == "wrong answer"


@pytest.mark.parametrize("name", SETUP_STYLES)
def test_what_the_setup_defines_is_run_when_it_is_called(sandbox, name):
    setup, test = SETUP_STYLES[name]
    assert verdicts(sandbox, test, setup) == ("passed 1/1", "wrong answer")


@pytest.mark.parametrize("name", SILENT)
def test_a_test_that_asks_nothing_is_not_passed(sandbox, name):
    for program in (RIGHT, WRONG):
        verdict = sandbox.check(program, [SILENT[name]])
        assert str(verdict) == "passed 0/1: unaskable test: it asks the program nothing"


def test_a_fixture_is_the_tests_fault(sandbox):
    verdict = sandbox.check(RIGHT, ["def test_f(tmp_path): assert f(6) == 2"])
    assert verdict.why.startswith("unaskable test: test_f is given nothing here: missing")


def test_the_first_failure_is_told(sandbox):
    test = (
        "def test_a(): assert f(1.5) == 0.5\ndef test_b(): f(1, 2)\ndef test_c(): assert f(6) == 2"
    )
    assert sandbox.check(WRONG, [test]).why == "raised TypeError"
