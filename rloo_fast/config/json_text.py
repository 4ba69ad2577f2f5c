"""JSON that somebody else wrote: read whole, or refused in a sentence."""

from __future__ import annotations

import json
import sys
from itertools import chain
from pathlib import Path
from typing import Any, cast

MAX_DEPTH = 100  # Python, Arrow and the hub's libraries go through nested values by recursion
TOO_DEEP = f"it is nested more than {MAX_DEPTH} levels deep"
HALF = "a text has half of a surrogate pair (\\ud800 to \\udfff), which is no character"
MAX_FILE_MIB = 64  # a file of settings


def parse_json(text: str) -> Any:
    """`json.loads`. Raises JSONDecodeError, or ValueError for what is nested more than MAX_DEPTH
    levels deep, or has an integer of more digits than Python reads."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        raise
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    except ValueError as error:
        digits = sys.get_int_max_str_digits()
        raise ValueError(f"it has an integer of more than {digits} digits") from error
    if text.count("[") + text.count("{") > MAX_DEPTH and is_deep(value):
        raise ValueError(TOO_DEEP)
    return value


def is_text(text: str) -> bool:
    """Whether it can be stored: False for half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_deep(value: Any, limit: int = MAX_DEPTH) -> bool:
    """Whether lists and dicts are nested more than `limit` levels deep in it."""
    level: list[Any] = [value]
    for _ in range(limit + 1):
        lists = [cast(list[Any], part) for part in level if isinstance(part, list)]
        dicts = [cast(dict[Any, Any], part) for part in level if isinstance(part, dict)]
        if not lists and not dicts:
            return False
        level = [*chain(*lists), *chain(*(part.values() for part in dicts))]
    return True


def read_settings(path: Path, limit_mib: int = MAX_FILE_MIB) -> str:
    """The text of a file of settings: no BOM. Raises OSError, or ValueError for one that is not
    UTF-8, or larger than `limit_mib`, as /dev/zero is."""
    limit = limit_mib * 2**20
    with path.open("rb") as file:
        raw = file.read(limit + 1)
    if len(raw) > limit:
        raise ValueError(f"it has more than {limit_mib} MiB, too many for settings")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8 text") from None


def check_json_file(path: Path) -> None:
    """Raise ValueError, with the path, for a file that is not JSON that can be read."""
    try:
        parse_json(read_settings(path))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{str(path)!r} is not valid JSON: {error.msg} in line {error.lineno}, "
            f"column {error.colno}."
        ) from error
    except ValueError as error:
        raise ValueError(f"{str(path)!r} cannot be read: {error}.") from error
