"""What the main process does alone with a server, while the others wait for it, and may fail at."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from ...records import Bucket


@contextmanager
def others_waiting(barrier: Callable[[], None]) -> Iterator[None]:
    """Between two barriers; what the main process raises comes after the second.

    A server that failed the main process fails the others as they ask it next.
    """
    barrier()  # nobody's completions are under way
    try:
        yield
    except Exception:
        barrier()
        raise
    barrier()


@contextmanager
def gathering(buckets: Iterable[Bucket]) -> Iterator[Iterator[Bucket]]:
    """The buckets, made to the last one whatever is done with them: every process takes part in
    gathering a sharded one."""
    iterator = iter(buckets)
    try:
        yield iterator
    except Exception:
        for _ in iterator:
            pass
        raise
    for _ in iterator:
        pass
