"""What interpreted Triton kernels do to memory: bytes per argument, faults, races; exps, dot FLOPs.

    with trace() as launches:
        my_op(x)
    assert launches[0]["x"].loaded_bytes == x.nbytes

Needs TRITON_INTERPRET=1, and calls fix_interpreter() (interpreter.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from triton.runtime import interpreter

from tests.support.interpreter import Builder, fix_interpreter

NOBODY, SEVERAL, ATOMIC = 0, -1, -2  # in place of a program's number, which starts at 1
EXPS, LOGS = (np.exp, np.exp2), (np.log, np.log2)
# Pointers carry the number of their argument above the 48 bits of an address, so that an access
# belongs to the argument it was computed from, wherever it points.
ADDRESS_BITS = np.uint64(48)
ADDRESS = np.uint64((1 << 48) - 1)


class MemoryFault(RuntimeError):
    """An access outside the argument's elements; raised before memory is touched."""


class Race(RuntimeError):
    """Accesses whose order a GPU does not fix."""


class Argument:
    """One tensor argument of a launch.

    loaded_bytes, stored_bytes, atomic_bytes: of the elements that each tl.load, tl.store or
    tl.atomic_* of each program touches; one that several lanes of a load ask for counts once.
    loads, stores: how often each element was loaded and stored, in the order of memory.
    """

    def __init__(self, name: str, tensor: torch.Tensor, history: History):
        self.name = name
        self.itemsize = tensor.element_size()
        self.start = tensor.data_ptr()
        self.history = history
        last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
        self.span = last + 1 if tensor.numel() else 0
        # A view does not own what lies between its rows.
        self._own = np.zeros(self.span, bool)
        torch.from_numpy(self._own).as_strided(tensor.shape, tensor.stride()).fill_(True)
        self._loads = np.zeros(self.span, np.uint32)
        self._stores = np.zeros(self.span, np.uint32)
        self.loaded_bytes = self.stored_bytes = self.atomic_bytes = 0

    @property
    def loads(self) -> np.ndarray:
        return self._loads[self._own]

    @property
    def stores(self) -> np.ndarray:
        return self._stores[self._own]

    def count(self, kind: str, elements: np.ndarray) -> None:
        num_bytes = elements.size * self.itemsize
        if kind == "load":
            self.loaded_bytes += num_bytes
            self._loads[elements] += 1
        elif kind == "store":
            self.stored_bytes += num_bytes
            self._stores[elements] += 1
        else:
            self.atomic_bytes += num_bytes

    def elements(self, kind: str, addresses: np.ndarray, itemsize: int) -> np.ndarray:
        """Numbers of the elements at these addresses. Raises MemoryFault."""
        index, rest = np.divmod(addresses.astype(np.int64) - self.start, self.itemsize)
        if itemsize != self.itemsize or rest.any():
            raise MemoryFault(
                f"{kind} of {itemsize} bytes that are not an element of {self.name}, whose "
                f"elements have {self.itemsize}."
            )
        outside = (index < 0) | (index >= self.span)
        outside[~outside] = ~self._own[index[~outside]]
        if outside.any():
            raise MemoryFault(
                f"out-of-bounds {kind} of {self.name}: {int(outside.sum())} elements, from "
                f"{index[outside].min()} to {index[outside].max()}; it has {self._own.sum()} in "
                f"0 .. {self.span - 1}."
            )
        return index

    def __repr__(self) -> str:
        return (
            f"{self.name}: {self.loaded_bytes} B loaded, {self.stored_bytes} B stored, "
            f"{self.atomic_bytes} B atomic"
        )


