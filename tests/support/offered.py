"""One bucket on a trainer's shelf."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rloo_fast.rollout.vllm.offers import BucketServer
from rloo_fast.rollout.vllm.pack import Packed


@contextmanager
def offered(shelf: BucketServer, bucket: Packed) -> Iterator[str]:
    """Its URL, while the block lasts; no other bucket comes after it."""
    with shelf.stream(1) as stream:
        stream.put(bucket)
        stream.end()
        yield stream.request["url"]
