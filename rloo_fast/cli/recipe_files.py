"""Ready-made files in recipes/, by name: settings of runs, of accelerate and of DeepSpeed.

quickstart             a run's options                   --config recipe:quickstart
deepspeed/zero3        DeepSpeed's configuration         --deepspeed recipe:deepspeed/zero3
accelerate/fsdp2       accelerate's, which wants a path  $(rloo-fast recipe accelerate/fsdp2)
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .options import UsageError

HELP = f"""\
usage: rloo-fast recipe           the names of all
       rloo-fast recipe NAME      the path of that file

{(__doc__ or "").strip()}"""
FOLDER = Path(__file__).parent.parent / "recipes"
PREFIX = "recipe:"


def main(argv: Sequence[str]) -> int:
    """`rloo-fast recipe NAME` prints the file's path; without a name, all names."""
    if {"-h", "--help"} & {*argv}:
        print(HELP)
        return 0
    if len(argv) > 1 or (argv and argv[0].startswith("-")):
        raise UsageError(f"recipe takes one name, or none to list them; got {' '.join(argv)}.")
    print(path_of(argv[0]) if argv else "\n".join(recipes()))
    return 0


def recipes() -> dict[str, Path]:
    """{name without suffix: file}."""
    files = sorted(path for path in FOLDER.rglob("*") if path.suffix in (".yaml", ".json"))
    return {path.relative_to(FOLDER).with_suffix("").as_posix(): path for path in files}


def path_of(name: str) -> Path:
    """The file of that name. Raises UsageError where there is none."""
    found = recipes()
    if name not in found:
        close = difflib.get_close_matches(name, found, n=1, cutoff=0.5)
        meant = f" Did you mean {close[0]}?" if close else ""
        raise UsageError(f"there is no recipe {name!r}: it is one of {', '.join(found)}.{meant}")
    return found[name]


def resolve(value: Any) -> Any:
    """The path of the file that the text `recipe:NAME` stands for; anything else as it is."""
    if isinstance(value, str) and value.startswith(PREFIX):
        return str(path_of(value.removeprefix(PREFIX)))
    return value
