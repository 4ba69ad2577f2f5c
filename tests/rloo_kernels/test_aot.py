"""The Triton kernels compiled for GPUs that are not here: sm_80, sm_90, sm_100 and gfx942.

For sm_90 the configurations hold every pair of a kernel's main options, for the others the
heaviest. All are compiled under the installed Triton; under the oldest one, where it is at hand,
the heaviest for sm_90. As a script, it prints what came out: python -m tests.rloo_kernels.test_aot
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.support.aot_launches import (
    ALIGNED,
    SMALL,
    UNALIGNED,
    covering,
    head_launches,
    objective_launches,
    row_launches,
)
from tests.support.triton_process import run_worker

pytestmark = pytest.mark.slow

TARGETS = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "mfma"}
RELEASES = {"installed": list(TARGETS), "3.6": ["sm_90"]}  # of Triton: what it compiles for
ALL = [(release, target) for release, targets in RELEASES.items() for target in targets]
CUDA = [(release, target) for release, target in ALL if target.startswith("sm")]
KERNELS = {
    "_forward_kernel",
    "_backward_kernel",
    "_label_kernel",
    "_head_kernel",
    "persistent_kernel",
    "combine_kernel",
    "redo_kernel",
    "_segments_kernel",
}
WITH_PRODUCTS = ("_head_kernel", "persistent_kernel", "redo_kernel")
HAVE_TMA = ("sm_90", "sm_100")  # what they compile the lm_head's main kernel to
# Bytes spilled per thread: under triton 3.9 the wide tile of sm_90 in some of its variants, and a
# row kernel two registers.
SPILL_BOUND = 64
ROOT = Path(__file__).parents[2]
OLDEST = Path(os.environ.get("RLOO_TRITON_36") or ROOT / ".triton36")
NO_OLDEST = (
    "the oldest Triton is not at hand: "
    'pip install --no-deps --target .triton36 triton==3.6.0 "numpy<2.4"'
)


def work() -> dict[str, Any]:
    from dataclasses import asdict

    import triton

    from tests.support.aot import compile_for

    rows = []
    oldest = "RLOO_TRITON_PATH" in os.environ
    for target in RELEASES["3.6" if oldest else "installed"]:
        # every pair of options once is enough: not under the oldest Triton again
        strength = 2 if target == "sm_90" and not oldest else 1
        vocabularies = (ALIGNED, UNALIGNED, SMALL) if target == "sm_90" else (ALIGNED,)
        groups = {
            **{f"V={v}": row_launches(v, strength) for v in vocabularies},
            "lm_head": head_launches(ALIGNED, [1024, 784], strength),  # on the tile, and off it
            f"lm_head, V={UNALIGNED}": head_launches(UNALIGNED, [768], strength),
            "objective": objective_launches(strength),
        }
        if target == "sm_90":
            groups["lm_head, D=1001"] = head_launches(ALIGNED, [1001], strength)
        for name, launches in groups.items():
            calls = list(launches)

            def call(calls=calls):
                for launch in calls:
                    launch()

            compiled = compile_for(target, call)
            rows += [{**asdict(row), "fits": row.fits, "group": name} for row in compiled]
    return {"triton": triton.__version__, "rows": rows}


# --- the tests


@functools.cache
def compiled(path: str | None) -> dict[str, Any]:
    with mock.patch.dict(os.environ, {"RLOO_TRITON_PATH": path} if path else {}):
        return run_worker(Path(__file__), "--worker", interpret=False)


@pytest.fixture(params=RELEASES)
def seen(request):
    pytest.importorskip("triton", reason="Triton has wheels for Linux alone")
    if request.param == "installed":
        return compiled(None)
    if not OLDEST.is_dir():
        pytest.skip(NO_OLDEST)
    return compiled(str(OLDEST))


def rows_of(seen, target, *kernels, group=None):
    rows = [
        row
        for row in seen["rows"]
        if row["target"] == target and row["kernel"] in (kernels or KERNELS)
        if group in (None, row["group"])
    ]
    assert rows, (target, kernels, group)
    return rows


def on(pairs: list[tuple[str, str]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("seen", "target"), pairs, indirect=["seen"])


@on(ALL)
def test_every_kernel_is_compiled(seen, target):
    without = set() if target in HAVE_TMA else {"persistent_kernel"}
    assert {row["kernel"] for row in rows_of(seen, target)} == KERNELS - without


@on(ALL)
def test_every_configuration_fits_shared_memory(seen, target):
    assert all(row["fits"] for row in rows_of(seen, target))


EVERYWHERE = ("lm_head", "objective", f"V={ALIGNED}", f"lm_head, V={UNALIGNED}")
ON_SM_90 = (f"V={UNALIGNED}", f"V={SMALL}", "lm_head, D=1001")
GROUPS = [
    (release, target, group)
    for release, target in ALL
    for group in (*EVERYWHERE, *(ON_SM_90 if target == "sm_90" else ()))
]


@pytest.mark.parametrize(("seen", "target", "group"), GROUPS, indirect=["seen"])
def test_registers_do_not_spill_more_than_the_bound(seen, target, group):
    over = [row for row in rows_of(seen, target, group=group) if row["spill_bytes"] > SPILL_BOUND]
    assert not over, [(row["kernel"], row["config"], row["spill_bytes"]) for row in over]


@on(ALL)
def test_the_matrix_kernel_uses_the_matrix_unit(seen, target):
    for row in rows_of(seen, target):
        expected = [TARGETS[target]] if row["kernel"] in WITH_PRODUCTS else []
        assert list(row["mma"]) == expected, (row["kernel"], row["config"])


@on(CUDA)
def test_aligned_rows_are_loaded_and_stored_in_128_bits(seen, target):
    group = f"V={ALIGNED}"
    scalars = {"_forward_kernel": 3, "_backward_kernel": 9}
    for row in rows_of(seen, target, *scalars, group=group):
        assert row["loads_128"] > 0
        assert row["loads"] - row["loads_128"] <= scalars[row["kernel"]], row["config"]
    for row in rows_of(seen, target, "_backward_kernel", group=group):
        assert row["stores_128"] == row["stores"] > 0, row["config"]


@on(CUDA)
def test_tiles_by_pointers_are_loaded_and_stored_in_128_bits(seen, target):
    by_pointers = rows_of(seen, target, "_head_kernel", "redo_kernel")
    even = [row for row in by_pointers if row["config"]["EVEN_D"]]
    assert all(row["loads_128"] > 0 for row in even)
    assert any(row["stores_128"] > 0 for row in even if row["config"]["STORE"])


@on([pair for pair in ALL if pair[1] in HAVE_TMA])
def test_the_persistent_kernel_is_specialised_by_warps(seen, target):
    # The compiler says nothing where it is not, and the kernel is as right: only slower.
    for row in rows_of(seen, target, "persistent_kernel"):
        assert row["config"]["SPECIALIZE"]
        assert len(row["specialized"]) > 1, f"no registers move between warps: {row['config']}"
        assert row["tma_loads"] >= 2, row["config"]
        assert (row["tma_stores"] > 0) == row["config"]["STORE"]
        if not row["config"]["HAS_BIAS"]:
            assert row["loads_128"] == 0, row["config"]  # no thread loads a part of X or W


@on([pair for pair in ALL if pair[1] in HAVE_TMA])
def test_no_thread_computes_addresses_between_products(seen, target):
    """The loop over D: products, barriers, and what the warp's scalar unit does."""
    for row in rows_of(seen, target, "persistent_kernel"):
        vector = set(row["product_loop"]) & {"LDG", "LDS", "STS", "FADD", "FMUL", "LDGSTS", "LDL"}
        assert row["product_loop"].get(TARGETS[target]) == 4, row["product_loop"]
        assert not vector, row["product_loop"]


