"""Runs a script that needs Triton in a process of its own.

A kernel is compiled or interpreted as TRITON_INTERPRET says when it is decorated: the two modes
cannot share a process. RLOO_TRITON_PATH names a directory, made by `pip install --target`, whose
packages win over the installed ones: with triton==3.6.0 and "numpy<2.4", the oldest triton.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.support.launch import HANGS_S
from tests.support.paths import python_path


def run_worker(script: Path, *arguments: str, interpret: bool, timeout_s: float = HANGS_S) -> Any:
    """The JSON that `script` prints as its last line.

    Raises RuntimeError with the end of its stderr if it fails, subprocess.TimeoutExpired if it
    takes longer than timeout_s.
    """
    environment = {
        **os.environ,
        "PYTHONPATH": python_path(os.environ.get("RLOO_TRITON_PATH", "")),
        "TRITON_INTERPRET": "1" if interpret else "0",
    }
    with tempfile.TemporaryDirectory() as cache:
        worker = subprocess.run(
            [sys.executable, str(script), *arguments],
            env={**environment, "TRITON_CACHE_DIR": cache},
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
    if worker.returncode:
        raise RuntimeError(f"{script.name} failed:\n{worker.stderr[-4000:]}")
    return json.loads(worker.stdout.splitlines()[-1])
