"""Whether a run is under way, and when it will be done."""

from __future__ import annotations

import os
import re
import socket
import time
from pathlib import Path
from statistics import median

from ..reports.panels import Rows, is_value

LOCK = ".rloo_lock"  # of `checkpoint.lock`: names who holds it, empty at a run's end
OWNER = re.compile(r"process (\d+) on (\S+)")
QUIET_S = 900  # a run on another machine that wrote nothing for so long is taken for ended
NUM_RECENT = 10  # logs that the time left is reckoned from


def status(run_dir: Path, rows: Rows) -> str:
    """running | finished | stopped (before its end) | empty (nothing logged)."""
    if _is_running(run_dir):
        return "running"
    if not rows:
        return "empty"
    return "finished" if any("train_loss" in row for row in rows[-3:]) else "stopped"


def _is_running(run_dir: Path) -> bool:
    try:
        owner = OWNER.match((run_dir / LOCK).read_text())
    except OSError:
        return False
    if owner is None:
        return False
    if owner[2] == socket.gethostname():
        return _is_alive(int(owner[1]))
    written = [p.stat().st_mtime for p in (run_dir / "metrics.jsonl", run_dir / LOCK) if p.exists()]
    return time.time() - max(written, default=0) < QUIET_S


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def seconds_left(rows: Rows, max_steps: int | None) -> float | None:
    """Of the training steps to come, at the pace of the newest; None where nobody knows."""
    paces = [row["step_time"] for row in rows if is_value(row.get("step_time"))][-NUM_RECENT:]
    if not max_steps or not paces:
        return None
    return median(paces) * max(max_steps - rows[-1]["step"], 0)
