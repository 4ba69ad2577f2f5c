"""The host in place of a GPU: what is counted and moved there, beside what Python can see."""

from __future__ import annotations

import gc
from typing import Any

import torch

from rloo_fast.offload.engine_room import EngineRoom, measure
from rloo_fast.offload.gpu import Gpu


class HostAsGpu(Gpu):
    """Every tensor of the process lies on it."""

    def __init__(self):
        super().__init__(torch.device("cpu"))
        self.size = 1 << 50

    def total(self):
        return self.size

    def allocated(self):
        return 0

    elsewhere = allocated

    def holds(self, tensor):
        return tensor.device.type == "cpu"

    def new_host(self, num_bytes):
        return torch.empty(num_bytes, dtype=torch.uint8)

    new_block = new_host

    def copy(self, source, target):
        target.copy_(source)

    def synchronize(self):
        return

    release = synchronize


class TightRoom(EngineRoom):
    """On a GPU that has room for nothing that can move. `seen`: what moved, each time."""

    def __init__(self, trainer: Any):
        gpu = HostAsGpu()
        self.memory = trainer.parallel.memory(lambda: trainer.model_wrapped)
        reference = None if trainer.reference is None else trainer.reference.model
        super().__init__(
            trainer.model, lambda: trainer.optimizer, reference, torch.device("cpu"), share=0.0,
            reserve=0, memory=self.memory, say=lambda line: None, gpu=gpu,
        )  # fmt: skip
        self.gpu, self.seen = gpu, []

    def host_slabs(self):
        """Addresses of the memory that stands for the host's."""
        return {slab.data_ptr() for slab in self.gpu._host_memory._slabs}

    def make(self):
        if not self.is_made:
            self.plan, self.gpu.size = None, self.held().fixed
        super().make()
        zero = getattr(self.optimizer(), "optimizer", None)
        by_engine = sorted(state.value for state in getattr(zero, "offloaded_states", ()))
        self.seen.append((self.plan.moved, by_engine))

    def held(self):
        return measure(self.model, self.optimizer(), self.reference, self.gpu, memory=self.memory)


def live_storages() -> dict[int, int]:
    """Address -> bytes of every storage on the host that a tensor in Python looks at."""
    gc.collect()
    found = {}
    for tensor in [value for value in gc.get_objects() if _is_tensor(value)]:
        local = getattr(tensor, "_local_tensor", tensor)
        if local.device.type == "cpu" and local.layout is torch.strided:
            storage = local.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return found


def _is_tensor(value: Any) -> bool:
    return issubclass(type(value), torch.Tensor)  # isinstance would wake lazy modules
