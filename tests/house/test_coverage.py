"""The table of coverage: what it sums, and when it fails."""

from __future__ import annotations

from tests.house.coverage import FLOORS, per_folder, table
from tests.support.paths import ROOT


def counted(run: int, all_: int) -> dict[str, dict[str, int]]:
    return {"summary": {"covered_lines": run, "num_statements": all_}}


def test_files_are_summed_by_folder():
    files = {
        "rloo_fast/policy/head.py": counted(8, 10),
        "rloo_fast/policy/attention/op.py": counted(10, 10),
        "kernels/rloo_kernels/loss/rloo_loss.py": counted(3, 4),
        "rloo_fast/trainer.py": counted(1, 2),
        "rloo_fast/policy/__init__.py": counted(0, 0),
    }
    assert per_folder(files) == {
        "rloo_fast/policy": (18, 20),
        "rloo_kernels": (3, 4),
        "rloo_fast/trainer.py": (1, 2),
    }


def test_it_fails_below_a_floor_and_for_a_folder_that_was_not_measured():
    floors, whole = {"rloo_fast/step": 80, "rloo_kernels": 90}, (100, 100)
    found = {"rloo_fast/step": (80, 100), "rloo_kernels": whole, "rloo_fast/cli": (0, 100)}
    assert table(found, floors)[1]
    text, holds = table({**found, "rloo_fast/step": (79, 100)}, floors)
    assert not holds
    (line,) = [line for line in text.splitlines() if "below its floor" in line]
    assert line.startswith("rloo_fast/step")
    assert not table({"rloo_fast/step": whole}, floors)[1]


def test_a_folder_with_a_floor_exists():
    assert all(
        (ROOT / folder).is_dir() or (ROOT / "kernels" / folder).is_dir() for folder in FLOORS
    )
