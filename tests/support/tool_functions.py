"""Tools and environments that tests give to runs."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any


def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: The first one.
        b: The second one.
    """
    return a + b


def divide(a: float, b: float) -> float:
    """Divide a number by another.

    Args:
        a: The number.
        b: The other.
    """
    return a / b


def wait(seconds: float) -> str:
    """Wait.

    Args:
        seconds: How long.
    """
    time.sleep(seconds)
    return "waited"


async def slow_add(a: int, b: int) -> int:
    """Add two numbers, slowly.

    Args:
        a: The first one.
        b: The second one.
    """
    await asyncio.sleep(0.1)
    return a + b


async def block(seconds: float) -> str:
    """Block the event loop, as an async function never should.

    Args:
        seconds: How long.
    """
    time.sleep(seconds)
    return "waited"


def thread_name() -> str:
    """Say which thread runs this."""
    return threading.current_thread().name


class Counter:
    """An environment that counts."""

    def __init__(self) -> None:
        self.count, self.rows = 0, []

    def reset(self, **row: Any) -> str:
        self.count = row.get("start", 0)
        self.rows.append(row)
        return f" It stands at {self.count}."

    def increase(self, by: int) -> int:
        """Count on.

        Args:
            by: How far.
        """
        self.count += by
        return self.count

    def wait(self, seconds: float) -> str:
        """Wait.

        Args:
            seconds: How long.
        """
        return wait(seconds)

    def get_reward(self) -> float:
        return float(self.count)

    def _own(self) -> None:
        """Not a tool."""
