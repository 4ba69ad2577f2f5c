"""A headless Chromium, Playwright's own or the system's; tests skip where there is none."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@contextmanager
def browser() -> Iterator[Any]:
    """Playwright's Browser. `make test` installs Playwright, and a browser where it can."""
    api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    found = next(filter(None, map(shutil.which, NAMES)), None)
    root = ["--no-sandbox"] if os.getuid() == 0 else []  # Chromium has no sandbox for root
    with api.sync_playwright() as playwright:
        try:
            started = playwright.chromium.launch(executable_path=found, args=root)
        except api.Error as error:
            pytest.skip(f"no browser can be started: {error.message.splitlines()[0]}")
        yield started
        started.close()
