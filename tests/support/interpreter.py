"""Triton's interpreter (TRITON_INTERPRET=1) made right for bf16, and able to run autotuned kernels.

Stock, bf16 operations, tl.dot and reductions work on the raw bits as if they were integers, and
stores truncate. fix_interpreter() mends that: arithmetic in fp32, rounded to nearest even after
each operation, tl.fma once. What it cannot make right it refuses. Seen with triton 3.9.0 (numpy
2.4) and 3.6.0, which needs numpy < 2.4. interpreter_trace.py counts memory traffic and finds races.

The mode is fixed when a kernel is decorated: set TRITON_INTERPRET=1 before kernels are imported.
The interpreter accepts what the compiler refuses (aot.py compiles). Its cost is per operation: a
large BLOCK makes a fast test.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import triton
import triton.language as tl
from triton import knobs
from triton._C.libtriton import ir
from triton.runtime import interpreter
from triton.runtime.autotuner import Autotuner

Builder = interpreter.InterpreterBuilder
Handle = interpreter.TensorHandle
# Combine functions whose result is one of the operands: exact in any dtype that holds bf16.
SELECTIONS = ("_argmin_combine", "_argmax_combine", "_elementwise_max", "_elementwise_min")


def fix_interpreter() -> None:
    """bf16 as a GPU computes it, and @triton.autotune without one. Once per process; idempotent.

    An autotuned kernel runs with every configuration, and once more with the first: a kernel that
    adds to its output needs reset_to_zero or restore_value, as it does on a GPU.
    Raises ValueError where the interpreter is off, or numpy too new for this triton.
    """
    if not knobs.runtime.interpret:
        raise ValueError("Set TRITON_INTERPRET=1 before any kernel is imported; it is not set.")
    numpy_version = tuple(int(n) for n in np.__version__.split(".")[:2])
    if triton.__version__.startswith("3.6.") and numpy_version >= (2, 4):
        raise ValueError(
            f"The interpreter of triton {triton.__version__} needs numpy < 2.4, got "
            f"{np.__version__}: pip install 'numpy<2.4', or use a newer triton."
        )
    if getattr(Builder, "_bf16_is_right", False):
        return
    Builder._bf16_is_right = True
    Builder.create_descriptor_reduce = _descriptor_reduce
    _fix_casts()
    _fix_arithmetic()
    _fix_reductions()
    _fix_fma()
    for name in ("create_fma", "create_erf", "create_rsqrt", "create_atomic_rmw"):
        _refuse_bf16(name)
    Autotuner.do_bench = property(lambda self: _run_once)


def bf16_to_float32(bits: np.ndarray) -> np.ndarray:
    """uint16 bits of bf16 -> fp32, exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def float32_to_bf16(values: np.ndarray) -> np.ndarray:
    """fp32 -> uint16 bits of bf16, to nearest even; every NaN becomes the quiet one."""
    values = np.asarray(values, np.float32)
    bits = values.view(np.uint32)
    half = np.uint32(0x7FFF) + ((bits >> 16) & 1)
    rounded = ((bits + half) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def is_bf16(handle: Any) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _widen(handle: Any) -> Any:
    """The handle, in fp32 if it is bf16."""
    return Handle(bf16_to_float32(handle.data), tl.float32) if is_bf16(handle) else handle


def _narrow(values: np.ndarray) -> Any:
    return Handle(float32_to_bf16(values), tl.bfloat16)


def _descriptor_reduce(self: Any, kind: Any, descriptor: Any, value: Any, indices: Any) -> Any:
    """descriptor.atomic_add, which the stock interpreter lacks."""
    if kind != ir.DESCRIPTOR_REDUCE_KIND.ADD or value.dtype.scalar != tl.float32:
        raise NotImplementedError(f"of descriptors only atomic_add of fp32 is here, got {kind}.")
    pointers, mask = descriptor.materialize_pointers(indices)
    add, order, scope = ir.ATOMIC_OP.FADD, ir.MEM_SEMANTIC.RELAXED, ir.MEM_SYNC_SCOPE.GPU
    return self.create_atomic_rmw(add, pointers, value, mask, order, scope)


def _fix_casts() -> None:
    cast = Builder.cast_impl

    def cast_impl(self, source, dtype):
        if dtype.scalar == tl.bfloat16 and not is_bf16(source):
            return _narrow(source.data.astype(np.float32))
        if dtype.scalar == tl.bfloat16:
            return source
        return cast(self, _widen(source), dtype)

    Builder.cast_impl = cast_impl
    Builder.get_bf16 = lambda self, value: _narrow(np.array([value], np.float32))


def _fix_arithmetic() -> None:
    binary, unary, ternary = Builder.binary_op, Builder.unary_op, Builder.ternary_op
    dot = Builder.create_dot

    def binary_op(self, left, right, op):
        if not (is_bf16(left) and is_bf16(right)):
            return binary(self, left, right, op)
        out = op(bf16_to_float32(left.data), bf16_to_float32(right.data))
        return Handle(out, tl.bfloat16) if out.dtype == bool else _narrow(out)

    def unary_op(self, operand, op):
        if not is_bf16(operand):
            return unary(self, operand, op)
        return _narrow(op(bf16_to_float32(operand.data)))

    def ternary_op(self, first, second, third, op):
        if op is np.where or not is_bf16(third):  # np.where moves bits
            return ternary(self, first, second, third, op)
        return _narrow(op(*(bf16_to_float32(h.data) for h in (first, second, third))))

    def create_dot(self, a, b, accumulator, *precision):
        return dot(self, _widen(a), _widen(b), accumulator, *precision)

    Builder.binary_op, Builder.unary_op, Builder.ternary_op = binary_op, unary_op, ternary_op
    Builder.create_dot = create_dot


def _fix_fma() -> None:
    """x y + z rounded once. Stock, the product is rounded too.

    fp64 holds a product of two fp32 numbers; that the sum is rounded to fp64 first changes the
    result only near a tie.
    """
    fma = Builder.create_fma

    def create_fma(self, x, y, z):
        if x.dtype.scalar != tl.float32:
            return fma(self, x, y, z)
        a, b, c = (h.data.astype(np.float64) for h in (x, y, z))
        return Handle((a * b + c).astype(np.float32), z.dtype.scalar)

    Builder.create_fma = create_fma


def _fix_reductions() -> None:
    """min, max, argmin and argmax are exact in fp32. A sum's rounding depends on its order."""
    apply = interpreter.ReduceScanOpInterface.apply

    def apply_in_fp32(self, operands):
        several = isinstance(operands, tuple)
        first = operands[0] if several else operands
        if not any(is_bf16(x.handle) for x in (operands if several else (operands,))):
            return apply(self, operands)
        if not self.combine_fn.__name__.startswith(SELECTIONS):
            raise NotImplementedError(
                f"A bf16 reduction ({self.combine_fn.__name__}) rounds at each step, in an "
                "order known to the GPU alone: cast to tl.float32 before it."
            )
        wide = tl.core.tensor(_widen(first.handle), _with_dtype(first.type, tl.float32))
        result = apply(self, (wide, *operands[1:]) if several else wide)
        value = result[0] if several else result
        value = tl.core.tensor(_narrow(value.handle.data), _with_dtype(value.type, tl.bfloat16))
        return (value, *result[1:]) if several else value

    interpreter.ReduceScanOpInterface.apply = apply_in_fp32


def _with_dtype(kind: Any, dtype: Any) -> Any:
    return tl.block_type(dtype, list(kind.shape)) if kind.is_block() else dtype


def _refuse_bf16(name: str) -> None:
    create = getattr(Builder, name)

    def refuse(self, *operands):
        if any(isinstance(x, Handle) and x.dtype.scalar == tl.bfloat16 for x in operands):
            raise NotImplementedError(
                f"{name} on bf16 is wrong in the interpreter: cast to tl.float32 before it."
            )
        return create(self, *operands)

    setattr(Builder, name, refuse)


def _run_once(launch: Callable[[], Any], quantiles: Any = None) -> list[float]:
    """In place of the autotuner's benchmark: all configurations are equally fast."""
    launch()
    return [1.0, 1.0, 1.0]
