"""The Triton kernels of logprob/ and lm_head/ in Triton's interpreter, against float64.

As a script, it prints the table of errors: python -m tests.rloo_kernels.test_interpreted
"""

from __future__ import annotations

import functools
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.kernel_cases import (
    DTYPES,
    HEAD_CASES,
    ROW_CASES,
    HeadCase,
    RowCase,
    compared,
    error,
    make_head,
    make_rows,
    plain_logprobs,
    plain_rows,
    relative,
)
from tests.support.triton_process import run_worker

ROUNDING_BF16 = 2.0**-8  # one unit in the last place

# --- in the worker, where TRITON_INTERPRET=1


def by_row_kernels(case: RowCase, logits, ids, keep, upstream) -> dict[str, torch.Tensor]:
    """plain_rows, by the kernels."""
    from rloo_kernels.logprob.rows_triton import backward_triton_, forward_triton

    transform = {"softcap": case.softcap, "logit_scale": case.logit_scale}
    s = forward_triton(logits, ids, keep, case.temperature, True, **transform)
    again = forward_triton(logits, ids, keep, case.temperature, False, **transform)
    assert again.entropy.numel() == 0
    assert torch.equal(again.logps, s.logps)
    found = {"log-prob": s.logps, "1 - p": s.rest, "entropy": s.entropy}
    g, gh = upstream
    for name, grads in (
        ("gradient", (g, None)),
        ("gradient of H", (None, gh)),
        ("gradient of both", (g, gh)),
    ):
        out = torch.empty(logits.shape, dtype=logits.dtype)
        x = logits
        if case.layout == "in place":
            whole = torch.full(logits._base.shape, torch.nan, dtype=logits.dtype)
            out = x = whole[:, : logits.shape[1]]
            x.copy_(logits)
        args = (ids, keep, s, *grads, case.temperature)
        backward_triton_(out, x, *args, **transform)
        if case.layout == "in place":
            assert whole[:, logits.shape[1] :].isnan().all(), "written beside the slice"
        found[name] = out
    return found


def measure_rows(case: RowCase) -> dict[str, Any]:
    logits, ids, keep = make_rows(case)
    upstream = (torch.randn(len(ids)), torch.randn(len(ids)))
    got = by_row_kernels(case, logits, ids, keep, upstream)
    seen = torch.ones(len(ids), dtype=torch.bool) if keep is None else keep
    clean = torch.where(seen.view(logits.shape[:-1])[..., None], logits, 0.0)
    kept = tuple(torch.where(seen, x, 0.0) for x in upstream)
    shaped_ids = ids.view(logits.shape[:-1])
    plain, exact = (plain_rows(x, shaped_ids, case, kept) for x in (clean, clean.double()))
    for numbers in (plain, exact):
        for name in ("log-prob", "1 - p", "entropy"):
            numbers[name] = torch.where(seen, numbers[name].reshape(-1), 0.0)
    rows = compared(got, plain, exact)
    if case.logits == "sure" and case.dtype == "fp32":
        for name in ("log-prob", "1 - p"):
            errors = [(x[name].double() / exact[name] - 1).abs().max().item() for x in (got, plain)]
            rows[f"{name}, relative"] = (*errors, 1e-5)
        own = [x["gradient"].gather(-1, shaped_ids[..., None]) for x in (got, plain, exact)]
        errors = [(x.double() / own[2] - 1).abs().max().item() for x in own[:2]]
        rows["gradient of z_y, relative"] = (*errors, 1e-5)
    return rows


