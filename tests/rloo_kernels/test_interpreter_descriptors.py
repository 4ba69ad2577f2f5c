"""Tensor descriptors and tl.fma in the interpreter: blocks end at edges, are counted and checked.

Run as a script under TRITON_INTERPRET=1, it runs the samples and prints what came out as JSON.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.triton_process import run_worker

ROWS, COLUMNS = 40, 56  # not multiples of the block of 16


def copied(dtype):
    """Whether a copy is right, what it left beside its slice, and the bytes that it moved."""
    import torch

    from tests.support import triton_samples as samples
    from tests.support.interpreter_trace import trace

    x = torch.randn(ROWS, COLUMNS).to(dtype)
    wide = torch.full((ROWS, COLUMNS + 8), torch.nan, dtype=dtype)
    with trace() as launches:
        samples.block_copy(x, wide[:, :COLUMNS])
    (launch,) = launches
    return {
        "same": torch.equal(wide[:, :COLUMNS], x),
        "beside": bool(wide[:, COLUMNS:].isnan().all()),
        "bytes": [launch["x"].loaded_bytes, launch["y"].stored_bytes],
        "item": x.element_size(),
    }


def faults():
    """What the tool says of planted faults."""
    import torch

    from tests.support import triton_samples as samples
    from tests.support.interpreter_trace import trace

    x, y = torch.randn(32, 32), torch.full((32, 32), torch.nan)
    found = {}
    for name, call in {
        "race": lambda: samples.block_copy(x, y, step=8),
        "beyond": lambda: samples.block_copy(x, y, height=33),
        "unaligned": lambda: samples.block_copy(torch.randn(32, 33)[:, :32], y),
    }.items():
        try:
            with trace():
                call()
            found[name] = "nothing"
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error} {error.__cause__}"
    return found


def measure():
    import torch

    from tests.support import triton_samples as samples
    from tests.support.interpreter import fix_interpreter

    fix_interpreter()
    torch.manual_seed(0)
    x = torch.arange(24.0).view(3, 8).bfloat16()
    total = torch.full((1,), torch.nan)
    samples.block_sum_kernel[(1,)](x, total, *x.shape, x.stride(0), BLOCK=16)
    a, b = torch.randn(4096), torch.randn(4096)
    c = -(a * b)  # what is left is the rounding of the product
    out = torch.full_like(a, torch.nan)
    samples.fma_kernel[(1,)](a, b, c, out, 4096, BLOCK=4096)
    exact = (a.double() * b.double() + c.double()).float()
    return {
        "copied": {str(d).split(".")[1]: copied(d) for d in (torch.float32, torch.bfloat16)},
        "padding": [total.item(), x.float().sum().item()],
        "faults": faults(),
        "fma": [(out != exact).sum().item(), (exact != 0).sum().item()],
    }


@pytest.fixture(scope="module")
def seen():
    pytest.importorskip("triton", reason="Triton has wheels for Linux alone")
    return run_worker(Path(__file__), interpret=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_blocks_that_reach_beyond_an_edge_move_what_is_inside_once(seen, dtype):
    found = seen["copied"][dtype]
    assert found["same"]
    assert found["beside"]
    assert found["bytes"] == [ROWS * COLUMNS * found["item"]] * 2


def test_a_block_is_zero_beyond_the_edge(seen):
    assert seen["padding"][0] == seen["padding"][1]


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("race", "two programs write one element"),
        ("beyond", "out-of-bounds load of x"),
        ("unaligned", "stride must be 16-byte aligned"),
    ],
)
def test_a_planted_fault_is_found(seen, fault, words):
    assert words in seen["faults"][fault]


def test_a_fused_multiply_add_rounds_once(seen):
    different, nonzero = seen["fma"]
    assert different == 0
    assert nonzero > 3000


if __name__ == "__main__":
    print(json.dumps(measure()))