# Instructions of a thread after a tile's products, per element that it holds, by (WANT_ENTROPY,
# STORE). Triton 3.9 makes 6.9, 8.8, 7.9, 9.4 to 9.9 (one of them exp2), Triton 3.6 up to 1.4 more.
MIX_BOUNDS = {
    (False, False): 9.0,
    (True, False): 10.5,
    (False, True): 10.0,
    (True, True): 11.5,
}


@on([pair for pair in ALL if pair[1] == "sm_90"])
def test_an_element_of_the_epilogue_costs_few_instructions(seen, target):
    for row in rows_of(seen, target, "persistent_kernel"):
        c = row["config"]
        if c["MODE"] < 1 and not c["HAS_BIAS"]:
            cost = per_element(row)
            assert row["epilogue"]["MUFU"] == 128, row["epilogue"]
            assert 5 < cost < MIX_BOUNDS[c["WANT_ENTROPY"], c["STORE"]], (c, cost)


def per_element(row: dict[str, Any]) -> float:
    """Instructions of the epilogue per element; a soft-cap takes two exp2 more per element."""
    exps = row["epilogue"].get("MUFU", 0)
    elements = exps / 3 if row["config"].get("MODE") == 1 else exps
    return sum(row["epilogue"].values()) / max(elements, 1)