def measure_head(case: HeadCase) -> dict[str, Any]:
    from rloo_kernels.lm_head.matrix_triton import matrix_piece
    from rloo_kernels.lm_head.piece_triton import library_piece
    from rloo_kernels.lm_head.tiles_triton import POINTER_TILES, forced_tile
    from rloo_kernels.lm_head.types import LMHead

    hidden, weight, bias, ids = make_head(case)
    head = LMHead(weight, bias, case.temperature, case.softcap, case.logit_scale)
    upstream = (torch.randn(len(ids)), torch.randn(len(ids)))
    raw = torch.nn.functional.linear(hidden, weight, bias)
    wide = [None if x is None else x.double() for x in (hidden, weight, bias)]
    exact_raw = torch.nn.functional.linear(*wide)
    ones = (torch.ones(len(ids)), torch.zeros(len(ids)))
    plain, exact = (
        plain_rows(x, ids, case, ones) | {"by upstream": plain_rows(x, ids, case, upstream)}
        for x in (raw, exact_raw)
    )
    ways = {"library": library_piece(hidden, head, ids, True, True, None)}
    # bf16's range is fp32's; fp16's is too small for the exponentials
    for store in (False, True) if case.dtype != "fp16" else (False,):
        way = "gradient" if store else "forward"
        ways[f"matrix, {way}"] = matrix_piece(hidden, head, ids, True, store)
        with forced_tile(POINTER_TILES["interpreter"]):
            ways[f"matrix by pointers, {way}"] = matrix_piece(hidden, head, ids, True, store)
    rows: dict[str, Any] = {}
    farthest = farthest_anchor(exact["log-prob"], plain_top(exact_raw, case))
    for way, (s, gradient) in ways.items():
        got = {"log-prob": s.logps, "1 - p": s.rest, "entropy": s.entropy}
        if gradient is not None:
            scale = 1.0 if gradient.row_scale is None else gradient.row_scale[:, None]
            got["gradient"] = gradient.matrix * scale
        for name, row in compared(got, plain, exact).items():
            rows[f"{way}: {name}"] = row
        if way.startswith("matrix"):
            # the difference of two numbers as large as the way from the anchor to the maximum
            *errors, bound = rows[f"{way}: entropy"]
            rows[f"{way}: entropy"] = (*errors, bound + 2.0**-22 * farthest)
        if gradient is not None:
            errors = [relative(x["gradient"], exact["gradient"]) for x in (got, plain)]
            rows[f"{way}: gradient, relative"] = (*errors, gradient_bound(case))
        if case.ids == "likely" and way.startswith("matrix"):  # no cancellation
            sure = exact["1 - p"] < 1e-2
            assert sure.sum() > 5
            errors = [(x["1 - p"] / exact["1 - p"] - 1)[sure].abs().max() for x in (got, plain)]
            rows[f"{way}: 1 - p, relative"] = (*map(float, errors), 1e-4)
        small = case.temperature >= 0.7 and not exact_raw.abs().gt(1000).any()  # fp32's own digits
        if way.startswith("matrix") and small and case.ids == "random":
            errors = [error(x["log-prob"], exact["log-prob"]) for x in (got, plain)]
            rows[f"{way}: log-prob, at most 1e-4"] = (*errors, 1e-4)
    _, gradient = library_piece(hidden, head, ids, True, True, upstream)
    assert gradient is not None
    name = "gradient of both"
    got = {name: gradient.matrix}
    row = compared(got, plain["by upstream"], exact["by upstream"])[name]
    rows[f"library: {name}"] = row
    distance = ((exact["log-prob"] - plain_top(exact_raw, case)) / 0.6931471805599453).tolist()
    rows["flagged"] = [sum(d < -64 for d in distance), len(distance)]
    return rows


def gradient_bound(case: HeadCase) -> float:
    """The logit gradient is rounded once (library), or twice with their scale (matrix kernel)."""
    return 1e-5 if case.dtype == "fp32" else ROUNDING_BF16 / (1 if case.dtype == "bf16" else 8)


def farthest_anchor(logps: torch.Tensor, top_logps: torch.Tensor) -> float:
    """How far the tokens' logits lie below their rows' maxima, at most the 64 log 2 of a redo."""
    distance = (top_logps - logps).clamp(max=64 * 0.6931471805599453)
    return distance.max().item() if len(logps) else 0.0


def plain_top(raw: torch.Tensor, case: HeadCase) -> torch.Tensor:
    """The log-prob of the likeliest token of each row."""
    if not len(raw):
        return raw.new_empty(0)
    sign = -1 if case.logit_scale < 0 else 1
    return plain_logprobs(raw, (sign * raw).argmax(-1), case)["log-prob"]


