"""Texts, values and command lines without their secrets.

A secret is recognised by the name that it is given under (`names`), by its place in a URL, by its
format (`hf_...`, `sk-...`, a private key), or as one that was met before (`known`). Mask first, cut
and escape later: half a key is no longer found.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

from . import known
from .known import MASK
from .names import IN_HEADERS, holds_headers, is_random, is_secret_name
from .texts import EMPTY, masked_text

DEEPEST = 64  # levels of a value; what lies below is masked


def masked(text: str) -> str:
    """`text` with MASK in place of every secret that is recognised in it."""
    return masked_text(text, learning=False)


def masked_values(value: Any, name: str = "") -> Any:
    """Dicts, lists and texts without secrets, new where they had some; `name`: what `value` was
    given as.

    Under a secret name all texts and numbers are masked, whatever their depth; so is a dict of
    headers, except for those that never hold one. Other objects stay the same.
    """
    return _Walk(learning=False).value(value, name, 0)


def shown(value: Any, length: int = 80) -> str:
    """repr(value) without secrets, cut to `length`: for an error that tells what was given."""
    return masked(repr(masked_values(value)))[:length]


def learn(value: Any, name: str = "") -> None:
    """Remember every secret in `value`, so that `masked` finds it wherever it stands."""
    _Walk(learning=True).value(value, name, 0)


def masked_argv(argv: Sequence[str]) -> list[str]:
    """The words of a command line without secrets: `--name value`, `--name=value`, JSON in it.

    The secrets are remembered.
    """
    words: list[str] = []
    name = ""
    for word in argv:
        option, equals, value = word.partition("=")
        if word.startswith("--") and len(word) > 2:
            name = option[2:]
            words.append(f"{option}={_masked_word(value, name)}" if equals else masked(word))
        else:
            words.append(_masked_word(word, name))
    return [known.masked_known(word) for word in words]  # of an option that came later


@contextmanager
def masked_errors() -> Iterator[None]:
    """An error that is raised in the block loses the secrets in its message and notes."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and isinstance(error.filename, str):
            error.filename = masked(error.filename)
        error.args = tuple(masked(arg) if isinstance(arg, str) else arg for arg in error.args)
        if notes := getattr(error, "__notes__", None):
            error.__notes__ = [masked(note) for note in notes]
        raise


def find_mask(value: Any, name: str = "") -> str | None:
    """The name of the first MASK in `value`, as in reward_kwargs['f']['api_key']; None: it has
    none."""
    if isinstance(value, str):
        return name if MASK in value else None
    entries: list[tuple[Any, Any]] = []
    if isinstance(value, Mapping):
        entries = list(cast(Mapping[Any, Any], value).items())
    elif isinstance(value, list | tuple):
        entries = list(enumerate(cast(Sequence[Any], value)))
    found = (find_mask(item, f"{name}[{key!r}]") for key, item in entries)
    return next(filter(None, found), None)


class _Walk:
    """Through nested values; `learning`: the secrets are remembered on the way."""

    def __init__(self, learning: bool):
        self.learning = learning

    def value(self, value: Any, name: str, depth: int) -> Any:
        secret = is_secret_name(name)
        if depth > DEEPEST or (secret and not isinstance(value, dict | list | tuple | set)):
            return self._hidden(value)
        if isinstance(value, str):
            if self._is_key(name) and is_random(value):
                return self._hidden(value)
            text = self._text(value)
            return value if text == value else text  # as it was, if it is of a class of its own
        if isinstance(value, dict):
            return self._dict(cast(dict[Any, Any], value), name, depth)
        if isinstance(value, list | tuple | set | frozenset):
            return self._sequence(cast(Sequence[Any], value), name, depth)
        return value

    def _dict(self, value: dict[Any, Any], name: str, depth: int) -> Any:
        # {"name": "API_KEY", "value": "..."}, as of environments
        named = value.get("name") if "value" in value else None
        new: dict[Any, Any] = {}
        for key, item in value.items():
            inner = key if isinstance(key, str) else ""
            if is_secret_name(name):
                inner = name
            elif key == "value" and isinstance(named, str):
                inner = named
            elif holds_headers(name) and inner.lower() not in IN_HEADERS:
                inner = "authorization"
            shown_key = self._text(key) if isinstance(key, str) else key
            new[shown_key] = self.value(item, inner, depth + 1)
        kept = all(key in new and new[key] is item for key, item in value.items())
        return value if kept else new

    def _sequence(self, value: Any, name: str, depth: int) -> Any:
        items: list[Any] = list(value)
        if len(items) == 2 and isinstance(items[0], str) and is_secret_name(items[0]):
            items[1] = self._hidden(items[1])  # (name, value)
        new = [self.value(item, name, depth + 1) for item in items]
        if all(one is other for one, other in zip(new, value, strict=True)):
            return value
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return cast(Any, type(value))(*new)
        return cast(Any, type(value))(new) if type(value) in (tuple, set, frozenset) else new

    def _hidden(self, value: Any) -> Any:
        if value is None or isinstance(value, bool):
            return value
        text = value if isinstance(value, str) else str(value)
        if text.lower() in EMPTY or known.is_mark(text):
            return value
        if self.learning:
            known.add(text)
            scheme = re.match(r"(?i)(bearer|basic|token)\s+", text)
            if scheme:
                known.add(text[scheme.end() :])
                known.add(_password(text[scheme.end() :]))
            if isinstance(value, bytes):
                known.add(value.decode(errors="surrogateescape"))
        return MASK

    def _text(self, value: str) -> str:
        return masked_text(value, self.learning)

    @staticmethod
    def _is_key(name: str) -> bool:
        return name.lower().rpartition("_")[2] in ("key", "keys")


def _password(basic: str) -> str:
    """Of base64("user:password"); "" where there is none."""
    try:
        return base64.b64decode(basic, validate=True).decode().partition(":")[2]
    except ValueError:
        return ""


def _masked_word(word: str, name: str) -> str:
    """A word of a command line that belongs to the option `name`."""
    try:
        value = json.loads(word) if word[:1] in "{[" else None
    except (ValueError, RecursionError):
        value = None
    learn(word if value is None else value, name)
    if value is None:
        return str(masked_values(word, name))
    without = masked_values(value, name)
    return word if without is value else json.dumps(without, ensure_ascii=False)
