"""Launch configurations of the matrix kernel, by device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import triton
from torch import Tensor

from ..dispatch import INTERPRETED, log_once


class Tile(NamedTuple):
    """A block of rows of X times a block of columns of W^T, `depth` of D at a time.

    `descriptors`: by the kernel of `persistent_triton.py`, which explains the last three; else by
    pointers, a program per tile.
    """

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int
    descriptors: bool = False
    specialize: bool = False
    flatten: bool = False  # the loops over tiles and over D become one
    halves: bool = False

    def options(self, depth: int) -> dict[str, Any]:
        """Arguments by name that its kernel takes for D = `depth`."""
        own: dict[str, Any] = {"EVEN_D": depth % self.depth == 0}
        if self.descriptors:
            own = {"FLATTEN": self.flatten, "SPECIALIZE": self.specialize, "HALVES": self.halves}
        return {
            **own,
            "BLOCK_N": self.rows,
            "BLOCK_V": self.columns,
            "BLOCK_D": self.depth,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


# By descriptors. What decides is in the table that `python -m tests.rloo_kernels.test_aot` prints.
HOPPER = Tile(128, 256, 64, 4, 4, descriptors=True, specialize=True, halves=True)
DESCRIPTOR_TILES = {
    "interpreter": Tile(32, 64, 32, 4, 1, descriptors=True, halves=True),
    "hopper": HOPPER,
    # before 3.9 Triton does not compile halves; whole tiles leave room for one stage less
    "hopper, Triton 3.6": HOPPER._replace(num_stages=3, halves=False),
    "hopper, soft-cap": HOPPER._replace(columns=128, halves=False),  # the wide tile spills
    "blackwell": Tile(128, 128, 64, 8, 4, descriptors=True, specialize=True, flatten=True),
}
# By pointers: odd D or addresses, older devices, rows that are done again.
POINTER_TILES = {
    "interpreter": Tile(32, 64, 32, 4, 1),
    "hopper": Tile(128, 128, 64, 8, 4),
    "blackwell": Tile(128, 128, 64, 8, 4),
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


def why_not_by_descriptors(hidden: Tensor, weight: Tensor) -> str | None:
    """Why X and W cannot be loaded by TMA, or None: rows begin at multiples of 16 bytes."""
    for name, x in (("hidden states", hidden), ("lm_head", weight)):
        if (x.stride(0) * x.element_size()) % 16:
            return f"rows of the {name} are {x.stride(0)} elements apart, no multiple of 16 bytes"
        if x.data_ptr() % 16:
            return f"the {name} do not begin at a multiple of 16 bytes"
    return None


def tile_for(depth: int, softcap: float | None, why_not: str | None) -> Tile:
    """The tile for the current device, no deeper than D asks for.

    `why_not` by descriptors: logged once where the device has them.
    """
    if _forced_tile is not None:
        return _fitting(_forced_tile, depth)
    kind = kind_of_device()
    key = kind
    if kind == "hopper" and softcap is not None:
        key = "hopper, soft-cap"
    elif kind == "hopper" and tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9):
        key = "hopper, Triton 3.6"
    elif kind == "blackwell" and softcap is not None:
        key = ""  # Triton 3.9 asks for twice the shared memory that there is
    if key not in DESCRIPTOR_TILES:
        return _fitting(POINTER_TILES[kind], depth)
    if why_not is not None:
        log_once(f"rloo_kernels loads the lm_head's tiles by pointers, not by TMA: {why_not}.")
        return _fitting(POINTER_TILES[kind], depth)
    return _fitting(DESCRIPTOR_TILES[key], depth)


def redo_tile_for(depth: int) -> Tile:
    """The tile for rows that are done again: by pointers, since they lie anywhere."""
    return _fitting(POINTER_TILES[kind_of_device()], depth)


def _fitting(tile: Tile, depth: int) -> Tile:
    return tile._replace(depth=min(tile.depth, max(16, triton.next_power_of_2(depth))))


def kind_of_device() -> str:
    """The key of POINTER_TILES for the current device."""
    if INTERPRETED:
        return "interpreter"
    target = triton.runtime.driver.active.get_current_target()
    if target.backend != "cuda":
        return "cdna"
    if target.arch == 90:
        return "hopper"
    # from 110 on, as on 86, a block has 99 KiB of shared memory
    return "blackwell" if 90 < target.arch < 110 else "ampere"


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
