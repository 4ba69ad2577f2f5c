"""The bytes that each Triton kernel loads and stores, counted, equal those its file claims.

Every access is checked against its tensor, and every order of accesses for races. As a script, it
prints the table of bytes: python -m tests.rloo_kernels.test_traced
"""

from __future__ import annotations

import functools
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from tests.support.kernel_cases import DTYPES
from tests.support.triton_process import run_worker

# A claim: {argument: (bytes loaded, bytes stored)}; an argument that is not named is not touched.
Claim = dict[str, tuple[int, int]]
Traced = tuple[str, str, Claim, Callable[[], Any]]  # kernel, case, claim, launcher
ROWS, V, KEPT = 5, 5000, 3  # two blocks of the vocabulary, the second one not full
STATISTICS = ("logps", "top", "log_total", "rest")


def row_claims(b: int, masked: bool, entropy: bool) -> tuple[Claim, dict[str, Claim]]:
    """The forward's claim, and the backward's by upstream gradient: V b per row, once."""
    kept = KEPT if masked else ROWS
    mask: Claim = {"keep": (ROWS, 0)} if masked else {}
    forward: Claim = {
        "logits": (kept * V * b + kept * b, 0),  # the token's own logit comes first
        "ids": (8 * kept, 0),
        **mask,
        **{name: (0, 4 * ROWS) for name in STATISTICS},
    }
    if entropy:
        forward["entropy"] = (0, 4 * ROWS)
    common: Claim = {
        "out": (0, ROWS * V * b),
        "logits": (kept * V * b, 0),
        "ids": (8 * kept, 0),
        "top": (4 * kept, 0),
        "log_total": (4 * kept, 0),
        **mask,
    }
    by_logp: Claim = {"grad": (4 * kept, 0), "rest": (4 * kept, 0)}
    names = ("grad_entropy", "entropy", "logps")
    by_entropy: Claim = {name: (4 * kept, 0) for name in names}
    backward = {"grad": common | by_logp}
    if entropy:
        backward |= {"H": common | by_entropy, "both": common | by_logp | by_entropy}
    return forward, backward


def traced_rows() -> Iterator[Traced]:
    from rloo_kernels.logprob.rows_triton import backward_triton_, forward_triton

    for dtype, masked, entropy in [
        ("fp32", False, False),
        ("fp16", True, False),
        ("bf16", False, True),
        ("bf16", True, True),
    ]:
        wide = torch.randn(ROWS, V + 3).to(DTYPES[dtype])
        logits = wide[:, :V]  # unaligned rows, with neighbours that are not the kernel's
        ids = torch.tensor([0, V - 1, 17, 4095, 4096])
        keep = torch.tensor([True, False, True, True, False]) if masked else None
        forward, backward = row_claims(logits.element_size(), masked, entropy)
        name = f"{dtype}{', masked' if masked else ''}{', entropy' if entropy else ''}"
        args = (ids, keep, 0.7)
        yield (
            "_forward_kernel",
            name,
            forward,
            lambda x=logits, a=args, e=entropy: forward_triton(x, *a, e),
        )
        s = forward_triton(logits, *args, entropy)
        g, gh = torch.randn(ROWS), torch.randn(ROWS)
        upstream = {"grad": (g, None), "H": (None, gh), "both": (g, gh)}
        for what, claim in backward.items():
            for place, out in (("", torch.empty(ROWS, V, dtype=logits.dtype)), (" in place", None)):
                target = wide.clone()[:, :V] if out is None else out
                source = target if out is None else logits
                yield (
                    "_backward_kernel",
                    f"{name}, {what}{place}",
                    claim,
                    lambda t=target, x=source, a=args, s=s, u=upstream[what]: backward_triton_(
                        t, x, a[0], a[1], s, *u, a[2]
                    ),
                )


# n, D, V with n % 32, D % 32 and V % 64 zero or not: the interpreter's tile is 32 x 64 x 32
HEAD_SIZES = [(64, 64, 128), (40, 48, 150), (90, 32, 200)]


