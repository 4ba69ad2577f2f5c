"""The README: one screen of what this is, and the way to everything else."""

from __future__ import annotations

import re

from tests.support.pages import code_blocks
from tests.support.paths import ROOT

README = (ROOT / "README.md").read_text()
STAGES = [
    "data", "rollout", "rewards", "batching", "objective", "policy", "step", "weight_sync"
]  # fmt: skip


def test_it_has_at_most_130_lines():
    assert len(README.splitlines()) <= 130


def test_its_first_screen_says_what_has_not_run_on_a_gpu():
    screen = "\n".join(README.splitlines()[:30])
    assert "Status" in screen
    assert "GPU" in screen
    assert "TRL" in screen


def test_it_shows_the_two_commands_and_the_drop_in():
    shell = "\n".join(code_blocks(README, "bash"))
    assert "make quickstart" in shell
    assert "rloo-fast train" in shell
    assert "from rloo_fast import RLOOConfig, RLOOTrainer" in "\n".join(
        code_blocks(README, "python")
    )


def test_it_links_the_folders_of_the_pipeline_in_order():
    assert re.findall(r"^\d\. \[\w+/\]\(rloo_fast/(\w+)\)", README, re.MULTILINE) == STAGES


def test_it_has_one_table():
    assert len(re.findall(r"^\| --- ", README, re.MULTILINE)) == 1
