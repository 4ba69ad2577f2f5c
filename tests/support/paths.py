"""Where the repository is, for tests that start processes."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]
SUPPORT = ROOT / "tests" / "support"


def python_path(*first: str) -> str:
    """PYTHONPATH of a process that imports `tests` and `benchmarks`, and all this one can."""
    paths = [*first, str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return os.pathsep.join(dict.fromkeys(path for path in paths if path))
