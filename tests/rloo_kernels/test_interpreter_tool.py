"""interpreter.py computes bf16 as torch does; interpreter_trace.py finds the planted faults.

Run as a script under TRITON_INTERPRET=1, it runs the samples and prints what came out as JSON.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.triton_process import run_worker

ARITHMETIC = ["a + b", "a b", "a / b", "-a", "min(a, b)", "where", "3 a"]


def hard_numbers():
    """fp32 numbers that are hard to round: ties, their neighbours, tiny, huge and not numbers."""
    import torch

    torch.manual_seed(0)
    ties = torch.arange(0x3F800000, 0x3F900000, 0x8000, dtype=torch.int32)
    bits = torch.cat([ties, ties - 1, ties + 1, torch.randint(0, 0x7F800000, (2000,))]).int()
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-40, 3.4e38])
    return torch.cat([special, bits.view(torch.float32), -bits.view(torch.float32)])


def same(a, b):
    """Elements that differ in a bit, NaNs being equal."""
    different = (a != b) | (a.signbit() != b.signbit())
    return int((different & ~(a.isnan() & b.isnan())).sum())


def measure_bf16():
    """Numbers of elements that differ from torch's."""
    import torch

    from tests.support import triton_samples as samples

    found = {}
    x = hard_numbers()
    stored = torch.full((1, len(x)), torch.nan, dtype=torch.bfloat16)
    samples.copy_rows(x[None], stored)
    found["store"] = same(stored[0], x.bfloat16())
    x = x[(x.abs() < 1e30) & (x != 0)][:4000].bfloat16()  # -0 is +0 in triton 3.6
    a, b = x, x.flip(0).roll(7)
    rows = torch.full((len(ARITHMETIC), len(a)), torch.nan, dtype=torch.bfloat16)
    samples.bf16_kernel[(1,)](a, b, rows, len(a), BLOCK=4096)
    want = samples.bf16_in_torch(a, b)
    found |= {name: same(*pair) for name, *pair in zip(ARITHMETIC, rows, want, strict=True)}
    a, b = (torch.randn(n, 70).bfloat16() for n in (40, 50))
    c = torch.full((40, 50), torch.nan)
    samples.matmul(a, b, c, tiles=(32, 32, 32))
    found["dot"] = ((c - a.float() @ b.float().T).abs().max() / c.abs().max()).item()
    return found


def measure_reductions():
    import torch

    from tests.support import triton_samples as samples

    x = torch.randn(64).bfloat16()
    values, indices = torch.full((2,), torch.nan).bfloat16(), torch.full((2,), -1)
    samples.reduce_kernel[(1,)](x, values, indices, SUM=False, BLOCK=64)
    return {
        "values": [values.tolist(), [x.max().item(), x.min().item()]],
        "indices": [indices.tolist(), [x.argmax().item(), x.argmin().item()]],
        "sum": error_of(
            lambda: samples.reduce_kernel[(1,)](x, values, indices, SUM=True, BLOCK=64)
        ),
    }


def error_of(call):
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def summary(launch):
    """A launch as JSON."""
    arguments = {
        name: {
            "loaded": a.loaded_bytes,
            "stored": a.stored_bytes,
            "atomic": a.atomic_bytes,
            "loads": sorted({int(n) for n in a.loads}),
            "stores": sorted({int(n) for n in a.stores}),
        }
        for name, a in launch.arguments.items()
    }
    counts = {name: getattr(launch, name) for name in ("bytes", "exps", "logs", "dot_flops")}
    return {**arguments, **counts, "races": launch.races}


def traced(call, raise_races=False):
    from tests.support.interpreter_trace import trace

    with trace(raise_races) as launches:
        call()
    return [summary(launch) for launch in launches]


