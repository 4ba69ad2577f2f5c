"""Log-probs of a reference by fp8 products: rounding, the token's own logit, what is refused."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rloo_kernels import linear_logprob, reference_logprob_fp8
from rloo_kernels.lm_head import fp8
from rloo_kernels.lm_head.fp8 import E4M3, product, to_fp8, why_no_fp8

from tests.support.kernel_helpers import NAMES, nan_in_new_memory, plain_head  # noqa: F401
from tests.support.triton_process import run_worker

pytestmark = pytest.mark.usefixtures("nan_in_new_memory")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HEAD = {"temperature": 0.7, "softcap": 20.0, "logit_scale": -1.3}


def make(num_rows=90, size=130, vocab_size=503, dtype=torch.float32, seed=0):
    """hidden (N, D), weight (V, D), ids sampled from the softmax of it; D and V off 16."""
    torch.manual_seed(seed)
    hidden, weight = torch.randn(num_rows, size), 3 * torch.randn(vocab_size, size) / size**0.5
    ids = torch.multinomial((hidden @ weight.T).softmax(-1), 1).squeeze(-1)
    return hidden.to(dtype), weight.to(dtype), ids


def test_a_row_is_rounded_to_three_bits_in_units_of_its_largest_number():
    torch.manual_seed(0)
    x = torch.randn(20, 130) * torch.logspace(-30, 30, 20)[:, None]
    x[3] = 0.0
    rows = to_fp8(x)
    back = rows.values.float()[:, :130] * rows.scales[:, None]
    largest = x.abs().amax(-1, keepdim=True)
    # half a unit of the last of 3 bits; below 2^-6 / 448 of the largest, of a subnormal's
    assert bool(((back - x).abs() <= torch.maximum(x.abs() / 16, largest / 448 / 1024)).all())
    assert rows.values.shape == (20, 144)
    assert not rows.values[:, 130:].float().any()
    torch.testing.assert_close(back.abs().amax(-1, keepdim=True), largest)


def test_products_are_those_of_the_rounded_rows_in_any_blocks(monkeypatch):
    hidden, weight, _ = make()
    bias = torch.randn(503)
    a, b = to_fp8(hidden), to_fp8(weight)
    exact = (a.values.double() * a.scales[:, None]) @ (b.values.double() * b.scales[:, None]).T
    whole = product(a, b, bias)
    torch.testing.assert_close(whole.double(), exact + bias, rtol=2**-8, atol=1e-5)
    monkeypatch.setattr(fp8, "BLOCK_NUMBERS", 1000)
    assert torch.equal(to_fp8(weight).values.float(), b.values.float())
    torch.testing.assert_close(product(a, b, bias), whole, rtol=2**-7, atol=1e-5)


@pytest.mark.parametrize("options", [{}, HEAD], ids=["plain", "soft-cap"])
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
def test_near_the_exact_log_probs_and_entropies(dtype, options):
    hidden, weight, ids = make(dtype=dtype)
    bias = torch.randn(503).to(dtype)
    exact = plain_head(hidden.double(), weight.double(), ids, bias.double(), **options)
    found = reference_logprob_fp8(hidden, weight, ids, bias=bias, return_entropy=True, **options)
    steepness = abs(options.get("logit_scale", 1.0)) / options.get("temperature", 1.0)
    for got, want in zip(found, exact, strict=True):
        off = (got.double() - want).abs() / steepness
        assert 1e-3 < off.mean() < 0.06  # it was rounded, and no more than that
        assert off.max() < 0.5


def test_the_tokens_own_logit_is_not_rounded():
    """Its own error is that of the sum over the others, which goes to 0 as p(y) -> 1."""
    _, weight, ids = make(num_rows=400)
    sure = weight[ids] * (60.0 / weight[ids].square().sum(-1, keepdim=True))
    exact = linear_logprob(sure.double(), weight.double(), ids)
    assert exact.min() > -0.1
    found = reference_logprob_fp8(sure, weight, ids)
    rounded = to_fp8(sure).values.float() @ to_fp8(weight).values.float().T
    scaled = rounded * to_fp8(sure).scales[:, None] * to_fp8(weight).scales
    off = scaled.gather(-1, ids[:, None])[:, 0] - (sure * weight[ids]).sum(-1)
    assert off.abs().mean() > 0.1  # what it would be off by
    assert (found - exact).abs().max() < 0.02


def test_pieces_change_nothing():
    hidden, weight, ids = make()
    whole = reference_logprob_fp8(hidden, weight, ids, return_entropy=True)
    parts = reference_logprob_fp8(hidden, weight, ids, return_entropy=True, chunk_bytes=2 * 503 * 7)
    torch.testing.assert_close(parts, whole, rtol=2**-7, atol=2e-3)
    assert reference_logprob_fp8(hidden[:0], weight, ids[:0]).shape == (0,)


@pytest.mark.parametrize("leaf", ["hidden", "weight", "bias"])
def test_no_gradient_can_be_asked_for(leaf):
    hidden, weight, ids = make()
    tensors = {"hidden": hidden, "weight": weight, "bias": torch.randn(503)}
    tensors[leaf].requires_grad_()
    with pytest.raises(ValueError, match="has no gradient, it is for a frozen reference"):
        reference_logprob_fp8(token_ids=ids, **tensors)
    with torch.no_grad():
        found = reference_logprob_fp8(token_ids=ids, **tensors)
    assert not found.requires_grad


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"token_ids": torch.full((90,), 503)}, r"token_ids must lie in \[0, 503\)"),
        ({"weight": torch.randn(503, 7)}, "with the same D"),
        ({"hidden": torch.randn(9, 10, 130)}, r"hidden must be \(N, D\)"),
        ({"temperature": 0.0}, "temperature must be > 0"),
    ],
)
def test_what_does_not_fit_is_refused(tensors, says):
    hidden, weight, ids = make()
    with pytest.raises(ValueError, match=says):
        reference_logprob_fp8(**{"hidden": hidden, "weight": weight, "token_ids": ids, **tensors})


@pytest.mark.parametrize(
    ("device", "capability", "says"),
    [
        ("cpu", None, None),
        ("cuda", (9, 0), None),
        ("cuda", (10, 0), None),
        ("cuda", (8, 0), "capability 9.0 .H100. or newer, and this is 8.0"),
        ("mps", None, "it takes an NVIDIA GPU, and this is mps"),
    ],
)
def test_the_devices_that_have_it(device, capability, says, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    found = why_no_fp8(torch.device(device))
    assert found is None if says is None else re.search(says, found)


def test_a_gpu_gets_aligned_matrices_and_hands_back_v_columns(monkeypatch):
    """The call of `torch._scaled_mm`, carried out by the specification."""
    hidden, weight, _ = make()
    bias, given = torch.randn(503), SimpleNamespace()

    def scaled_mm(a, b, *, scale_a, scale_b, bias, out_dtype, use_fast_accum):
        given.shapes = (a.shape, b.shape, scale_a.shape, scale_b.shape, bias.shape)
        given.strides = (a.stride(1), b.stride(0), scale_b.stride())
        assert (a.dtype, b.dtype, use_fast_accum) == (E4M3, E4M3, False)
        raw = (a.float() * scale_a) @ (b.float() * scale_b) + bias
        return raw.to(out_dtype)

    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    a, b = to_fp8(hidden), to_fp8(weight)
    found = fp8._product_cuda(a, b, bias)
    assert given.shapes == ((90, 144), (144, 512), (90, 1), (1, 512), (512,))
    assert given.strides == (1, 1, (512, 1))
    torch.testing.assert_close(found, product(a, b, bias), rtol=2**-6, atol=2e-2)


def test_torch_compile_keeps_it_whole():
    hidden, weight, ids = make()
    torch.library.opcheck(
        torch.ops.rloo_kernels.reference_logprob_fp8,
        (hidden, weight, None, ids, 1.0, None, 1.0, True, 40),
        test_utils=("test_schema", "test_faketensor"),
    )
    compiled = torch.compile(reference_logprob_fp8, fullgraph=True, backend="eager")
    torch.testing.assert_close(
        compiled(hidden, weight, ids), reference_logprob_fp8(hidden, weight, ids)
    )


def by_row_kernels() -> dict[str, float]:
    """The largest difference of the row kernel's statistics and torch's."""
    from rloo_kernels import dispatch

    from tests.support.interpreter import fix_interpreter

    fix_interpreter()
    found = {}
    for name, options in {"plain": {}, "soft-cap": HEAD}.items():
        hidden, weight, ids = make(num_rows=20, dtype=torch.bfloat16)
        both = []
        for dispatch.INTERPRETED in (False, True):
            both.append(reference_logprob_fp8(hidden, weight, ids, return_entropy=True, **options))
        found[name] = max((a - b).abs().max().item() for a, b in zip(*both, strict=True))
    return found


def test_the_row_kernel_makes_the_same_of_the_products():
    pytest.importorskip("triton", reason="Triton has wheels for Linux alone")
    found = run_worker(Path(__file__), "--worker", interpret=True)
    assert found.keys() == {"plain", "soft-cap"}
    assert max(found.values()) < 1e-4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_with_fp8_makes_what_the_emulation_makes():
    if (reason := why_no_fp8(torch.device("cuda"))) is not None:
        pytest.skip(reason)
    hidden, weight, ids = make(dtype=torch.bfloat16)
    emulated = reference_logprob_fp8(hidden, weight, ids, return_entropy=True)
    found = reference_logprob_fp8(hidden.cuda(), weight.cuda(), ids.cuda(), return_entropy=True)
    torch.testing.assert_close([x.cpu() for x in found], list(emulated), rtol=1e-2, atol=2e-2)


if __name__ == "__main__":
    if sys.argv[1:] == ["--worker"]:
        print(json.dumps(by_row_kernels()))