def test_rows_that_start_anywhere_are_moved_one_by_one(seen):
    rows = rows_of(seen, "sm_90", "_forward_kernel", "_backward_kernel", group=f"V={UNALIGNED}")
    assert {(row["loads_128"], row["stores_128"]) for row in rows} == {(0, 0)}


@pytest.mark.parametrize(("vocab", "block"), [(ALIGNED, 4096), (UNALIGNED, 4096), (SMALL, 512)])
def test_the_block_follows_the_vocabulary(seen, vocab, block):
    rows = rows_of(seen, "sm_90", "_forward_kernel", group=f"V={vocab}")
    assert {row["config"]["BLOCK"] for row in rows} == {block}


def test_covering_holds_every_pair():
    options = {"a": [1, 2, 3], "b": [1, 2], "c": [1, 2], "d": [1, 2]}
    chosen = covering(options, 2)
    for (i, xs), (j, ys) in itertools.combinations(options.items(), 2):
        assert {(c[i], c[j]) for c in chosen} == set(itertools.product(xs, ys))
    assert len(chosen) < 10


def print_table(found: dict[str, Any]) -> None:
    print(
        f"triton {found['triton']}. loop: instructions beside the MMAs in a step along D; "
        "epilogue: per element, after a tile's products; groups: registers of specialised warps"
    )
    print(
        f"{'target':<8}{'kernel':<18}{'pointers':<16}{'constexprs':<62}{'warps':>6}{'regs':>5}"
        f"{'spill':>6}{'shared':>8}  {'MMA':<10}{'ld128':>6}{'st128':>8}{'TMA':>5}"
        f"{'loop':>5}{'epilogue':>9}  groups"
    )
    for row in found["rows"]:
        constants = " ".join(
            name if value is True else f"{name}={value}"
            for name, value in row["config"].items()
            if value is not False
        )
        mma = " ".join(f"{name}:{count}" for name, count in row["mma"].items()) or "-"
        dtypes = ",".join(row["pointers"].split(",")[:3])
        print(f"{row['target']:<8}{row['kernel'].strip('_'):<18}{dtypes:<16}{constants[:60]:<62}"
              f"{row['num_warps']:>6}{row['registers']:>5}{row['spill_bytes']:>6}"
              f"{row['shared_bytes']:>8}  {mma:<10}{row['loads_128']:>3}/{row['loads']:<4}"
              f"{row['stores_128']:>3}/{row['stores']:<3}"
              f"{row['tma_loads']:>3}/{row['tma_stores']}{beside_products(row):>5}"
              f"{per_element(row) if row['epilogue'] else 0:>9.1f}  "
              f"{','.join(map(str, row['specialized'])) or '-'}")  # fmt: skip
    print("\ninstructions of a thread after a tile's products, the most frequent")
    for row in found["rows"]:
        if row["kernel"] in WITH_PRODUCTS and row["epilogue"]:
            c = row["config"]
            options = [
                name for name in ("HAS_BIAS", "WANT_ENTROPY", "STORE", "HALVES") if c.get(name)
            ]
            tile = "x".join(str(c[name]) for name in ("BLOCK_N", "BLOCK_V", "BLOCK_D"))
            mix = " ".join(f"{name}:{count}" for name, count in [*row["epilogue"].items()][:10])
            print(f"{row['target']:<8}{row['kernel'].strip('_'):<18}{tile:<12}MODE={c['MODE']} "
                  f"{' '.join(options):<36}{mix}")  # fmt: skip


def beside_products(row: dict[str, Any]) -> int:
    loop = row["product_loop"]
    return sum(count for name, count in loop.items() if name not in row["mma"])


if __name__ == "__main__":
    if sys.argv[1:] == ["--worker"]:
        print(json.dumps(work()))
    else:
        print_table(compiled(None))
