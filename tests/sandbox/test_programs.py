"""What the tests of a program see of it: plain data, handles, and nothing that judges itself."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest

from rloo_fast.sandbox import Sandbox, Verdict
from tests.support.paths import ROOT

TEST = "assert f() == 3"


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(timeout_s=60, workers=2) as made:
        yield made


PAIR = "class Pair:\n    def __init__(self, a, b):\n        self.a, self.b = a, b\n"
NODE = "class Node:\n    def __init__(self, x):\n        self.x, self.next = x, None\n"
SUM = "def total(node):\n    return node.x + (total(node.next) if node.next else 0)\n"

# name -> (program, setup, tests that pass, tests that do not)
HONEST: dict[str, tuple[str, str, list[str], list[str]]] = {
    "several names": (
        "def add(a, b=1): return a + b\ndef f(*, b): return add(0, b=b)\nx = [1]",
        "",
        ["assert add(1) == f(b=2) == 2", "assert all(add(i) == i + 1 for i in x)"],
        ["assert add(1) == 3", "assert f(1) == 1", "assert missing(1) == 1"],
    ),
    "objects of its classes": (
        PAIR + "def longest(pairs): return max(p.b - p.a for p in pairs)",
        "",
        ["assert longest([Pair(1, 2), Pair(3, 9)]) == 6", "assert Pair(1, 2).a == 1"],
        ["assert Pair(1, 2) == Pair(1, 2)", "assert longest(3)"],
    ),
    "what its objects are to each other": (
        "import dataclasses, enum\n@dataclasses.dataclass(order=True)\nclass V:\n    x: int\n"
        "    def __add__(self, other): return V(self.x + getattr(other, 'x', other))\n"
        "    def __repr__(self): return 'V!'\nE = enum.Enum('E', 'ONE')\ndef one(): return E.ONE",
        "",
        [
            "assert V(1) + V(2) == V(3) and V(1) < V(2) and V(1) != V(2)",
            "assert [v.x for v in sorted([V(2), V(1)])] == [1, 2] and V(1) in [V(1)]",
            "assert isinstance(V(1), V) and not isinstance(3, V) and repr(V(1)) == 'V!'",
            "assert one() is E.ONE",
        ],
        ["assert V(1) + 2 == V(3)", "assert V(1) > V(2)", "assert isinstance(one(), V)"],
    ),
    "what plain Python makes of annotations": (
        "import inspect\ndef f(x: int): return x\n"
        "def g(): return inspect.signature(f).parameters['x'].annotation is int",
        "",
        ["assert g()"],
        ["assert f(1) == 2"],
    ),
    "functions of the library as arguments": (
        "def f(g, x): return g(x)\ndef len(x): return -1",
        "import math, operator\ndef twice(x): return 2 * x",
        [
            "assert f(math.sqrt, 4) == 2 and f(operator.neg, 4) == -4 and f(int, '3') == 3",
            "assert f(str.upper, 'a') == 'A' and f(max, [1, 2]) == 2 and f(twice, 2) == 4",
            "import statistics\nassert f(statistics.mean, [1, 3]) == 2",
        ],
        ["assert f(math.sqrt, 4) == 3"],
    ),
    "setup with its classes": (
        NODE + SUM,
        "head = Node(1)\nhead.next = Node(2)",
        ["assert total(head) == 3"],
        ["assert total(head) == 2"],
    ),
    "classes of the setup": (
        SUM + "def make(x): return Node(x)",
        NODE + "def twice(x): return 2 * x",
        ["n = Node(1)\nn.next = Node(twice(3))\nassert total(n) == 7", "assert make(4).x == 4"],
        ["assert make(4) == 4"],
    ),
    "iterators": (
        "def up(n):\n    while True:\n        yield n\n        n += 1\n"
        "def few(n): return map(str, range(n))",
        "from itertools import islice",
        [
            "assert list(islice(up(3), 3)) == [3, 4, 5]",
            "assert list(few(2)) == ['0', '1']",
            "assert next(up(1)) == 1 and '1' in few(2) and len({'a': 1}) == 1",
        ],
        ["assert few(2) == ['0', '1']"],
    ),
    "exceptions": (
        "class Low(ValueError): pass\ndef f(x):\n    if x < 0: raise Low('too low')\n    return x",
        "",
        [
            "try:\n    f(-1)\n    assert False\nexcept ValueError as error:\n"
            "    assert str(error) == 'too low'",
            "assert f(1) == 1",
        ],
        ["assert f(-1) == 1"],
    ),
    "a built-in name": (
        "def sum(a, b): return a + b",
        "",
        ["assert sum(1, 2) == 3"],
        ["assert sorted([sum(1, 2)]) == [3]"],
    ),
    "a module the test uses": (
        "def f(): return 3.0000000001",
        "",
        ["assert math.isclose(f(), 3)"],
        ["assert math.isclose(f(), 4)"],
    ),
    "subclasses of plain types": (
        "import collections, enum\ndef count(x): return collections.Counter(x)\n"
        "def pair(): return collections.namedtuple('P', 'a b')(1, 2)\n"
        "def one(): return enum.IntEnum('E', 'ONE').ONE",
        "",
        [
            "assert count('aab') == {'a': 2, 'b': 1} and count('aab').most_common(1) == [('a', 2)]",
            "assert pair() == (1, 2)",
            "assert one() == 1",
        ],
        ["assert type(one()) is not int"],
    ),
    "files, a demonstration, the library": (
        "import dataclasses, functools, json, random, re, sqlite3, string, typing, uuid, zoneinfo\n"
        "print('working')\ndef f(x):\n    with open('x', 'w') as file: file.write(x)\n"
        "    return open('x').read()\nif __name__ == '__main__': input()",
        "",
        ["assert f('hallo') == 'hallo'"],
        ["assert f(1) == 1"],
    ),
}


@pytest.mark.parametrize("name", HONEST)
def test_an_honest_program_passes_the_tests_that_it_meets_and_no_other(sandbox, name):
    program, setup, passing, failing = HONEST[name]
    assert str(sandbox.check(program, passing, setup)) == f"passed {len(passing)}/{len(passing)}"
    for test in failing:
        assert sandbox.check(program, [test], setup).passed == 0, test


YES = (  # classes that say so to everything
    "import collections, decimal\nclass Yes:\n    def __eq__(self, other): return True\n"
    "    __lt__ = __sub__ = __contains__ = __eq__\nclass D(Yes, decimal.Decimal): pass\n"
    "class C(Yes, collections.Counter): pass\n"
    "class M(type):\n    def __instancecheck__(self, other): return True\n"
)


@pytest.mark.parametrize(
    ("test", "setup", "why"),
    [
        ("assert f(lambda: 1)", "", "an argument of type function cannot be sent"),
        ("def g(): pass\nassert f(g)", "", "an argument of type function cannot be sent"),
        ("assert f(iter([1]))", "", "an argument of type list_iterator cannot be sent"),
        ("assert f(Slots())", "class Slots: __slots__ = ()", "an argument of type Slots cannot be"),
        ("x = []\nx.append(x)\nassert f(x)", "", "nested deeper than 50 levels"),
        ("assert f('x' * 2**22)", "", "bytes, more than 4194304"),
        ("try:\n    f(lambda: 1)\nexcept Exception:\n    pass", "", "an argument of type function"),
        ("try:\n    fail()\nexcept f:\n    pass", "", "f is caught, and no exception"),
        ("assert f(", "", "SyntaxError in the test"),
        ("assert f(1)", "x =", "SyntaxError in the setup"),
        ("import numpy\nassert f(1)", "", "there is no module numpy here"),
    ],
)
def test_a_test_that_cannot_be_asked_is_not_the_programs_fault(sandbox, test, setup, why):
    program = "class Own(Exception): pass\ndef f(x): return True\ndef fail(): raise Own"
    verdict = sandbox.check(program, [test, "assert f(1)  # good"], setup)
    assert verdict.why.startswith("unaskable test: ")
    assert why in verdict.why
    assert verdict.passed == (0 if setup.endswith("=") else 1)


def test_what_the_program_itself_does_is_its_fault(sandbox):
    for program, why in [
        ("def f(): eval('1 +')", "raised SyntaxError"),
        ("def f(): import numpy", "raised ModuleNotFoundError"),
        ("def f(x: Undefined): return 3", "raised NameError"),
    ]:
        assert sandbox.check(program, [TEST]).why == why


def test_one_string_is_no_list_of_tests(sandbox):
    with pytest.raises(ValueError, match="got one string: 'assert f"):
        sandbox.check("def f(): return 3", TEST)


@pytest.mark.parametrize(
    ("program", "test"),
    [
        ("def f(): return 4\ndef abs(x): return 0", "assert abs(f() - 3) < 1e-6"),
        ("def f(): return 4\ndef isinstance(*_): return True", "assert isinstance(f(), str)"),
        (
            "import math\nmath.isclose = lambda *_: True\ndef f(): return 4",
            "assert math.isclose(f(), 3)",
        ),
        ("def f(): return 4\ndef check(*_): return True", "assert check(f())"),
        (YES + "def f(): return Yes()", "assert f() == Decimal(3)"),
        (YES + "def f(): return [Yes()]", "assert f() == [3]"),
        (YES + "def f(): return Yes()", "assert f() == mine"),
        (YES + "def f(): return D(4)", "assert f() == Decimal(3)"),
        (YES + "def f(): return C('b')", "assert f() == Counter('aa')"),
        (YES + "class T(metaclass=M): pass\ndef f(): return 4", "assert isinstance(f(), T)"),
        ("def f(): return 4\ndef abs(x): return 0", "assert abs(answer() - 3) < 1e-6"),
        ("def f(): return 4\nclass math: isclose = lambda *_: True", "assert close()"),
    ],
    ids=[
        *("abs", "isinstance", "math", "setup", "yes", "yes in a list", "yes to an object"),
        *(
            "yes of a Decimal",
            "yes of a Counter",
            "yes of a type",
            "abs in a setup",
            "math in a setup",
        ),
    ],
)
def test_what_judges_an_answer_is_not_the_candidates(sandbox, program, test):
    setup = "def check(x): return x == 3\ndef answer(): return f()\n"
    setup += "def close(): return math.isclose(f(), 3)\nclass Mine: pass\nmine = Mine()\n"
    setup += "from decimal import Decimal\nfrom collections import Counter"
    assert str(sandbox.check(program, [test], setup)) == "passed 0/1: wrong answer"


def test_an_exception_cannot_end_a_loop_of_the_test(sandbox):
    program, test = "def f(x): raise StopIteration", "assert all(map(f, [1, 2]))"
    assert str(sandbox.check(program, [test])) == "passed 0/1: raised RuntimeError"


def test_tests_do_not_see_each_other(sandbox):
    program = "n = 0\ndef f():\n    global n\n    n += 1\n    return n"
    tests = ["assert f() == 1", "assert f() == 1  # again"]
    assert str(sandbox.check(program, tests)) == "passed 2/2"


def test_chance_is_the_same_every_time(sandbox):
    program = "import random\ndef f(): return random.random(), hash('text')"
    command, seed = [sys.executable, "-c", "print(hash('text'))"], {"PYTHONHASHSEED": "0"}
    number = subprocess.run(command, env=seed, stdout=subprocess.PIPE, text=True).stdout
    test = f"assert f() == ({random.Random(0).random()}, {number})"
    assert str(sandbox.check(program, [test])) == "passed 1/1"


@pytest.mark.parametrize(
    ("program", "why"),
    [("def f(:", "syntax error"), ("1 / 0", "raised ZeroDivisionError"), ("", "raised NameError")],
)
def test_why_a_program_fails(sandbox, program, why):
    verdict = sandbox.check(program, [TEST, TEST + " "])
    assert verdict == Verdict(0, 2, why)


def test_the_example_of_the_documentation(capsys):
    page = (ROOT / "docs" / "sandbox.md").read_text()
    example = page.split("```python\n")[1].split("```")[0]
    exec(example)
    assert f"# {capsys.readouterr().out}" == example[example.index("# ") :]
