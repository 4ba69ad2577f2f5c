"""The trainer's main process and the workers of a server that receive, as a process group of torch.

It is none of torch.distributed's named groups, so neither the trainer's nor vLLM's know of it. NCCL
between GPUs, gloo between hosts. Nothing in it waits for ever: after a time limit the group is
closed. What NCCL was doing on a GPU is aborted; gloo has no such call, but whoever waits for a
process whose end of the group is gone is told at once.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .http import SILENT_S, STALL_S, patience_s
from .pack import Packed

Backend = Literal["nccl", "gloo"]
T = TypeVar("T")

LATER = timedelta(days=1)  # torch's own limits are never met: meeting one may end the process
TRAINER = 0  # its rank
POLL_S = 0.0002, 0.002  # first and longest time between two looks at a transfer
# NCCL's watchdog throws where nobody catches, which would end vLLM when a trainer dies
UNWATCHED = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    "TORCH_NCCL_PROPAGATE_ERROR": "0",
}


class GroupBroken(RuntimeError):
    """Another process of the group is gone, or did nothing within the time limit."""


class Group:
    """Every process of the group makes one at the same time. Raises GroupBroken, not later than
    after twice SILENT_S, if another does not.

    `store`: see `meeting.py`. `address`: of this machine, on the network that leads to the others.
    `device`: where buckets are sent from and received.
    """

    def __init__(
        self,
        backend: Backend,
        store: dist.Store,
        rank: int,
        size: int,
        *,
        address: str,
        device: torch.device,
    ):
        self.device = device if backend == "nccl" else torch.device("cpu")
        self._store = store  # torch calls it, and does not keep it
        self._is_closed = threading.Event()
        self._group: Any = None
        with self._told():
            make = {"nccl": _nccl, "gloo": _gloo}[backend]
            self._group = _within(SILENT_S, lambda: make(store, rank, size, address))
            self._group.set_timeout(LATER)
            # NCCL connects in the first of them
            _within(SILENT_S, lambda: self._broadcast(torch.zeros(1, dtype=torch.uint8), SILENT_S))

    def send(self, bucket: Packed | None) -> None:
        """The trainer's part: all have the bucket when it returns; None: no more come."""
        with self._told():
            header = () if bucket is None else bucket.header
            sizes = [-1, -1] if bucket is None else [len(header), len(bucket.data)]
            self._broadcast(torch.tensor(sizes), STALL_S)
            if bucket is not None:
                self._broadcast(torch.frombuffer(bytearray(header), dtype=torch.uint8), SILENT_S)
                self._broadcast(bucket.data, patience_s(len(bucket.data)))

    def receive(self, most_bytes: int) -> Packed | None:
        """A worker's part. ValueError for more than `most_bytes`."""
        with self._told():
            num_header, num_data = self._broadcast(torch.zeros(2, dtype=torch.int64), STALL_S)
            if num_header < 0:
                return None
            if num_data < 0 or num_header + num_data > most_bytes:
                raise ValueError(f"{num_header + num_data} bytes, and {most_bytes} may come")
            header = self._broadcast(torch.zeros(int(num_header), dtype=torch.uint8), SILENT_S)
            data = torch.empty(int(num_data), dtype=torch.uint8, device=self.device)
            self._broadcast(data, patience_s(len(data)))
            return Packed(header.cpu().numpy().tobytes(), data)

    def close(self) -> None:
        """Give up what is under way, here and, as they notice, in the other processes."""
        if not self._is_closed.is_set():
            self._is_closed.set()
            left, self._group = [self._group], None
            if self.device.type == "cuda" and left[0] is not None:
                left[0].abort()
            # its end waits for what is under way, which only the other end may be able to end
            threading.Thread(target=left.clear, daemon=True).start()

    def _broadcast(self, tensor: Tensor, limit_s: float) -> Tensor:
        """The trainer's tensor, in all processes; small ones come back on the host."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # this may be another thread
        there = tensor.to(self.device)
        options: Any = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = TRAINER, 0
        if self._is_closed.is_set():
            raise GroupBroken("it was closed")
        work = self._group.broadcast([there], options)
        due, pause = time.monotonic() + limit_s, POLL_S[0]
        try:
            while not work.is_completed():
                if self._is_closed.is_set():
                    raise GroupBroken("it was closed")
                if time.monotonic() > due:
                    raise GroupBroken(f"nothing came through within {limit_s:.0f} s")
                time.sleep(pause)
                pause = min(2 * pause, POLL_S[1])
            work.wait()
        finally:
            del work  # it keeps the connections, and an error keeps this frame
        return there

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Whatever goes wrong closes the group."""
        try:
            yield
        except (ValueError, GroupBroken):
            self.close()
            raise
        except Exception as error:
            self.close()
            raise GroupBroken(
                "another process of the group of trainer and workers hung up, or never came "
                f"({type(error).__name__}: {str(error)[:160]})"
            ) from error


def _gloo(store: dist.Store, rank: int, size: int, address: str) -> Any:
    options: Any = dist.ProcessGroupGloo._Options()
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
    options._timeout = timedelta(seconds=SILENT_S)  # to connect
    options._threads = 1
    return dist.ProcessGroupGloo(store, rank, size, options)


def _nccl(store: dist.Store, rank: int, size: int, address: str) -> Any:
    nccl: Any = dist.ProcessGroupNCCL
    options = nccl.Options()
    options._timeout = LATER
    before = {name: os.environ.get(name) for name in UNWATCHED}
    os.environ.update(UNWATCHED)  # read as it is made
    try:
        return nccl(store, rank, size, options)
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _within(seconds: float, function: Callable[[], T]) -> T:
    """What it returns; GroupBroken if it takes longer: then it is left to itself."""
    found: list[T] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            found.append(function())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if failed:
        raise failed[0]
    if not found:
        raise GroupBroken(f"not every process of it was there within {seconds:.0f} s")
    return found[0]
