"""How the matrix kernel is launched: which tile, by descriptors or pointers, whose allocator."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton has wheels for Linux alone")

from rloo_kernels import dispatch  # noqa: E402
from rloo_kernels.lm_head import tiles_triton  # noqa: E402
from rloo_kernels.lm_head.matrix_triton import with_workspace  # noqa: E402
from rloo_kernels.lm_head.tiles_triton import (  # noqa: E402
    DESCRIPTOR_TILES,
    POINTER_TILES,
    redo_tile_for,
    row_tiles_at_once,
    tile_for,
    why_not_by_descriptors,
)
from triton.runtime import _allocation  # noqa: E402


@pytest.fixture
def device(request, monkeypatch):
    kind, release = request.param
    monkeypatch.setattr(tiles_triton, "kind_of_device", lambda: kind)
    monkeypatch.setattr(triton, "__version__", release)


@pytest.mark.parametrize(
    ("device", "softcap", "tile"),
    [
        (("hopper", "3.9.0"), None, DESCRIPTOR_TILES["hopper"]),
        (("hopper", "3.10.1"), None, DESCRIPTOR_TILES["hopper"]),
        (("hopper", "3.6.0"), None, DESCRIPTOR_TILES["hopper, Triton 3.6"]),
        (("hopper", "3.6.0"), 30.0, DESCRIPTOR_TILES["hopper, soft-cap"]),
        (("blackwell", "3.9.0"), None, DESCRIPTOR_TILES["blackwell"]),
        (("blackwell", "3.9.0"), 30.0, POINTER_TILES["blackwell"]),
        (("ampere", "3.9.0"), None, POINTER_TILES["ampere"]),
        (("cdna", "3.9.0"), None, POINTER_TILES["cdna"]),
    ],
    indirect=["device"],
)
def test_a_device_and_a_release_of_triton_have_their_tile(device, softcap, tile):
    assert tile_for(4096, softcap, None) == tile


@pytest.mark.parametrize("device", [("hopper", "3.9.0")], indirect=True)
def test_rows_at_odd_addresses_are_loaded_by_pointers_and_the_log_says_why_once(device, caplog):
    dispatch.log_once.cache_clear()
    weight = torch.empty(8, 1001, dtype=torch.bfloat16)
    why = why_not_by_descriptors(torch.empty(4, 1001, dtype=torch.bfloat16), weight)
    assert tile_for(1001, None, why) == POINTER_TILES["hopper"]
    assert tile_for(1001, None, why) == POINTER_TILES["hopper"]
    (record,) = caplog.records
    assert "by pointers, not by TMA" in record.message
    assert "1001 elements apart" in record.message


@pytest.mark.parametrize("device", [("ampere", "3.9.0")], indirect=True)
def test_nothing_is_logged_where_there_is_no_tma(device, caplog):
    dispatch.log_once.cache_clear()
    assert tile_for(1001, None, "odd") == POINTER_TILES["ampere"]
    assert not caplog.records


def test_a_slice_that_begins_at_an_odd_address_is_not_for_descriptors():
    x = torch.empty(64, 72, dtype=torch.bfloat16)
    assert why_not_by_descriptors(x, x) is None
    assert "do not begin" in str(why_not_by_descriptors(x, x[:, 4:]))
    assert "72 elements" not in str(why_not_by_descriptors(x[:, 8:], x))
    assert "elements apart" in str(why_not_by_descriptors(torch.empty(4, 70), x))


@pytest.mark.parametrize("device", [("hopper", "3.9.0")], indirect=True)
def test_rows_that_are_done_again_are_loaded_by_pointers(device):
    assert redo_tile_for(4096) == POINTER_TILES["hopper"]
    assert redo_tile_for(20).depth == 32


@pytest.mark.parametrize(
    ("num_rows", "depth", "group"),
    [
        (2304, 3584, 9),  # 12 MiB hold 13 tiles of 128 rows: 18 tiles are two groups of 9
        (2304, 896, 18),
        (16384, 8192, 6),
        (128, 1 << 20, 1),
    ],
)
def test_the_rows_of_a_group_fit_the_cache_and_groups_are_of_one_size(num_rows, depth, group):
    tile = POINTER_TILES["hopper"]
    hidden = torch.empty(num_rows, depth, dtype=torch.bfloat16, device="meta")
    assert row_tiles_at_once(-(-num_rows // tile.rows), tile, hidden) == group


def test_the_callers_allocator_stays(monkeypatch):
    taken = []

    def launch():
        taken.append(_allocation._allocator.get()(640, 128, None))
        raise RuntimeError("as a launch may")

    def callers(size, alignment, stream):
        raise AssertionError("the caller's allocator is the caller's")

    token = _allocation._allocator.set(callers)
    try:
        with pytest.raises(RuntimeError, match="as a launch may"):
            with_workspace(torch.device("cpu"), launch)
        assert _allocation._allocator.get() is callers
    finally:
        _allocation._allocator.reset(token)
    assert taken[0].nbytes == 640
