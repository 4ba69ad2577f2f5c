"""Lines that tests run, per folder, and the floors that hold where one is set.

python -m tests.house.coverage COVERAGE_JSON      (of `coverage json`; exit status 1 below a floor)

Kernels of Triton (*_triton.py) are left out of the measurement: Python never runs them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

# folder -> percent of its statements; measured: 96, 98, 91, 97 and 95
FLOORS: dict[str, int] = {
    "rloo_fast/batching": 93,
    "rloo_fast/objective": 95,
    "rloo_fast/step": 88,
    "rloo_fast/policy": 94,
    "rloo_kernels": 92,
}


def folder_of(path: str) -> str:
    """rloo_fast/a/b/c.py -> rloo_fast/a; a file in the root of rloo_fast stands for itself."""
    parts = path.removeprefix("kernels/").split("/")
    return "rloo_kernels" if parts[0] == "rloo_kernels" else "/".join(parts[:2])


def per_folder(files: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """`files` of `coverage json` -> (statements run, statements) of each folder."""
    found: dict[str, tuple[int, int]] = {}
    for path, entry in sorted(files.items()):
        run, all_ = found.get(folder_of(path), (0, 0))
        summary = entry["summary"]
        found[folder_of(path)] = (
            run + summary["covered_lines"],
            all_ + summary["num_statements"],
        )
    return {folder: counts for folder, counts in found.items() if counts[1]}


def table(found: Mapping[str, tuple[int, int]], floors: Mapping[str, int]) -> tuple[str, bool]:
    """(the lines to print, whether every floor holds); a folder that is not there has 0%."""
    lines, holds = [f"{'folder':28} {'lines':>6} {'run':>6} {'floor':>6}"], True
    for folder in sorted({*found, *floors}):
        run, all_ = found.get(folder, (0, 0))
        percent, floor = 100 * run / max(all_, 1), floors.get(folder)
        below = floor is not None and percent < floor
        holds = holds and not below
        told = "" if floor is None else f"{floor}%" + ("  below its floor" if below else "")
        lines.append(f"{folder:28} {all_:6} {percent:5.1f}% {told:>6}".rstrip())
    return "\n".join(lines), holds


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        text, holds = table(per_folder(json.load(file)["files"]), FLOORS)
    print(text)
    sys.exit(not holds)
