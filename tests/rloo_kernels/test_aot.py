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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

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
    "combine_kernel",
    "redo_kernel",
    "_segments_kernel",
}
# Bytes spilled per thread. Under triton 3.6 the wide tile of sm_90 spills where nothing is stored,
# later the redo pass of the lm_head where D is no multiple of 8, and a row kernel two registers.
SPILL_BOUND = {"3.6": 160, "later": 64}
ALIGNED, UNALIGNED, SMALL = 151936, 50257, 507
ROOT = Path(__file__).parents[2]
OLDEST = Path(os.environ.get("RLOO_TRITON_36") or ROOT / ".triton36")
NO_OLDEST = (
    "the oldest Triton is not at hand: "
    'pip install --no-deps --target .triton36 triton==3.6.0 "numpy<2.4"'
)


def covering(options: dict[str, list[Any]], size: int) -> list[dict[str, Any]]:
    """Few choices among which all values of any `size` options occur together; greedy."""
    every = [
        dict(zip(options, values, strict=True)) for values in itertools.product(*options.values())
    ]

    def subsets(choice: dict[str, Any]) -> set[tuple]:
        return set(itertools.combinations(choice.items(), size))

    missing, chosen = set().union(*map(subsets, every)), []
    while missing:
        best = max(every, key=lambda choice: len(subsets(choice) & missing))
        missing -= subsets(best)
        chosen.append(best)
    return chosen


# --- in the worker: launches, with tensors that take no memory


def row_launches(vocab: int, strength: int) -> Iterator[Callable[[], Any]]:
    """The row kernels of the op on logits and of the "library" way of the lm_head."""
    import torch
    from rloo_kernels.logprob.rows_triton import backward_triton_, forward_triton
    from rloo_kernels.logprob.types import RowStatistics

    from tests.support.aot import untouched

    dtypes = [torch.float32, torch.float16, torch.bfloat16]
    n = 4096
    ids, keep = untouched((n,), torch.int64), untouched((n,), torch.bool)
    statistics = RowStatistics(*(untouched((n,)) for _ in range(5)))
    transforms, flags = [(30.0, 1.0), (None, -1.0), (None, 1.0)], [True, False]

    def launch(dtype, out, mask, entropy, upstream, transform):
        def call():
            x, target = untouched((n, vocab), dtype), untouched((n, vocab), out)
            kwargs = dict(zip(("softcap", "logit_scale"), transform, strict=True))
            rows = (ids, keep if mask else None)
            forward_triton(x, *rows, 1.0, entropy, **kwargs)
            grads = (untouched((n,)) if name in upstream else None for name in ("grad", "H"))
            backward_triton_(target, x, *rows, statistics, *grads, 1.0, **kwargs)

        return call

    upstream = [("grad", "H"), ("H",), ("grad",)]
    by_op = {"dtype": dtypes[::-1], "mask": flags, "entropy": flags, "up": upstream}
    by_head = {"out": dtypes, "entropy": flags, "up": upstream[::2], "to": transforms}
    if vocab != ALIGNED or strength == 1:  # the others differ in how they are loaded, no more
        by_op, by_head = (
            {name: values[:1] for name, values in x.items()} for x in (by_op, by_head)
        )
    for c in covering(by_op, strength):
        yield launch(c["dtype"], c["dtype"], c["mask"], c["entropy"], c["up"], (None, 1.0))
    for c in covering(by_head, 1):
        yield launch(torch.float32, c["out"], False, c["entropy"], c["up"], c["to"])


def head_launches(vocab: int, depths: list[int], strength: int) -> Iterator[Callable[[], Any]]:
    import torch
    from rloo_kernels.lm_head.matrix_triton import matrix_piece
    from rloo_kernels.lm_head.types import LMHead

    from tests.support.aot import untouched

    def launch(store, entropy, bias, transform, depth, vocab, dtype, n=4096):
        def call():
            weight = untouched((vocab, depth), dtype)
            head = LMHead(weight, untouched((vocab,), dtype) if bias else None, 1.0, *transform)
            hidden, ids = untouched((n, depth), dtype), untouched((n,), torch.int64)
            matrix_piece(hidden, head, ids, entropy, store)  # its [n, V] is never touched

        return call

    if vocab != ALIGNED or depths[0] % 8:
        yield launch(True, True, False, (None, 1.0), depths[0], vocab, torch.bfloat16)
        return
    options = {
        "transform": [(30.0, 1.0), (None, 1.0), (None, -1.0)],
        "depth": depths,
        "store": [True, False],
    }
    if strength == 1:
        options["transform"] = options["transform"][:2]
    for c in covering(options, strength):
        bias = c["depth"] == depths[-1]
        yield launch(c["store"], True, bias, c["transform"], c["depth"], vocab, torch.bfloat16)
    yield launch(False, False, False, (None, 1.0), depths[0], vocab, torch.float16)
    if strength > 1:
        yield launch(True, False, True, (None, 1.0), depths[0], vocab, torch.bfloat16)
        # integers that are 1 become constants
        yield launch(True, False, False, (None, 1.0), 7, 1, torch.bfloat16, n=1)