def measure_traffic():
    import torch

    from tests.support import triton_samples as samples

    x, y = torch.randn(3, 507), torch.full((3, 507), torch.nan)
    a, b = (torch.randn(n, 64).bfloat16() for n in (64, 32))
    ids = torch.randint(0, 5, (1000,))
    counts = torch.zeros(5, dtype=torch.int32)
    doubled = torch.full((600,), torch.nan)
    found = {
        "copy": traced(lambda: samples.copy_rows(x, y, block=128)),
        "in place": traced(lambda: samples.copy_rows(x, x)),
        "softmax": traced(lambda: samples.softmax(x, y)),
        "twice": traced(lambda: samples.softmax(x, y, twice=True)),
        "matmul": traced(lambda: samples.matmul(a, b, torch.empty(64, 32), (32, 32, 32))),
        "count": traced(lambda: samples.count_kernel[(4,)](ids, counts, 1000, BLOCK=128, UNROLL=2)),
        "tuned": traced(lambda: samples.double(x.flatten()[:600], doubled)),
    }
    found["softmax error"] = (y - x.softmax(1)).abs().max().item()
    found["counts"] = [counts.tolist(), ids.bincount(minlength=5).tolist()]
    found["doubled"] = bool((doubled == 2 * x.flatten()[:600]).all())
    return found


def measure_faults():
    import torch

    from tests.support import triton_samples as samples

    x, y = torch.randn(3, 500), torch.zeros(3, 512)
    wide = torch.randn(3, 512)
    packed = torch.randn(2, 500)
    out, target, guarded = torch.zeros(1, 512), torch.zeros(512), torch.zeros(3, 512)
    return {
        "load": error_of(lambda: traced(lambda: samples.copy_rows(x, y, n=501))),
        "in a wider tensor": error_of(
            lambda: traced(lambda: samples.copy_rows(wide[:, :500], y, n=501))
        ),
        "in another tensor": error_of(
            lambda: traced(lambda: samples.copy_rows(packed[:1], out, n=501))
        ),
        "store": error_of(lambda: traced(lambda: samples.copy_rows(wide, guarded[:, :500], n=501))),
        "untouched": bool((out == 0).all() and (guarded == 0).all()),
        "collide": traced(lambda: samples.collide_kernel[(2,)](target, SAME=False, BLOCK=64)),
        "alone": traced(lambda: samples.collide_kernel[(1,)](target, SAME=False, BLOCK=64)),
        "same": traced(lambda: samples.collide_kernel[(1,)](target, SAME=True, BLOCK=64)),
        "swap": traced(lambda: samples.swap_kernel[(1,)](target, BARRIER=False, BLOCK=64)),
        "barrier": traced(lambda: samples.swap_kernel[(1,)](target, BARRIER=True, BLOCK=64)),
        "shift up": traced(
            lambda: samples.copy_rows(target[None, :-1], target[None, 1:], block=64)
        ),
        "shift down": traced(
            lambda: samples.copy_rows(target[None, 1:], target[None, :-1], block=64)
        ),
        "raised": error_of(
            lambda: traced(lambda: samples.collide_kernel[(2,)](target, False, 64), True)
        ),
    }


def measure():
    from tests.support.interpreter import fix_interpreter

    fix_interpreter()
    return {
        "bf16": measure_bf16(),
        "reductions": measure_reductions(),
        "traffic": measure_traffic(),
        "faults": measure_faults(),
    }


@pytest.fixture(scope="module")
def seen():
    pytest.importorskip("triton", reason="Triton has wheels for Linux alone")
    return run_worker(Path(__file__), interpret=True)


def launch_of(seen, name):
    (launch,) = (seen["traffic"] | seen["faults"])[name]
    return launch


@pytest.mark.parametrize("operation", ["store", *ARITHMETIC])
def test_bf16_equals_torch_in_every_bit(seen, operation):
    assert seen["bf16"][operation] == 0


def test_a_bf16_dot_is_that_of_its_numbers(seen):
    assert seen["bf16"]["dot"] < 1e-6


