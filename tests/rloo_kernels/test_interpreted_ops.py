"""The kernel of the objective and the whole ops in the interpreter, against torch in float64.

As a script, it prints the table of errors: python -m tests.rloo_kernels.test_interpreted_ops
"""

from __future__ import annotations

import functools
import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.rloo_kernels.test_interpreted import assert_within_bounds, print_table
from tests.support.kernel_cases import DTYPES, Numbers, compared, worst
from tests.support.triton_process import run_worker

# (level, kl, token_mean)
OBJECTIVES = [
    ("sequence", "reward", False),
    ("token", "reward", False),
    ("token", "reward", True),
    ("token", "reward_to_go", False),
    ("token", "reward_to_go", True),
    ("token", "loss", False),
    ("token", "corrected_loss", True),
]
GIVEN = ["rewards, rloo", "rewards, grpo", "rewards, dr_grpo", "advantages", "token_advantages"]
OBJECTIVE_CASES = {
    f"{level}, kl {kl}{', mean' if mean else ''}: {given}": ((level, kl, mean), given)
    for (level, kl, mean), given in itertools.product(OBJECTIVES, GIVEN)
    if not (given == "token_advantages" and level == "sequence")
    and not (kl == "reward_to_go" and not given.startswith("rewards"))
    and (given != "rewards, dr_grpo" or kl == "corrected_loss")  # one case of it is enough
}
NAN = float("nan")

# --- in the worker, where TRITON_INTERPRET=1


def ragged_batches() -> list[tuple[int, list[int], list[float]]]:
    """(K, lengths, rewards): ragged, empty, longer than a block of 512; NaN rewards."""
    return [
        (2, [3, 0, 0, 0, 17, 5], [1.0, NAN, 0.5, 2.0, -1.0, 3.0]),  # one scorable; empty group
        (3, [700, 1, 40, 6, 513, 512], [NAN, NAN, NAN, 1.0, 1.0, 1.5]),  # none scorable
    ]


def measure_objective(name: str) -> dict[str, Any]:
    from rloo_kernels.loss.objective_torch import objective_torch
    from rloo_kernels.loss.objective_triton import objective_triton
    from rloo_kernels.loss.types import TABLE_FIELDS, LossInputs, LossOptions

    (level, kl, mean), kind = OBJECTIVE_CASES[name]
    torch.manual_seed(len(name))
    found = []
    for i, use_old in itertools.product((0, 1), (False, True)):
        k, lengths, rewards = ragged_batches()[i]
        use_mask = use_old == (i == 1)
        bounds = torch.tensor([0, *lengths]).cumsum(0)
        n, num_rows = sum(lengths), len(lengths)
        logps = -torch.rand(n)
        inputs = LossInputs(
            torch.tensor(rewards) if kind.startswith("rewards") else None,
            torch.randn(num_rows) if kind == "advantages" else None,
            torch.randn(n) if kind == "token_advantages" else None,
            logps + torch.randn(n) / (5 if level == "token" else 50) if use_old else None,
            logps + 0.1 * torch.randn(n),
            torch.rand(n) > 0.3 if use_mask else None,
        )
        advantage = kind.split(", ")[-1] if kind.startswith("rewards") else "rloo"
        options = LossOptions(k, 0.3, 0.1, 0.2, 7.0, advantage, kl, level, mean)
        if inputs.old_logps is not None:
            inputs.old_logps[torch.rand(n) < 0.2] = NAN  # the token's own
        entropy = torch.rand(n)

        def numbers(run: Callable, dtype: torch.dtype, *args) -> Numbers:
            logps, bounds, inputs, entropy, options = args
            wide = [None if x is None else x.to(dtype) for x in inputs[:5]]
            inputs = type(inputs)(*wide, inputs.mask)
            c, table = run(logps.to(dtype), bounds, inputs, entropy.to(dtype), options)
            return {"coefficients": c, **dict(zip(TABLE_FIELDS, table, strict=True))}

        args = (logps, bounds, inputs, entropy, options)
        got, plain, exact = (
            numbers(run, dtype, *args)
            for run, dtype in (
                (objective_triton, torch.float32),
                (objective_torch, torch.float32),
                (objective_torch, torch.float64),
            )
        )
        found.append(compared(got, plain, exact))
    return worst(found)


def leaves(dtype: torch.dtype, *shapes: tuple[int, ...], frozen: tuple[int, ...] = ()):
    xs = [torch.randn(shape).to(dtype) for shape in shapes]
    return [x.requires_grad_(i not in frozen) for i, x in enumerate(xs)]