def head_claims(
    sizes: tuple[int, int, int], bias: bool, entropy: bool, store: bool, descriptors: bool
) -> list:
    """[(kernel, claim)] of one matrix_piece in bf16 that flags no row."""
    n, depth, vocab = sizes
    tiles_n, tiles_v = -(-n // 32), -(-vocab // 64)
    padded = 4 * n * 16  # the sums of a row, up to their pitch
    # by pointers, a tile that is not full loads row 0 of X, or of W, in place of missing ones
    rows = n + (n % 32 > 0 and tiles_n > 1 and not descriptors)
    columns = vocab + (vocab % 64 > 0 and tiles_v > 1 and not descriptors)
    of_tiles = 4 * n * tiles_v
    label: Claim = {
        "hidden": (2 * n * depth, 0),
        "weight": (2 * n * depth, 0),
        "ids": (8 * n, 0),
        "z_y": (0, 4 * n),
    }
    head: Claim = {
        "hidden": (tiles_v * 2 * rows * depth, 0),
        "weight": (tiles_n * 2 * columns * depth, 0),
        "ids": (8 * n * tiles_v, 0),
        "anchor": (of_tiles, 0),
        "sums": (0, of_tiles),
    }
    combine: Claim = {
        "z_y": (4 * n, 0),
        "sums": (padded, 0),
        **{name: (0, 4 * n) for name in ("logps", "top_out", "log_total", "rest")},
    }
    if bias:
        label["bias"] = (2 * n, 0)
        head["bias"] = (tiles_n * 2 * vocab, 0)
    if entropy:
        head["weighted"] = (0, of_tiles)
        combine |= {"weighted": (padded, 0), "entropy": (0, 4 * n)}
    if store:
        head["matrix"] = (0, 2 * n * -(-vocab // 16) * 16)
        combine |= {"ids": (8 * n, 0), "matrix": (0, 2 * n), "row_scale": (0, 4 * n)}  # M_y
    # programs of the redo pass, which is for nobody: as many as there are tiles, but at most 4
    nobody: Claim = {"redo_count": (4 * min(4, tiles_n * tiles_v), 0)}
    return [
        ("_label_kernel", label),
        ("persistent_kernel" if descriptors else "_head_kernel", head),
        ("combine_kernel", combine),
        ("redo_kernel", nobody),
        ("redo_kernel", nobody),
        ("combine_kernel, redo", {"redo_count": (4 * min(4, -(-n // 4)), 0)}),
    ]


def traced_heads() -> Iterator[tuple[str, list, Callable[[], Any]]]:
    """(case, claims of its launches, launcher)."""
    from rloo_kernels.lm_head import tiles_triton
    from rloo_kernels.lm_head.matrix_triton import matrix_piece
    from rloo_kernels.lm_head.types import LMHead

    cases = [
        (HEAD_SIZES[0], False, False, False),
        (HEAD_SIZES[0], False, False, True),
        (HEAD_SIZES[1], True, True, False),
        (HEAD_SIZES[1], True, True, True),
    ]
    # rows of W at multiples of 16 bytes, or not; three row tiles as groups of two and one
    cases.append((HEAD_SIZES[2], False, False, True))
    for (sizes, bias, entropy, store), descriptors in itertools.product(cases, (True, False)):
        n, depth, vocab = sizes
        hidden = (torch.randn(n, depth) / 10).bfloat16()  # no row is flagged
        width = depth + (8 if descriptors else 5)
        weight = torch.randn(vocab, width).bfloat16()[:, :depth]
        head = LMHead(weight, torch.randn(vocab).bfloat16() if bias else None, 1.0, None, 1.0)
        ids = torch.randint(vocab, (n,))
        flags = f"{', bias' if bias else ''}{', entropy' if entropy else ''}"
        flags += "" if descriptors else ", odd"
        name = f"{n}x{depth}x{vocab}{flags}{', gradient' if store else ''}"
        group_bytes = 2 * 32 * depth * 2  # two row tiles of X

        def call(a=(hidden, head, ids, entropy, store), group_bytes=group_bytes):
            with mock.patch.object(tiles_triton, "GROUP_BYTES", group_bytes):
                matrix_piece(*a)

        yield name, head_claims(sizes, bias, entropy, store, descriptors), call


def traced_weights() -> Iterator[Traced]:
    """dW added in memory: the interpreter's tile is 32 x 64 of dW, 32 rows deep."""
    from rloo_kernels.lm_head.weight_triton import add_in_memory

    for n, depth, vocab in [(64, 64, 128), (40, 48, 150), (7, 200, 33)]:
        tiles_v, tiles_d = -(-vocab // 32), -(-depth // 64)
        claim: Claim = {  # beyond the edges nothing is loaded
            "matrix": (tiles_d * 2 * n * vocab, 0),
            "scaled": (tiles_v * 2 * n * depth, 0),
            "total": (0, 4 * vocab * depth),  # added; not loaded
        }
        matrix = torch.randn(n, -(-vocab // 16) * 16).bfloat16()[:, :vocab]
        tensors = torch.randn(vocab, depth), matrix, torch.randn(n, depth).bfloat16()
        name = f"{n}x{depth}x{vocab}"
        yield "_weight_kernel", name, claim, lambda t=tensors: add_in_memory(*t)


REDO_SIZES = (96, 32, 128)  # three row tiles and two column tiles
REDONE = [3, 40, 41, 95]


def redo_of_some_rows() -> list[dict[str, Any]]:
    """What the redo pass touches where rows of several row tiles are flagged, launch by launch."""
    from rloo_kernels.lm_head.matrix_triton import matrix_piece
    from rloo_kernels.lm_head.types import LMHead

    from tests.support.interpreter_trace import trace

    n, depth, vocab = REDO_SIZES
    hidden, weight = (torch.randn(n, depth) / 10).bfloat16(), torch.randn(vocab, depth).bfloat16()
    hidden[REDONE] *= 300
    ids = torch.randint(vocab, (n,))
    ids[REDONE] = (hidden.float() @ weight.float().T)[REDONE].argmin(-1)
    with trace() as launches:
        matrix_piece(hidden, LMHead(weight, None, 1.0, None, 1.0), ids, False, True)
    return [
        {name: (a.loaded_bytes, a.stored_bytes, a.atomic_bytes) for name, a in x.arguments.items()}
        for x in launches[3:]
    ]


OBJECTIVES = {
    # (level, kl, old, mask, inputs): per-token inputs loaded once, and those loaded twice
    "sequence": (("sequence", "reward", False, False), "ref_logps logps entropy", ""),
    "sequence, ratio": (
        ("sequence", "reward", True, False), "logps ref_logps old_logps entropy", ""),
    "sequence, ratio, mask": (
        ("sequence", "reward", True, True), "logps ref_logps old_logps entropy", "mask"),
    "token, ratio": (("token", "reward", True, False), "ref_logps entropy", "logps old_logps"),
    "token, k3": (("token", "loss", True, False), "entropy", "logps old_logps ref_logps"),
    "token, to go": (("token", "reward_to_go", False, False), "entropy", "logps ref_logps"),
    "token, given": (("token", "reward", True, True), "ref_logps entropy token_advantages",
                     "logps old_logps mask"),
}  # fmt: skip
LENGTHS = [3, 0, 17, 600, 5, 1]


def traced_objectives() -> Iterator[Traced]:
    from rloo_kernels.loss.objective_triton import objective_triton
    from rloo_kernels.loss.types import TABLE_FIELDS, LossInputs, LossOptions

    n, num_rows = sum(LENGTHS), len(LENGTHS)
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0)
    for name, ((level, kl, old, mask), once, twice) in OBJECTIVES.items():
        given = name.endswith("given")
        inputs = LossInputs(
            None if given else torch.randn(num_rows),
            None,
            torch.randn(n) if given else None,
            torch.randn(n) if old else None,
            torch.randn(n),
            torch.ones(n, dtype=torch.bool) if mask else None,
        )
        options = LossOptions(2, 0.0 if given else 0.1, denominator=6.0, kl=kl, level=level)
        per_token = {x: 1 for x in once.split()} | {x: 2 for x in twice.split()}
        claim: Claim = {
            x: (times * n * (1 if x == "mask" else 4), 0) for x, times in per_token.items()
        }
        # the sum of given advantages is known last, and replaces a zero
        cells = num_rows * (len(TABLE_FIELDS) + given)
        claim |= {
            "coefficients": (0, 4 * n),
            "cu_seqlens": (2 * 2 * 8 * num_rows, 0),
            "table": (0, 4 * cells),
        }
        if not given:
            claim["rewards"] = (4 * num_rows, 0)
        args = (torch.randn(n), bounds, inputs, torch.rand(n), options)
        yield "_segments_kernel", name, claim, lambda a=args: objective_triton(*a)


def counted(name: str, claims: list, call: Callable[[], Any]) -> Iterator[dict[str, Any]]:
    """One line for each launch's argument: the bytes seen and the bytes claimed."""
    from tests.support.interpreter_trace import trace

    with trace() as launches:
        call()
    assert [x.kernel for x in launches] == [kernel.split(",")[0] for kernel, _ in claims]
    for launch, (kernel, claim) in zip(launches, claims, strict=True):
        assert set(claim) <= set(launch.arguments), set(claim) - set(launch.arguments)
        for argument, a in launch.arguments.items():
            yield {
                "case": f"{kernel}: {name}",
                "argument": argument,
                "seen": [a.loaded_bytes, a.stored_bytes + a.atomic_bytes],  # added: not loaded
                "claimed": list(claim.get(argument, (0, 0))),
                "stores": sorted({int(x) for x in a.stores}),
            }


def work() -> dict[str, Any]:
    torch.manual_seed(0)
    lines: list[dict[str, Any]] = []
    for kernel, name, claim, call in [*traced_rows(), *traced_objectives(), *traced_weights()]:
        lines += counted(name, [(kernel, claim)], call)
    for name, claims, call in traced_heads():
        lines += counted(name, claims, call)
    return {"lines": lines, "redo": redo_of_some_rows()}


# --- the tests


@functools.cache
def measured() -> dict[str, Any]:
    return run_worker(Path(__file__), "--worker", interpret=True)


@pytest.fixture
def seen():
    pytest.importorskip("triton", reason="Triton has wheels for Linux alone")
    return measured()


def lines_of(seen, kernel):
    """Those of a case, or of all cases of a kernel."""
    lines = [x for x in seen["lines"] if kernel in (x["case"], x["case"].split(":")[0])]
    assert lines, kernel
    return lines


@pytest.mark.parametrize(
    "kernel",
    [
        "_forward_kernel",
        "_backward_kernel",
        "_label_kernel",
        "_head_kernel",
        "persistent_kernel",
        "combine_kernel",
        "redo_kernel",
        "combine_kernel, redo",
        "_weight_kernel",
        *(f"_segments_kernel: {name}" for name in OBJECTIVES),
    ],
)
def test_a_kernel_moves_the_bytes_that_its_file_claims(seen, kernel):
    lines = lines_of(seen, kernel)
    wrong = [line for line in lines if line["seen"] != line["claimed"]]
    assert not wrong, "\n".join(
        f"{line['case']}: {line['argument']} {line['seen']}, claimed {line['claimed']}"
        for line in wrong
    )


@pytest.mark.parametrize(
    ("kernel", "argument"),
    [
        ("_backward_kernel", "out"),
        ("_head_kernel", "matrix"),
        ("persistent_kernel", "matrix"),
        ("_segments_kernel", "coefficients"),
    ],
)
def test_every_element_of_the_output_is_stored_once(seen, kernel, argument):
    lines = [line for line in lines_of(seen, kernel) if line["argument"] == argument]
    assert all(line["stores"] == [1] for line in lines if line["claimed"][1])


def test_the_redo_pass_touches_the_flagged_rows_alone(seen):
    _, depth, vocab = REDO_SIZES
    rows, tiles_v, programs = len(REDONE), 2, 4
    # the rows of the list are one row tile; the lanes beyond its end load row 0 of X
    both: dict[str, tuple[int, ...]] = {
        "redo_count": (4 * programs, 0, 0),
        "redo_rows": (4 * rows * tiles_v, 0, 0),
        "hidden": (2 * (rows + 1) * depth * tiles_v, 0, 0),
        "weight": (2 * vocab * depth, 0, 0),
    }
    find_top = {"anchor": (0, 0, 4 * rows * tiles_v)}
    relative_to_it = {
        "anchor": (4 * rows * tiles_v, 0, 0),
        "ids": (8 * rows * tiles_v, 0, 0),
        "sums": (0, 4 * rows * tiles_v, 0),
        "matrix": (0, 2 * rows * vocab, 0),
    }
    touched = [
        {name: tuple(x) for name, x in launch.items() if x != [0, 0, 0]} for launch in seen["redo"]
    ]
    assert touched[:2] == [both | find_top, both | relative_to_it]
    combined = touched[2]
    assert combined.pop("redo_count") == (4 * programs, 0, 0)
    for name in ("redo_rows", "z_y", "anchor"):
        assert combined.pop(name) == (4 * rows, 0, 0)
    assert combined.pop("sums") == (4 * rows * 16, 0, 0)
    assert combined.pop("ids") == (8 * rows, 0, 0)
    assert combined.pop("matrix") == (0, 2 * rows, 0)
    assert set(combined.values()) == {(0, 4 * rows, 0)}  # the statistics


if __name__ == "__main__":
    if sys.argv[1:] == ["--worker"]:
        print(json.dumps(work()))
    else:
        print(f"{'kernel: case':<59}{'argument':<15}{'loaded':>9}{'stored':>9}{'claimed':>20}")
        for line in measured()["lines"]:
            claimed = "{} / {}".format(*line["claimed"])
            numbers = "".join(f"{x:>9}" for x in line["seen"])
            if line["seen"] != [0, 0] or line["claimed"] != [0, 0]:
                print(f"{line['case']:<59}{line['argument']:<15}{numbers}{claimed:>20}")
