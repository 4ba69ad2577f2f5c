"""What is sent to a server: a bucket of weights as a safetensors file, and back."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch

from rloo_fast.rollout.vllm.pack import pack, unpack


def unpacked(bucket, dtype=None):
    packed = pack(bucket, dtype)
    file = packed.header + packed.data.numpy().tobytes()
    assert len(file) == packed.nbytes
    found, views = safetensors.torch.load(file), unpack(packed.header, packed.data)
    assert found.keys() == views.keys()
    for name, tensor in found.items():
        assert (views[name].dtype, views[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(views[name], tensor)
    return found


def test_what_is_packed_is_a_safetensors_file():
    shared = torch.randn(6)
    bucket = [
        ("odd", torch.arange(3, dtype=torch.uint8)),
        ("transposed", torch.randn(3, 5).T),
        ("half", torch.randn(7).to(torch.bfloat16)),
        ("double", torch.randn(2, 2).double()),
        ("scalar", torch.tensor(3.5)),
        ("empty", torch.empty(0, 4)),
        ("flag", torch.tensor([True, False])),
        ("same memory", shared),
        ("a view of it", shared[2:]),
    ]
    found = unpacked(bucket)
    assert found.keys() == dict(bucket).keys()
    for name, tensor in bucket:
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    assert unpacked([]) == {}


def test_only_what_is_wider_is_rounded():
    wide, half, number = torch.randn(9), torch.randn(9).half(), torch.arange(9)
    found = unpacked([("wide", wide), ("half", half), ("number", number)], torch.bfloat16)
    assert torch.equal(found["wide"], wide.bfloat16())
    assert torch.equal(found["half"], half)
    assert torch.equal(found["number"], number)
    assert pack([("wide", wide)], torch.bfloat16).data.numel() == 18


def test_a_file_that_safetensors_wrote_is_read():
    weights = {"a": torch.randn(3, 2), "b": torch.randn(5).half()}
    file = safetensors.torch.save(weights, {"from": "elsewhere"})
    begin = 8 + int.from_bytes(file[:8], "little")
    data = torch.frombuffer(bytearray(file[begin:]), dtype=torch.uint8)
    found = unpack(file[:begin], data)
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())


def entry(**changes):
    return {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}


@pytest.mark.parametrize(
    "fields",
    [
        [], {"w": None}, {"w": {}}, {"w": [1]}, entry(dtype="F31"), entry(dtype=["F32"]),
        entry(shape=[3]), entry(shape=[-2]), entry(shape=[2.0]), entry(shape=[True, 2]),
        entry(shape="2"), entry(data_offsets=[0, 12], shape=[3]), entry(data_offsets=[-8, 0]),
        entry(data_offsets=[8, 0]), entry(data_offsets=[0, 8, 8]), entry(data_offsets=["0", "8"]),
        entry(data_offsets=[1, 5], shape=[1]), entry(shape=[2**70]), entry(shape=[0, 2**70, 1]),
    ],
)  # fmt: skip
def test_what_is_no_tensor_of_the_file_is_refused(fields):
    header = json.dumps(fields).encode()
    header = len(header).to_bytes(8, "little") + header
    with pytest.raises(ValueError, match=r"no (tensor|header)"):
        unpack(header, torch.zeros(8, dtype=torch.uint8))


@pytest.mark.parametrize("header", [b"", b"\x02\0\0\0\0\0\0\0", b"\x03\0\0\0\0\0\0\0{}", b"x" * 20])
def test_what_is_no_header_is_refused(header):
    with pytest.raises(ValueError):
        unpack(header, torch.zeros(8, dtype=torch.uint8))
