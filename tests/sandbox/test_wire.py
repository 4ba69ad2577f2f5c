"""Plain data between tests and programs: what arrives is what was sent, and nothing else."""

from __future__ import annotations

import datetime
from collections import Counter, OrderedDict, defaultdict, deque
from decimal import Decimal
from fractions import Fraction

import pytest

from rloo_fast.sandbox import Sandbox
from rloo_fast.sandbox.inside import wire


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(timeout_s=60, workers=2) as made:
        yield made


VALUES = [
    None,
    True,
    0,
    -(10**3000),
    2**63,
    0.1,
    float("inf"),
    1 + 2j,
    "ä\0\ud800\n",
    b"\xff",
    [],
    (),
]
VALUES += [(1, [2, (3,)]), {1, "a"}, frozenset({(1, 2)}), {"a": {1: None}, (1, 2): [1.0]}, [[]] * 3]
VALUES += [bytearray(b"a"), Decimal("1.50"), Decimal("-Infinity"), Fraction(-(2**70), 3)]
VALUES += [datetime.date(2020, 2, 29), datetime.time(1, 2, 3, 4), datetime.timedelta(-1, 2, 3)]
VALUES += [datetime.datetime(2020, 1, 2, 3, tzinfo=datetime.UTC)]
VALUES += [datetime.datetime(1, 1, 1, 0, 0, 0, 7), range(9, 0, -2), deque([1, [2]], maxlen=3)]
VALUES += [Counter("aab"), OrderedDict([(2, 1), (1, 2)]), defaultdict(list, {"a": [1]})]
IMPORTS = "import datetime\nfrom collections import *\nfrom decimal import Decimal\n"
IMPORTS += "from fractions import Fraction\ninf = float('inf')\n"


def test_plain_data_arrives_as_it_was_sent(sandbox):
    tests = ["for x in values: assert repr(same(x)) == repr(x) and same(x) == x and check(x)"]
    values = f"{IMPORTS}values = {VALUES!r}\n".replace("<class 'list'>", "list")
    program = values + "def same(x): return x\n"
    program += "def check(x): return any(x == y and type(x) is type(y) for y in values)"
    assert str(sandbox.check(program, tests, values)) == "passed 1/1"


@pytest.mark.parametrize("forged", [["Fraction", 1, 0], ["Decimal", "x"], ["date", 1], ["range"]])
def test_forged_parts_of_plain_data_are_garbled(forged):
    with pytest.raises(wire.Garbled):
        wire.decode(forged, lambda tag, rest: None)


def test_views_and_defaults_of_dicts_work_on_both_sides(sandbox):
    program = "import collections\ndef make(): return collections.defaultdict(lambda: 7, a=1)\n"
    program += "def keys(x): return x.keys()\ndef order(x): return list(x)\n"
    program += "def get(x, key): return x[key]"
    tests = [
        "x = {'b': [1], 'a': 2}\nassert keys(x) == x.keys() and order(keys(x)) == ['b', 'a']",
        "x = {'b': [1], 'a': 2}\nassert order(x.values()) == [[1], 2]",
        "x = {'b': [1], 'a': 2}\nassert order(x.items()) == [('b', [1]), ('a', 2)]",
        "assert make() == {'a': 1} and make()['b'] == 7",
        "from collections import defaultdict\nassert get(defaultdict(list), 1) == []",
    ]
    assert str(sandbox.check(program, tests)) == "passed 5/5"
