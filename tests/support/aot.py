"""Triton kernels compiled for GPUs that are not here, and what came out of the compiler.

compile_for(target, call) runs `call`, which calls a launcher with CPU tensors. Each launch is
compiled for the target with the specialisation of its real arguments (dtypes, divisibility by 16,
ints equal to 1, None), an autotuned kernel in each configuration, and nothing runs. Seen with
triton 3.6.0 and 3.9.0. Kernels must have been decorated without TRITON_INTERPRET=1.
"""

from __future__ import annotations

import contextlib
import io
import math
import mmap
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.autotuner import Autotuner
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from tests.support.machine_code import read_amd, read_nvidia


@dataclass(frozen=True)
class Device:
    """What a target allows: shared memory in bytes per block, and its number of processors."""

    gpu: GPUTarget
    shared_limit: int
    num_processors: int


DEVICES = {
    "sm_80": Device(GPUTarget("cuda", 80, 32), 163 * 1024, 108),
    "sm_90": Device(GPUTarget("cuda", 90, 32), 227 * 1024, 132),
    "sm_100": Device(GPUTarget("cuda", 100, 32), 227 * 1024, 148),
    "gfx942": Device(GPUTarget("hip", "gfx942", 64), 64 * 1024, 304),
}
TENSOR_MEMORY_COLUMNS = 512  # of a processor of sm_100


@dataclass(frozen=True)
class Compiled:
    """One kernel compiled for one target. Counts are of instructions in its machine code."""

    target: str
    kernel: str
    pointers: str  # the dtypes of its tensor arguments, in order
    config: dict[str, Any]  # its constexprs
    num_warps: int
    num_stages: int
    registers: int  # per thread
    spill_bytes: int  # NVIDIA: stored to and loaded from local memory; AMD: scratch per lane
    shared_bytes: int
    shared_limit: int
    tensor_memory: int  # columns; 0 where the target has none
    mma: dict[str, int]  # instruction -> count
    loads: int  # from global memory, cp.async and TMA included; atomics are neither load nor store
    loads_128: int  # those of 128 bits or more per thread (a TMA copy has no such width)
    stores: int
    stores_128: int
    tma_loads: int  # blocks that the hardware addresses, counted among the loads and the stores
    tma_stores: int
    specialized: list[int]  # registers per thread of each kind of warp group; empty: none is
    product_loop: dict[str, int]  # instructions of one step of the loop with the products
    epilogue: dict[str, int]  # of one thread, after a tile's products, where it takes exp2
    seconds: float  # to compile

    @property
    def fits(self) -> bool:
        """Whether a launch would find the shared and the tensor memory that it asks for."""
        in_shared = self.shared_bytes <= self.shared_limit
        return in_shared and self.tensor_memory <= TENSOR_MEMORY_COLUMNS


def compile_for(target: str, call: Callable[[], Any]) -> list[Compiled]:
    """What `call` launches, compiled for `target`: one row per kernel and specialisation.

    The kernels' outputs hold nothing: nothing runs. Raises ValueError for an unknown target or if
    nothing was launched, and what the compiler raises, also where an autotuner would drop the
    configuration without a word.
    """
    if target not in DEVICES:
        raise ValueError(f"target must be one of {', '.join(DEVICES)}, got {target!r}.")
    capture = _Capture(target)
    with capture.installed():
        call()
    if capture.failures:
        raise capture.failures[0]
    if not capture.rows:
        raise ValueError(
            f"Nothing was compiled for {target}: expected a call that launches Triton kernels; "
            "kernels decorated under TRITON_INTERPRET=1 are never compiled, and a launcher "
            "that asks for CUDA tensors took another path."
        )
    return list(capture.rows.values())


