"""Small kernels, some faulty on purpose, on which aot.py and interpreter_trace.py are tested."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def copy_kernel(x, y, x_stride, y_stride, n, BLOCK: tl.constexpr):
    """y[row, :n] = x[row, :n]; wrong if n is more than the width."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + row * x_stride + columns, mask=columns < n)
    tl.store(y + row * y_stride + columns, values, mask=columns < n)


def copy_rows(x, y, n=None, block=2048):
    n = x.shape[1] if n is None else n
    grid = (x.shape[0], triton.cdiv(n, block))
    copy_kernel[grid](x, y, x.stride(0), y.stride(0), n, BLOCK=block)


@triton.jit
def softmax_kernel(x, y, n, TWICE: tl.constexpr, BLOCK: tl.constexpr):
    """y = softmax of each row of x; TWICE loads the row for its maximum and again for the rest."""
    columns = tl.arange(0, BLOCK)
    row = tl.program_id(0).to(tl.int64) * n
    z = tl.load(x + row + columns, mask=columns < n, other=-float("inf")).to(tl.float32)
    largest = tl.max(z, 0)
    if TWICE:
        z = tl.load(x + row + columns, mask=columns < n, other=-float("inf")).to(tl.float32)
    p = tl.exp2((z - largest) * 1.4426950408889634)
    tl.store(y + row + columns, p / tl.sum(p, 0), mask=columns < n)


def softmax(x, y, twice=False, block=None, **options):
    block = block or triton.next_power_of_2(x.shape[1])
    softmax_kernel[(len(x),)](x, y, x.shape[1], TWICE=twice, BLOCK=block, **options)


@triton.jit
def matmul_kernel(
    a, b, c, M, N, K, TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr
):
    """c = a bᵀ, a (M, K), b (N, K), c (M, N), accumulated in fp32."""
    rows = tl.program_id(0).to(tl.int64) * TILE_M + tl.arange(0, TILE_M)
    columns = tl.program_id(1).to(tl.int64) * TILE_N + tl.arange(0, TILE_N)
    inner = tl.arange(0, TILE_K)
    sums = tl.zeros((TILE_M, TILE_N), tl.float32)
    for k in tl.range(0, K, TILE_K, num_stages=3):
        in_k = k + inner[None, :] < K
        a_tile = tl.load(
            a + rows[:, None] * K + k + inner[None, :],
            mask=(rows[:, None] < M) & in_k,
            other=0.0,
        )
        b_tile = tl.load(
            b + columns[:, None] * K + k + inner[None, :],
            mask=(columns[:, None] < N) & in_k,
            other=0.0,
        )
        sums = tl.dot(a_tile, b_tile.T, sums)
    inside = (rows[:, None] < M) & (columns[None, :] < N)
    tl.store(c + rows[:, None] * N + columns[None, :], sums.to(c.dtype.element_ty), mask=inside)


def matmul(a, b, c, tiles=(128, 256, 64), num_warps=8):
    grid = (triton.cdiv(len(a), tiles[0]), triton.cdiv(len(b), tiles[1]))
    sizes = dict(zip(("TILE_M", "TILE_N", "TILE_K"), tiles, strict=True))
    matmul_kernel[grid](a, b, c, len(a), len(b), a.shape[1], **sizes, num_warps=num_warps)


BLOCKS = [triton.Config({"BLOCK": 256}), triton.Config({"BLOCK": 1024}, num_warps=8)]


@triton.autotune(BLOCKS, key=["n"])
@triton.jit
def double_kernel(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, 2 * tl.load(x + i, mask=i < n), mask=i < n)


def double(x, y):
    double_kernel[lambda meta: (triton.cdiv(len(x), meta["BLOCK"]),)](x, y, len(x))


@triton.autotune(BLOCKS, key=["n"])
@triton.jit
def refused_kernel(x, n, BLOCK: tl.constexpr):
    """One of its configurations does not compile."""
    tl.static_assert(BLOCK == 256)
    i = tl.arange(0, BLOCK)
    tl.store(x + i, i.to(tl.float32), mask=i < n)


@triton.jit
def collide_kernel(x, SAME: tl.constexpr, BLOCK: tl.constexpr):
    """Every program writes element 0; SAME: every lane does."""
    i = tl.arange(0, BLOCK)
    tl.store(x + (i * 0 if SAME else i), i.to(tl.float32))


