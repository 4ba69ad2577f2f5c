"""Small collectives: every process calls, and every process gets the same answer.

What they send is known on the host and wanted there, so they go from host to host: a collective of
the devices would wait for all that these were given before.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

T = TypeVar("T")


def any_process(accelerator: Accelerator, flag: bool) -> bool:
    """Whether `flag` is true on at least one process."""
    if accelerator.num_processes == 1:
        return flag
    flags = gather_tensor(accelerator, torch.tensor([flag]))
    return bool(flags.any())


def gather_tensor(accelerator: Accelerator, mine: Tensor) -> Tensor:
    """(n, ...) of every process, on the CPU -> (n x processes, ...), in rank order."""
    if accelerator.num_processes == 1:
        return mine
    if accelerator.device.type == "cpu":
        gathered: Any = accelerator.gather(mine)
        return gathered
    parts = [torch.empty_like(mine) for _ in range(accelerator.num_processes)]
    dist.all_gather(parts, mine, group=_host_group())
    return torch.cat(parts)


@functools.cache
def _host_group() -> Any:
    """All processes, over the host; their own group, of accelerate, is one of the devices."""
    return dist.new_group(backend="gloo")


def total(accelerator: Accelerator, mine: int) -> int:
    """The sum over processes."""
    everyone = accelerator.gather(torch.tensor([mine], device=accelerator.device))
    assert isinstance(everyone, Tensor)
    return int(everyone.sum())


def gather_objects(accelerator: Accelerator, mine: T) -> list[T]:
    """One picklable object per process, in rank order."""
    return [mine] if accelerator.num_processes == 1 else gather_object([mine])


def gather_rows(accelerator: Accelerator, columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Per-row tensors (R,) of this process -> (R x processes,) of all, in float64 on the CPU.

    One collective for all columns; every process must have the same number of rows.
    """
    matrix = torch.stack([column.double().cpu() for column in columns.values()], dim=1)
    matrix = gather_tensor(accelerator, matrix)
    return {name: matrix[:, i] for i, name in enumerate(columns)}
