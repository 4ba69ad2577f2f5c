"""No file and no function is longer than a reader can hold. The exceptions only get fewer."""

from __future__ import annotations

import ast

from tests.support.paths import ROOT
from tests.support.sources import source_files, tree

MOST_LINES_OF_FILE, MOST_LINES_OF_FUNCTION = 450, 90
LONG_FILES = {"rloo_fast/trainer.py": 481}  # path -> lines today
LONG_FUNCTIONS = {  # path::function -> lines today
    "kernels/rloo_kernels/loss/objective_triton.py::_segments_kernel": 168,
}


def excess(lengths: dict[str, int], most: int, known: dict[str, int]) -> dict[str, int]:
    """What is longer than `most`, and than it is known to be; and what is known but was cut."""
    long = {name: length for name, length in lengths.items() if length > most}
    grown = {name: length for name, length in long.items() if length > known.get(name, most)}
    return grown | {name: 0 for name in known if name not in long}


def test_files():
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in source_files()
    }
    assert excess(lengths, MOST_LINES_OF_FILE, LONG_FILES) == {}


def test_functions():
    lengths = {
        f"{path.relative_to(ROOT)}::{node.name}": (node.end_lineno or 0) - node.lineno + 1
        for path in source_files()
        for node in ast.walk(tree(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert excess(lengths, MOST_LINES_OF_FUNCTION, LONG_FUNCTIONS) == {}


def test_what_grew_and_what_was_cut_are_both_named():
    assert excess({"a": 11, "b": 30, "c": 5}, 10, {"b": 20, "c": 12}) == {"a": 11, "b": 30, "c": 0}
