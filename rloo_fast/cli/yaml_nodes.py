"""YAML that somebody else wrote: what is refused before values are made of it."""

from __future__ import annotations

from typing import Any

import yaml

from ..config.json_text import HALF, MAX_DEPTH, TOO_DEEP, is_text
from .options import UsageError

MAX_YAML_MIB = 1  # a recipe has a few KiB
MAX_SIZE = 2**22  # characters and values, those behind aliases counted wherever they stand


class Loader(yaml.SafeLoader):
    """PyYAML's, as it is: libraries change its tables for a whole process (lm-format-enforcer,
    which vLLM imports, reads dates as texts)."""


for tag, construct in {
    "null": Loader.construct_yaml_null,
    "bool": Loader.construct_yaml_bool,
    "int": Loader.construct_yaml_int,
    "float": Loader.construct_yaml_float,
    "binary": Loader.construct_yaml_binary,
    "timestamp": Loader.construct_yaml_timestamp,
    "omap": Loader.construct_yaml_omap,
    "pairs": Loader.construct_yaml_pairs,
    "set": Loader.construct_yaml_set,
    "str": Loader.construct_yaml_str,
    "seq": Loader.construct_yaml_seq,
    "map": Loader.construct_yaml_map,
}.items():
    Loader.add_constructor(f"tag:yaml.org,2002:{tag}", construct)


def check_nodes(node: Any) -> None:
    """Raise UsageError, with the line, for what YAML allows and no recipe needs: a key twice, half
    a character, nesting beyond MAX_DEPTH, aliases within themselves or that multiply to more than
    MAX_SIZE."""
    _size(node, 1, {})


def _size(node: Any, level: int, known: dict[int, int]) -> int:
    if id(node) in known:
        if known[id(node)] == 0:
            raise _refused(node, "it is a part of itself")
        return known[id(node)]
    if level > MAX_DEPTH:
        raise _refused(node, TOO_DEEP)
    known[id(node)] = 0  # until all of its parts are counted
    size = 1
    if isinstance(node, yaml.ScalarNode):
        size += len(node.value)
        if not is_text(node.value):
            raise _refused(node, HALF)
    elif isinstance(node, yaml.SequenceNode):
        size += sum(_size(item, level + 1, known) for item in node.value)
    else:
        keys = set()
        for key, value in node.value:
            size += _size(key, level + 1, known) + _size(value, level + 1, known)
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in keys:
                    raise _refused(key, f"the key {key.value!r} is there a second time")
                keys.add(key.value)
    if size > MAX_SIZE:
        raise _refused(node, "its aliases multiply to more than a recipe may hold")
    known[id(node)] = size
    return size


def _refused(node: Any, problem: str) -> UsageError:
    return UsageError(f"line {node.start_mark.line + 1}: {problem}.")
