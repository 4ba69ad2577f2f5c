"""No modules import each other in a circle, and vLLM is named where it belongs.

`make lint` checks the layers; what import-linter cannot see is here: circles inside a folder, and
modules that are imported by a string.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from tests.support.sources import PACKAGES, circles, imported, modules, source_files, tree

IMPORTERS = ("import_module", "__import__", "find_spec", "importorskip")


def graph_of(packages: dict[str, Path]) -> dict[str, set[str]]:
    known = modules(packages)
    return {name: imported(name, path, known) for name, path in known.items()}


def test_there_is_no_circle():
    graph = graph_of(PACKAGES)
    assert len(graph) > 200
    assert circles(graph) == []


@pytest.mark.parametrize(
    "back",
    [
        "def f():\n    from . import a\n",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from p.a import X\n",
        "import p.a\n",
    ],
    ids=["in a function", "for types", "absolute"],
)
def test_a_circle_is_found(back, tmp_path):
    for name, text in {"__init__": "", "a": "from .b import Y\n", "b": back, "c": ""}.items():
        (tmp_path / f"{name}.py").write_text(text)
    assert circles(graph_of({"p": tmp_path})) == [["p.a", "p.b"]]


def vllm_imports(module: ast.Module) -> list[int]:
    """Lines that import vllm or one of its modules, by a statement or by a string."""
    lines = []
    for node in ast.walk(module):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = getattr(node.func, "attr", getattr(node.func, "id", None))
            names = [str(node.args[0].value)] if function in IMPORTERS else []
        if any(name.split(".")[0] == "vllm" for name in names):
            lines.append(node.lineno)
    return lines


def test_vllm_is_imported_where_its_engines_are():
    """In the package, and in the benchmarks that call vLLM beside it."""
    found = {str(path.relative_to(ROOT)) for path in source_files() if vllm_imports(tree(path))}
    allowed = ("rloo_fast/rollout/vllm/", "benchmarks/rollout/", "benchmarks/sync/")
    allowed += ("benchmarks/gpu_smoke/device",)
    assert [path for path in sorted(found) if not path.startswith(allowed)] == []
    assert "rloo_fast/rollout/vllm/package.py" in found  # by a string


@pytest.mark.parametrize(
    "text",
    [
        "import vllm.platforms",
        "def f():\n    from vllm import LLM",
        "import importlib\nimportlib.import_module('vllm.config')",
        "__import__('vllm')",
    ],
)
def test_an_import_of_vllm_is_found(text):
    assert vllm_imports(ast.parse(text))
    assert not vllm_imports(ast.parse(text.replace("vllm", "vllm_package")))
