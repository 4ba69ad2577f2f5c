"""The memory of one CUDA device: its size, what lies in it, copies to the host and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .host_memory import HostMemory


class Gpu:
    """The memory of one CUDA device, and copies of bytes to the host and back.

    A copy is complete after the next `synchronize`. Host memory is pinned, and kept for the next
    round: after the first one none is allocated.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._host_memory = HostMemory(lambda num_bytes: self.new_host(num_bytes))

    def to_host(self, blocks: Sequence[Tensor]) -> list[Tensor]:
        """(n,) uint8 each on the device -> the same on the host, where it stays until the next call
        of this."""
        hosts = self._host_memory.take([block.nbytes for block in blocks])
        for block, host in zip(blocks, hosts, strict=True):
            self.copy(block, host)
        return hosts

    def to_device(self, host: Tensor) -> Tensor:
        block = self.new_block(host.nbytes)
        self.copy(host, block)
        return block

    # What asks CUDA: tests replace it

    def total(self) -> int:
        return torch.cuda.mem_get_info(self.device)[1]

    def allocated(self) -> int:
        """Bytes of all tensors of this process on the device, whoever holds them."""
        return torch.cuda.memory_allocated(self.device)

    def elsewhere(self) -> int:
        """Bytes in use that torch does not have in this process: other processes', the driver's.

        Too few, down to 0, once a sleeping engine has given back memory that torch still counts.
        """
        free, total = torch.cuda.mem_get_info(self.device)
        return max(0, total - free - torch.cuda.memory_reserved(self.device))

    def holds(self, tensor: Tensor) -> bool:
        there = tensor.device
        return there.type == self.device.type and self.device.index in (None, there.index)

    def new_host(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def new_block(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)

    def copy(self, source: Tensor, target: Tensor) -> None:
        target.copy_(source, non_blocking=True)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def release(self) -> None:
        """Hand back to the device what torch keeps of freed tensors, activations above all."""
        torch.cuda.empty_cache()
