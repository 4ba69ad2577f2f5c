"""dW added in memory: in the interpreter against float64, and compiled for sm_90 and sm_100.

As a script, it prints what the compiler made of it: python -m tests.rloo_kernels.test_weight_kernel
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from tests.rloo_kernels.test_aot import NO_OLDEST, OLDEST
from tests.support.triton_process import run_worker

# n, D, V: on the interpreter's tile of 32, 64, 32 and off it; one row; several waves of programs
SIZES = [(64, 64, 128), (40, 48, 150), (1, 8, 5), (130, 136, 500)]
TMA = ("UTMALDG", "UTMAREDG")


def errors(n: int, depth: int, vocab: int) -> dict[str, Any]:
    """Of three pieces added one after another, beside one fp32 product of what was given."""
    from rloo_kernels.lm_head.weight_triton import add_in_memory, adds_in_memory

    torch.manual_seed(n)
    total = torch.randn(vocab, depth)
    exact, plain, one_by_one = total.double(), total.clone(), total.clone()
    for _ in range(3):
        wide = torch.full((n, -(-vocab // 16) * 16 + 16), torch.nan, dtype=torch.bfloat16)
        matrix = wide[:, :vocab]  # what lies between its rows is nan
        matrix.copy_(torch.randn(n, vocab))
        scaled = torch.randn(n, depth).bfloat16()
        assert adds_in_memory(total, matrix, scaled)
        add_in_memory(total, matrix, scaled)
        exact += matrix.double().T @ scaled.double()
        plain += matrix.float().T @ scaled.float()
        one_by_one += (matrix.double().T @ scaled.double()).float()
    size = exact.abs().max().item()
    error, torch_s, least = ((x - exact).abs().max().item() for x in (total, plain, one_by_one))
    return {"error": error, "torch": torch_s, "bound": 2 * max(torch_s, least) + 1e-7 * size}


def refusals() -> dict[str, bool]:
    """Whether the kernel takes what descriptors or the cost model do not allow."""
    from rloo_kernels.lm_head.waves import REDUCE_ADD_MOST_ROWS
    from rloo_kernels.lm_head.weight_triton import adds_in_memory

    def takes(n: int = 4, depth: int = 16, vocab: int = 32) -> bool:
        total = torch.empty(vocab, depth)
        matrix, scaled = (torch.empty(n, x, dtype=torch.bfloat16) for x in (vocab, depth))
        return adds_in_memory(total, matrix, scaled)

    most = REDUCE_ADD_MOST_ROWS
    return {
        "plain": takes(),
        "odd D": takes(depth=17),
        "odd V": takes(vocab=33),  # the matrix kernel's rows are padded, the library's are not
        "most rows": takes(n=most),
        "more rows": takes(n=most + 1),
    }


def uses_in_the_loss() -> dict[str, int]:
    """How often the loss in chunks of one group adds in memory, by dtype: all but the first."""
    from rloo_kernels import fused_linear_rloo_loss
    from rloo_kernels.lm_head import weight_triton

    found = {}
    for dtype in (torch.bfloat16, torch.float32):
        hidden, weight = (
            torch.randn(n, 16).to(dtype).requires_grad_() for n in (30, 64)
        )  # 3 groups
        with mock.patch.object(
            weight_triton, "add_in_memory", wraps=weight_triton.add_in_memory
        ) as add:
            out = fused_linear_rloo_loss(
                hidden, weight, torch.randint(64, (30,)), torch.arange(0, 31, 5), beta=0.1,
                rewards=torch.randn(6), ref_logps=torch.randn(30), num_generations=2,
                chunk_bytes=10 * 64 * (2 if dtype == torch.bfloat16 else 8),
            )  # fmt: skip
            out.loss.backward()
        found[str(dtype)] = add.call_count
    return found


def compiled() -> dict[str, Any]:
    from dataclasses import asdict

    from rloo_kernels.lm_head.weight_triton import add_in_memory

    from tests.support import aot

    row, counts = aot._Capture.row, []

    def counted(self: Any, kernel: Any, compiled: Any, *args: Any) -> Any:
        sass = compiled.asm["sass"]
        counts.append({name: len(re.findall(rf"\b{name}\b", sass)) for name in TMA})
        return row(self, kernel, compiled, *args)

    aot._Capture.row = counted
    rows = []
    for target, depth in itertools.product(["sm_90", "sm_100"], [896, 3584]):

        def call(depth: int = depth) -> None:
            n, vocab = 2304, 152064
            total, matrix, scaled = (
                aot.untouched((vocab, depth)),
                aot.untouched((n, vocab), torch.bfloat16),
                aot.untouched((n, depth), torch.bfloat16),
            )
            add_in_memory(total, matrix, scaled)

        rows += [asdict(x) | {"fits": x.fits} for x in aot.compile_for(target, call)]
    return {"rows": [row | {"tma": n} for row, n in zip(rows, counts, strict=True)]}


# --- the tests


@functools.cache
def interpreted() -> dict[str, Any]:
    return run_worker(Path(__file__), "--interpret", interpret=True)


@pytest.fixture
def seen():
    pytest.importorskip("triton", reason="Triton has wheels for Linux alone")
    return interpreted()


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_added_in_memory_it_errs_at_most_twice_as_much_as_torch(seen, size):
    found = seen["errors"][str(size)]
    assert found["error"] <= found["bound"], found


def test_who_adds_is_decided_by_alignment_and_rows(seen):
    assert seen["refusals"] == {
        "plain": True, "odd D": False, "odd V": False, "most rows": True, "more rows": False,
    }  # fmt: skip


@pytest.mark.parametrize(("arch", "takes"), [(80, False), (90, True), (100, True), (120, False)])
def test_a_device_without_room_for_its_tiles_does_not_add_in_memory(arch, takes, monkeypatch):
    """sm_120 has TMA, but 99 KiB of shared memory a block: the tile of sm_100 asks for 112."""
    triton = pytest.importorskip("triton", reason="Triton has wheels for Linux alone")
    from rloo_kernels.lm_head.weight_triton import adds_in_memory

    target = triton.backends.compiler.GPUTarget("cuda", arch, 32)
    active = SimpleNamespace(get_current_target=lambda: target)
    monkeypatch.setattr(triton.runtime, "driver", SimpleNamespace(active=active))
    matrix, scaled = (torch.empty(4, x, dtype=torch.bfloat16) for x in (32, 16))
    assert adds_in_memory(torch.empty(32, 16), matrix, scaled) == takes


def test_the_loss_adds_in_memory_from_its_second_chunk_on(seen):
    assert seen["uses"] == {"torch.bfloat16": 2, "torch.float32": 0}


@pytest.mark.slow
@pytest.mark.parametrize("release", ["installed", "3.6"])
def test_compiled_it_loads_and_adds_by_tma(release):
    pytest.importorskip("triton", reason="Triton has wheels for Linux alone")
    if release == "3.6" and not OLDEST.is_dir():
        pytest.skip(NO_OLDEST)
    path = {"RLOO_TRITON_PATH": str(OLDEST)} if release == "3.6" else {}
    with mock.patch.dict(os.environ, path):
        rows = run_worker(Path(__file__), "--compile", interpret=False)["rows"]
    assert {row["target"] for row in rows} == {"sm_90", "sm_100"}
    for row in rows:
        assert row["fits"], row
        assert row["spill_bytes"] == 0, row
        assert min(row["tma"].values()) > 0, row
        assert row["mma"], row
        assert row["stores"] == 0, row  # nothing leaves by another way


if __name__ == "__main__":
    if sys.argv[1:] == ["--interpret"]:
        from tests.support.interpreter import fix_interpreter

        fix_interpreter()
        found = {str(size): errors(*size) for size in SIZES}
        seen = {"errors": found, "refusals": refusals(), "uses": uses_in_the_loss()}
        print(json.dumps(seen))
    elif sys.argv[1:] == ["--compile"]:
        print(json.dumps(compiled()))
    else:
        for row in run_worker(Path(__file__), "--compile", interpret=False)["rows"]:
            kept = ("target", "registers", "spill_bytes", "shared_bytes", "mma", "tma")
            print({name: row[name] for name in kept})
