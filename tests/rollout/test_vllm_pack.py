"""What is sent to a server: a safetensors file, and the next bucket while one is on its way."""

from __future__ import annotations

import threading

import pytest
import safetensors.torch
import torch

from rloo_fast.rollout.vllm.offers import BucketServer
from rloo_fast.rollout.vllm.pack import pack
from rloo_fast.rollout.vllm.server import VLLMServer


def unpacked(bucket, dtype=None):
    packed = pack(bucket, dtype)
    file = packed.header + packed.data.numpy().tobytes()
    assert len(file) == packed.nbytes
    return safetensors.torch.load(file)


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


@pytest.fixture
def sender(monkeypatch):
    """send(buckets, take): through an engine whose server is `take(url)`."""
    offers = BucketServer("127.0.0.1")
    engine = VLLMServer.__new__(VLLMServer)
    engine.sent_dtype = None

    def send(buckets, take):
        monkeypatch.setattr(engine, "_take", lambda url, parts, address: take(url))
        engine._send_buckets("merged", buckets, offers)

    yield send
    offers.close()


def test_the_next_bucket_is_gathered_while_the_server_loads_one(sender):
    asked, log = [threading.Event() for _ in range(4)], []

    def gathered():
        for number in range(4):
            asked[number].set()
            log.append(f"gather {number}")
            yield [("w", torch.full((2,), float(number)))]

    def take(url):
        number = int(url.rpartition("/")[2])
        if number < 3:
            assert asked[number + 1].wait(10), "nothing was gathered while this one was loaded"
        log.append(f"load {number}")

    sender(gathered(), take)
    assert [line for line in log if "load" in line] == [f"load {n}" for n in range(4)]
    assert log.index("load 0") < log.index("gather 2")  # two are on the host, and no more


def test_a_bucket_that_the_server_refuses_ends_the_update(sender):
    gathered = []

    def buckets():
        for number in range(9):
            gathered.append(number)
            yield [("w", torch.zeros(2))]

    def take(url):
        raise RuntimeError("refused")

    with pytest.raises(RuntimeError, match="refused"):
        sender(buckets(), take)
    assert len(gathered) == 2


def test_a_gathering_that_fails_is_told_after_what_is_on_its_way_has_arrived(sender):
    taken = []

    def buckets():
        yield [("w", torch.zeros(2))]
        raise ValueError("out of memory")

    with pytest.raises(ValueError, match="out of memory"):
        sender(buckets(), taken.append)
    assert len(taken) == 1