def untouched(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A contiguous CPU tensor of any size, its pages not backed by memory until they are touched.

    Launchers see true strides and an address divisible by 16.
    """
    num_elements = math.prod(shape)
    no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)  # named from Python 3.13 on
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    pages = mmap.mmap(-1, max(1, num_elements * dtype.itemsize), flags=flags)
    return torch.frombuffer(pages, dtype=dtype, count=num_elements).view(shape)


def table(rows: list[Compiled]) -> str:
    """The rows as aligned text, with a header."""
    header = "target kernel pointers config warps stages regs spill shared MMA ld128 st128 sec"
    lines = [header.split()]
    for row in rows:
        cells = [
            row.target,
            row.kernel,
            row.pointers,
            ",".join(f"{name}={value}" for name, value in row.config.items()) or "-",
            row.num_warps,
            row.num_stages,
            row.registers,
            row.spill_bytes,
            f"{row.shared_bytes}{'' if row.fits else ' TOO MUCH'}",
            " ".join(f"{name}:{count}" for name, count in row.mma.items()) or "-",
            f"{row.loads_128}/{row.loads}",
            f"{row.stores_128}/{row.stores}",
            f"{row.seconds:.1f}",
        ]
        lines.append([str(cell) for cell in cells])
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    padded = [[cell.ljust(n) for cell, n in zip(line, widths, strict=True)] for line in lines]
    return "\n".join("  ".join(line).rstrip() for line in padded)


class _Driver:
    """Stands for the GPU's driver: answers what a launch asks before it compiles."""

    def __init__(self, device: Device):
        self.device = device
        self.utils = self

    def get_current_target(self) -> GPUTarget:
        return self.device.gpu

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_properties(self, device: int = 0) -> dict[str, int]:
        return {
            "max_shared_mem": self.device.shared_limit,
            "multiprocessor_count": self.device.num_processors,
            "warpSize": self.device.gpu.warp_size,
        }


class _Capture:
    """Every launch under installed() is compiled for the target and becomes a row."""

    def __init__(self, target: str):
        self.target = target
        self.device = DEVICES[target]
        self.rows: dict[int, Compiled] = {}
        self.failures: list[Exception] = []
        self.kept: list[Any] = []  # compiled kernels; alive, so that an id is not used twice

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        run, tune, active = JITFunction.run, Autotuner.run, driver._active
        with contextlib.ExitStack() as undo, knobs.cache.scope(), knobs.nvidia.scope():
            # A cached kernel has no ptxas log to read: the cache is empty and stays so.
            knobs.cache.dir = undo.enter_context(tempfile.TemporaryDirectory())
            knobs.nvidia.dump_ptxas_log = True
            fresh: set[int] = set()  # kernels and tuners that have an empty cache of their own

            def compile_only(kernel, *args, grid, warmup, **kwargs):
                if id(kernel) not in fresh:
                    fresh.add(id(kernel))
                    _replace(undo, kernel, device_caches=defaultdict(kernel.create_binder))
                return self.add(
                    kernel, lambda: run(kernel, *args, grid=grid, warmup=True, **kwargs)
                )

            def tune_once(tuner, *args, **kwargs):
                if id(tuner) not in fresh:
                    fresh.add(id(tuner))
                    _replace(undo, tuner, cache={}, do_bench=_compile_once)
                return tune(tuner, *args, **kwargs)

            JITFunction.run, Autotuner.run = compile_only, tune_once
            driver.set_active(_Driver(self.device))
            try:
                yield
            finally:
                JITFunction.run, Autotuner.run = run, tune
                driver._active = active

    def add(self, kernel: JITFunction, launch: Callable[[], Any]) -> Any:
        log, start = io.StringIO(), time.perf_counter()
        try:
            with contextlib.redirect_stdout(log):
                compiled = launch()
        except Exception as error:
            self.failures.append(error)
            raise
        if id(compiled) not in self.rows:
            self.kept.append(compiled)
            seconds = time.perf_counter() - start
            self.rows[id(compiled)] = self.row(kernel, compiled, log.getvalue(), seconds)
        return compiled

    def row(self, kernel: JITFunction, compiled: Any, log: str, seconds: float) -> Compiled:
        read = read_nvidia if self.device.gpu.backend == "cuda" else read_amd
        constants, types = compiled.src.constants, compiled.src.signature.values()
        return Compiled(
            target=self.target,
            kernel=kernel.__name__,
            pointers=",".join(t[1:] for t in types if isinstance(t, str) and t[0] == "*"),
            config={p.name: constants[(p.num,)] for p in kernel.params if p.is_constexpr},
            num_warps=compiled.metadata.num_warps,
            num_stages=compiled.metadata.num_stages,
            shared_bytes=compiled.metadata.shared,
            shared_limit=self.device.shared_limit,
            tensor_memory=getattr(compiled.metadata, "tmem_size", None) or 0,
            seconds=seconds,
            **read(compiled.asm, log),
        )


def _compile_once(launch: Callable[[], Any], quantiles: Any = None) -> list[float]:
    """In place of the autotuner's benchmark: all configurations are equally fast."""
    launch()
    return [1.0, 1.0, 1.0]


def _replace(undo: contextlib.ExitStack, holder: Any, **values: Any) -> None:
    """Sets attributes of `holder`; `undo` puts back those it had, and removes the others."""
    for name, value in values.items():
        if name in vars(holder):
            undo.callback(setattr, holder, name, vars(holder)[name])
        else:
            undo.callback(delattr, holder, name)
        setattr(holder, name, value)