def objective_launches(strength: int) -> Iterator[Callable[[], Any]]:
    import torch
    from rloo_kernels.loss.advantages import BY_GROUP
    from rloo_kernels.loss.objective_triton import objective_triton
    from rloo_kernels.loss.types import LossInputs, LossOptions

    from tests.support.aot import untouched

    def launch(objective, kind, old, ref, mask, entropy, k):
        def call():
            n, num_rows = 4096, k * (8 if k > 1 else 1)
            tokens = [untouched((n,)) for _ in range(5)]
            inputs = LossInputs(
                untouched((num_rows,)) if kind in BY_GROUP else None,
                untouched((num_rows,)) if kind == "rows" else None,
                tokens[0] if kind == "tokens" else None,
                tokens[1] if old else None,
                tokens[2] if ref else None,
                untouched((n,), torch.bool) if mask else None,
            )
            level, kl, mean = objective
            advantage = kind if kind in BY_GROUP else "rloo"
            options = LossOptions(k, 0.1, denominator=9.0, advantage=advantage, kl=kl,
                                  level=level, token_mean=mean)  # fmt: skip
            bounds = untouched((num_rows + 1,), torch.int64)
            given = tokens[4] if entropy else None
            objective_triton(tokens[3], bounds, inputs, given, options)

        return call

    flags = [True, False]
    objectives = [
        ("sequence", "reward", False),
        ("token", "reward", True),
        ("token", "reward_to_go", False),
        ("token", "loss", False),
        ("token", "corrected_loss", False),
    ]
    options = {
        "objective": objectives,
        "kind": ["rloo", "grpo", "rows", "tokens", "dr_grpo"],
        "old": flags,
        "ref": flags,
        "mask": flags,
        "entropy": flags,
        "k": [2, 16],
    }
    for c in covering(options, 1) if strength > 1 else []:
        if c["kind"] == "tokens" and c["objective"][0] == "sequence":
            continue
        if c["objective"][1] != "reward" and not c["ref"]:
            c = {**c, "ref": True}
        yield launch(*c.values())
    yield launch(objectives[0], "rows", True, True, True, True, 1)
    yield launch(objectives[4], "grpo", True, True, True, True, 16)


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
    assert {row["kernel"] for row in rows_of(seen, target)} == KERNELS


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
    bound = SPILL_BOUND.get(seen["triton"][:3], SPILL_BOUND["later"])
    over = [row for row in rows_of(seen, target, group=group) if row["spill_bytes"] > bound]
    assert not over, [(row["kernel"], row["config"], row["spill_bytes"]) for row in over]


@on(ALL)
def test_the_matrix_kernel_uses_the_matrix_unit(seen, target):
    for row in rows_of(seen, target):
        product = row["kernel"] in ("_head_kernel", "redo_kernel")
        expected = [TARGETS[target]] if product else []
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
def test_the_matrix_kernel_loads_its_tiles_in_128_bits_and_stores_them_so(seen, target):
    even = [row for row in rows_of(seen, target, "_head_kernel") if row["config"]["EVEN_D"]]
    assert all(row["loads_128"] > 0 for row in even)
    assert any(row["stores_128"] > 0 for row in even if row["config"]["STORE"])


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
    print(f"triton {found['triton']}")
    print(
        f"{'target':<8}{'kernel':<18}{'pointers':<16}{'constexprs':<62}{'warps':>6}{'regs':>5}"
        f"{'spill':>6}{'shared':>8}  {'MMA':<10}{'ld128':>6}{'st128':>8}"
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
              f"{row['stores_128']:>3}/{row['stores']:<3}")  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1:] == ["--worker"]:
        print(json.dumps(work()))
    else:
        print_table(compiled(None))