class History:
    """Which program read and wrote each element of a storage, for all arguments that view it."""

    def __init__(self, start: int, num_bytes: int, itemsize: int):
        self.start = start
        self.itemsize = itemsize
        length = num_bytes // itemsize + 1
        self.reader = np.zeros(length, np.int64)
        self.writer = np.zeros(length, np.int64)
        self.written_at = np.zeros(length, np.int64)  # the number of barriers until then

    def record(self, kind: str, index: np.ndarray, program: int, barriers: int) -> str | None:
        """Notes an access; what is wrong with its order, if anything."""
        reader, writer = self.reader[index], self.writer[index]
        others_read = ((reader != NOBODY) & (reader != program)).any()
        others_wrote = ((writer != NOBODY) & (writer != program)).any()
        if kind == "load":
            fresh = (writer == program) & (self.written_at[index] == barriers)
            alone = (reader == NOBODY) | (reader == program)
            self.reader[index] = np.where(alone, program, SEVERAL)
            if fresh.any():
                return "store, then load, without tl.debug_barrier between"
            return "a program loads what another one writes" if others_wrote else None
        if kind == "atomic":
            others_wrote = ((writer > NOBODY) & (writer != program)).any()
        self.writer[index] = ATOMIC if kind == "atomic" else program
        self.written_at[index] = barriers
        if others_wrote:
            return "two programs write one element"
        return "a program writes what another one loads" if others_read else None


@dataclass
class Launch:
    """One launch: launch["x"] is its argument x."""

    kernel: str
    arguments: dict[str, Argument] = field(default_factory=dict)
    races: list[str] = field(default_factory=list)
    exps: int = 0  # elements that went through exp or exp2, masked lanes included
    logs: int = 0
    dot_flops: int = 0  # 2 M N K for each tl.dot
    barriers: int = 0
    _numbers: dict[int, int] = field(default_factory=dict)  # id of a tensor -> of its argument
    _histories: dict[tuple[int, int], History] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Argument:
        return self.arguments[name]

    @property
    def bytes(self) -> int:
        """Loaded and stored, all arguments together; an atomic does both."""
        counts = self.arguments.values()
        return sum(a.loaded_bytes + a.stored_bytes + 2 * a.atomic_bytes for a in counts)

    def add_argument(self, name: str, tensor: torch.Tensor) -> None:
        storage, itemsize = tensor.untyped_storage(), tensor.element_size()
        key = (storage.data_ptr(), itemsize)
        history = self._histories.setdefault(key, History(key[0], storage.nbytes(), itemsize))
        self.arguments[name] = Argument(name, tensor, history)
        self._numbers[id(tensor)] = len(self.arguments)

    def tag(self, tensor: Any) -> np.uint64:
        """What a pointer to this argument carries above its address."""
        return np.uint64(self._numbers.get(id(tensor), 0)) << ADDRESS_BITS

    def access(self, kind: str, pointers: np.ndarray, mask: np.ndarray, itemsize: int) -> None:
        """Counts one load, store or atomic of one program. Raises MemoryFault."""
        pointers, mask = np.broadcast_arrays(pointers, mask)
        pointers = pointers[mask]
        if not pointers.size:
            return
        numbers = np.unique(pointers >> ADDRESS_BITS)
        where = f"{self.kernel}, program {interpreter.interpreter_builder.grid_idx}"
        if numbers.size > 1 or not 0 < numbers[0] <= len(self.arguments):
            raise MemoryFault(f"{where}: {kind} through pointers that come from no argument.")
        argument = list(self.arguments.values())[int(numbers[0]) - 1]
        try:
            index = argument.elements(kind, pointers & ADDRESS, itemsize)
        except MemoryFault as fault:
            raise MemoryFault(f"{where}: {fault}") from None
        elements = np.unique(index)
        argument.count(kind, elements)
        history = argument.history
        shared = elements + (argument.start - history.start) // itemsize
        race = history.record(kind, shared, _program_number(), self.barriers)
        if kind == "store" and elements.size < index.size:
            race = "one store writes an element more than once"
        if race and f"{argument.name}: {race}" not in self.races:
            self.races.append(f"{argument.name}: {race}")


@contextlib.contextmanager
def trace(raise_races: bool = True) -> Iterator[list[Launch]]:
    """Collects a Launch for each launch in its body; an autotuned kernel has several.

    Raises MemoryFault from the launch that leaves its tensors: given a column slice of a wider
    tensor, reading past the end of a row is a fault too. Raises Race at the end, unless
    raise_races is False: partial results read behind an atomic counter look like a race here.
    """
    fix_interpreter()
    launches: list[Launch] = []
    with contextlib.ExitStack() as undo:
        _trace_memory(undo, launches)
        _trace_launches(undo, launches)
        _trace_operations(undo, launches)
        yield launches
    races = [f"{launch.kernel}: {race}" for launch in launches for race in launch.races]
    if raise_races and races:
        raise Race("\n".join(races))