def logits_op(dtype: torch.dtype, inplace: bool = False, strided: bool = False) -> tuple:
    """selective_log_softmax on a slice of a longer sequence, through log-prob and entropy."""
    from rloo_kernels import selective_log_softmax

    (x,) = leaves(dtype, (2, 10, 300))
    ids, mask = torch.randint(300, (2, 18))[:, ::2], (torch.rand(2, 18) > 0.3)[:, ::2]
    if not strided:
        ids, mask = ids.contiguous(), mask.contiguous()
    g = torch.randn(2, 9)

    def call(x):
        z = (x * 1)[:, :-1]  # a leaf cannot be overwritten
        lp, h = selective_log_softmax(
            z, ids, temperature=0.7, mask=mask, return_entropy=True, inplace_backward=inplace
        )
        return {"log-prob": lp, "entropy": h}, (lp * g + h * g.flip(0)).sum()

    return call, [x]


def linear_op(
    dtype: torch.dtype,
    frozen: tuple[int, ...] = (),
    entropy: bool = False,
    strided: bool = False,
    flat: bool = False,
    **options: Any,
) -> tuple:
    """linear_logprob of 21 rows; `flat`: ids and mask without a batch."""
    from rloo_kernels import linear_logprob

    depth = 24
    hidden, weight, bias = leaves(dtype, (21, depth), (150, depth), (150,), frozen=frozen)
    ids, mask = torch.randint(150, (42,))[::2], (torch.rand(42) > 0.2)[::2]
    if strided:
        wide = torch.randn(150, 2).to(dtype)[:, 0]
        bias = wide.detach().requires_grad_(2 not in frozen)
        assert bias.stride() == (2,)
    else:
        ids, mask = ids.contiguous(), mask.contiguous()
    g = torch.randn(21)

    def call(hidden, weight, bias):
        found = linear_logprob(
            hidden, weight, ids, bias=bias, mask=mask if not flat else None,
            return_entropy=True, **options,
        )  # fmt: skip
        lp, h = found
        loss = (lp * g + h * g.flip(0)).sum() if entropy else (lp * g).sum()
        return {"log-prob": lp, "entropy": h}, loss

    return call, [hidden, weight, bias]


def loss_inputs(dtype: torch.dtype, old: bool, ref: bool) -> dict[str, Any]:
    lengths = [4, 0, 9, 2, 5, 7]
    n = sum(lengths)
    inputs: dict[str, Any] = {"rewards": torch.randn(6), "num_generations": 2}
    if old:
        inputs["old_logps"] = -4.5 + torch.randn(n)
        inputs["old_logps"][::5] = NAN  # the token's own
    if ref:
        inputs |= {"ref_logps": -4.5 + torch.randn(n), "beta": 0.1}
    return {"cu_seqlens": torch.tensor([0, *lengths]).cumsum(0), **inputs}


def fields(objective: Any) -> Numbers:
    return {k: x for k, x in objective._asdict().items() if x is not None}


def loss_op(
    dtype: torch.dtype,
    op: str = "fused_linear_rloo_loss",
    frozen: tuple[int, ...] = (),
    old: bool = False,
    ref: bool = True,
    strided: bool = False,
    mask: bool = False,
    chunk_bytes: int | None = None,
    **options: Any,
) -> tuple:
    """fused_linear_rloo_loss, rloo_loss or rloo_objective of six completions."""
    import rloo_kernels

    depth, vocab = 24, 150
    inputs = {**loss_inputs(dtype, old, ref), **options}
    bounds = inputs.pop("cu_seqlens")
    n = int(bounds[-1])
    if mask:
        inputs["mask"] = torch.rand(2 * n)[::2] > 0.2
        if not strided:
            inputs["mask"] = inputs["mask"].contiguous()
    if strided:
        bounds = torch.stack([bounds, bounds * 0], 1)[:, 0]
        for name in ("rewards", "ref_logps", "old_logps"):
            if name in inputs:
                inputs[name] = torch.stack([inputs[name], inputs[name] * 0], 1)[:, 0]
    ids = torch.randint(vocab, (2 * n,))[::2]
    ids = ids if strided else ids.contiguous()
    run = getattr(rloo_kernels, op)
    if op == "fused_linear_rloo_loss":
        tensors = leaves(dtype, (n, depth), (vocab, depth), frozen=frozen)
        inputs |= {"chunk_bytes": chunk_bytes, "return_entropy": True}
    elif op == "rloo_loss":
        tensors = leaves(dtype, (n, vocab))
        inputs["return_entropy"] = True
    else:
        tensors = [(-4.5 + torch.randn(n)).requires_grad_()]

    def call(*tensors):
        args = tensors if op == "rloo_objective" else (*tensors, ids)
        objective = run(*args, bounds, **inputs)
        return fields(objective), objective.loss

    return call, tensors


