"""What the README shows runs, and what it points to is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_loss_example_runs_and_gives_gradients():
    (example,) = [code for code in PYTHON if "fused_linear_rloo_loss" in code]
    names: dict = {}
    exec(example, names)
    assert names["hidden"].grad.isfinite().all()
    assert names["lm_head"].grad.norm() > 0


def test_the_reward_example_scores():
    (example,) = [code for code in PYTHON if "def score" in code]
    names: dict = {}
    exec(example, names)
    assert names["score"](completions=[" 7", "8"], answer=["7", "9"]) == [1.0, 0.0]


def test_the_drop_in_example_names_what_exists():
    (example,) = [code for code in PYTHON if "RLOOTrainer(" in code]
    compile(example, "README.md", "exec")
    names: dict = {}
    exec("\n".join(line for line in example.splitlines() if line.startswith("from ")), names)
    assert {"RLOOConfig", "RLOOTrainer", "Dataset"} <= names.keys()


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINKS = [
    (page.parent, link)
    for page in PAGES
    for link in re.findall(r"\]\((?!http)([^)]+)\)", page.read_text())
]


@pytest.mark.parametrize(("folder", "link"), LINKS, ids=[link for _, link in LINKS])
def test_links_point_to_files(folder, link):
    assert (folder / link).is_file()


@pytest.mark.parametrize("path", re.findall(r"`((?:rloo_fast|kernels|tests)/[\w/.]*)`", README))
def test_the_map_names_what_exists(path):
    assert (ROOT / path).exists()
