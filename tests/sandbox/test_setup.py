"""What of a setup a program is given, and that answers in a setup cannot be read by it."""

from __future__ import annotations

import pytest

from rloo_fast.sandbox import Sandbox
from rloo_fast.sandbox.inside.setup import Setup

NODE = "class Node:\n    def __init__(self, x):\n        self.x, self.next = x, None\n"
CHECK = (
    "EXPECTED = {2: 'a7f3', 3: '90cc'}\n"
    "def check(candidate):\n    for x, answer in EXPECTED.items():\n"
    "        assert candidate(x) == answer\n"
    "def reference(x): return EXPECTED[x]\n"
    "class Solution:\n    def solve(self, x): return EXPECTED[x]\n"
    "class Answers:\n    two = 'a7f3'\n"
    "class Caller:\n    def __call__(self, x): return 'a7f3'\n"
)
# Programs that have not solved anything, and look for the answers
READERS = {
    "expected values": "def f(x): return EXPECTED[x]",
    "the reference": "def f(x): return reference(x)",
    "a reference's class": "def f(x): return Solution().solve(x)",
    "a class of answers": "def f(x): return Answers.two",
    "an object that is called": "def f(x): return Caller()(x)",
    "constants of the check": "def f(x): return check.__code__.co_consts[1]",
    "all names": "def f(x):\n    table = next(v for v in globals().values() if type(v) is dict "
    "and x in v)\n    return table[x]",
    "names of the main module": "import sys\ndef f(x): return sys.modules['__main__'].EXPECTED[x]",
    "the source in the heap": (
        "import gc\nfound = [o for o in gc.get_objects() if isinstance(o, dict) and 'setup' in o]\n"
        "def f(x): return eval(found[0]['setup'].split('EXPECTED = ')[1].split('\\n')[0])[x]"
    ),
    "a name in a call": "def f(x): return getattr(x, 'reference')(x)",
}


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(timeout_s=60, workers=1) as made:
        yield made


@pytest.mark.parametrize("name", READERS)
def test_answers_in_a_setup_are_the_tests_alone(sandbox, name):
    tests = ["check(f)", "assert f(2) == reference(2)", "assert f(3) == Solution().solve(3)"]
    assert sandbox.check(READERS[name], tests, CHECK).passed == 0
    assert sandbox.check("def f(x): return {2: 'a7f3', 3: '90cc'}[x]", tests, CHECK).passed == 3


# name -> (a class that only holds data, how a program would read the answer in it)
CLASSES = {
    "cases in __init__": ("def __init__(self): self.two = 'a7f3'", "Data().two"),
    "a default argument": ("def __init__(self, two='a7f3'): self.two = two", "Data().two"),
    "a keyword's default": ("def __init__(self, *, two='a7f3'): self.two = two", "Data().two"),
    "a docstring": ("'a7f3'\n    def __init__(self): pass", "Data.__doc__"),
    "a method's docstring": ("def __init__(self): 'a7f3'", "Data.__init__.__doc__"),
    "a comparison": (
        "def __eq__(self, x): return x == 'a7f3'",
        "Data.__eq__.__code__.co_consts[1]",
    ),
    "a length": ("def __len__(self): return 4711", "len(Data())"),
    "bytes": ("def __init__(self): self.two = b'a7f3'.decode()", "Data().two"),
    "a list of letters": ("def __init__(self): self.two = ''.join(['a7', 'f3'])", "Data().two"),
    "a field": ("two: str = 'a7f3'", "Data.two"),
}
DERIVED = {
    "dataclass": ("@dataclass\nclass Data:\n    two: str = 'a7f3'", "Data().two"),
    "field of a dataclass": (
        "@dataclass\nclass Data:\n    two: str = field(default_factory=lambda: 'a7f3')",
        "Data().two",
    ),
    "NamedTuple": ("class Data(NamedTuple):\n    two: str = 'a7f3'", "Data().two"),
    "Enum": ("class Data(Enum):\n    TWO = 'a7f3'", "Data.TWO.value"),
    "number of an Enum": ("class Data(IntEnum):\n    TWO = 4711", "Data.TWO.value"),
    "a decorator": (
        "@(lambda c: setattr(c, 'two', 'a7f3') or c)\nclass Data:\n    x: int",
        "Data.two",
    ),
    "an argument of a class": ("class Data(Base, two='a7f3'): pass", "Data.two"),
}
IMPORTS = (
    "from dataclasses import dataclass, field\nfrom enum import Enum, IntEnum\n"
    "from typing import NamedTuple\n"
    "class Base:\n    def __init_subclass__(cls, two): cls.two = two\n"
)


