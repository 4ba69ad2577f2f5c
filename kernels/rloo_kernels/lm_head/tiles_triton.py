"""Launch configurations of the matrix kernel, by device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import triton
from torch import Tensor

from ..dispatch import INTERPRETED


class Tile(NamedTuple):
    """A block of rows of X times a block of columns of W^T, `depth` of D at a time."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int

    def options(self, depth: int) -> dict[str, Any]:
        """Arguments by name that a kernel on tiles by pointers takes for D = `depth`."""
        return {
            "EVEN_D": depth % self.depth == 0,
            "BLOCK_N": self.rows,
            "BLOCK_V": self.columns,
            "BLOCK_D": self.depth,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


TILES = {
    "interpreter": Tile(32, 64, 32, 4, 1),
    "hopper": Tile(128, 256, 64, 8, 3),  # wgmma; the accumulator alone takes half the registers
    "narrow": Tile(128, 128, 64, 8, 4),  # where the wide tile spills: soft-cap, odd D, sm_100
    "ampere": Tile(128, 128, 32, 8, 3),
    "cdna": Tile(128, 128, 32, 8, 2),
}
GROUP_BYTES = 12 << 20  # of X, which are to stay in the second-level cache beside W's tiles

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
        return _fitting(_forced_tile, depth)
    kind = _kind_of_device()
    if kind == "hopper" and (softcap is not None or depth % TILES["hopper"].depth):
        kind = "narrow"
    return _fitting(TILES[kind], depth)


def redo_tile_for(depth: int) -> Tile:
    """The tile for rows that are done again, which are few: the one that spills nowhere."""
    kind = _kind_of_device()
    return _fitting(TILES["narrow" if kind == "hopper" else kind], depth)


def _fitting(tile: Tile, depth: int) -> Tile:
    return tile._replace(depth=min(tile.depth, max(16, triton.next_power_of_2(depth))))


def _kind_of_device() -> str:
    """The key of TILES for the current device."""
    if INTERPRETED:
        return "interpreter"
    target = triton.runtime.driver.active.get_current_target()
    if target.backend != "cuda":
        return "cdna"
    if target.arch == 90:
        return "hopper"
    # from 110 on, as on 80, a block has 99 KiB of shared memory at the least
    return "narrow" if 90 < target.arch < 110 else "ampere"


def row_tiles_at_once(tiles_n: int, tile: Tile, hidden: Tensor) -> int:
    """Row tiles of a group of `tile_of`: as many as GROUP_BYTES hold, groups of nearly one size."""
    most = max(1, GROUP_BYTES // (tile.rows * hidden.shape[1] * hidden.element_size()))
    return triton.cdiv(tiles_n, triton.cdiv(tiles_n, most))


def num_processors() -> int:
    """Multiprocessors of the current device; a few where there is none."""
    if INTERPRETED:
        return 4
    driver = triton.runtime.driver.active
    return _num_processors(driver.get_current_target(), driver.get_current_device())


@cache
def _num_processors(target: Any, device: int) -> int:
    properties = triton.runtime.driver.active.utils.get_device_properties(device)
    return properties["multiprocessor_count"]
