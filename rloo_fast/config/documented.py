"""A field of a configuration, with the sentence that `--help` and docs/api.md show of it."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def documented(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text.replace("%", "%%")})
