"""Tensors and their storages, which move between host and GPU as blocks of bytes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

ZERO_PARTS = ("ds_tensor", "ds_secondary_tensor")


def held_by(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers, and what this process has of parameters that ZeRO-3 splits."""
    parameters = list(module.parameters())
    parts = [getattr(p, name, None) for p in parameters for name in ZERO_PARTS]
    return [*parameters, *(part for part in parts if part is not None), *module.buffers()]


def by_storage(tensors: Iterable[Tensor]) -> dict[int, list[Tensor]]:
    """Address of a storage -> the tensors that are views of it."""
    blocks: dict[int, list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        blocks[tensor.untyped_storage().data_ptr()].append(tensor)
    return blocks


def is_plain(tensor: Tensor) -> bool:
    """Whether the tensor is a strided view of one storage, and nothing else."""
    return type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided


def whole_storage(tensor: Tensor) -> Tensor:
    """(n,) uint8: every byte of the storage of `tensor`."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def point(tensors: list[Tensor], block: Tensor) -> None:
    """Make the tensors views of `block`, each with its offset, size and strides as before."""
    for t in tensors:
        empty = torch.empty(0, dtype=t.dtype, device=block.device)
        place = (t.storage_offset(), t.size(), t.stride())
        t.data = empty.set_(block.untyped_storage(), *place)
