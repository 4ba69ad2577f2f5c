"""What the loss does on a GPU beside its kernels, on a pretended one: pieces by waves, dX and dW
written in one pass, no wait, the numbers of the CPU. Bytes are those of the operands of torch's
ops; as a script, it prints them: python -m tests.rloo_kernels.lm_head.test_outputs_on_gpu
"""

from __future__ import annotations

from collections import Counter
from unittest import mock

import pytest
import torch
from rloo_kernels import fused_linear_rloo_loss
from rloo_kernels.lm_head import fused_linear_rloo_loss as op
from rloo_kernels.lm_head.gradients import GradientAccumulator
from rloo_kernels.lm_head.piece_torch import forward_piece_torch
from rloo_kernels.lm_head.types import LMHead, LogitGradient
from rloo_kernels.lm_head.waves import LEAST_INACTIVE_ROWS, HeadShape, Pieces
from rloo_kernels.loss.rloo_objective import scaled_gradient

from tests.support.kernel_helpers import bounds
from tests.support.pretend_cuda import CUDA, OnCuda, PretendCuda

aten = torch.ops.aten
PRODUCTS = (aten.mm, aten.bmm, aten.addmm, aten.linear)
N, D, V = 700, 16, 64


class CountedCuda(PretendCuda):
    """Bytes that ops load and store on the pretended GPU, by op; products of bf16 into fp32.

    A product counts what it stores (what it loads depends on its tiles), a view nothing.
    """

    def __init__(self):
        super().__init__()
        self.moved: Counter[str] = Counter()
        self.product_rows: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in (aten.mm.dtype, aten.bmm.dtype, aten.addmm.dtype_out):  # a CPU has neither
            *add, a, b, dtype = (x.host if isinstance(x, OnCuda) else x for x in args)
            made = a.to(dtype) @ b.to(dtype)
            if add:
                kwargs["out"].host.add_(made)
                assert add[0] is kwargs["out"].host
            made = kwargs["out"] if add else OnCuda(made)
        else:
            made = super().__torch_dispatch__(func, types, args, kwargs)
        if isinstance(made, OnCuda) and func.namespace == "aten":
            self._count(func, args, made)
        return made

    def _count(self, func, args, made):
        given = [x for x in args if isinstance(x, OnCuda)]
        storages = {x.host.untyped_storage().data_ptr() for x in given}
        packet = func.overloadpacket
        if packet in PRODUCTS:
            self.moved["product"] += num_bytes(made)
            self.product_rows.append(made.shape[0])
        elif packet is aten.copy_:
            self.moved["copy_"] += sum(map(num_bytes, given))
        elif "empty" in packet.__name__:
            return
        elif func._schema.is_mutable or made.host.untyped_storage().data_ptr() not in storages:
            self.moved[packet.__name__] += sum(map(num_bytes, [*given, made]))


def num_bytes(x: torch.Tensor) -> int:
    return x.numel() * x.element_size()


def bytes_of_outputs(num_pieces: int, n: int = 128) -> dict[str, float]:
    """What a piece of n rows moves for dX and c X, / (n D), and for dW on its way out, / (V D)."""
    found = {}
    with CountedCuda() as cuda:
        hidden, weight, matrix = (
            torch.randn(shape, dtype=torch.bfloat16).to(CUDA) for shape in ((n, D), (V, D), (n, V))
        )
        head, m = LMHead(weight, None, 1.0, None, 1.0), LogitGradient(matrix, None)
        c, one = torch.randn(n).to(CUDA), torch.ones(()).to(CUDA)
        of_c = 4 * n  # c itself is loaded as well

        sums = GradientAccumulator(hidden, head, (True, False, False), num_pieces)
        cuda.moved.clear()
        sums.add(slice(0, n), hidden, m, c)
        found["dX"] = (sum(cuda.moved.values()) - of_c) / (n * D)

        sums = GradientAccumulator(hidden, head, (False, True, False), num_pieces)
        cuda.moved.clear()
        sums.add(slice(0, n), hidden, m, c)
        del cuda.moved["product"]
        found["c X"] = (sum(cuda.moved.values()) - of_c) / (n * D)

        cuda.moved.clear()
        made = sums.finish(torch.bfloat16 if num_pieces == 1 else torch.float32)[1]
        scaled_gradient(made, one, weight)
        found["dW, from its sum to .grad"] = (sum(cuda.moved.values()) - 4) / (V * D)
    return found


