"""Inputs that made peers give wrong gradients or log-probs, in the ops, by torch and by kernels.

The numbers are issues: gradients given twice (QuACK 209), log-probs of very negative logits (verl
2656, SkyRL 2141), gradients of zero (unsloth 5230). The ops run by torch here, and in Triton's
interpreter in a process of its own, with the same tests of the same numbers.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rloo_kernels import fused_linear_rloo_loss, linear_logprob, rloo_loss, selective_log_softmax
from torch import Tensor

from tests.support.kernel_helpers import plain_head
from tests.support.triton_process import run_worker

N, D, V = 24, 32, 130
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BOUNDS = torch.arange(0, N + 1, 3)  # 8 completions
SOFTCAP: dict[str, Any] = {"softcap": 30.0, "temperature": 0.7}


def head_inputs(dtype: torch.dtype, spread: float = 3.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(hidden, weight, ids, advantages): logits have a standard deviation of `spread`."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(N, D), spread / D**0.5 * torch.randn(V, D)
    ids, advantages = torch.randint(V, (N,)), torch.randn(len(BOUNDS) - 1)
    return hidden.to(dtype), weight.to(dtype), ids, advantages


def leaf(x: Tensor) -> Tensor:
    return x.clone().requires_grad_()


def distance(x: Tensor, exact: Tensor) -> float:
    """||x - exact|| / ||exact||, inf where x is not finite."""
    if not x.isfinite().all():
        return float("inf")
    return ((x.double() - exact).norm() / exact.norm()).item()


# --- what is measured, by torch in this process and by kernels in another


def gradients_twice(dtype: torch.dtype) -> dict[str, list[float]]:
    """[distance of the second backward's gradients from the first's, of 3 x loss from 3 x them]."""
    hidden, weight, ids, advantages = head_inputs(dtype)
    x, w = leaf(hidden), leaf(weight)
    logits = leaf(torch.nn.functional.linear(hidden, weight))
    fused = fused_linear_rloo_loss(x, w, ids, BOUNDS, advantages=advantages, chunk_bytes=6 * 4 * V)
    alone = rloo_loss(logits, ids, BOUNDS, advantages=advantages)
    logps = linear_logprob(x, w, ids)
    assert isinstance(logps, Tensor)
    made = {
        "fused_linear_rloo_loss": (fused.loss, (x, w)),
        "rloo_loss": (alone.loss, (logits,)),
        "linear_logprob": (logps.square().sum(), (x, w)),
    }
    found = {}
    for name, (loss, leaves) in made.items():
        first, second = (
            [g.clone() for g in torch.autograd.grad(loss, leaves, retain_graph=True)]
            for _ in range(2)
        )
        third = torch.autograd.grad(3 * loss, leaves)
        pairs = list(zip(first, second, third, strict=True))
        found[name] = [
            max(distance(b, a.double()) for a, b, _ in pairs),
            max(distance(c / 3, a.double()) for a, _, c in pairs),
        ]
    return found


def one_row_for_two_tokens(dtype: torch.dtype) -> float:
    """Distance of dX from float64's where every hidden state predicts two tokens."""
    hidden, weight, ids, advantages = head_inputs(dtype)
    index = torch.arange(N) // 2

    def grad(x: Tensor, logps: Callable[[Tensor], Tensor] | None) -> Tensor:
        x = leaf(x)
        if logps is None:
            made = fused_linear_rloo_loss(
                x[index], weight, ids, BOUNDS, advantages=advantages, chunk_bytes=7 * 4 * V
            )
            loss = made.loss
        else:
            sums = torch.stack([part.sum() for part in logps(x[index]).split(3)])
            loss = -(advantages.double() * sums).mean()
        return torch.autograd.grad(loss, x)[0]

    def exact(x: Tensor) -> Tensor:
        return plain_head(x, weight.double(), ids)[0]

    return distance(grad(hidden[: N // 2], None), grad(hidden[: N // 2].double(), exact))


def negative_logits(dtype: torch.dtype) -> dict[str, float]:
    """Largest error of a log-prob, relative to max(1, |log p|), of rows far below the others."""
    torch.manual_seed(1)
    found = {}
    for below in (60.0, 90.0, 200.0, 1e4, 1e8):
        bias = torch.randn(V)
        bias[: V // 2] -= below  # half of the vocabulary
        hidden, weight, ids, _ = head_inputs(dtype)
        ids[::2] = ids[::2] % (V // 2)
        args = [hidden, weight, bias.to(dtype)]
        logps, entropy = linear_logprob(args[0], args[1], ids, bias=args[2], return_entropy=True)
        made = torch.nn.functional.linear(*args)  # rounded as it is, what follows is exact
        exact = made.double().log_softmax(-1).gather(-1, ids[:, None]).squeeze(-1)
        if dtype == torch.bfloat16:  # where the kernel rounds no logits, those are exact too
            wide = torch.nn.functional.linear(*(x.double() for x in args))
            other = wide.log_softmax(-1).gather(-1, ids[:, None]).squeeze(-1)
            error = torch.minimum((logps - exact).abs(), (logps - other).abs())
        else:
            error = (logps - exact).abs()
        error = error / exact.abs().clamp(min=1)
        found[str(below)] = error.max().item() if entropy.isfinite().all() else float("nan")
    logits = torch.full((4, V), -1e30)
    logps = selective_log_softmax(logits, torch.arange(4))
    assert isinstance(logps, Tensor)
    found["all -1e30"] = (logps + torch.tensor(float(V)).log()).abs().max().item()
    return found


def share_of_gradient(dtype: torch.dtype) -> dict[str, float]:
    """Norms relative to float64's: of dX, dW and their smallest row, for tiny advantages."""
    hidden, weight, ids, advantages = head_inputs(dtype)
    ids = torch.arange(N) % V  # each row of W a gradient of its own

    def grads(x: Tensor, w: Tensor, exact: bool) -> tuple[Tensor, ...]:
        x, w = leaf(x), leaf(w)
        small = 1e-6 * advantages
        if not exact:
            made = fused_linear_rloo_loss(
                x, w, ids, BOUNDS, advantages=small, chunk_bytes=5 * 4 * V
            )
            return torch.autograd.grad(made.loss, (x, w))
        sums = torch.stack([part.sum() for part in plain_head(x, w, ids)[0].split(3)])
        return torch.autograd.grad(-(small.double() * sums).mean(), (x, w))

    ours = grads(hidden, weight, False)
    exact = grads(hidden.double(), weight.double(), True)
    found = {}
    for name, g, e in zip("XW", ours, exact, strict=True):
        found[name] = (g.double().norm() / e.norm()).item()
        found[f"{name}, worst row"] = (g.double().norm(dim=1) / e.norm(dim=1)).min().item()
    return found


def large_logits_under_a_softcap(dtype: torch.dtype) -> dict[str, float]:
    """Distances from float64 of log-probs and gradients, by the size of the raw logits."""
    found = {}
    for spread in (30.0, 1e3, 1e6):
        hidden, weight, ids, _ = head_inputs(dtype, spread)

        def run(x: Tensor, w: Tensor, ops: bool, ids=ids) -> list[Tensor]:
            x, w = leaf(x), leaf(w)
            options = SOFTCAP
            if ops:
                logps = linear_logprob(x, w, ids, **options)
                assert isinstance(logps, Tensor)
            else:
                logps, _ = plain_head(x, w, ids, **options)
            return [logps.detach(), *torch.autograd.grad(logps.sum(), (x, w))]

        ours, plain = run(hidden, weight, True), run(hidden, weight, False)
        exact = run(hidden.double(), weight.double(), False)
        for name, got, torchs, want in zip(("logp", "X", "W"), ours, plain, exact, strict=True):
            size = want.norm().item()
            bound = 2 * (torchs.double() - want).norm().item() + 2e-2 * size + 1e-6
            error = (got.double() - want).norm().item() if got.isfinite().all() else float("inf")
            found[f"{spread:g}: {name}"] = error / bound
    return found


def masked_vocabulary(dtype: torch.dtype) -> dict[str, float]:
    """What -inf in the bias leaves: numbers that are to be 0, or at most 1."""
    hidden, weight, ids, _ = head_inputs(dtype)
    bias = torch.zeros(V, dtype=dtype)
    bias[::2] = -torch.inf
    ids = ids // 2 * 2 + 1  # tokens that can be
    x, w, b = leaf(hidden), leaf(weight), leaf(bias)
    logps, entropy = linear_logprob(x, w, ids, bias=b, return_entropy=True)
    grads = torch.autograd.grad(logps.sum() + entropy.sum(), (x, w, b))
    alone, _ = plain_head(hidden.double(), weight.double()[1::2], ids // 2)
    error = distance(logps.detach(), alone)
    finite = [y.isfinite().all() for y in (grads[0], grads[1][1::2], grads[2][1::2], entropy)]
    masked = linear_logprob(hidden, weight, ids - 1, bias=bias)
    assert isinstance(masked, Tensor)
    return {
        "gradient of what is masked": max(g[::2].abs().max().item() for g in grads[1:]),
        "log-probs / bound": error / (1e-6 if dtype == torch.float32 else 2e-2),
        "not finite": float(not all(finite)),
        "masked token not -inf": float((masked != -torch.inf).any()),
    }


def work(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "twice": gradients_twice(dtype),
        "two tokens": one_row_for_two_tokens(dtype),
        "negative": negative_logits(dtype),
        "share": share_of_gradient(dtype),
        "soft-cap": large_logits_under_a_softcap(dtype),
        "masked": masked_vocabulary(dtype),
    }


# --- the tests


@functools.cache
def by_kernels() -> dict[str, Any]:
    return run_worker(Path(__file__), "--worker", interpret=True)


@functools.cache
def by_torch(name: str) -> dict[str, Any]:
    return work(DTYPES[name])


@pytest.fixture(params=[f"{way}-{dtype}" for way in ("torch", "kernels") for dtype in DTYPES])
def found(request):
    way, dtype = request.param.split("-")
    if way == "torch":
        return by_torch(dtype) | {"dtype": dtype}
    pytest.importorskip("triton", reason="Triton has wheels for Linux alone")
    return by_kernels()[dtype] | {"dtype": dtype}


def test_a_second_backward_gives_the_same_gradients(found):
    rounding = 1e-6 if found["dtype"] == "fp32" else 2.0**-8
    for name, (again, scaled) in found["twice"].items():
        assert again == 0, name
        assert scaled <= rounding, name


def test_a_hidden_state_of_two_tokens_gets_both_gradients(found):
    assert found["two tokens"] <= (1e-5 if found["dtype"] == "fp32" else 2e-2)


def test_very_negative_logits_have_exact_log_probs(found):
    bound = 1e-5 if found["dtype"] == "fp32" else 1e-2
    assert {k: v for k, v in found["negative"].items() if not v <= bound} == {}


def test_tiny_advantages_give_whole_gradients(found):
    within = 1e-4 if found["dtype"] == "fp32" else 5e-2
    assert {k: v for k, v in found["share"].items() if not abs(v - 1) <= within} == {}


def test_large_logits_under_a_softcap(found):
    assert {k: v for k, v in found["soft-cap"].items() if not v <= 1} == {}


def test_a_masked_vocabulary_gets_no_gradient_and_does_no_harm(found):
    for name, value in found["masked"].items():
        assert value <= (1 if "bound" in name else 0), (name, value)


def test_a_graph_that_is_freed_refuses_a_second_backward():
    hidden, weight, ids, advantages = head_inputs(torch.float32)
    made = fused_linear_rloo_loss(leaf(hidden), leaf(weight), ids, BOUNDS, advantages=advantages)
    made.loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        made.loss.backward()


if __name__ == "__main__" and sys.argv[1:] == ["--worker"]:
    from tests.support.interpreter import fix_interpreter

    fix_interpreter()
    print(json.dumps({name: work(dtype) for name, dtype in DTYPES.items()}))