def measure_far_rows() -> dict[str, Any]:
    """Rows whose first element lies beyond number 2**31, in memory that is mostly not there."""
    from rloo_kernels.lm_head.matrix_triton import matrix_piece
    from rloo_kernels.lm_head.types import LMHead
    from rloo_kernels.logprob.rows_triton import backward_triton_, forward_triton

    from tests.support.aot import untouched

    torch.manual_seed(0)
    vocab, rows = 300, {}
    x, ids = 3 * torch.randn(4, vocab).bfloat16(), torch.randint(vocab, (4,))
    upstream = (torch.randn(4), torch.randn(4))
    case = RowCase("far", "bf16", (4, vocab))
    plain, exact = (plain_rows(y, ids, case, upstream) for y in (x, x.double()))
    step = (1 << 30) + 8  # fits 32 bits, and 3 of them do not
    for name, shape, strides in (
        ("rows", (4, vocab), (step, 1)),
        ("outer rows", (4, 1, vocab), (step, step, 1)),
        ("inner rows", (1, 4, vocab), (step, step, 1)),
    ):
        memory = untouched((3 * step + vocab,), torch.bfloat16)
        far = memory.as_strided(shape, strides)
        far.copy_(x.view(shape))
        s = forward_triton(far, ids, None, 1.0, True)
        backward_triton_(far, far, ids, None, s, *upstream, 1.0)
        got = {"log-prob": s.logps, "gradient of both": far.reshape(4, vocab)}
        rows |= {f"{name}: {k}": row for k, row in compared(got, plain, exact).items()}
    head_case = HeadCase("far", sizes=(5, 48, 150))
    hidden, weight, _, ids = make_head(head_case)
    step = 1 << 25  # 150 rows of the lm_head, 75 of which lie beyond 2**31
    far = untouched((149 * step + 48,), torch.bfloat16).as_strided((150, 48), (step, 1))
    far.copy_(weight)
    ids[:3] = torch.tensor([149, 100, 65])
    ones = (torch.ones(5), torch.zeros(5))
    plain, exact = (plain_rows(h @ w.T, ids, head_case, ones) for h, w in (
        (hidden, weight), (hidden.double(), weight.double())
    ))  # fmt: skip
    s, gradient = matrix_piece(hidden, LMHead(far, None, 1.0, None, 1.0), ids, True, True)
    assert gradient is not None
    assert gradient.row_scale is not None
    got = {"log-prob": s.logps, "gradient": gradient.matrix * gradient.row_scale[:, None]}
    return rows | {f"lm_head: {k}": row for k, row in compared(got, plain, exact).items()}


def measure_strange_ids() -> dict[str, Any]:
    """Token ids outside the vocabulary: {way: (rows whose log-prob is nan, the others' error)}."""
    from rloo_kernels.lm_head.matrix_triton import matrix_piece
    from rloo_kernels.lm_head.piece_triton import library_piece
    from rloo_kernels.lm_head.types import LMHead
    from rloo_kernels.logprob.rows_triton import backward_triton_, forward_triton

    from tests.support.interpreter_trace import trace

    torch.manual_seed(0)
    hidden, weight = torch.randn(5, 32).bfloat16(), torch.randn(70, 32).bfloat16()
    ids = torch.tensor([3, -1, 70, 1 << 40, 69])
    head = LMHead(weight, None, 1.0, None, 1.0)
    logits = (hidden.float() @ weight.float().T).bfloat16()
    with trace():  # raises where something is read or written outside its tensor
        found = {
            "logits": forward_triton(logits, ids, None, 1.0, True),
            "matrix, forward": matrix_piece(hidden, head, ids, True, False)[0],
            "matrix, gradient": matrix_piece(hidden, head, ids, True, True)[0],
            "library": library_piece(hidden, head, ids, True, True, None)[0],
        }
        backward_triton_(
            torch.empty_like(logits), logits, ids, None, found["logits"], torch.ones(5), None, 1.0
        )
    good = torch.tensor([0, 4])
    rows = {}
    for name, s in found.items():
        z = logits if name == "logits" else hidden.double() @ weight.double().T
        want = z.double().log_softmax(-1)[good, ids[good]]
        rows[name] = (s.logps.isnan().nonzero().flatten().tolist(), error(s.logps[good], want))
    return rows


def measure_not_numbers() -> dict[str, list[bool]]:
    """Whether all log-probs are nan where torch's are: {what is wrong: by pass and tile}."""
    from rloo_kernels.lm_head.matrix_triton import matrix_piece
    from rloo_kernels.lm_head.tiles_triton import DESCRIPTOR_TILES, POINTER_TILES, forced_tile
    from rloo_kernels.lm_head.types import LMHead

    torch.manual_seed(0)
    hidden, weight = torch.randn(5, 32).bfloat16(), torch.randn(70, 32).bfloat16()
    bias, ids = torch.randn(70).bfloat16(), torch.arange(5)
    broken = weight.clone()
    broken[68, 3] = torch.nan  # of no row's token
    heads = {
        "nan in W": (broken, None),
        "nan in W, bias": (broken, bias),
        "bias of -inf": (weight, torch.full_like(bias, -torch.inf)),
    }
    found: dict[str, list[bool]] = {name: [] for name in heads}
    for (name, (w, b)), store, tiles in itertools.product(
        heads.items(), (False, True), (DESCRIPTOR_TILES, POINTER_TILES)
    ):
        with forced_tile(tiles["interpreter"]):
            s, _ = matrix_piece(hidden, LMHead(w, b, 1.0, None, 1.0), ids, True, store)
        found[name].append(bool(s.logps.isnan().all() and s.entropy.isnan().all()))
    return found


