"""Rows in fp8 (e4m3), each with a scale of its own, and the product of two such matrices.

    scale_i = max_d |x_id| / 448        q_id = e4m3(x_id / scale_i)
    raw_iv  = bf16(scale_i scale_v sum_d q_id q_vd + b_v)

`product_torch` is the specification, with fp32 sums of the values that fp8 leaves; a GPU's product
of fp8 matrices is `torch._scaled_mm`, from compute capability 9.0 on. FLOPs: 2nDV, at twice the
rate of bf16. Bytes: W read, a copy of 1 byte per number written, and 2 n V stored for raw.
"""

# pyright: strict, reportUnknownMemberType=false

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0  # of e4m3: what is larger turns into nan, not into it
ALIGNED = 16  # _scaled_mm takes multiples of it for D and V
BLOCK_NUMBERS = 1 << 24  # of the fp32 copy of some rows while they are rounded


class Fp8Rows(NamedTuple):
    """x (n, D) as scales[:, None] * values; beyond D, up to a multiple of 16, zeros."""

    values: Tensor  # (n, D') e4m3
    scales: Tensor  # (n,) fp32


def why_no_fp8(device: torch.device) -> str | None:
    """Why this device has no product of fp8 matrices with scales per row; None on a CPU too,
    where it is emulated."""
    if device.type == "cpu":
        return None
    if device.type != "cuda" or torch.version.hip is not None:
        return f"it takes an NVIDIA GPU, and this is {device.type}"
    found = torch.cuda.get_device_capability(device)
    if found < (9, 0):
        return f"it takes compute capability 9.0 (H100) or newer, and this is {found[0]}.{found[1]}"
    return None


def to_fp8(x: Tensor) -> Fp8Rows:
    """x (n, D), each row rounded to e4m3 in units of its largest number / 448."""
    n, depth = x.shape
    values = x.new_zeros(n, -(-depth // ALIGNED) * ALIGNED, dtype=E4M3)
    scales = x.new_empty(n, dtype=torch.float32)
    for rows in _blocks(n, depth):
        block = x[rows].float()  # of fp32 the very numbers: nothing may be written into it
        scale = block.abs().amax(-1).div_(LARGEST).clamp_(min=torch.finfo(torch.float32).tiny)
        # rounding may put the largest just above 448
        block = (block / scale[:, None]).clamp_(-LARGEST, LARGEST)
        values[rows, :depth] = block.to(E4M3)
        scales[rows] = scale
    return Fp8Rows(values, scales)


def product(a: Fp8Rows, b: Fp8Rows, bias: Tensor | None) -> Tensor:
    """raw (n, V) in bf16 of hidden states a (n, D) and an lm_head b (V, D), bias (V,)."""
    if a.values.is_cuda:
        return _product_cuda(a, b, bias)
    return product_torch(a, b, bias)


def product_torch(a: Fp8Rows, b: Fp8Rows, bias: Tensor | None) -> Tensor:
    """The specification."""
    raw = a.scales.new_empty(len(a.values), len(b.values), dtype=torch.bfloat16)
    hidden = a.values.float()
    for rows in _blocks(*b.values.shape):
        part = hidden @ b.values[rows].float().T
        part *= a.scales[:, None] * b.scales[rows]
        raw[:, rows] = part if bias is None else part + bias[rows].float()
    return raw


def _product_cuda(a: Fp8Rows, b: Fp8Rows, bias: Tensor | None) -> Tensor:
    vocab_size = len(b.values)
    values, scales = b
    if short := -vocab_size % ALIGNED:
        values = torch.cat([values, values.new_zeros(short, values.shape[1])])
        scales = torch.cat([scales, scales.new_ones(short)])
        bias = None if bias is None else torch.cat([bias, bias.new_zeros(short)])
    raw = cast(Any, torch)._scaled_mm(
        a.values,
        values.T,
        scale_a=a.scales[:, None].contiguous(),
        scale_b=scales[None].contiguous(),
        bias=None if bias is None else bias.bfloat16(),
        out_dtype=torch.bfloat16,
        use_fast_accum=False,  # sums in fp32, not in fewer bits
    )
    return raw[:, :vocab_size]


def _blocks(num_rows: int, depth: int) -> Iterator[slice]:
    size = max(1, BLOCK_NUMBERS // max(depth, 1))
    for start in range(0, num_rows, size):
        yield slice(start, min(start + size, num_rows))
