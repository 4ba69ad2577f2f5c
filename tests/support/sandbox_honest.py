"""Honest programs that end, recurse, print or are written as models do; and honest tests of pytest
and unittest. Each passes."""

from __future__ import annotations

SQUARE = "def f(x): return x * x\n"
TEST = "assert f(2) == 4"
CHAIN = "def g(n): return 0 if n == 0 else 1 + g(n - 1)\ndef f(x): return g({0}) - {0} + x * x\n"
OWN = "class Low(ValueError): pass\nclass Lower(Low): pass\ndef f(x): raise Lower('too low')\n"
PYTEST = "import pytest\n"
CASE = "import unittest\nclass T(unittest.TestCase):\n    def test_f(self): "

# name -> a program that passes TEST
PROGRAMS: dict[str, str] = {
    "asks for input at its end": SQUARE + "n = int(input())\nprint(f(n))",
    "reads lines at its end": SQUARE + "import sys\nfor line in sys.stdin: print(f(int(line)))",
    "reads descriptor 0": SQUARE + "for word in open(0).read().split(): print(f(int(word)))",
    "sys.exit(main())": SQUARE + "import sys\ndef main(): print(f(3))\nsys.exit(main())",
    "sys.exit(0)": SQUARE + "import sys\nsys.exit(0)",
    "raise SystemExit": SQUARE + "raise SystemExit",
    "quit()": SQUARE + "quit()",
    "os.EX_OK": SQUARE + "import os, sys\nsys.exit(os.EX_OK)",
    "argparse": "import argparse\nparser = argparse.ArgumentParser()\n"
    "parser.add_argument('--n', type=int, default=3)\nprint(parser.parse_args().n)\n" + SQUARE,
    "arguments": SQUARE + "import sys\nif len(sys.argv) > 1: print(f(int(sys.argv[1])))",
    "its own file": SQUARE + "from pathlib import Path\nHERE = Path(__file__).resolve().parent",
    "main": SQUARE + "def main(): print(f(int(input())))\nif __name__ == '__main__':\n    main()",
    "limits of the stack": "import resource, sys\n"
    "resource.setrlimit(resource.RLIMIT_STACK, (resource.RLIM_INFINITY,) * 2)\n"
    "sys.setrecursionlimit(10**6)\n" + SQUARE,
    "its limits": "import resource\nassert resource.getrlimit(resource.RLIMIT_NOFILE)\n" + SQUARE,
    "deep recursion": "import sys\nsys.setrecursionlimit(10**6)\n" + CHAIN.format(50_000),
    "deep recursion, cached": "import functools, sys\nsys.setrecursionlimit(10**6)\n"
    "@functools.cache\n" + CHAIN.format(20_000),
    "help": "help\n" + SQUARE,
    "prints while tested": "import sys\ndef f(x):\n    print('x' * 10**5, flush=True)\n"
    "    sys.stderr.write('x' * 10**5)\n    return x * x",
    "output set up": "import sys\nsys.stdout.reconfigure(encoding='utf-8', line_buffering=True)\n"
    "sys.stdout.buffer.write(b'x')\n" + SQUARE,
    "logging, warnings, timeit": "import logging, timeit, warnings\n"
    "logging.basicConfig(level=10)\nlogging.info('x')\nwarnings.simplefilter('ignore')\n"
    "timeit.timeit('1', number=9)\n" + SQUARE,
    "locale, uuid, secrets, hashlib": "import hashlib, locale, secrets, uuid\n"
    "locale.setlocale(locale.LC_ALL, '')\nuuid.uuid1(), uuid.uuid4(), secrets.token_hex()\n"
    "hashlib.sha256(b'x').hexdigest()\n" + SQUARE,
    "pickles and copies of its classes": "import copy, pickle\nclass A: x = [1]\n"
    "assert pickle.loads(pickle.dumps(A())).x == copy.deepcopy(A()).x\n" + SQUARE,
    "annotations of tomorrow": "from __future__ import annotations\n"
    "from dataclasses import dataclass, field\n@dataclass(order=True, frozen=True)\nclass P:\n"
    "    x: list[int] | None = field(default_factory=list)\nassert P().x == []\n"
    "def f(x: Undefined) -> Undefined: return x * x",
    "types": "import typing as t\nT = t.TypeVar('T')\nclass S(t.Generic[T], t.Protocol): pass\n"
    "class D(t.TypedDict): x: int\n@t.overload\ndef f(x: int) -> int: ...\ndef f(x): return x * x",
    "match": "def f(x):\n    match x:\n        case int(n) if n > 1: return n * n\n",
    "source of a class": "import inspect\nclass A:\n    x = 1\n    y = 2\n"
    "def f(x): return len(inspect.getsource(A).splitlines()) + 1",
    "environment": "import os\nos.environ['X'] = '1'\nos.environ.get('HOME'), os.getcwd()\n"
    "os.cpu_count(), os.path.expanduser('~')\n" + SQUARE,
    "files": "import json\nwith open('a.json', 'w') as file: json.dump({'x': 2}, file)\n"
    "def f(x): return json.load(open('a.json'))['x'] * x",
    "collector and tracer": "import sys, gc, tracemalloc\ngc.disable()\ntracemalloc.start()\n"
    "sys.set_int_max_str_digits(0)\nlen(str(10**9000))\n" + SQUARE,
    "a line of coding": "# -*- coding: utf-8 -*-\n" + SQUARE,
    "tabs and carriage returns": "def f(x):\r\n\treturn x * x\r\n",
}
# name -> (program, a test that it passes)
TESTS: dict[str, tuple[str, str]] = {
    "own exception, except": (
        OWN,
        "try:\n    f(1)\n    assert False\nexcept Low as error:\n    assert 'too' in str(error)",
    ),
    "own exception, raises": (OWN, PYTEST + "with pytest.raises(Lower, match='low'): f(1)"),
    "own exception, of two": (OWN, PYTEST + "with pytest.raises((KeyError, Low)): f(1)"),
    "own exception, assertRaises": (OWN, CASE + "\n        with self.assertRaises(Low): f(1)"),
    "own exception, called": (OWN, CASE + "self.assertRaises(Low, f, 1)"),
    "raises, called": ("def f(x): raise ValueError(x)", PYTEST + "pytest.raises(ValueError, f, 2)"),
    "raises, what was raised": (
        "def f(x): raise ValueError('bad')",
        PYTEST + "with pytest.raises(ValueError) as caught: f(2)\n"
        "assert caught.type is ValueError and caught.match('bad')",
    ),
    "param": (
        SQUARE,
        PYTEST + "@pytest.mark.parametrize('x, y', [pytest.param(2, 4, id='two'), (3, 9)], "
        "ids=['2', '3'])\ndef test_f(x, y): assert f(x) == y",
    ),
    "parametrize of a class": (
        SQUARE,
        PYTEST + "@pytest.mark.parametrize('x,y', [(2, 4), (3, 9)])\nclass TestF:\n"
        "    def test_f(self, x, y): assert f(x) == y",
    ),
    "a mark of its own": (
        SQUARE,
        PYTEST + f"@pytest.mark.slow\ndef test_f(): {TEST}\n"
        f"@pytest.mark.timeout(3)\ndef test_g(): {TEST}",
    ),
    "setup_method, setup_class": (
        SQUARE,
        "class TestF:\n    @classmethod\n    def setup_class(cls): cls.x = 2\n"
        "    def setup_method(self, method): self.y = 4\n"
        "    def test_f(self): assert f(self.x) == self.y",
    ),
    "inherited": (SQUARE, f"class Base:\n    def test_f(self): {TEST}\nclass TestF(Base): pass"),
    "pytest.main": (
        SQUARE,
        PYTEST + f"def test_f(): {TEST}\nif __name__ == '__main__':\n"
        "    pytest.main([__file__, '-q'])",
    ),
    "unittest, with a result": (
        SQUARE,
        CASE + "self.assertEqual(f(2), 4)\n"
        "result = unittest.TextTestRunner().run(unittest.makeSuite(T))\n"
        "assert result.wasSuccessful() and result.testsRun == 1",
    ),
    "unused helper": (SQUARE, f"def double(x): return 2 * x\n{TEST}"),
    "asserts in a lambda's place": (SQUARE, "assert all(f(x) == x ** 2 for x in range(9))"),
    "a message": (SQUARE, "assert f(2) == 4, f'got {f(2)}'"),
    "a comparison that must raise": (
        "class V: pass",
        PYTEST + "with pytest.raises(TypeError):\n    V() < 3",
    ),
    "attributes of any name": (
        "class A:\n    def __init__(self): self._number, self._remote, self.args = 1, 2, 3",
        "a = A()\nassert (a._number, a._remote, a.args) == (1, 2, 3)",
    ),
    "unicode": ("def größe(x): return x * x\nπ = 3", "assert größe(2) == 4 and π == 3"),
    "class Solution": (
        "class Solution:\n    def square(self, x: int) -> int: return x * x",
        "assert Solution().square(2) == 4",
    ),
    "large result": ("def f(x): return 'a' * 3_000_000", "assert len(f(1)) == 3_000_000"),
    "long expression": (SQUARE, "assert f(2) == " + " + ".join(["0"] * 900) + " + 4"),
}