GROUPS = {
    "rows": lambda: {case.id: measure_rows(case) for case in ROW_CASES},
    "head": lambda: {case.id: measure_head(case) for case in HEAD_CASES},
    "far": measure_far_rows,
    "ids": measure_strange_ids,
    "nan": measure_not_numbers,
}


def work() -> dict[str, Any]:
    from tests.support.interpreter import fix_interpreter

    fix_interpreter()
    torch.use_deterministic_algorithms(True)  # torch.empty holds nan, and the largest int
    assert torch.empty(3).isnan().all()
    assert torch.ones(1).new_empty(3).isnan().all()
    return {name: group() for name, group in GROUPS.items()}


# --- the tests


@functools.cache
def measured() -> dict[str, Any]:
    return run_worker(Path(__file__), "--worker", interpret=True)


@pytest.fixture
def seen():
    pytest.importorskip("triton", reason="Triton has wheels for Linux alone")
    return measured()


def assert_within_bounds(rows):
    over = {name: row for name, row in rows.items() if name != "flagged" and not row[0] <= row[2]}
    assert not over, f"(error, torch's, bound): {over}"


@pytest.mark.parametrize("case", ROW_CASES, ids=lambda case: case.id)
def test_row_kernels_err_at_most_twice_as_much_as_torch(seen, case):
    assert_within_bounds(seen["rows"][case.id])


@pytest.mark.parametrize("case", HEAD_CASES, ids=lambda case: case.id)
def test_head_kernels_err_at_most_twice_as_much_as_torch(seen, case):
    assert_within_bounds(seen["head"][case.id])


@pytest.mark.parametrize("name", ["unlikely tokens bf16", "unlikely, soft-cap bf16"])
def test_the_head_cases_hold_rows_that_are_done_again_beside_ordinary_ones(seen, name):
    flagged, num_rows = seen["head"][name]["flagged"]
    assert 0 < flagged <= num_rows - 10


@pytest.mark.parametrize("name", ["all unlikely bf16", "all unlikely, wide fp16"])
def test_the_head_cases_hold_pieces_of_which_all_rows_are_done_again(seen, name):
    flagged, num_rows = seen["head"][name]["flagged"]
    assert flagged == num_rows


def test_rows_beyond_two_to_the_31_elements_are_found(seen):
    assert_within_bounds(seen["far"])


@pytest.mark.parametrize("way", ["logits", "matrix, forward", "matrix, gradient", "library"])
def test_ids_outside_the_vocabulary_give_nan_in_their_rows_alone(seen, way):
    rows, others = seen["ids"][way]
    assert rows == [1, 2, 3]
    assert others < 1e-5


@pytest.mark.parametrize("what", ["nan in W", "nan in W, bias", "bias of -inf"])
def test_what_is_not_a_number_is_not_hidden(seen, what):
    assert seen["nan"][what] == [True] * 4


def test_every_dtype_and_layout_has_a_case():
    assert {case.dtype for case in ROW_CASES} == {case.dtype for case in HEAD_CASES} == set(DTYPES)
    layouts = {case.layout for case in ROW_CASES}
    assert layouts == {"plain", "slice", "unaligned", "transposed", "in place"}


def print_table(groups: dict[str, Any]) -> None:
    print(f"{'case':<38}{'quantity':<42}{'kernel':>9}{'torch':>9}{'bound':>9}")
    for name, rows in groups.items():
        for quantity, row in rows.items():
            if quantity != "flagged":
                print(f"{name:<38}{quantity:<42}" + "".join(f"{x:>9.1e}" for x in row))


if __name__ == "__main__":
    if sys.argv[1:] == ["--worker"]:
        print(json.dumps(work()))
    else:
        found = measured()
        print_table({**found["rows"], **found["head"], "beyond 2**31 elements": found["far"]})
