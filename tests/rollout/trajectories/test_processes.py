"""Two processes sample the conversations that one does, and make the same steps of them."""

from __future__ import annotations

import json

import pytest

from tests.support.launch import run_worker_processes
from tests.support.tools_worker import CASES

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tools")
    for processes in (1, 2):
        done = run_worker_processes("tools_worker", str(folder), processes=processes)
        assert done.returncode == 0, done.stderr[-4000:]
    read = lambda name: json.loads((folder / f"{name}.json").read_text())  # noqa: E731
    return read("1.0"), read("2.0"), read("2.1")


@pytest.mark.parametrize("case", CASES)
def test_two_processes_are_one(case, found):
    alone, first, second = (one[case] for one in found)
    assert len(alone["logs"]) == 2
    for one, other in zip(alone["logs"], first["logs"], strict=True):
        assert other == pytest.approx(one, rel=2e-4, abs=2e-5)
    assert first["logs"] == second["logs"]
    assert first["rounds"] == second["rounds"] > 4  # where weights are split, each call needs both
