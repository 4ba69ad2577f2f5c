"""A frozen model that waits on the host, and is on the GPU only while it is asked something."""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

from .memory import Gpu
from .storages import by_storage, held_by, is_plain, point, whole_storage

logger = logging.getLogger(__name__)


class Parked:
    """A frozen module that lies on the host, and on `device` inside `with`; on a CPU, as it is.

    Each time its storages are copied to the device; nothing is copied back, as nothing changes
    them. Raises ValueError for a module with weights of another kind than plain tensors.
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
        for tensors in by_storage(held_by(module)).values():
            storage = whole_storage(tensors[0])
            point(tensors, self._gpu.new_host(storage.nbytes).copy_(storage))

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