def test_outputs_are_written_in_one_pass():
    """10 n D for dX (22 before): the fp32 product stored, loaded, and the result. 4 n D for c X
    (12 before). dW: its sum loaded and .grad stored (10 V D before, in three passes)."""
    assert bytes_of_outputs(1) == {"dX": 10, "c X": 4, "dW, from its sum to .grad": 4}
    assert bytes_of_outputs(2) == {"dX": 10, "c X": 4, "dW, from its sum to .grad": 6}


# --- the whole op


@pytest.fixture
def cuda(monkeypatch):
    """A pretended GPU of two processors, on which torch's ops run, in pieces by waves."""
    monkeypatch.setattr("rloo_kernels.dispatch.triton_missing", lambda: "pretended")
    monkeypatch.setattr(op, "pieces_of", pieces_by_waves)
    with CountedCuda() as cuda:
        yield cuda


def pieces_by_waves(hidden, shape, need, most):
    vocab_size, depth = shape
    return Pieces(
        most, HeadShape(depth, vocab_size, 2, need[0], need[1]) if hidden.is_cuda else None
    )


LENGTHS = [90, 85, 100, 70, 60, 120, 95, 80]
assert sum(LENGTHS) == N
LOSSES = {
    "a group per chunk": {"beta": 0.1},
    "known beforehand": {"beta": 0.0},
    "groups too large": {"beta": 0.1, "num_generations": 4},
    "sequence ratio": {"beta": 0.0, "old": True},
}


def make(dtype):
    torch.manual_seed(0)
    hidden, weight = torch.randn(N, D).to(dtype), torch.randn(V, D).to(dtype)
    given = {"ref_logps": torch.randn(N) - 4, "rewards": torch.randn(8)}
    given["rewards"][:2] = 1.0  # a group of two without signal
    return hidden, weight, torch.randint(V, (N,)), given


def run(device, dtype, chunk_rows, factor=3.0, old=False, inputs_there=True, **options):
    hidden, weight, ids, given = make(dtype)
    leaves = [x.to(device).requires_grad_() for x in (hidden, weight)]
    if old:
        given["old_logps"] = torch.randn(N) - 4
    given = {k: x.to(device if inputs_there else "cpu") for k, x in given.items()}
    size = weight.element_size()
    options = {"num_generations": 2, **options}
    found = fused_linear_rloo_loss(
        *leaves, ids.to(device), bounds(LENGTHS), **given, **options,
        chunk_bytes=chunk_rows * V * size,
    )  # fmt: skip
    grads = torch.autograd.grad(found.loss * factor, leaves, retain_graph=True)
    again = torch.autograd.grad(found.loss * factor, leaves)
    return [found.loss.detach(), found.logps, *grads], again


def host(x):
    return x.host if isinstance(x, OnCuda) else x


@pytest.mark.parametrize("inputs_there", [True, False], ids=["inputs on it", "inputs on the host"])
@pytest.mark.parametrize("chunk_rows", [300, 2000], ids=["pieces", "one piece"])
@pytest.mark.parametrize("name", LOSSES)
def test_numbers_are_those_of_a_cpu(name, chunk_rows, inputs_there, cuda):
    options = LOSSES[name]
    got, again = run(CUDA, torch.bfloat16, chunk_rows, inputs_there=inputs_there, **options)
    got, again = [host(x) for x in got], [host(x) for x in again]
    plain, _ = run("cpu", torch.bfloat16, chunk_rows, **options)
    exact, _ = run("cpu", torch.float64, chunk_rows, **options)
    for x, y, want in zip(got, plain, exact, strict=True):
        assert x.dtype == y.dtype
        size = 1e-6 * max(1.0, want.abs().max().item())
        error, torch_s = ((z.double() - want).abs().max().item() for z in (x, y))
        assert error <= 2 * torch_s + size
    for x, y in zip(got[2:], again, strict=True):  # a second backward gives the same
        assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_dx_in_parts_of_the_vocabulary(dtype, cuda, monkeypatch):
    """The same numbers, from one launch of all parts' products and a sum."""
    from rloo_kernels.lm_head import gradients

    monkeypatch.setattr(gradients, "num_processors", lambda x: 132)
    monkeypatch.setattr(gradients, "best_parts", lambda *args: (0.0, 4))
    got = host(run(CUDA, dtype, 2000, beta=0.1)[0][2])
    assert cuda.moved["sum"] >= 4 * N * D * (4 + 1)  # four parts loaded, one sum stored
    exact = run("cpu", torch.float64, 2000, beta=0.1)[0][2]
    plain = run("cpu", dtype, 2000, beta=0.1)[0][2]
    error, torch_s = ((x.double() - exact).abs().max().item() for x in (got, plain))
    assert error <= 2 * torch_s + 1e-6 * exact.abs().max().item()


