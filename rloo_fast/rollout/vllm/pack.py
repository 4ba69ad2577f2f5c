"""A bucket of weights as a safetensors file: cast, and copied to the host, in one step."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...records import Bucket

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


class Packed(NamedTuple):
    header: bytes
    data: Tensor  # uint8, on the host

    @property
    def nbytes(self) -> int:
        return len(self.header) + self.data.numel()


def pack(bucket: Bucket, dtype: torch.dtype | None = None) -> Packed:
    """The file's header, and its data, which is the only copy that is made of the bucket.

    `dtype`: what wider floating-point tensors are rounded to. Widest tensors come first, as the
    format has them, so that each begins at a multiple of its element's size.
    """
    typed = [(name, t.detach(), _narrowed(t, dtype)) for name, t in bucket]
    typed.sort(key=lambda entry: -entry[2].itemsize)  # stable
    fields: dict[str, Any] = {}
    end = 0
    for name, tensor, own in typed:
        start, end = end, end + tensor.numel() * own.itemsize
        fields[name] = {
            "dtype": DTYPES[own], "shape": list(tensor.shape), "data_offsets": [start, end]
        }  # fmt: skip
    data = torch.empty(end, dtype=torch.uint8, pin_memory=any(t.is_cuda for _, t in bucket))
    for name, tensor, own in typed:
        start, stop = fields[name]["data_offsets"]
        data[start:stop].view(own).view(tensor.shape).copy_(tensor)
    header = json.dumps(fields).encode()
    header += b" " * (-len(header) % 8)
    return Packed(len(header).to_bytes(8, "little") + header, data)


def _narrowed(tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    if dtype is None or not tensor.is_floating_point() or tensor.itemsize <= dtype.itemsize:
        return tensor.dtype
    return dtype
