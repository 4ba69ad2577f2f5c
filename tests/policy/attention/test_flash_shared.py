"""A tree of segments in FlashAttention calls, one per depth, by stand-ins for the kernels."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rloo_fast.batching.segments import make_segments
from rloo_fast.policy.attention import flash_shared
from rloo_fast.policy.attention import interface as attention
from rloo_fast.policy.attention.flash import varlen_attention
from tests.support import flash_stand_in
from tests.support.attention_cases import (
    SCALE,
    assert_close,
    naive,
    results,
    some_segments,
    tensors,
    through_interface,
    through_op,
    visible,
)

PADDING = {"pad_segments_to": 40, "pad_keys_to": 2000}
CASES = {
    "one group": ([9, 4, 20, 1], [-1, 0, 0, 0]),
    "one completion": ([9, 4], [-1, 0]),
    "a prompt without completions, empty segments": (
        [5, 7, 0, 3, 0], [-1, -1, 1, 1, 1],
    ),
    "a row of its own between": ([6, 3, 5, 4, 2], [-1, 0, -1, -1, 3]),
    "padding at the end": ([6, 3, 5], [-1, 0, -1]),
    "a system prompt, two groups": ([7, 5, 3, 4, 6, 2, 9], [-1, 0, 1, 1, 0, 4, 4]),
    "a chain": ([3, 4, 5, 6, 7], [-1, 0, 1, 2, 3]),
    "trees of different depth": ([3, 4, 5, 6, 2, 7, 4], [-1, 0, 1, 0, -1, 4, -1]),
    "an empty segment on the path": ([3, 0, 5, 6, 0, 4], [-1, 0, 1, 1, 0, 4]),
    **{f"random {seed}": some_segments(seed) for seed in range(20, 26)},
    **{f"random tree {seed}": some_segments(seed, "tree") for seed in range(6)},
}  # fmt: skip


@pytest.fixture
def flash(monkeypatch):
    """The number of calls of the stand-ins, which row attention is sent to."""
    calls = []

    def forward(*args):
        calls.append(args)
        return flash_stand_in.forward(*args)

    monkeypatch.setattr(flash_shared, "flash_forward", forward)
    monkeypatch.setattr(flash_shared, "flash_backward", flash_stand_in.backward)
    monkeypatch.setattr(attention, "_backend", lambda *_: "varlen")
    return calls


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("padded", [{}, PADDING], ids=["", "static shapes"])
def test_the_calls_are_masked_attention(case, padded, flash):
    lengths, parents = CASES[case]
    inputs = tensors(sum(lengths), 4, 2, seed=3)
    mask = visible(lengths, parents)
    want = results(lambda q, k, v: naive(q, k, v, mask), *inputs)
    cut = make_segments(lengths, parents, "cpu", **padded)
    assert_close(results(through_interface(cut), *inputs), want, 1e-12)
    assert_close(results(through_op(cut), *inputs), want, 1e-12)  # the formula
    assert len(flash) == 1 + len(cut.shared)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_fewer_key_heads(kv_heads, flash):
    lengths, parents = CASES["random 20"]
    inputs = tensors(sum(lengths), 4, kv_heads)
    want = results(lambda q, k, v: naive(q, k, v, visible(lengths, parents)), *inputs)
    cut = make_segments(lengths, parents, "cpu")
    assert_close(results(through_interface(cut), *inputs), want, 1e-12)


def test_scores_far_apart(flash):
    """Where one part has all of the probability, and where scores overflow an exp."""
    lengths, parents = CASES["one group"]
    q, k, v, grad = tensors(sum(lengths), 2, 2)
    for factor in (-3000, 3000):
        k_far = k.clone()
        k_far[:, :, :9] *= factor
        inputs = (q, k_far, v, grad)
        want = results(lambda q, k, v: naive(q, k, v, visible(lengths, parents)), *inputs)
        got = results(through_interface(make_segments(lengths, parents, "cpu")), *inputs)
        assert_close(got, want, 1e-10)


def test_keys_are_given_as_they_lie(flash):
    lengths, parents = CASES["random 21"]
    q, k, v, _ = tensors(sum(lengths), 4, 2)
    through_interface(make_segments(lengths, parents, "cpu"))(q, k, v)
    for _, k_given, v_given, *_ in flash:
        assert (k_given.data_ptr(), v_given.data_ptr()) == (k.data_ptr(), v.data_ptr())


@pytest.mark.parametrize(
    ("case", "calls"),
    [("one group", 1), ("a system prompt, two groups", 2), ("a chain", 4),
     ("trees of different depth", 2), ("an empty segment on the path", 1)],
)  # fmt: skip
def test_a_call_for_each_depth(case, calls):
    assert len(make_segments(*CASES[case], "cpu").shared) == calls
    assert len(make_segments(*CASES[case], "cpu", **PADDING).shared) == calls  # powers of two


def test_segments_that_continue_no_other_need_no_call():
    assert make_segments([4, 5], [-1, -1], "cpu").shared == ()


def test_static_shapes_depend_on_few_numbers():
    sizes = set()
    for groups in range(1, 9):
        lengths, parents = [], []
        for _ in range(groups):
            parents += [-1, *[len(lengths)] * 2]
            lengths += [4, 2, 2]
        cut = make_segments(lengths, parents, "cpu", **PADDING)
        (shared,) = cut.shared
        sizes.add((len(shared.cu_q), len(shared.cu_k)))
    assert len(sizes) == 2


def on_meta(dtype=torch.bfloat16, prompt=4096, completions=64, length=512):
    """A group on the meta device, where torch's own FlashAttention ops check what they get."""
    lengths = [prompt, *[length] * completions]
    cut = make_segments(lengths, [-1, *[0] * completions], "meta")
    total = sum(lengths)
    q, k, v = (
        torch.empty(1, total, h, 128, dtype=dtype, device="meta").transpose(1, 2).requires_grad_()
        for h in (32, 8, 8)
    )
    return cut, q, k, v


class Moved(TorchDispatchMode):
    """Bytes that ops but the attention kernels read and write."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if "flash_attention" in str(func) or "varlen" in str(func) or func.is_view:
            return out
        written = sum(x.nbytes for x in tree_leaves(out) if isinstance(x, torch.Tensor))
        read = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if func is torch.ops.aten.index_select.default:  # reads what it takes, and the index
            read = [out, args[2]]
        self.total += written + sum(x.nbytes for x in read)
        return out


def test_torchs_ops_take_these_arguments():
    cut, q, k, v = on_meta(prompt=256, completions=3, length=40)
    out = varlen_attention(q, k, v, cut, 0.1, None, None)
    assert (out.shape, out.dtype) == ((1, 376, 32, 128), torch.bfloat16)
    for x, grad in zip((q, k, v), torch.autograd.grad(out, (q, k, v), out), strict=True):
        assert grad.shape == x.shape


def test_bytes_of_a_long_prompt_with_many_completions():
    """The table of docs/update-phase.md: P = 4096, K = 64, L = 512, 32 and 8 heads of 128, bf16."""
    found = {}
    for name in ("copies", "two calls"):
        cut, q, k, v = on_meta()
        if name == "copies":
            cut = cut._replace(shared=())
        with Moved() as forward:
            out = varlen_attention(q, k, v, cut, SCALE, None, None)
        with Moved() as backward:
            torch.autograd.grad(out, (q, k, v), torch.empty_like(out))
        found[name] = [round(x.total / 2**20) for x in (forward, backward)]  # MiB
    assert found == {"copies": [2341, 8899], "two calls": [1510, 2448]}
