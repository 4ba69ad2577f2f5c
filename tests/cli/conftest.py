"""A folder with what a command names, and trainers that only record."""

from __future__ import annotations

import json
import sys

import datasets
import pytest

from tests.support.commands import FakeTrainer


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The current directory, with a model's config, prompts and a reward function."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])  # the command puts the directory there
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "model").mkdir(exist_ok=True)
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "r.py").write_text("def f(completions, **kwargs):\n    return [0.0] * 4\n")
    rows = [{"prompt": f"w{i} w2", "answer": "w3"} for i in range(8)]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


@pytest.fixture
def trainers(monkeypatch):
    """The FakeTrainers that a command made."""
    FakeTrainer.made = []
    monkeypatch.setattr("rloo_fast.trainer.RLOOTrainer", FakeTrainer)
    return FakeTrainer.made
