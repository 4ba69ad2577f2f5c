"""Plain data between the tests and a candidate, as bounded JSON messages over a pipe.

What arrives is built anew from exact types, so that a subclass with an __eq__ of its own, or any
other object with behaviour, cannot come through: it arrives as its base type or as a handle.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

MAX_BYTES = 4 * 2**20  # of a message
MAX_DEPTH = 50

SEQUENCES: dict[str, type] = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}


class Garbled(Exception):
    """What came over the pipe is no message."""


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
    if isinstance(value, complex):
        return ["complex", value.real, value.imag]
    if isinstance(value, bytes | bytearray):
        return ["bytes", value.hex()]
    if isinstance(value, dict):
        items = dict.items(value)
        return ["dict", *([encode(x, other, depth - 1) for x in item] for item in items)]
    for tag, kind in SEQUENCES.items():
        if isinstance(value, kind):
            return [tag, *(encode(x, other, depth - 1) for x in kind.__iter__(value))]
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
        if tag == "complex":
            return complex(*rest)
        if tag == "bytes":
            return bytes.fromhex(*rest)
        if tag == "dict":
            pairs = ([decode(x, other, depth - 1) for x in item] for item in rest)
            return {key: value for key, value in pairs}
        if tag in SEQUENCES:
            return SEQUENCES[tag](decode(x, other, depth - 1) for x in rest)
        return other(tag, rest)
    except (IndexError, KeyError, TypeError, ValueError) as error:
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