@triton.jit
def swap_kernel(x, BARRIER: tl.constexpr, BLOCK: tl.constexpr):
    """Stores, then loads what other threads of the program stored."""
    i = tl.arange(0, BLOCK)
    tl.store(x + i, i.to(tl.float32))
    if BARRIER:
        tl.debug_barrier()
    tl.store(x + BLOCK + i, tl.load(x + BLOCK - 1 - i))


@triton.jit
def count_kernel(ids, counts, n, BLOCK: tl.constexpr, UNROLL: tl.constexpr):
    """counts[id] += 1 for each id, n of them, by atomics in a while loop."""
    start = tl.program_id(0) * BLOCK * UNROLL
    stop = tl.minimum(start + BLOCK * UNROLL, n)
    while start < stop:
        for _ in tl.static_range(UNROLL):
            i = start + tl.arange(0, BLOCK)
            values = tl.load(ids + i, mask=i < stop, other=0)
            tl.atomic_add(counts + values, 1, mask=i < stop)
            start += BLOCK


@triton.jit
def bf16_kernel(a, b, out, n, BLOCK: tl.constexpr):
    """Rows of out: a + b, a b, a / b, -a, the smaller, a if a < b else 1, 3 a; all in bf16."""
    i = tl.arange(0, BLOCK)
    x = tl.load(a + i, mask=i < n)
    y = tl.load(b + i, mask=i < n, other=1.0)
    one = tl.full((BLOCK,), 1.0, tl.bfloat16)
    tl.store(out + 0 * n + i, x + y, mask=i < n)
    tl.store(out + 1 * n + i, x * y, mask=i < n)
    tl.store(out + 2 * n + i, x / y, mask=i < n)
    tl.store(out + 3 * n + i, -x, mask=i < n)
    tl.store(out + 4 * n + i, tl.minimum(x, y), mask=i < n)
    tl.store(out + 5 * n + i, tl.where(x < y, x, one), mask=i < n)
    tl.store(out + 6 * n + i, x * 3, mask=i < n)


def bf16_in_torch(a, b):
    """bf16_kernel's rows."""
    chosen = torch.where(a < b, a, 1.0)
    return torch.stack([a + b, a * b, (a / b), -a, torch.minimum(a, b), chosen, a * 3])


@triton.jit
def fma_kernel(x, y, z, out, n, BLOCK: tl.constexpr):
    """out = x y + z, rounded once."""
    i = tl.arange(0, BLOCK)
    a, b = tl.load(x + i, mask=i < n), tl.load(y + i, mask=i < n)
    tl.store(out + i, tl.fma(a, b, tl.load(z + i, mask=i < n)), mask=i < n)


@triton.jit
def reduce_kernel(x, values, indices, SUM: tl.constexpr, BLOCK: tl.constexpr):
    """The largest and the smallest of bf16 numbers and where; SUM: their sum, in bf16."""
    z = tl.load(x + tl.arange(0, BLOCK))
    if SUM:
        tl.store(values, tl.sum(z, 0))
    else:
        tl.store(values, tl.max(z, 0))
        tl.store(values + 1, tl.min(z, 0))
        tl.store(indices, tl.argmax(z, 0))
        tl.store(indices + 1, tl.argmin(z, 0))


@triton.jit
def block_copy_kernel(x, y, M, N, x_stride, y_stride, STEP: tl.constexpr, BLOCK: tl.constexpr):
    """y = x, as blocks of BLOCK by BLOCK that descriptors move, a program per row of blocks.

    Rows of blocks are STEP apart: where STEP < BLOCK, two programs write one element.
    """
    source = tl.make_tensor_descriptor(x, [M, N], [x_stride, 1], [BLOCK, BLOCK])
    target = tl.make_tensor_descriptor(y, [M, N], [y_stride, 1], [BLOCK, BLOCK])
    row = tl.program_id(0) * STEP
    for column in tl.range(0, N, BLOCK, flatten=True, warp_specialize=True):
        target.store([row, column], source.load([row, column]))


def block_copy(x, y, step=16, block=16, height=None):
    """`height`: of the tensors, as the descriptors are told."""
    height = height or len(x)
    sizes = (height, x.shape[1], x.stride(0), y.stride(0))
    block_copy_kernel[(triton.cdiv(height, step),)](x, y, *sizes, STEP=step, BLOCK=block)


@triton.jit
def block_sum_kernel(x, out, M, N, x_stride, BLOCK: tl.constexpr):
    """Sum of one block that begins at the first element."""
    blocks = tl.make_tensor_descriptor(x, [M, N], [x_stride, 1], [BLOCK, BLOCK])
    tl.store(out, tl.sum(tl.sum(blocks.load([0, 0]).to(tl.float32), 1), 0))
