"""Plain data between the tests and a candidate, as bounded JSON messages over a pipe.

What arrives is built anew from exact types, so that a subclass with an __eq__ of its own, or any
other object with behaviour, cannot come through: it arrives as its base type or as a handle.
"""

from __future__ import annotations

import json
import os
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from fractions import Fraction
from itertools import chain
from typing import Any, NamedTuple

MAX_BYTES = 4 * 2**20  # of a message
MAX_DEPTH = 50
# Binary ones that a program answers, if both sides are its objects: names of module operator.
OPERATORS = ("eq", "lt", "le", "gt", "ge", "add", "sub", "mul", "matmul", "truediv", "floordiv")
OPERATORS += ("mod", "pow", "and_", "or_", "xor", "lshift", "rshift")


class Kind(NamedTuple):
    """A type of plain data: an object's parts, plain data again, and an object made of them."""

    type: type
    parts: Callable[[Any], Iterable]
    make: Callable[..., Any]


def _flat(items: Iterable[tuple]) -> Iterable:
    return chain.from_iterable(items)


def _dict(*parts: Any) -> dict:
    return dict(zip(parts[::2], parts[1::2], strict=True))


KINDS: dict[str, Kind] = {  # a type after those derived from it
    "list": Kind(list, list.__iter__, lambda *items: list(items)),
    "tuple": Kind(tuple, tuple.__iter__, lambda *items: items),
    "set": Kind(set, set.__iter__, lambda *items: set(items)),
    "frozenset": Kind(frozenset, frozenset.__iter__, lambda *items: frozenset(items)),
    "Counter": Kind(Counter, lambda x: _flat(dict.items(x)), lambda *p: Counter(_dict(*p))),
    "OrderedDict": Kind(
        OrderedDict, lambda x: _flat(OrderedDict.items(x)), lambda *p: OrderedDict(_dict(*p))
    ),
    "defaultdict": Kind(
        defaultdict,
        lambda x: [x.default_factory, *_flat(dict.items(x))],
        lambda factory, *p: defaultdict(factory, _dict(*p)),
    ),
    "dict": Kind(dict, lambda x: _flat(dict.items(x)), _dict),
    "keys": Kind(type({}.keys()), iter, lambda *keys: dict.fromkeys(keys).keys()),
    "values": Kind(type({}.values()), iter, lambda *values: dict(enumerate(values)).values()),
    "items": Kind(type({}.items()), _flat, lambda *p: _dict(*p).items()),
    "deque": Kind(deque, lambda x: [x.maxlen, *x], lambda maxlen, *items: deque(items, maxlen)),
    "range": Kind(range, lambda x: [x.start, x.stop, x.step], range),
    "bytes": Kind(bytes, lambda x: [x.hex()], bytes.fromhex),
    "bytearray": Kind(bytearray, lambda x: [x.hex()], lambda x: bytearray(bytes.fromhex(x))),
    "complex": Kind(complex, lambda x: [x.real, x.imag], complex),
    "Decimal": Kind(Decimal, lambda x: [Decimal.__str__(x)], Decimal),
    "Fraction": Kind(
        Fraction, lambda x: [x.numerator, x.denominator], lambda over, under: Fraction(over, under)
    ),
    # A time zone arrives as its offset at that moment.
    "datetime": Kind(datetime, lambda x: [datetime.isoformat(x)], datetime.fromisoformat),
    "date": Kind(date, lambda x: [date.isoformat(x)], date.fromisoformat),
    "time": Kind(time, lambda x: [time.isoformat(x)], time.fromisoformat),
    "timedelta": Kind(timedelta, lambda x: [x.days, x.seconds, x.microseconds], timedelta),
}


class Garbled(BaseException):
    """What came over the pipe is no message. `except Exception` of a test does not catch it."""


def encode(value: Any, other: Callable[[Any], list], depth: int = MAX_DEPTH) -> Any:
    """value -> JSON. Numbers, strings and None as they are, [tag, ...] for the rest.

    `other` encodes what is no plain data. Raises ValueError beyond MAX_DEPTH.
    """
    if not depth:
        raise ValueError(f"the value is nested deeper than {MAX_DEPTH} levels or contains itself")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        exact = int.__index__(value)
        return exact if abs(exact) < 2**63 else ["int", format(exact, "x")]
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, str):
        return str.__str__(value)
    for tag, kind in KINDS.items():
        if isinstance(value, kind.type):
            return [tag, *(encode(part, other, depth - 1) for part in kind.parts(value))]
    return other(value)


def decode(data: Any, other: Callable[[str, list], Any], depth: int = MAX_DEPTH) -> Any:
    """The inverse of `encode`; `other(tag, rest)` gives what is no plain data.

    Raises Garbled for anything that `encode` does not write.
    """
    if not depth:
        raise Garbled(f"nested deeper than {MAX_DEPTH} levels")
    if not isinstance(data, list):
        if isinstance(data, dict):
            raise Garbled("a JSON object")
        return data
    try:
        tag, rest = data[0], data[1:]
        if tag == "int":
            return int(rest[0], 16)
        if tag in KINDS:
            return KINDS[tag].make(*(decode(part, other, depth - 1) for part in rest))
        return other(tag, rest)
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise Garbled(f"{type(error).__name__}: {error}") from error


def send(pipe: int, data: Any) -> None:
    """Raises ValueError if the message is longer than MAX_BYTES."""
    raw = json.dumps(data, separators=(",", ":")).encode()
    if len(raw) > MAX_BYTES:
        raise ValueError(f"the value takes {len(raw)} bytes, more than {MAX_BYTES}")
    view = memoryview(len(raw).to_bytes(4, "big") + raw)
    while view:
        view = view[os.write(pipe, view) :]


def receive(pipe: int) -> Any:
    """Raises EOFError at the end of the pipe, Garbled for what is no message."""
    size = int.from_bytes(_read(pipe, 4), "big")
    if size > MAX_BYTES:
        raise Garbled(f"a message of {size} bytes")
    try:
        return json.loads(_read(pipe, size))
    except (ValueError, RecursionError) as error:
        raise Garbled(f"{type(error).__name__}: {error}") from error


def _read(pipe: int, size: int) -> bytes:
    raw = b""
    while len(raw) < size:
        if not (piece := os.read(pipe, min(size - len(raw), 2**16))):
            raise EOFError
        raw += piece
    return raw