@pytest.mark.parametrize("name", [*CLASSES, *DERIVED])
def test_a_class_that_holds_an_answer_is_not_given(sandbox, name):
    source, read = DERIVED.get(name) or CLASSES[name]
    setup = IMPORTS + (source if name in DERIVED else f"class Data:\n    {source}\n")
    test, setup = "assert f(2) in EXPECTED", setup + "\nEXPECTED = 4711, 'a7f3'"
    assert sandbox.check(f"def f(x): return {read}", [test], setup).passed == 0
    assert Setup(IMPORTS + source).shared().count("a7f3") == 0


def test_classes_that_programs_are_written_for_are_given():
    source = (
        "class ListNode:\n    'A node.'\n    def __init__(self, val=0, next=None):\n"
        "        self.val, self.next = val, next\n"
        "    def __repr__(self): return f'ListNode({self.val})'\n"
        "class Node:\n    __slots__ = ('x', 'best')\n"
        "    def __init__(self, x: 'int' = -1, *rest):\n"
        "        if rest: raise ValueError('one value')\n"
        "        self.x, self.best, self.near = x, float('inf'), []\n"
        "class Tree(Node):\n    left: 'Tree | None' = None\n"
        "class Color(Enum):\n    RED = 'red'\n    GREEN = 2\n    BLUE = auto()\n"
        "class Point(namedtuple('Point', 'x y')): pass\n"
        "@dataclass(order=True)\nclass P:\n    x: int = 0\n"
        "    ys: list = field(default_factory=list)\n"
    )
    shared = Setup(source).shared()
    for name in ("ListNode", "Node", "Tree", "Color", "Point", "P"):
        assert f"class {name}" in shared
    assert "A node." not in shared


def test_what_a_program_is_given_before_it_runs():
    data = (
        "@dataclass\nclass Point:\n    x: int = 0\n"
        "class Color(Enum):\n    RED = 1\n"
        "class Pair:\n    'Two.'\n    __slots__ = ('a', 'b')\n    first: int\n"
        "    def __init__(self, a, b): self.a, self.b = a, b\n"
        "    def __eq__(self, x): return True\n"
        "class Tree(Pair): pass\n"
    )
    imports = "from dataclasses import dataclass\nfrom enum import Enum\nimport math\n"
    others = CHECK + (
        "x = 3\nclass Default:\n    def __init__(self): self.x = EXPECTED\n"
        "class Below(Solution): pass\nroot = Tree(1, 2)\nroot.a = 3\nif x: y = 4\n"
    )
    given: dict[str, object] = {"__name__": "given"}
    source = Setup(imports + data + others).shared()
    exec(compile(source, "setup", "exec", dont_inherit=True), given)
    expected = {"dataclass", "Enum", "math", "Point", "Color", "Pair", "Tree"}
    assert given.keys() - {"__name__", "__builtins__"} == expected


@pytest.mark.parametrize("source", ["x =", "\0", "(" * 10_000, "def f():\n\treturn 1\n        x"])
def test_of_a_setup_with_an_error_nothing_is_given(source):
    assert Setup(source).shared() == ""


def test_what_a_test_sends_is_given_with_what_it_needs(sandbox):
    setup = (
        "import math\nFACTOR = 2\ndef scale(x): return FACTOR * math.floor(x)\n"
        "def twice(x): return scale(scale(x))\nclass Shape:\n    side = 3\n"
        "    def area(self): return scale(self.side)\n"
        "SECRET = 'a7f3'\ndef unsent(): return SECRET\n"
    )
    program = (
        "def apply(g, x): return g(x)\ndef area(shape): return shape.area()\n"
        "def scale(x): return -1\ndef own(): return scale(0)\n"
        "def peek(g, x):\n    g(x)\n    return [n for n in ('SECRET', 'unsent') if n in globals()]"
    )
    tests = [
        "assert apply(scale, 3.5) == 6 and apply(twice, 3) == 12",
        "assert area(Shape()) == 6 and own() == -1",
        "assert apply(twice, 1) == 4 and own() == -1",
        "assert peek(twice, 1) == []",
    ]
    assert str(sandbox.check(program, tests, setup)) == "passed 4/4"


def test_a_class_of_the_program_takes_the_place_of_the_setups(sandbox):
    program = NODE + "def total(node): return isinstance(node, Node) and node.x"
    tests = ["assert total(Node(3)) == 3"]
    assert str(sandbox.check(program, tests, NODE)) == "passed 1/1"


def test_what_cannot_be_given_is_the_tests_fault(sandbox):
    setup = "import numpy_is_not_here as n\ndef g(x): return n.x\n"
    verdict = sandbox.check("def f(g): return 1", ["assert f(print) == 1"], setup)
    assert "there is no module numpy_is_not_here here" in verdict.why