@pytest.mark.parametrize("what", ["values", "indices"])
def test_bf16_extremes_are_found(seen, what):
    got, want = seen["reductions"][what]
    assert got == want


def test_a_bf16_sum_is_refused(seen):
    assert "cast to tl.float32" in seen["reductions"]["sum"]


def test_a_copy_moves_each_byte_once(seen):
    launch, num_bytes = launch_of(seen, "copy"), 3 * 507 * 4
    assert (launch["x"]["loaded"], launch["x"]["stored"]) == (num_bytes, 0)
    assert (launch["y"]["loaded"], launch["y"]["stored"]) == (0, num_bytes)
    assert (launch["bytes"], launch["races"]) == (2 * num_bytes, [])


def test_arguments_that_share_memory_are_counted_apart(seen):
    launch = launch_of(seen, "in place")
    assert (launch["x"]["loads"], launch["x"]["stores"]) == ([1], [0])
    assert (launch["y"]["loads"], launch["y"]["stores"]) == ([0], [1])
    assert launch["races"] == []


def test_a_second_read_is_seen(seen):
    once, twice = launch_of(seen, "softmax"), launch_of(seen, "twice")
    assert (once["x"]["loads"], twice["x"]["loads"]) == ([1], [2])
    assert twice["x"]["loaded"] == 2 * once["x"]["loaded"]


def test_exps_are_counted_with_their_masked_lanes(seen):
    assert (launch_of(seen, "softmax")["exps"], launch_of(seen, "copy")["exps"]) == (3 * 512, 0)


def test_a_traced_kernel_computes_what_it_should(seen):
    assert seen["traffic"]["softmax error"] < 1e-6


def test_a_dot_costs_2mnk(seen):
    launch = launch_of(seen, "matmul")
    assert launch["dot_flops"] == 2 * 64 * 32 * 64
    assert launch["a"]["loaded"] == 64 * 64 * 2  # one tile of columns
    assert launch["b"]["loads"] == [2]  # by two tiles of rows


def test_atomics_of_many_programs_are_no_race(seen):
    launch = launch_of(seen, "count")
    got, want = seen["traffic"]["counts"]
    assert got == want
    assert (launch["races"], launch["counts"]["stored"]) == ([], 0)
    assert launch["counts"]["atomic"] > 0


def test_every_configuration_of_an_autotuned_kernel_runs(seen):
    loaded = [launch["x"]["loaded"] for launch in seen["traffic"]["tuned"]]
    assert loaded == [2400] * 3  # both configurations, then the one chosen
    assert seen["traffic"]["doubled"]


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("load", "out-of-bounds load of x: 1 elements, from 1500 to 1500"),
        ("in a wider tensor", "out-of-bounds load of x: 1 elements, from 500 to 500"),
        ("in another tensor", "out-of-bounds load of x: 1 elements, from 500 to 500"),
        ("store", "out-of-bounds store of y: 1 elements, from 500 to 500"),
    ],
)
def test_one_element_out_of_bounds_is_a_fault(seen, case, words):
    assert seen["faults"][case].startswith("MemoryFault: copy_kernel, program")
    assert words in seen["faults"][case]


def test_a_fault_comes_before_memory_is_touched(seen):
    assert seen["faults"]["untouched"]


@pytest.mark.parametrize(
    ("case", "races"),
    [
        ("collide", ["x: two programs write one element"]),
        ("same", ["x: one store writes an element more than once"]),
        ("swap", ["x: store, then load, without tl.debug_barrier between"]),
        ("shift up", ["x: a program loads what another one writes"]),
        ("shift down", ["y: a program writes what another one loads"]),
        ("alone", []),
        ("barrier", []),
    ],
)
def test_accesses_without_an_order_are_races(seen, case, races):
    assert launch_of(seen, case)["races"] == races


def test_a_race_is_raised(seen):
    assert seen["faults"]["raised"] == "Race: collide_kernel: x: two programs write one element"


if __name__ == "__main__":
    print(json.dumps(measure()))
