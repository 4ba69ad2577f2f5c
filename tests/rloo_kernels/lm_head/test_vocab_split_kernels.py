"""What the kernels do for a split vocabulary alone: bytes in the interpreter, and code for GPUs."""

from __future__ import annotations

import functools
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.triton_process import run_worker

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
ROWS, V = 6, 2100


def pieces(n: int, empty: Any, softcap: float | None = None) -> Any:
    """A call of `_finish` for n rows of V columns, tensors made by empty(shape, dtype)."""
    from rloo_kernels.lm_head.types import LMHead, LogitGradient
    from rloo_kernels.lm_head.vocab_shards import SplitLabels
    from rloo_kernels.lm_head.vocab_shards_triton import _finish
    from rloo_kernels.logprob.types import RowStatistics

    matrix = empty((n, -(-V // 16) * 16), torch.bfloat16)
    gradient = LogitGradient(matrix[:, :V], empty((n,), torch.float32))
    head = LMHead(empty((V, 8), torch.bfloat16), None, 1.0, softcap, 1.0)
    columns, label = empty((n,), torch.int64), empty((n,), torch.float32)
    found = RowStatistics(*(empty((n,), torch.float32) for _ in range(5)))
    share = empty((n,), torch.float32)
    nobody: Any = None
    labels = SplitLabels(nobody, columns, label)
    return lambda: _finish(gradient, head, labels, found, share), gradient, columns, share, found


def traced() -> dict[str, Any]:
    """Bytes of one call whose third row has a share of 0, and which has four of six tokens."""
    from tests.support.interpreter import fix_interpreter
    from tests.support.interpreter_trace import trace

    fix_interpreter()
    call, gradient, columns, share, found = pieces(ROWS, lambda s, d: torch.ones(s, dtype=d))
    columns.copy_(torch.tensor([0, -1, 5, V - 1, -1, 7]))
    share[2], found.rest[:] = 0.0, 0.25
    with trace() as launches:
        call()
    (launch,) = launches
    moved = {name: (a.loaded_bytes, a.stored_bytes) for name, a in launch.arguments.items()}
    return {
        "bytes": {name: x for name, x in moved.items() if x != (0, 0)},
        "claimed": {
            "columns": (8 * ROWS, 0),
            "row_scale": (4 * ROWS, 4 * ROWS),
            "share": (4 * ROWS, 0),
            "rest": (4 * 4, 0),
            "matrix": (0, 3 * 2 + V * 2),
        },
        "dropped": gradient.matrix[2].nonzero().tolist(),
        "M_y": [(gradient.matrix[i, y] * gradient.row_scale[i]).item()
                for i, y in enumerate(columns) if y >= 0],
    }  # fmt: skip


def compiled() -> list[dict[str, Any]]:
    from rloo_kernels.logprob.rows_triton import forward_triton

    from tests.support.aot import compile_for, untouched

    n, vocab = 4096, 37984
    raw, ids = untouched((n, vocab)), untouched((n,), torch.int64)

    def calls():
        for softcap in (None, 30.0):
            pieces(n, untouched, softcap)[0]()
            transform = {"softcap": softcap, "label_logits": untouched((n,))}
            for entropy in (False, True):
                forward_triton(raw, ids, None, 1.0, entropy, **transform)

    return [asdict(row) for target in TARGETS for row in compile_for(target, calls)]


@functools.cache
def measured(interpret: bool) -> Any:
    pytest.importorskip("triton", reason="Triton has wheels for Linux alone")
    return run_worker(Path(__file__), "traced" if interpret else "compiled", interpret=interpret)


def test_the_last_pass_moves_the_bytes_it_claims():
    seen = measured(True)
    assert seen["bytes"] == {name: list(x) for name, x in seen["claimed"].items()}


def test_a_row_of_no_weight_keeps_its_token_alone():
    seen = measured(True)
    assert seen["dropped"] == [[5]]
    assert seen["M_y"] == [0.25] * 4


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kernel", ["_finish_kernel", "_forward_kernel"])
def test_kernels_compile_without_a_spill(kernel, target):
    rows = [x for x in measured(False) if (x["kernel"], x["target"]) == (kernel, target)]
    assert len(rows) == {"_finish_kernel": 2, "_forward_kernel": 4}[kernel]
    assert not any(row["spill_bytes"] for row in rows)


if __name__ == "__main__":
    print(json.dumps({"traced": traced, "compiled": compiled}[sys.argv[1]]()))
