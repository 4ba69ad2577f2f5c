"""What was asked for -> {field: value}: the command line and YAML files.

Not argparse, nor HfArgumentParser over it: those read `-1e-3` as an option, accept abbreviations,
take no mapping, and name no near match.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ..config.json_text import TOO_DEEP, is_text, read_settings
from ..config.names_2024 import SCRIPT_OPTIONS
from ..config.paths import user_path
from ..masking import learn
from .options import PATH_OR_TRUE, Option, UsageError, convert
from .recipe_files import resolve
from .yaml_nodes import MAX_YAML_MIB, Loader, check_nodes

HELP_COMMAND = "rloo-fast train --help all"
# Options of TRL's scripts that are written differently here
ELSEWHERE = {
    "reward_model_name_or_path": "a reward model goes to reward_funcs",
    "no_progress": "write disable_tqdm",
    "warmup_ratio": "write warmup_steps, which below 1 is a share of the run",
    **SCRIPT_OPTIONS,
}


def read_command_line(
    argv: Sequence[str], options: Mapping[str, Option], help_command: str = HELP_COMMAND
) -> dict[str, Any]:
    """`--name value ...`, `--name=value`, `--flag`, `--no_flag`; of a repeated one the last counts.

    Everything up to the next `--` belongs to an option, so negative numbers need no quoting.
    Raises UsageError.
    """
    given: dict[str, list[str]] = {}
    name = None
    for token in argv:
        if not is_text(token):
            raise UsageError(f"expected UTF-8 text, got {token!r}.")
        if token.startswith("--") and len(token) > 2:
            name, has_value, value = token[2:].partition("=")
            name = name.replace("-", "_")
            given[name] = [value] if has_value else []
        elif name is None:
            raise UsageError(f"expected an option that begins with --, got {token!r}.")
        else:
            given[name].append(token)
    values = {}
    for name, words in given.items():
        flag = options.get(name.removeprefix("no_"))
        if name not in options and name.startswith("no_") and flag and bool in flag.kinds:
            if words:
                raise UsageError(f"--{name} takes no value, got {' '.join(words)}.")
            values[flag.name] = False
            continue
        if name not in options:
            hint = _nearest(name, options, "--", help_command)
            raise UsageError(f"unknown option --{name}{hint}")
        values[name] = _from_words(options[name], [resolve(word) for word in words])
    return values


def _from_words(option: Option, words: list[str]) -> Any:
    try:
        if not words and (bool in option.kinds or option.name in PATH_OR_TRUE):
            return convert(option, True)
        if not words:
            raise UsageError(f"{option.name}: expected {option.expected}, got nothing.")
        if len(words) > 1 and not option.takes_list:
            raise UsageError(
                f"{option.name}: expected {option.expected}, got {len(words)} values: "
                f"{' '.join(words)}"
            )
        return convert(option, words if len(words) > 1 else words[0])
    except UsageError as error:
        raise UsageError(f"--{error}") from None


def read_yaml(
    path: str | Path, options: Mapping[str, Option], variant: str | None = None
) -> dict[str, Any]:
    """The mapping in a YAML file, converted, with one of its `variants` laid over it.

    Raises UsageError with file, line and key.
    """
    data, node = _parse(path)
    values = _convert_all(data, node, options, path)
    variants = data.get("variants", {})
    if not isinstance(variants, dict) or not all(isinstance(v, dict) for v in variants.values()):
        raise UsageError(f"{path}: variants must be a mapping of names to mappings of options.")
    nodes = dict(_entries(dict(_entries(node)).get("variants")))
    if unknown := nodes.keys() - variants.keys():
        raise UsageError(f"{path}: the variant {min(unknown)} must have a name that is text.")
    read = {name: _convert_all(variants[name], each, options, path) for name, each in nodes.items()}
    if variant is not None and variant not in read:
        names = f"it has {', '.join(read)}" if read else "it has none"
        raise UsageError(f"{path} has no variant {variant!r}: {names}.")
    return {**values, **(read[variant] if variant is not None else {})}


def _entries(node: Any) -> list[tuple[str, Any]]:
    """(key, its node) of a mapping's node; nothing of None."""
    return [(str(key.value), value) for key, value in node.value] if node is not None else []


def _parse(path: str | Path) -> tuple[dict[str, Any], Any]:
    """A YAML file's mapping, and the node that knows its lines (None for an empty file)."""
    try:
        text = read_settings(user_path(path), MAX_YAML_MIB)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"cannot read {path}: {reason}.") from error
    try:
        loader: Any = Loader(text)
        node = loader.get_single_node()
        if node is not None:
            check_nodes(node)
        data = loader.construct_document(node) if node is not None else {}
    except UsageError as error:
        raise UsageError(f"{path}, {error}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UsageError(f"{path}{where}: not valid YAML: {error.problem}.") from error
    except yaml.YAMLError as error:
        raise UsageError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    except RecursionError:
        raise UsageError(f"{path}: {TOO_DEEP}.") from None
    except (ValueError, LookupError, AttributeError) as error:  # of a value such as 2026-13-45
        raise UsageError(f"{path}: not valid YAML: a value cannot be read ({error}).") from error
    learn(data)
    if not isinstance(data, dict):
        raise UsageError(
            f"{path}: expected a mapping, lines such as `learning_rate: 1e-6`, got a "
            f"{type(data).__name__}."
        )
    return data, node


def _convert_all(
    data: Mapping[str, Any], node: Any, options: Mapping[str, Option], path: str | Path
) -> dict[str, Any]:
    values = {}
    for key_node, _ in node.value if node is not None else ():
        name, line = str(key_node.value), key_node.start_mark.line + 1
        if name == "variants":
            continue
        if name not in options:
            hint = _nearest(name, options)
            raise UsageError(f"unknown key {name!r} in {path}, line {line}{hint}")
        try:
            values[name] = convert(options[name], resolve(data[name]))
        except UsageError as error:
            raise UsageError(f"{path}, line {line}: {error}") from None
    return values


def _nearest(
    name: str, options: Iterable[str], dashes: str = "", help_command: str = HELP_COMMAND
) -> str:
    if name in ELSEWHERE:
        return f": {ELSEWHERE[name]}."
    close = difflib.get_close_matches(name, options, n=1)
    if close:
        return f": did you mean {dashes}{close[0]}?" if dashes else f": did you mean {close[0]!r}?"
    return f". `{help_command}` lists every one."
