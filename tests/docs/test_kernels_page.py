"""kernels/README.md: its table has every file, in an order in which imports point upwards."""

from __future__ import annotations

import ast
import re

from tests.support.paths import ROOT

FOLDER = ROOT / "kernels" / "rloo_kernels"
TABLE = (ROOT / "kernels" / "README.md").read_text().split("## Files")[1].split("\n## ")[0]
NAMED = [
    name
    for cell in re.findall(r"^\| (`.+?) \|", TABLE, re.MULTILINE)
    for name in re.findall(r"`([\w/]+\.py)`", cell)
]


def imported(name: str) -> set[str]:
    """The files of the package that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse((FOLDER / name).read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = (FOLDER / name).parents[node.level - 1]
            parts = (node.module or "").split(".") if node.module else []
            for alias in node.names:
                for path in (base.joinpath(*parts), base.joinpath(*parts, alias.name)):
                    if path.with_suffix(".py").is_file():
                        found.add(path.with_suffix(".py").relative_to(FOLDER).as_posix())
    return found


def test_it_has_every_file_once():
    files = [path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*.py")]
    assert sorted(NAMED) == sorted(name for name in files if not name.endswith("__init__.py"))


def test_a_file_imports_only_from_those_above_it():
    wrong = [
        (name, other)
        for i, name in enumerate(NAMED)
        for other in imported(name)
        if other not in NAMED[:i]
    ]
    assert not wrong
    assert "loss/types.py" in imported("lm_head/chunked_loss.py")
