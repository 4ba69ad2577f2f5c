"""Paths as a user wrote them, taken as they are written."""

from __future__ import annotations

import os
from pathlib import Path


def user_path(text: str | Path) -> Path:
    """The path, with ~ and ~user for home directories; a ~ that is nobody's home stays one."""
    return Path(os.path.expanduser(text))
