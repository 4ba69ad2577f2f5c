"""aot.py finds what it should in the compiled samples, the planted faults among it.

Run as a script, it compiles the samples and prints what came out as JSON.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

import pytest

from tests.support.triton_process import run_worker

TARGETS = ["sm_80", "sm_90", "sm_100", "gfx942"]
NVIDIA = ["sm_80", "sm_90", "sm_100"]
ROWS, WIDTH = 16384, 151936  # in bf16 almost 5 GB


def launches():
    """The launches to compile, by name. Called in the worker: Triton is imported there alone."""
    import torch

    from tests.support import triton_samples as samples
    from tests.support.aot import untouched

    def copy(width):
        x, y = (untouched((ROWS, width), torch.bfloat16) for _ in range(2))
        samples.copy_rows(x[:, :WIDTH], y[:, :WIDTH])

    def matmul():
        samples.matmul(*(untouched((4096, 4096), torch.bfloat16) for _ in range(3)))

    def softmax(**options):
        x, y = untouched((64, 4096)), untouched((64, 4096))
        samples.softmax(x, y, **options)

    return {
        "aligned": lambda: copy(WIDTH),
        "unaligned": lambda: copy(WIDTH + 1),
        "matmul": matmul,
        "softmax": softmax,
        "spilling": lambda: softmax(maxnreg=32),  # CUDA alone has this option
        "double": lambda: samples.double(untouched((4096,)), untouched((4096,))),
        "refused": lambda: samples.refused_kernel[(1,)](untouched((4096,)), 4096),
        "nothing": lambda: None,
    }


def state_of_triton():
    """What compile_for replaces while it works."""
    from triton import knobs
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    from tests.support.triton_samples import double_kernel

    tuner = (double_kernel.cache, "do_bench" in vars(double_kernel), type(double_kernel).run)
    caches = id(double_kernel.fn.device_caches)
    knob_values = (knobs.cache.dir, knobs.nvidia.dump_ptxas_log)
    return (driver._active, JITFunction.run, tuner, caches, knob_values)


def measure():
    """The rows by launch and target, the errors of what must fail, and the memory that it took."""
    from dataclasses import asdict

    from tests.support.aot import compile_for, table

    before = state_of_triton()
    rows, errors, every = {}, {}, []
    for name, launch in launches().items():
        for target in NVIDIA if name == "spilling" else TARGETS:
            try:
                compiled = compile_for(target, launch)
            except Exception as error:
                errors[f"{name} {target}"] = f"{type(error).__name__}: {error}"
                continue
            every += compiled
            rows[f"{name} {target}"] = [{**asdict(row), "fits": row.fits} for row in compiled]
    try:
        compile_for("sm_7", launches()["softmax"])
    except ValueError as error:
        errors["target"] = str(error)
    return {
        "rows": rows,
        "errors": errors,
        "table": table(every),
        "restored": before == state_of_triton(),
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


@pytest.fixture(scope="module")
def seen():
    pytest.importorskip("triton", reason="Triton has wheels for Linux alone")
    return run_worker(Path(__file__), interpret=False)


def only(seen, name):
    (row,) = seen["rows"][name]
    return row


@pytest.mark.parametrize("target", TARGETS)
def test_aligned_rows_move_in_128_bits(seen, target):
    row = only(seen, f"aligned {target}")
    assert row["loads_128"] == row["loads"] > 0
    assert row["stores_128"] == row["stores"] > 0


@pytest.mark.parametrize("target", TARGETS)
def test_an_unaligned_row_stride_has_no_128_bit_access(seen, target):
    row = only(seen, f"unaligned {target}")
    assert (row["loads_128"], row["stores_128"]) == (0, 0)
    assert row["loads"] > only(seen, f"aligned {target}")["loads"]


@pytest.mark.parametrize(
    ("target", "instruction"),
    [("sm_80", "HMMA"), ("sm_90", "HGMMA"), ("sm_100", "UTCHMMA"), ("gfx942", "mfma")],
)
def test_a_bf16_dot_uses_the_matrix_unit_of_its_target(seen, target, instruction):
    assert list(only(seen, f"matmul {target}")["mma"]) == [instruction]
    assert only(seen, f"softmax {target}")["mma"] == {}


@pytest.mark.parametrize("target", NVIDIA)
def test_too_few_registers_spill(seen, target):
    spilling, row = only(seen, f"spilling {target}"), only(seen, f"softmax {target}")
    assert (row["spill_bytes"], spilling["registers"]) == (0, 32)
    assert spilling["spill_bytes"] > 0


def test_eight_warps_hold_the_large_tile_on_sm_90(seen):
    assert only(seen, "matmul sm_90")["spill_bytes"] == 0


def test_shared_memory_is_held_against_the_limit_of_the_target(seen):
    fits = {target: only(seen, f"matmul {target}")["fits"] for target in TARGETS}
    assert fits == {"sm_80": True, "sm_90": True, "sm_100": True, "gfx942": False}
    amd = only(seen, "matmul gfx942")
    assert amd["shared_bytes"] > amd["shared_limit"] == 65536


@pytest.mark.parametrize("target", TARGETS)
def test_each_configuration_of_an_autotuned_kernel_is_compiled_for_each_target(seen, target):
    rows = seen["rows"][f"double {target}"]
    assert [(row["config"], row["num_warps"]) for row in rows] == [
        ({"BLOCK": 256}, 4),
        ({"BLOCK": 1024}, 8),
    ]


def test_a_configuration_that_does_not_compile_is_an_error(seen):
    assert "CompileTimeAssertionFailure" in seen["errors"]["refused sm_90"]


def test_a_call_that_launches_nothing_is_an_error(seen):
    assert "Nothing was compiled for sm_90" in seen["errors"]["nothing sm_90"]


def test_an_unknown_target_is_an_error(seen):
    assert "one of sm_80, sm_90, sm_100, gfx942, got 'sm_7'" in seen["errors"]["target"]


def test_nothing_else_failed(seen):
    failed = {name.split()[0] for name in seen["errors"]}
    assert failed == {"refused", "nothing", "target"}


def test_the_row_names_the_kernel_its_dtypes_and_its_config(seen):
    row = only(seen, "softmax sm_90")
    assert (row["kernel"], row["pointers"]) == ("softmax_kernel", "fp32,fp32")
    assert row["config"] == {"TWICE": False, "BLOCK": 4096}
    assert row["seconds"] > 0


def test_triton_is_left_as_it_was(seen):
    assert seen["restored"]


def test_large_tensors_take_no_memory(seen):
    assert seen["peak_gib"] < 3


def test_the_table_has_a_line_for_each_row(seen):
    lines = seen["table"].splitlines()
    assert len(lines) == 1 + sum(len(rows) for rows in seen["rows"].values())
    assert any("sm_90" in line and "HGMMA" in line for line in lines)


if __name__ == "__main__":
    measured = measure()
    print(measured["table"], file=sys.stderr)
    print(json.dumps(measured))
