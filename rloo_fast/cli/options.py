"""Dataclass fields -> options, and the one rule by which values given to them are converted."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from ..config.json_text import HALF, is_text, parse_json, read_settings
from ..config.paths import user_path
from ..masking import shown
from .source import SourceError, from_source

NOTHING = type(None)
TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
# str fields that transformers documents as "true or a path"; no value after the option means true
PATH_OR_TRUE = ("resume_from_checkpoint", "fsdp")


class UsageError(ValueError):
    """A mistake in what was asked for: shown as one line, without a traceback."""


@dataclass(frozen=True)
class Option:
    """One field: what it may be (`kinds`, in the order they are tried), and what it is for."""

    name: str
    kinds: tuple[Any, ...]
    optional: bool  # None may be given
    choices: tuple[Any, ...]  # () where any value of a kind will do
    default: Any
    help: str
    owner: str  # name of the dataclass that declares the field

    @property
    def expected(self) -> str:
        """What to write, for error messages and help."""
        if self.choices:
            more = ", ..." if len(self.choices) > 12 else ""
            return "one of " + ", ".join(map(str, self.choices[:12])) + more
        if self.name in PATH_OR_TRUE:
            return "true or a path"
        kinds = [k for k in self.kinds if not (k is str and self.takes_mapping)]
        words = dict.fromkeys(_word(kind) for kind in kinds)
        return " or ".join([*words, "none"] if self.optional else words)

    @property
    def takes_mapping(self) -> bool:
        """A mapping, or its JSON; the `str` of `dict | str` is that JSON and no other text."""
        return any(_is_dict(kind) for kind in self.kinds)

    @property
    def takes_list(self) -> bool:
        return any(typing.get_origin(kind) is list for kind in self.kinds)


def _word(kind: Any) -> str:
    if typing.get_origin(kind) is list:
        item = _word(typing.get_args(kind)[0]).split(maxsplit=1)[-1]
        return f"a list of {item if item == 'text' else item + 's'}"
    if typing.get_origin(kind) is typing.Literal:
        return " or ".join(str(value).lower() for value in typing.get_args(kind))
    words = {bool: "true or false", int: "an integer", float: "a number", str: "text"}
    return words.get(kind, "a mapping such as '{\"key\": 1}'" if _is_dict(kind) else kind.__name__)


def _is_dict(kind: Any) -> bool:
    return kind is dict or typing.get_origin(kind) is dict


def _rank(kind: Any) -> int:
    """Narrow kinds first: "8" is a number before it is text, "none" a literal before text."""
    if typing.get_origin(kind) is typing.Literal:
        return 0
    return {bool: 1, int: 2, float: 3, str: 9}.get(kind, 4)


def options_of(*classes: type) -> dict[str, Option]:
    """Every field of the dataclasses that `__init__` takes, by name."""
    options = {}
    for cls in classes:
        hints = typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            if not field.init:
                continue
            hint = hints[field.name]
            is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
            kinds = typing.get_args(hint) if is_union else (hint,)
            enums = [k for k in kinds if isinstance(k, type) and issubclass(k, Enum)]
            choices = [member.value for member in enums[0]] if enums else None
            bases = [c for c in reversed(cls.__mro__) if dataclasses.is_dataclass(c)]
            owner = next(c for c in bases if field.name in c.__dataclass_fields__)
            options[field.name] = Option(
                name=field.name,
                kinds=tuple(sorted({*kinds} - {NOTHING, *enums}, key=_rank)),
                optional=NOTHING in kinds,
                choices=tuple(choices or field.metadata.get("choices") or ()),
                default=_default(field),
                help=" ".join((field.metadata.get("help") or "").replace("%%", "%").split()),
                owner=owner.__name__,
            )
    return options


def options_named(place: str) -> dict[str, Option]:
    """The options of a dataclass given as "module:Class", from its source where that says them.

    A default that depends on what is installed may be another one there: it is for help alone.
    """
    module, _, name = place.partition(":")
    try:
        return options_of(from_source(module, name))
    except SourceError:
        return options_of(getattr(importlib.import_module(module), name))


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def convert(option: Option, value: Any) -> Any:
    """The value as the field's type. Text, as on a command line or quoted in YAML, is read.

    Raises UsageError with what was expected and what came.
    """
    if value is None or _is_none_word(option, value):
        if option.optional:
            return None
    elif option.choices:
        value = "no" if value is False and "no" in option.choices else value  # YAML 1.1: no = False
        if value in option.choices:
            return value
    else:
        for kind in option.kinds:
            try:
                return _as(kind, value, option)
            except (ValueError, TypeError, OverflowError, OSError):
                continue
    kind = "" if isinstance(value, str) else f"{type(value).__name__} "
    came = "nothing (null)" if value is None else f"{kind}{shown(value)}"
    raise UsageError(f"{option.name}: expected {option.expected}, got {came}{_why(option, value)}")


def _is_none_word(option: Option, value: Any) -> bool:
    is_word = isinstance(value, str) and value.lower() in ("none", "null")
    return is_word and (str not in option.kinds or option.takes_mapping)


def _as(kind: Any, value: Any, option: Option) -> Any:
    """`value` as `kind`; ValueError or TypeError if it is none."""
    text = value.strip().lower() if isinstance(value, str) else None
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if typing.get_origin(kind) is typing.Literal:
        words = {str(x).lower(): x for x in typing.get_args(kind)}
        if str(value).lower() in words:
            return words[str(value).lower()]
        raise TypeError
    if typing.get_origin(kind) is list:
        item = typing.get_args(kind)[0]
        if not isinstance(value, list | tuple):
            if str in option.kinds:
                raise TypeError  # one text stays as it is where both are allowed
            value = [value]
        return [_as(str if issubclass(item, Enum) else item, x, option) for x in value]
    if _is_dict(kind):
        return _mapping(value)
    if kind is bool and (isinstance(value, bool) or value in (0, 1) or text in TRUE + FALSE):
        if str in option.kinds and text not in (None, "true", "false"):
            raise TypeError  # a word of its own, as include_num_input_tokens_seen has "no"
        return text in TRUE if text is not None else bool(value)
    if kind is int and (number or text is not None):
        if isinstance(value, int) or (text or "").lstrip("+-").isdigit():
            return int(value)
        if float(value) == int(float(value)):  # 1e6 is meant as an integer, 1.5 is not
            return int(float(value))
    if kind is float and (number or text is not None):
        return float(value)
    if kind is str and (text is not None or number) and not option.takes_mapping:
        return str(value)
    if kind is str and isinstance(value, bool) and option.name in PATH_OR_TRUE:
        return str(value).lower()
    raise TypeError


def _mapping(value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        text = value.strip()
        if not text.startswith("{") and Path(text).suffix == ".json":
            text = read_settings(user_path(value))
        value = parse_json(text)
        if not is_text(json.dumps(value, ensure_ascii=False)):
            raise ValueError(HALF)
    if not isinstance(value, Mapping):
        raise TypeError
    return dict(value)


def _why(option: Option, value: Any) -> str:
    """The end of the sentence: what is wrong with a JSON mapping, or the nearest choice."""
    if isinstance(value, str) and option.takes_mapping:
        try:
            _mapping(value)
        except json.JSONDecodeError as error:
            return f" ({error.msg} at character {error.pos + 1})."
        except TypeError:
            return "."
        except (OSError, ValueError) as error:
            return f" ({error.strerror if isinstance(error, OSError) else error})."
    if all(dataclasses.is_dataclass(kind) for kind in option.kinds):
        return ": it can be set in Python only."
    close = difflib.get_close_matches(str(value), map(str, option.choices), n=1)
    return f": did you mean {close[0]}?" if close else "."
