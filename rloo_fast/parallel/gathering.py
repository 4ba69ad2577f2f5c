"""Full tensors of parameters that an engine keeps in shards: FSDP2 (DTensor) or ZeRO-3 (`ds_*`).

Gathering is a collective: every process asks for the same parameters in the same order. The model
is sharded again before a full tensor is handed out, and the tensor lives as long as the caller
keeps it: a caller that stops half-way leaves nothing open.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def full_nbytes(parameter: Tensor, dtype: torch.dtype | None = None) -> int:
    """Bytes of the whole parameter as `gathered` gives it, however much of it is here."""
    size = (_cast(parameter, dtype) or parameter.dtype).itemsize
    return getattr(parameter, "ds_numel", parameter.numel()) * size


@torch.no_grad()
def gathered(parameters: Sequence[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """The full tensor of each, on every process; one that is not sharded: itself, not a copy.

    `dtype`: what FSDP2's floating-point shards are rounded to first, as it does for a forward.
    """
    with kept_whole(parameters):
        # ZeRO-3 lets go of the gathered memory, which lives on in the detached tensors
        return [_whole(parameter, dtype) for parameter in parameters]


def _whole(parameter: Tensor, dtype: torch.dtype | None) -> Tensor:
    if not isinstance(parameter, DTensor):
        return parameter.detach()
    # offloaded shards lie on the CPU, where the processes' collectives may not reach
    shard: Any = parameter.detach().to(parameter.device_mesh.device_type, _cast(parameter, dtype))
    return shard.full_tensor()


def _cast(parameter: Tensor, dtype: torch.dtype | None) -> torch.dtype | None:
    """The dtype to change to, or None."""
    rounds = isinstance(parameter, DTensor) and parameter.is_floating_point()
    return dtype if rounds else None


def _is_partitioned(parameter: Tensor) -> bool:
    """Small parameters stay whole under ZeRO-3; to gather them would partition them afterwards."""
    status = getattr(parameter, "ds_status", None)
    return status is not None and status.name != "AVAILABLE"


def kept_whole(parameters: Iterable[Tensor]) -> AbstractContextManager[None]:
    """While open, ZeRO-3's parameters are whole, in place; others are left as they are."""
    partitioned = [parameter for parameter in parameters if _is_partitioned(parameter)]
    if not partitioned:
        return nullcontext()
    import deepspeed  # pyright: ignore[reportMissingImports]

    return deepspeed.zero.GatheredParameters(partitioned)


@contextmanager
def own_class(model: Any) -> Iterator[None]:
    """Inside, `model` is of the class that FSDP2 found it in, not of FSDP2's subclass of that.

    transformers looks up by the class's name how a checkpoint's names and tensors differ.
    """
    found = type(model)
    if isinstance(model, FSDPModule):
        model.__class__ = found.__mro__[2]  # after the subclass and FSDPModule
    try:
        yield
    finally:
        model.__class__ = found