HALF, FULL = "bf16", "fp32"
TOKEN = {"level": "token", "token_mean": True}
OPS: dict[str, tuple[Callable, str, dict[str, Any]]] = {
    **{f"logits {dtype}": (logits_op, dtype, {}) for dtype in DTYPES},
    "logits, in place bf16": (logits_op, HALF, {"inplace": True}),
    "logits, strided ids and mask": (logits_op, FULL, {"strided": True}),
    **{f"linear {dtype}": (linear_op, dtype, {}) for dtype in DTYPES},
    "linear, pieces bf16": (linear_op, HALF, {"chunk_bytes": 3000}),
    "linear, pieces fp16": (linear_op, "fp16", {"chunk_bytes": 5000}),
    "linear, frozen head bf16": (linear_op, HALF, {"frozen": (1, 2)}),
    "linear, frozen head, pieces fp32": (linear_op, FULL, {"frozen": (1, 2), "chunk_bytes": 5000}),
    "linear, entropy bf16": (linear_op, HALF, {"entropy": True}),
    "linear, entropy, frozen fp32": (linear_op, FULL, {"entropy": True, "frozen": (1, 2)}),
    "linear, soft-cap bf16": (linear_op, HALF, {"softcap": 5.0, "temperature": 0.7}),
    "linear, strided ids and bias bf16": (linear_op, HALF, {"strided": True, "flat": True}),
    "linear, strided ids and bias fp32": (linear_op, FULL, {"strided": True, "flat": True}),
    "rloo_loss bf16": (loss_op, HALF, {"op": "rloo_loss"}),
    "rloo_loss, ratio fp32": (loss_op, FULL, {"op": "rloo_loss", "old": True, "mask": True}),
    **{f"fused {dtype}": (loss_op, dtype, {}) for dtype in DTYPES},
    "fused, ratio bf16": (loss_op, HALF, {"old": True, "mask": True, **TOKEN}),
    "fused, beta 0 bf16": (loss_op, HALF, {"ref": False, "mask": True}),
    "fused, frozen head bf16": (loss_op, HALF, {"frozen": (1,)}),
    "fused, frozen head, pieces fp32": (loss_op, FULL, {"frozen": (1,), "chunk_bytes": 6000}),
    "fused, two passes bf16": (loss_op, HALF, {"chunk_bytes": 1500}),
    "fused, pieces bf16": (loss_op, HALF, {"chunk_bytes": 3600}),
    "fused, known, pieces bf16": (loss_op, HALF, {"chunk_bytes": 3600, "ref": False}),
    "fused, normalize fp32": (loss_op, FULL, {"normalize": True}),
    "fused, k3 bf16": (loss_op, HALF, {"kl": "loss", **TOKEN, "advantage": "grpo"}),
    "fused, strided fp32": (loss_op, FULL, {"strided": True, "mask": True, "old": True}),
    "objective, strided": (
        loss_op, FULL, {"op": "rloo_objective", "strided": True, "mask": True, "old": True}),
    "objective, normalize": (loss_op, FULL, {"op": "rloo_objective", "normalize": True}),
    "objective, normalize, to go": (
        loss_op, FULL, {"op": "rloo_objective", "normalize": True, "kl": "reward_to_go", **TOKEN}),
}  # fmt: skip


def measure_op(name: str) -> dict[str, Any]:
    """The op in the interpreter, in torch in the same dtype, in torch in float64."""
    from rloo_kernels import dispatch

    make, dtype, options = OPS[name]
    torch.manual_seed(len(name))
    call, tensors = make(DTYPES[dtype], **options)

    def numbers(interpreted: bool, widen: bool) -> Numbers:
        dispatch.INTERPRETED = interpreted
        xs = [x.detach().double() if widen else x.detach() for x in tensors]
        xs = [y.requires_grad_(x.requires_grad) for x, y in zip(tensors, xs, strict=True)]
        found, loss = call(*xs)
        loss.backward()
        gradients = {f"gradient {i}": x.grad for i, x in enumerate(xs) if x.requires_grad}
        return {k: x.detach() for k, x in (found | gradients).items()}

    return compared(numbers(True, False), numbers(False, False), numbers(False, True))


def work() -> dict[str, Any]:
    from tests.support.interpreter import fix_interpreter

    fix_interpreter()
    torch.use_deterministic_algorithms(True)  # torch.empty holds nan, and the largest int
    return {
        "objectives": {name: measure_objective(name) for name in OBJECTIVE_CASES},
        "ops": {name: measure_op(name) for name in OPS},
    }


# --- the tests


@functools.cache
def measured() -> dict[str, Any]:
    return run_worker(Path(__file__), "--worker", interpret=True)


@pytest.fixture
def seen():
    pytest.importorskip("triton", reason="Triton has wheels for Linux alone")
    return measured()


@pytest.mark.parametrize("name", OBJECTIVE_CASES)
def test_the_objective_kernel_errs_at_most_twice_as_much_as_torch(seen, name):
    assert_within_bounds(seen["objectives"][name])


@pytest.mark.parametrize("name", OPS)
def test_an_op_by_kernels_errs_at_most_twice_as_much_as_by_torch(seen, name):
    assert_within_bounds(seen["ops"][name])


if __name__ == "__main__":
    if sys.argv[1:] == ["--worker"]:
        print(json.dumps(work()))
    else:
        found = measured()
        print_table(found["objectives"] | found["ops"])
