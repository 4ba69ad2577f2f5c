"""Host memory for many blocks of bytes, taken in few slabs.

torch rounds every pinned allocation up to a power of two, and keeps what is freed: allocated one by
one, the blocks of Qwen2.5-7B's Adam state (56.7 GiB) pin 107.9 GiB. Slabs are of powers of two, and
are filled first-fit by falling size: 57 GiB.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

ALIGNMENT = 512  # bytes: what CUDA's own allocations begin at
DOUBLINGS = 6  # slab sizes that are tried, from the least that holds the largest block


class Slab(NamedTuple):
    """A power of two of bytes, and the (block, first byte) of each block in it."""

    size: int
    places: tuple[tuple[int, int], ...]


class HostMemory:
    """Hands out blocks of host memory; `new_slab(num_bytes)` allocates, (num_bytes,) uint8.

    The slabs of one `take` serve the next one, so that equal sizes allocate once.
    """

    def __init__(self, new_slab: Callable[[int], Tensor]):
        self._new_slab = new_slab
        self._slabs: list[Tensor] = []

    def take(self, sizes: Sequence[int]) -> list[Tensor]:
        """(size,) uint8 for each size, each with a storage of its own: what saves one of them does
        not save its neighbours. Nobody may read the blocks of the `take` before any more."""
        spare, used = sorted(self._slabs, key=len), []
        blocks: list[Tensor] = [torch.empty(0, dtype=torch.uint8)] * len(sizes)
        for slab in pack(sizes):
            fitting = [i for i, known in enumerate(spare) if len(known) >= slab.size]
            memory = spare.pop(fitting[0]) if fitting else self._new_slab(slab.size)
            used.append(memory)
            whole = memory.numpy()
            for block, start in slab.places:
                blocks[block] = torch.from_numpy(whole[start : start + sizes[block]])
        self._slabs = used
        return blocks


def pack(sizes: Sequence[int]) -> list[Slab]:
    """Slabs for blocks of these sizes, with the fewest bytes of all slab sizes tried."""
    largest = max(sizes, default=0)
    if not largest:
        return []
    falling = sorted((i for i, size in enumerate(sizes) if size), key=lambda i: -sizes[i])
    smallest_slab = _power_of_two(_aligned(largest))
    tried = [_first_fit(sizes, falling, smallest_slab << i) for i in range(DOUBLINGS)]
    return min(tried, key=lambda slabs: sum(slab.size for slab in slabs))


def _first_fit(sizes: Sequence[int], order: Sequence[int], capacity: int) -> list[Slab]:
    ends: list[int] = []
    places: list[list[tuple[int, int]]] = []
    first_with_room: dict[int, int] = {}  # by size: slabs before it are too full for such a block
    for block in order:
        size = _aligned(sizes[block])
        slab = first_with_room.get(size, 0)
        while slab < len(ends) and ends[slab] + size > capacity:
            slab += 1
        first_with_room[size] = slab
        if slab == len(ends):
            ends.append(0)
            places.append([])
        places[slab].append((block, ends[slab]))
        ends[slab] += size
    return [Slab(_power_of_two(end), tuple(found)) for end, found in zip(ends, places, strict=True)]


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _power_of_two(size: int) -> int:
    """The least that holds `size`."""
    return 1 << (size - 1).bit_length()
