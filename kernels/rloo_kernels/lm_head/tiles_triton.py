"""Launch configurations of the matrix kernel, by device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import triton

from ..dispatch import INTERPRETED


class Tile(NamedTuple):
    """A block of rows of X times a block of columns of W^T, `depth` of D at a time."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


TILES = {
    "interpreter": Tile(32, 64, 32, 4, 1),
    "hopper": Tile(128, 256, 64, 8, 3),  # wgmma; the accumulator alone takes half the registers
    "narrow": Tile(128, 128, 64, 8, 4),  # where the wide tile spills: soft-cap, odd D, sm_100
    "ampere": Tile(128, 128, 32, 8, 3),
    "cdna": Tile(128, 128, 32, 8, 2),
}

_forced_tile: Tile | None = None


@contextmanager
def forced_tile(tile: Tile) -> Iterator[None]:
    """Within it the matrix kernel takes this tile: for measuring tiles against each other."""
    global _forced_tile
    before, _forced_tile = _forced_tile, tile
    try:
        yield
    finally:
        _forced_tile = before


def tile_for(depth: int, softcap: float | None) -> Tile:
    """The tile for the current device, no deeper than D asks for."""
    if _forced_tile is not None:
        tile = _forced_tile
    elif INTERPRETED:
        tile = TILES["interpreter"]
    else:
        target = triton.runtime.driver.active.get_current_target()
        if target.backend != "cuda":
            tile = TILES["cdna"]
        elif target.arch < 90:
            tile = TILES["ampere"]
        else:
            wide = target.arch == 90 and softcap is None and depth % TILES["hopper"].depth == 0
            tile = TILES["hopper" if wide else "narrow"]
    return tile._replace(depth=min(tile.depth, max(16, triton.next_power_of_2(depth))))
