"""Tensors and the storages they look into: what is moved between host and GPU as bytes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn


def held_by(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def by_storage(tensors: Iterable[Tensor]) -> dict[int, list[Tensor]]:
    """Address of a storage -> the tensors that look into it."""
    blocks: dict[int, list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        blocks[tensor.untyped_storage().data_ptr()].append(tensor)
    return blocks


def is_plain(tensor: Tensor) -> bool:
    """It is its storage and strides, and nothing else."""
    return type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided


def whole_storage(tensor: Tensor) -> Tensor:
    """(n,) uint8: every byte of the storage that `tensor` looks into."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def point(tensors: list[Tensor], block: Tensor) -> None:
    """Let the same tensors look at the same places of `block`."""
    for t in tensors:
        empty = torch.empty(0, dtype=t.dtype, device=block.device)
        place = (t.storage_offset(), t.size(), t.stride())
        t.data = empty.set_(block.untyped_storage(), *place)  # pyright: ignore
