"""Copies between host and GPU that make the host wait as seldom as possible."""

# pyright: strict, reportUnknownMemberType=false

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(x: Tensor, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """`x` on `device`, in `dtype` (None: its own); from the host to a GPU without a wait.

    A copy out of pageable memory waits for all that the GPU was given before. Out of pinned memory
    it is queued; torch keeps the pinned block until it has been read.
    """
    if torch.device(device).type != "cuda" or x.is_cuda:
        return x.to(device, dtype)
    return x.to(dtype or x.dtype).pin_memory().to(device, non_blocking=True)


def to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors, of one device and one dtype, on the CPU by one copy: one wait for all of them.

    What comes back shares one storage, and none with what was given.
    """
    if not tensors:
        return []
    assert len({x.dtype for x in tensors}) == 1, [x.dtype for x in tensors]
    whole = torch.cat([x.detach().reshape(-1) for x in tensors]).cpu()
    parts: Sequence[Tensor] = torch.split(whole, [x.numel() for x in tensors])
    return [part.view(x.shape) for part, x in zip(parts, tensors, strict=True)]
