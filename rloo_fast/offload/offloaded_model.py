"""A frozen model that is held on the host, and on the GPU only while it computes."""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

from .gpu import Gpu
from .host_memory import HostMemory
from .storages import by_storage, held_by, is_plain, point, whole_storage

logger = logging.getLogger(__name__)


class OffloadedModel:
    """Holds a frozen module on the host, and on `device` inside `with`. On a CPU it stays put.

    `with` copies its storages to the device; nothing is copied back, as nothing changes them.
    Raises ValueError for a module whose weights are not plain tensors.
    """

    def __init__(self, module: nn.Module, device: torch.device, gpu: Gpu | None = None):
        self._module = module
        self._gpu = Gpu(device) if gpu is None and device.type == "cuda" else gpu
        self._hosts: list[tuple[list[Tensor], Tensor]] = []  # of what is on the device now
        if self._gpu is None:
            logger.info("On a CPU reward models stay where they are.")
            return
        if not all(map(is_plain, held_by(module))):
            raise ValueError(
                "reward_model_offload needs reward models of plain tensors, not quantised or "
                "sharded ones: leave it out."
            )
        groups = list(by_storage(held_by(module)).values())
        # memory that nobody else takes: it is never written to again
        hosts = HostMemory(self._gpu.new_host).take(
            [tensors[0].untyped_storage().nbytes() for tensors in groups]
        )
        for tensors, host in zip(groups, hosts, strict=True):
            point(tensors, host.copy_(whole_storage(tensors[0])))

    def __enter__(self) -> None:
        if self._gpu is None:
            return
        hosts = [(t, whole_storage(t[0])) for t in by_storage(held_by(self._module)).values()]
        blocks = [self._gpu.to_device(host) for _, host in hosts]
        self._gpu.synchronize()
        for (tensors, _), block in zip(hosts, blocks, strict=True):
            point(tensors, block)
        self._hosts = hosts

    def __exit__(self, *_: object) -> None:
        for tensors, host in self._hosts:
            point(tensors, host)
        self._hosts = []
        if self._gpu is not None:
            self._gpu.release()