class _Memory:
    """Stands for the interpreter's C++ module, through which each access to memory goes."""

    def __init__(self, real: Any, launches: list[Launch]):
        self._real = real
        self._launches = launches

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def load(self, pointers, mask, other, dtype):
        self._launches[-1].access("load", pointers, mask, np.dtype(dtype).itemsize)
        return self._real.load(pointers & ADDRESS, mask, other, dtype)

    def store(self, pointers, values, mask):
        self._launches[-1].access("store", pointers, mask, values.dtype.itemsize)
        return self._real.store(pointers & ADDRESS, values, mask)

    def atomic_rmw(self, op, pointers, values, mask, order):
        self._launches[-1].access("atomic", pointers, mask, values.dtype.itemsize)
        return self._real.atomic_rmw(op, pointers & ADDRESS, values, mask, order)

    def atomic_cas(self, pointers, expected, values, order):
        self._launches[-1].access("atomic", pointers, np.True_, values.dtype.itemsize)
        return self._real.atomic_cas(pointers & ADDRESS, expected, values, order)


def _trace_memory(undo: contextlib.ExitStack, launches: list[Launch]) -> None:
    convert = interpreter._implicit_cvt

    def implicit_cvt(argument):
        converted = convert(argument)
        tag = launches[-1].tag(argument)
        if tag:
            converted.handle.data = converted.handle.data + tag
        return converted

    _swap(undo, interpreter, "_implicit_cvt", implicit_cvt)
    _swap(undo, interpreter, "_interpreter", _Memory(interpreter._interpreter, launches))


def _trace_launches(undo: contextlib.ExitStack, launches: list[Launch]) -> None:
    executor = interpreter.GridExecutor
    to_host, run = executor._init_args_hst, executor.__call__

    def init_args(self, args, kwargs):
        host_args, host_kwargs = to_host(self, args, kwargs)
        named = [*zip(self.arg_names, host_args, strict=False), *host_kwargs.items()]
        for name, value in named:
            for full_name, tensor in _tensors(name, value):
                launches[-1].add_argument(full_name, tensor)
        return host_args, host_kwargs

    def call(self, *args, **kwargs):
        launches.append(Launch(self.fn.__name__))
        try:
            return run(self, *args, **kwargs)
        except interpreter.InterpreterError as error:
            cause = error  # the interpreter wraps errors, once per function that was called
            while cause is not None and not isinstance(cause, MemoryFault):
                cause = cause.__cause__
            raise (cause or error) from None

    _swap(undo, executor, "_init_args_hst", init_args)
    _swap(undo, executor, "__call__", call)


def _trace_operations(undo: contextlib.ExitStack, launches: list[Launch]) -> None:
    unary, dot, barrier = Builder.unary_op, Builder.create_dot, Builder.create_barrier

    def unary_op(self, operand, op):
        launches[-1].exps += operand.data.size if op in EXPS else 0
        launches[-1].logs += operand.data.size if op in LOGS else 0
        return unary(self, operand, op)

    def create_dot(self, a, b, accumulator, *precision):
        launches[-1].dot_flops += 2 * a.data.shape[-1] * accumulator.data.size
        return dot(self, a, b, accumulator, *precision)

    def create_barrier(self):
        launches[-1].barriers += 1
        return barrier(self)

    _swap(undo, Builder, "unary_op", unary_op)
    _swap(undo, Builder, "create_dot", create_dot)
    _swap(undo, Builder, "create_barrier", create_barrier)


def _swap(undo: contextlib.ExitStack, holder: Any, name: str, value: Any) -> None:
    undo.callback(setattr, holder, name, getattr(holder, name))
    setattr(holder, name, value)


def _tensors(name: str, value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in an argument: itself, a descriptor's, those of a tuple."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, tuple):
        for i, item in enumerate(value):
            yield from _tensors(f"{name}[{i}]", item)
    elif isinstance(getattr(value, "base", None), torch.Tensor):
        yield name, value.base


def _program_number() -> int:
    x, y, z = interpreter.interpreter_builder.grid_idx
    num_x, num_y, _ = interpreter.interpreter_builder.grid_dim
    return 1 + x + num_x * (y + num_y * z)
