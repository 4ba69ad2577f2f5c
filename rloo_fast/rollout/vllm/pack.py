"""A bucket of weights as a safetensors file: cast, and copied to where it is sent, in one step."""

from __future__ import annotations

import json
from math import prod
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
    header: bytes  # its length in 8 bytes, then JSON
    data: Tensor  # uint8

    @property
    def nbytes(self) -> int:
        return len(self.header) + self.data.numel()


def pack(
    bucket: Bucket, dtype: torch.dtype | None = None, device: torch.device | None = None
) -> Packed:
    """The file's header, and its data, which is the only copy that is made of the bucket.

    `dtype`: what wider floating-point tensors are rounded to. `device`: where the data is; None:
    the host. Widest tensors come first, as the format has them, so that each begins at a multiple
    of its element's size.
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
    pinned = device is None and any(t.is_cuda for _, t in bucket)
    data = torch.empty(end, dtype=torch.uint8, device=device, pin_memory=pinned)
    for name, tensor, own in typed:
        start, stop = fields[name]["data_offsets"]
        data[start:stop].view(own).view(tensor.shape).copy_(tensor)
    header = json.dumps(fields).encode()
    header += b" " * (-len(header) % 8)
    return Packed(len(header).to_bytes(8, "little") + header, data)


def unpack(header: bytes, data: Tensor) -> dict[str, Tensor]:
    """The tensors of a file that `pack` or safetensors made, as views of its data. ValueError for
    what is none."""
    fields = json.loads(header[8:])
    if not isinstance(fields, dict) or len(header) != 8 + int.from_bytes(header[:8], "little"):
        raise ValueError("no header of a safetensors file")
    fields.pop("__metadata__", None)
    return {name: _view(entry, data) for name, entry in fields.items()}


def _view(entry: Any, data: Tensor) -> Tensor:
    match entry:
        case {"dtype": str(name), "shape": [*shape], "data_offsets": [int(start), int(stop)]}:
            dtype = next((known for known, said in DTYPES.items() if said == name), None)
        case _:
            raise ValueError(f"no tensor of a safetensors file: {entry!r:.200}")
    if dtype is None or any(type(size) is not int or size < 0 for size in shape):
        raise ValueError(f"no tensor that is known here: {entry!r:.200}")
    size = prod(shape) * dtype.itemsize
    if not 0 <= start <= stop <= len(data) or stop - start != size or start % dtype.itemsize:
        raise ValueError(f"no tensor within {len(data)} bytes: {entry!r:.200}")
    return data[start:stop].view(dtype).view(shape)


def _narrowed(tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    if dtype is None or not tensor.is_floating_point() or tensor.itemsize <= dtype.itemsize:
        return tensor.dtype
    return dtype
