"""The attention op over segments against masked attention in float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from rloo_fast.batching.segments import make_segments
from rloo_fast.policy.attention import formula as attention_formula
from rloo_fast.policy.attention import op as attention_ops
from tests.support.attention_cases import (
    SCALE,
    assert_close,
    heads,
    kinds,
    naive,
    results,
    some_segments,
    tensors,
    through_interface,
    through_op,
    visible,
)
from tests.support.kernel_helpers import (  # noqa: F401
    Watch,
    assert_error_at_most_twice,
    bounds,
    nan_in_new_memory,
)


@pytest.mark.usefixtures("nan_in_new_memory")
@kinds
@heads
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.double, 1e-12), (torch.float, 3e-6)])
def test_op_is_masked_attention(window, softcap, kv_heads, dtype, tolerance):
    for seed, layout in ((0, "shared_prefix"), (1, "tree"), (2, "packed"), (9, "tree")):
        lengths, parents = some_segments(seed, layout)
        inputs = tensors(sum(lengths), 4, kv_heads, seed=seed)
        mask = visible(lengths, parents, window)
        want = results(lambda q, k, v, m=mask: naive(q, k, v, m, softcap), *inputs)
        op = through_op(make_segments(lengths, parents, "cpu"), window, softcap)
        assert_close(results(op, *inputs, dtype=dtype), want, tolerance)


@kinds
def test_half_precision_loses_at_most_twice_what_torch_does(window, softcap):
    for seed, dtype, layout in (
        (3, torch.bfloat16, "shared_prefix"),
        (4, torch.float16, "shared_prefix"),
        (5, torch.bfloat16, "tree"),
        (6, torch.float16, "tree"),
    ):
        lengths, parents = some_segments(seed, layout)
        # what the reference is given is what the op is given: rounded inputs
        inputs = [x.to(dtype).double() for x in tensors(sum(lengths), 4, 2, seed=seed)]
        mask = visible(lengths, parents, window)

        def torch_s(q, k, v, mask=mask):
            if softcap is not None:
                return naive(q, k, v, mask, softcap)
            return scaled_dot_product_attention(
                q, k, v, attn_mask=mask, scale=SCALE, enable_gqa=True
            ).transpose(1, 2)

        want = results(lambda q, k, v, m=mask: naive(q, k, v, m, softcap), *inputs)
        op = through_op(make_segments(lengths, parents, "cpu"), window, softcap)
        assert_error_at_most_twice(
            results(op, *inputs, dtype=dtype), results(torch_s, *inputs, dtype=dtype), want, 1e-4
        )


def test_scores_are_made_in_chunks(monkeypatch):
    """The result does not depend on SCORE_BYTES, and no larger score is made."""
    lengths, parents = [60, 45, 0, 70, 33], [-1, 0, 1, 0, -1]
    inputs = tensors(sum(lengths), 4, 2)
    segments = make_segments(lengths, parents, "cpu")
    for window, softcap in ((None, 4.0), (20, None)):
        mask = visible(lengths, parents, window)
        want = results(lambda q, k, v, m=mask, c=softcap: naive(q, k, v, m, c), *inputs)
        for size in (1, 4 * 4 * 130 * 7, 16 << 20):
            monkeypatch.setattr(attention_formula, "SCORE_BYTES", size)
            got = results(through_op(segments, window, softcap), *inputs)
            assert_close(got, want, 1e-12)


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (100, None), (None, 4.0)])
def test_nothing_of_size_tokens_squared_is_made(monkeypatch, window, softcap):
    lengths, parents = [400, *[150] * 4, 300, *[5] * 20], [-1, *[0] * 4, -1]
    parents += [5] * 20
    total, num_heads, dim = sum(lengths), 2, 8  # 1400 tokens: [T, T] is 2 M, out 22 k
    monkeypatch.setattr(attention_formula, "SCORE_BYTES", 40_000 * 4)
    q, k, v, grad = (x.float() for x in tensors(total, num_heads, num_heads, dim))
    cut = make_segments(lengths, parents, "cpu")
    score = attention_formula.AttentionScore(SCALE, window, softcap)
    with Watch() as watch:
        out, lse = attention_ops.forward_segments(q, k, v, cut.bounds, cut.parents, score)
        attention_ops.backward_segments(grad, q, k, v, out, lse, cut.bounds, cut.parents, score)
    assert watch.largest <= 40_000
    # q, k, v, out and their gradients' sums and copies, and three scores
    assert watch.peak <= 8 * out.nbytes + 4 * 40_000 * 4


def test_shared_keys_are_not_copied():
    """The prompt's keys go to the kernel as they lie in the row, once per group."""
    seen = []

    class Calls(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is attention_ops._flash:
                same = args[1].untyped_storage()._cdata == k.untyped_storage()._cdata
                seen.append((args[0].shape[2], args[1].shape[2], same))
            return func(*args, **(kwargs or {}))

    lengths, parents = [50, 20, 0, 30, 40], [-1, *[0] * 4]
    q, k, v, _ = tensors(140, 2, 2)
    cut = make_segments(lengths, parents, "cpu")
    score = attention_formula.AttentionScore(SCALE, None, None)
    with Calls():
        attention_ops.forward_segments(q, k, v, cut.bounds, cut.parents, score)
    assert sorted(seen) == sorted([(90, 50, True), *[(n, n, True) for n in (50, 20, 30, 40)]])


def test_opcheck():
    lengths, parents = [20, 3, 4, 30], [-1, 0, 1, 0]
    cut = make_segments(lengths, parents, "cpu")
    for kv_heads, options in ((2, (SCALE, None, None)), (1, (SCALE, 30, 4.0))):
        q, k, v = (x.float().requires_grad_() for x in tensors(57, 2, kv_heads, 8)[:3])
        torch.library.opcheck(
            attention_ops.segment_attention_op, (q, k, v, cut.bounds, cut.parents, *options)
        )


def test_one_graph_serves_other_segments():
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def scaled(q, k, v, segments):
        return 2 * through_interface(segments)(q * 0.5, k, v)

    compiled = torch.compile(scaled, fullgraph=True, backend=counter)
    inputs = tensors(70, 4, 2)
    for lengths, parents in (
        ([30, 10, 30, 0], [-1, 0, 0, -1]),
        ([5, 40, 20, 5], [-1, 0, 1, -1]),
    ):
        cut = make_segments(lengths, parents, "cpu", pad_segments_to=6, pad_keys_to=150)
        want = results(lambda *qkv, c=cut: scaled(*qkv, c), *inputs)
        assert_close(results(lambda *qkv, c=cut: compiled(*qkv, c), *inputs), want, 1e-12)
    assert counter.frame_count == 1


def test_autocast_and_smaller_values():
    """Queries and keys leave the rotary embedding in fp32; latent attention's values are narrow."""
    lengths, parents = [12, 5, 6], [-1, 0, 0]
    q, k, v, _ = tensors(23, 4, 2)
    v = v[..., :6]
    run = through_interface(make_segments(lengths, parents, "cpu"))
    want = naive(q, k, v, visible(lengths, parents))
    torch.testing.assert_close(run(q, k, v), want)
    for inputs in ((q.float(), k.float(), v.bfloat16()), (q.float(), k.float(), v.float())):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = run(*inputs)
        assert out.dtype == torch.bfloat16
        assert out.is_contiguous()
        assert (out - want).abs().max() < 0.02
