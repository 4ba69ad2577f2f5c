"""Processes that share a tensor-parallel vLLM engine: all must make the same requests."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

Row = TypeVar("Row")


def tensor_parallel_group(size: int) -> Any:
    """The processes that share this one's engine; None: it is not shared."""
    if size == 1:
        return None
    world, rank = dist.get_world_size(), dist.get_rank()
    groups = [
        dist.new_group(list(range(start, start + size)), backend="gloo")
        for start in range(0, world, size)
    ]
    return groups[rank // size]


def unlink_shared_memory(group: Any) -> None:
    """Remove the names of shared memory that vLLM's CPU build would leave behind.

    The next group would open the old memory by the same name. Once every process has it open, it
    needs no name.
    """
    dist.barrier(group)
    ranks = dist.get_process_group_ranks(group)
    for path in Path("/dev/shm").glob(f"*-[[]{ranks[0]}-{ranks[-1]}]-cpushm_*"):
        path.unlink(missing_ok=True)


def together(rows: list[Row], group: Any) -> tuple[list[Row], int]:
    """The requests of all processes of the group, and the index of this one's first."""
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, rows, group=group)
    before = everyone[: dist.get_rank(group)]
    return [row for some in everyone for row in some], sum(map(len, before))
