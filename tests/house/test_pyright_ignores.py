"""What the type checker is told to overlook does not grow."""

from __future__ import annotations

import re

from tests.support.paths import ROOT

MOST = 60  # lower it when there are fewer
IGNORE = re.compile(r"#\s*pyright: ignore|#\s*type: ignore")


def test_there_are_not_more_ignores_than_before():
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for folder in ("rloo_fast", "kernels", "benchmarks", "tests")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if IGNORE.search(line)
    ]
    found = [place for place in found if not place.startswith("tests/house/test_pyright_ignores")]
    assert len(found) <= MOST, "\n".join(found)
