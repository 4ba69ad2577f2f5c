"""Tests that would pass without judging anything, and programs that make a test do so."""

from __future__ import annotations

import re

import pytest

from rloo_fast.sandbox import Sandbox

WRONG = "def f(x): return 0\n"
RIGHT = "def f(x): return x * x\n"
IS = "assert f(2) == 4"
CASE = "import unittest\nclass T(unittest.TestCase):\n"
CASE += "    def test_f(self): self.assertEqual(f(2), 4)\n"
SUITE = "unittest.defaultTestLoader.loadTestsFromTestCase(T)"
END = "import os\ndef f(x): os._exit(0)\n"
NOT_RUN = "unaskable test: .*, which asserts something, is not run"

# name -> a test that RIGHT passes. WRONG passed it: nothing looked at what came of its asserts.
UNHEARD = {
    "unittest: a runner": CASE + f"unittest.TextTestRunner().run({SUITE})",
    "unittest: a runner of a suite": CASE + "s = unittest.TestSuite()\ns.addTest(T('test_f'))\n"
    "runner = unittest.TextTestRunner()\nrunner.run(s)",
    "unittest: run": CASE + "T('test_f').run()",
    "unittest: called": CASE + "T('test_f')()",
    "unittest: a result of its own": CASE + f"{SUITE}.run(unittest.TestResult())",
    "swallowed by a handler": f"try:\n    {IS}\nexcept AssertionError:\n    print('failed')",
    "swallowed by a bare handler": f"f(1)\ntry:\n    {IS}\nexcept: pass",
    "swallowed by suppress": f"import contextlib\nwith contextlib.suppress(Exception):\n    {IS}",
    "swallowed in the setup's style": "def check(g):\n    try:\n        assert g(2) == 4\n"
    "    except Exception: pass\ncheck(f)",
    "doctest": "import doctest\ndef g():\n    '''\n    >>> f(2)\n    4\n    '''\n"
    "doctest.run_docstring_examples(g, globals())",
    "in a block": f"f(1)\nif True:\n    def test_f(): {IS}",
    "in a try": f"f(1)\ntry:\n    def test_f(): {IS}\nexcept ImportError: pass",
    "inherited": f"class Base:\n    def test_a(self): {IS}\n"
    "class TestB(Base):\n    def test_b(self): assert f(0) == 0",
    "guarded": f"f(1)\nif __name__ == '__main__':\n    {IS}",
    "called by a guarded main": f"f(1)\ndef main():\n    {IS}\n"
    "if __name__ == '__main__':\n    main()",
}
# name -> a test that says nothing of any program, and why
HOLLOW = {
    "a tuple": ("assert (f(2) == 4, 'wrong')", "asserts a tuple"),
    "a comparison": ("f(2) == 4", "compares without an assert"),
    "a comparison in a test": ("def test_f():\n    f(2) == 4", "compares without an assert"),
    "a returned comparison": ("def test_f():\n    return f(2) == 4", "nobody asserts"),
    "asynchronous": (f"f(1)\nasync def test_f(): {IS}", "asynchronous"),
    "asynchronous, never awaited": (f"async def g(): {IS}\nf(1)\ng()", "asynchronous"),
    "a generator": (f"f(1)\ndef test_f():\n    yield\n    {IS}", NOT_RUN),
    "a method that is a generator": (
        f"f(1)\nclass TestF:\n    def test_f(s):\n        yield\n        {IS}",
        NOT_RUN,
    ),
    "no cases": (
        f"import pytest\nf(1)\n@pytest.mark.parametrize('x', [])\ndef test_f(x): {IS}",
        "has no cases of x",
    ),
    "uncalled": (f"f(1)\ndef check(g): {IS}", NOT_RUN),
    "uncalled method": (f"f(1)\nclass Checks:\n    def test_f(self): {IS}", NOT_RUN),
    "uncalled, but listed": (f"f(1)\ndef test_f(): {IS}\nTESTS = [test_f]", NOT_RUN),
    "uncalled, in a test": (f"def test_f():\n    f(1)\n    def inner(): {IS}", NOT_RUN),
    "pytest.skip": ("import pytest\nf(1)\npytest.skip('x')", "pytest.skip is not here"),
    "pytest.mark.xfail": (f"import pytest\n@pytest.mark.xfail\ndef test_f(): {IS}", "xfail is not"),
    "pytest.mark.skip": (f"import pytest\nf(1)\n@pytest.mark.skip\ndef test_f(): {IS}", "skip is"),
    "pytest.fixture": ("import pytest\n@pytest.fixture\ndef x(): return 2", "fixture is not here"),
    "pytest.param marked": ("import pytest\npytest.param(1, marks=1)", "`marks` are not here"),
    "unittest.skip": (CASE.replace("    def", "    @unittest.skip('x')\n    def"), "is skipped"),
    "expectedFailure": (
        CASE.replace("    def", "    @unittest.expectedFailure\n    def"),
        "is to fail",
    ),
    "ends itself": (f"f(1)\nimport sys\nsys.exit(0)\n{IS}", "ends itself"),
    "the program's name": ("assert f", "asks the program nothing"),
    "that it can be called": ("assert callable(f)", "asks the program nothing"),
}
# name -> a program that has solved nothing, a test that it passed, and what is said now
EVASIONS = {
    "end under except Exception": (END, f"try: {IS}\nexcept Exception: pass", "ended"),
    "end under a bare except": (END, "try: f(1)\nexcept: pass", "ended"),
    "end under raises": (END, "import pytest\nwith pytest.raises(Exception): f(1)", "ended"),
    "end as EOFError": (END, "import pytest\nwith pytest.raises(EOFError): f(1)", "ended"),
    "end, in unittest": (
        END,
        CASE.replace("self.assertEqual(f(2), 4)", "self.assertRaises(Exception, f, 1)"),
        "ended",
    ),
    "skip by an exception": (
        "def f(x): raise NotImplementedError",
        CASE.replace(
            "self.assertEqual(f(2), 4)",
            "\n        try: f(2)\n        except NotImplementedError: self.skipTest('later')",
        ),
        "unaskable test: test_f is skipped.*",
    ),
    "skip by a value": (
        WRONG,
        CASE.replace("class", "@unittest.skipUnless(f(1) == 1, 'x')\nclass"),
        "unaskable test: test_f is skipped.*",
    ),
    "group of exceptions": (
        "def f(x): raise ExceptionGroup('x', [ValueError()])",
        "import pytest\nwith pytest.raises(TypeError): f(1)",
        "raised Exception",
    ),
    "less than abs alone allows": (
        "def f(x): return 1000.0005",
        "from pytest import approx\nassert f(1) == approx(1000, abs=1e-9)",
        "wrong answer",
    ),
    "raises that calls nothing": (
        WRONG,
        "import pytest\npytest.raises(ValueError, f, 1)",
        "wrong .*",
    ),
    "own exception's name": (
        "class Own(Exception): pass\ndef f(x): raise type('Other', (Exception,), {})",
        "try:\n    f(1)\n    assert False\nexcept Own: pass",
        "raised Exception",
    ),
}


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(timeout_s=10, workers=2) as made:
        yield made


@pytest.mark.parametrize("name", UNHEARD)
def test_what_comes_of_an_assert_counts(sandbox, name):
    assert str(sandbox.check(RIGHT, [UNHEARD[name]])) == "passed 1/1"
    assert str(sandbox.check(WRONG, [UNHEARD[name]])) == "passed 0/1: wrong answer"


@pytest.mark.parametrize("name", HOLLOW)
def test_a_test_that_judges_nothing_is_an_error_of_the_row(sandbox, name):
    test, why = HOLLOW[name]
    for program in (RIGHT, WRONG):
        verdict = sandbox.check(program, [test])
        assert (verdict.passed, verdict.why[:14]) == (0, "unaskable test"), verdict.why
        assert re.search(why, verdict.why), verdict.why


@pytest.mark.parametrize("name", EVASIONS)
def test_a_program_cannot_make_a_test_hollow(sandbox, name):
    program, test, why = EVASIONS[name]
    verdict = sandbox.check(program, [test])
    assert verdict.passed == 0
    assert re.fullmatch(why, verdict.why), verdict.why
