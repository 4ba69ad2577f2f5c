"""The GPU, and what stands in for it with --dry: the same calls on the host."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rloo_fast.offload.gpu import Gpu
from rloo_fast.offload.storages import whole_storage

GIB = 1 << 30


class Skipped(Exception):
    """Why a part cannot run here."""


class Cuda:
    """The first CUDA device."""

    is_cuda = True

    def __init__(self) -> None:
        self.device = torch.device("cuda", 0)
        torch.cuda.set_device(self.device)
        torch.zeros(1, device=self.device)  # makes the context, which is in use from here on

    def gpu(self) -> Gpu:
        return Gpu(self.device)

    def used(self) -> int | None:
        """Bytes in use on the device, whoever uses them."""
        free, total = torch.cuda.mem_get_info(self.device)
        return total - free

    def reserved(self) -> int:
        return torch.cuda.memory_reserved(self.device)

    def uses_expandable_segments(self) -> bool:
        return any(found["is_expandable"] for found in torch.cuda.memory._snapshot()["segments"])

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def release(self) -> None:
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()

    def capture(self, work: Callable[[], object]) -> Callable[[], object]:
        """A CUDA graph of `work`; the call replays it."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            work()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        return graph.replay

    def sleep_pool(self) -> Any:
        """vLLM's allocator. Raises Skipped where there is none."""
        try:
            module: Any = importlib.import_module("vllm.device_allocator.cumem")
        except ImportError as error:
            raise Skipped(f"vLLM's sleep mode cannot be imported: {error}") from error
        if not module.cumem_available:
            raise Skipped("this vLLM was built without its allocator for sleep mode")
        return module.CuMemAllocator.get_instance()

    @contextmanager
    def allocations(self) -> Iterator[SimpleNamespace]:
        """`.bytes` at the end: what the block allocated and did not free."""
        found = SimpleNamespace(bytes=0)
        before = torch.cuda.memory_allocated(self.device)
        yield found
        self.synchronize()
        found.bytes = torch.cuda.memory_allocated(self.device) - before


class Host:
    """In place of a GPU. What cannot be measured on a host is None."""

    is_cuda = False

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    def gpu(self) -> Gpu:
        return HostAsGpu()

    def used(self) -> int | None:
        return None

    def reserved(self) -> int:
        return 0

    def uses_expandable_segments(self) -> bool:
        return "expandable_segments:True" in os.environ.get("PYTORCH_ALLOC_CONF", "")

    def synchronize(self) -> None:
        return

    def release(self) -> None:
        return

    def capture(self, work: Callable[[], object]) -> Callable[[], object]:
        work()
        return work

    def sleep_pool(self) -> Any:
        return HostPool()

    @contextmanager
    def allocations(self) -> Iterator[SimpleNamespace]:
        yield SimpleNamespace(bytes=None)  # torch's profiler loses a free now and then


class HostAsGpu(Gpu):
    """Every tensor of the process lies on it."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))

    def total(self) -> int:
        return 1 << 50

    def allocated(self) -> int:
        return 0

    def elsewhere(self) -> int:
        return 0

    def new_host(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    def new_block(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    def copy(self, source: Tensor, target: Tensor) -> None:
        target.copy_(source)

    def synchronize(self) -> None:
        return

    def release(self) -> None:
        return


class HostPool:
    """In place of vLLM's allocator: tensors keep their addresses, and lose their bits asleep."""

    def __init__(self) -> None:
        self._blocks: dict[int, tuple[str, Tensor]] = {}
        self._saved: dict[int, Tensor] = {}

    @contextmanager
    def use_memory_pool(self, tag: str) -> Iterator[None]:
        with _NewTensors(lambda t: self._blocks.setdefault(t.data_ptr(), (tag, whole_storage(t)))):
            yield

    def sleep(self, offload_tags: tuple[str, ...]) -> None:
        for address, (tag, block) in self._blocks.items():
            if tag in offload_tags:
                self._saved[address] = block.clone()
            block.fill_(0xAB)

    def wake_up(self, tags: list[str]) -> None:
        for address, (tag, block) in self._blocks.items():
            if tag in tags and address in self._saved:
                block.copy_(self._saved.pop(address))


class _NewTensors(TorchDispatchMode):
    """Calls `found` with every tensor that is made inside."""

    def __init__(self, found: Callable[[Tensor], object]):
        super().__init__()
        self._found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self._found(out)
        return out