def test_a_call_waits_for_nothing(cuda):
    hidden, weight, ids, given = make(torch.bfloat16)
    leaves = [x.to(CUDA).requires_grad_() for x in (hidden, weight)]
    ids, given = ids.to(CUDA), {k: x.to(CUDA) for k, x in given.items()}
    cuda.waits.clear()
    for beta in (0.0, 0.1):
        found = fused_linear_rloo_loss(
            *leaves, ids, bounds(LENGTHS), **given, num_generations=2, beta=beta,
            chunk_bytes=300 * V * 2,
        )  # fmt: skip
        torch.autograd.grad(found.loss, leaves)
    assert cuda.waits == []


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("softcap", [None, 400.0])
def test_torchs_log_probs_of_impossible_tokens_wait_for_nothing(softcap, temperature, cuda):
    """Without Triton, and in fp64: which exponentials underflow, nobody looks."""
    hidden, weight, ids, _ = make(torch.float32)
    head = LMHead(40 * weight, None, temperature, softcap, 1.0)
    raw = hidden.double() @ head.weight.double().T
    z = (raw if softcap is None else softcap * torch.tanh(raw / softcap)) / temperature
    want = z.log_softmax(-1).gather(-1, ids[:, None]).squeeze(1)
    there, ids = head._replace(weight=head.weight.to(CUDA)), ids.to(CUDA)
    hidden = hidden.to(CUDA)
    cuda.waits.clear()
    found, _ = forward_piece_torch(hidden, there, ids, False, True, None)
    assert cuda.waits == []
    assert (want < -120).any()  # fp32's exponential ends at 104
    torch.testing.assert_close(host(found.logps).double(), want, rtol=1e-5, atol=1e-3)


def test_the_factor_of_backward_is_not_rounded_to_the_dtype_of_the_weights(cuda):
    """1/3 in bf16 would shrink or stretch the whole gradient by up to 0.4 %."""
    third = run(CUDA, torch.bfloat16, 2000, factor=1 / 3, beta=0.1)[0][3].host.double()
    whole = run(CUDA, torch.bfloat16, 2000, factor=1.0, beta=0.1)[0][3].host.double()
    assert abs((third * whole).sum() / (whole * whole).sum() * 3 - 1) < 2e-4


@pytest.mark.parametrize("enough", [False, True])
def test_rows_without_signal_are_run_apart_where_that_pays(enough, cuda):
    """Below a read of W in time, they go with the others."""
    inactive = LEAST_INACTIVE_ROWS if enough else LEAST_INACTIVE_ROWS - 1
    advantages = torch.ones(N)
    advantages[100 : 100 + inactive] = 0
    hidden, weight, ids, _ = make(torch.bfloat16)
    leaves = [x.to(CUDA).requires_grad_() for x in (hidden, weight)]
    cuda.product_rows.clear()
    found = fused_linear_rloo_loss(
        *leaves, ids.to(CUDA), bounds(LENGTHS), token_advantages=advantages, level="token"
    )
    rows = [n for n in cuda.product_rows if n != V]  # logits and dX, not dW
    assert rows == ([inactive, N - inactive, N - inactive] if enough else [N, N])
    dx = torch.autograd.grad(found.loss, leaves)[0].host
    assert ((dx == 0).all(1) == (advantages == 0)).all()


@pytest.mark.parametrize("mocked", [None, 40 << 30])
def test_the_budget_follows_free_memory(mocked, monkeypatch):
    from rloo_kernels.lm_head import piece

    monkeypatch.setattr(piece, "free_bytes", lambda device: mocked)
    monkeypatch.setattr("rloo_kernels.dispatch.triton_missing", lambda: "pretended")
    hidden = mock.Mock(spec=torch.Tensor)
    hidden.is_cuda, hidden.shape, hidden.dtype = True, (16384, 3584), torch.bfloat16
    hidden.device, hidden.element_size = CUDA, lambda: 2
    weight = torch.empty(152064, 3584, dtype=torch.bfloat16, device="meta")
    rows = piece.planned_rows(hidden, weight, None, True)
    assert rows == (16384 if mocked else (768 << 20) // (2 * 152064))
    assert piece.planned_rows(hidden, weight, 152064 * 2 * 9, True) == 9


if __name__ == "__main__":
    for num_pieces in (1, 2):
        print(num_pieces, bytes_of_outputs(num_pieces))
