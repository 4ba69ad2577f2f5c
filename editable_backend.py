"""Builds with setuptools, and installs for editing by paths that type checkers and editors follow.

The packages lie in two folders, `.` and `kernels`, for which setuptools' editable install is a hook
that finds modules when they are imported: what only reads files sees no package. Here it is a .pth
file with the two folders, as PEP 660 allows.
"""

from __future__ import annotations

import base64
import hashlib
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import (
    build_sdist,
    build_wheel,
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    get_requires_for_build_wheel,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

WHEEL = (
    "Wheel-Version: 1.0\nGenerator: editable_backend\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
)


def build_editable(
    wheel_directory: str,
    config_settings: Any = None,
    metadata_directory: str | None = None,
) -> str:
    """A wheel of metadata and a .pth file; returns its name (PEP 660)."""
    root = Path(__file__).resolve().parent
    with tempfile.TemporaryDirectory() as folder:
        info = build_meta.prepare_metadata_for_build_editable(folder, config_settings)
        files = {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(Path(folder, info).rglob("*"))
            if path.is_file()
        }
    files[f"{info}/WHEEL"] = WHEEL.encode()
    files["__editable__.rloo_fast.pth"] = f"{root}\n{root / 'kernels'}\n".encode()
    lines = [f"{name},{_digest(content)},{len(content)}\n" for name, content in files.items()]
    files[f"{info}/RECORD"] = "".join([*lines, f"{info}/RECORD,,\n"]).encode()
    wheel = f"{info.removesuffix('.dist-info')}-0.editable-py3-none-any.whl"
    with zipfile.ZipFile(Path(wheel_directory, wheel), "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return wheel


def _digest(content: bytes) -> str:
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=")
    return f"sha256={digest.decode()}"
