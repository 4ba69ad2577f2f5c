"""What the GPU attention kernels are called with, on CPU tensors: varlen, FlexAttention."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from rloo_fast.batching.segments import make_segments
from rloo_fast.policy.attention import flash as attention_flash
from rloo_fast.policy.attention import interface as attention
from tests.support.attention_cases import (
    SCALE,
    assert_close,
    kinds,
    naive,
    results,
    some_segments,
    tensors,
    through_interface,
    visible,
)
from tests.support.kernel_helpers import (  # noqa: F401
    Watch,
    assert_error_at_most_twice,
    bounds,
    nan_in_new_memory,
)


def fake_varlen(q, k, v, cu_q, cu_k, max_q, max_k, left, softcap):
    """What FlashAttention varlen computes: per segment, causal aligned to the bottom right."""
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert int(cu_q.diff().max()) <= max_q
    assert int(cu_k.diff().max()) <= max_k
    if k.requires_grad and len(k) > cu_k[-1]:  # no kernel writes the gradient of what is no key
        for x in (k, v):
            x.register_hook(lambda g: g.index_fill(0, torch.arange(cu_k[-1], len(g)), torch.nan))
    rows = []
    for s in range(len(cu_q) - 1):
        i, j = slice(cu_q[s], cu_q[s + 1]), slice(cu_k[s], cu_k[s + 1])
        num_q, num_k = cu_q[s + 1] - cu_q[s], cu_k[s + 1] - cu_k[s]
        behind = torch.arange(num_q)[:, None] + num_k - num_q - torch.arange(num_k)
        mask = (behind >= 0) & ((behind <= left) if left >= 0 else True)
        one = [x.transpose(0, 1).unsqueeze(0) for x in (q[i], k[j], v[j])]
        rows.append(naive(*one, mask, softcap)[0])
    return torch.cat(rows)


@pytest.fixture(params=["torch", "flash_attn"])
def varlen(request, monkeypatch):
    """Calls that reach the varlen function, which the row's attention is sent to."""
    calls = []

    def torch_s(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa=False):
        assert scale == SCALE
        assert window_size[1] == 0
        calls.append((k, max_q, max_k))
        return fake_varlen(q, k, v, cu_q, cu_k, max_q, max_k, window_size[0], None)

    def package_s(
        q, k, v, cu_q, cu_k, max_q, max_k, *, softmax_scale, causal, window_size, softcap
    ):
        assert softmax_scale == SCALE
        assert causal
        calls.append((k, max_q, max_k))
        return fake_varlen(q, k, v, cu_q, cu_k, max_q, max_k, window_size[0], softcap or None)

    installed = request.param == "flash_attn"
    if installed:
        module = types.SimpleNamespace(flash_attn_varlen_func=package_s)
        monkeypatch.setitem(sys.modules, "flash_attn", module)
    monkeypatch.setattr(attention_flash, "has_flash_package", lambda: installed)
    monkeypatch.setattr(attention_flash.torch_varlen, "varlen_attn", torch_s)
    monkeypatch.setattr(attention, "_backend", lambda *_: "varlen")
    calls.append(installed)
    return calls


@kinds
def test_varlen_is_given_every_segments_keys(varlen, window, softcap):
    refused = softcap is not None and not varlen[0]  # choose_backend does not send it there
    for seed, layout in ((5, "shared_prefix"), (6, "tree")):
        lengths, parents = some_segments(seed, layout)
        inputs = tensors(sum(lengths), 4, 2, seed=seed)
        mask = visible(lengths, parents, window)
        want = results(lambda q, k, v, m=mask: naive(q, k, v, m, softcap), *inputs)
        for padded in ({}, {"pad_segments_to": 40, "pad_keys_to": 2000}):
            cut = make_segments(lengths, parents, "cpu", **padded)._replace(shared=())
            run = through_interface(cut, sliding_window=window, softcap=softcap)
            if refused:
                with pytest.raises(AssertionError, match="has no soft-cap"):
                    results(run, *inputs)
            else:
                assert_close(results(run, *inputs), want, 1e-12)


def test_varlen_gathers_nothing_where_rows_hold_their_prompts(varlen):
    lengths, parents = some_segments(7, "packed")
    q, k, v, _ = tensors(sum(lengths), 4, 2)
    out = through_interface(make_segments(lengths, parents, "cpu"))(q, k, v)
    torch.testing.assert_close(out, naive(q, k, v, visible(lengths, parents)))
    assert varlen[1][0].data_ptr() == k.data_ptr()


def test_gathered_gradients_are_summed_in_fp32():
    dtypes = set()

    class Sums(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.index_add_.default:
                dtypes.update((args[0].dtype, args[3].dtype))
            return func(*args, **(kwargs or {}))

    index, cu_k = torch.tensor([0, 1, 0, 1, 0]), torch.tensor([0, 3, 5])
    k = torch.zeros(2, 1, 4, dtype=torch.bfloat16, requires_grad=True)
    gathered, _ = attention_flash.GatherKeys.apply(k, k.detach(), index, cu_k)
    with Sums():
        gathered.backward(torch.ones_like(gathered))
    assert dtypes == {torch.float32}
    assert k.grad[:, 0, 0].tolist() == [3.0, 2.0]


@pytest.mark.parametrize("window", [None, 10, 45])
@pytest.mark.parametrize("block", [16, 32])
def test_block_table_is_exact(monkeypatch, window, block):
    monkeypatch.setattr(attention_flash, "BLOCK", block)
    for seed, layout in ((8, "shared_prefix"), (9, "packed"), (10, "shared_prefix"), (13, "tree")):
        lengths, parents = some_segments(seed, layout)
        cut, total = make_segments(lengths, parents, "cpu"), sum(lengths)
        needed, full = attention_flash.block_table(cut, window)
        mask = attention_flash.block_mask(cut, torch.device("cpu"), window)
        theirs = create_block_mask(mask.mask_mod, 1, 1, total, total, "cpu", BLOCK_SIZE=block)
        edge = -total % block
        pairs = torch.nn.functional.pad(visible(lengths, parents, window), (0, edge, 0, edge))
        blocks = pairs.unflatten(1, (-1, block)).unflatten(0, (-1, block)).transpose(1, 2)
        assert torch.equal(needed, blocks.flatten(2).any(-1))
        assert torch.equal(full, blocks.flatten(2).all(-1))
        assert torch.equal(mask.to_dense(), theirs.to_dense())
        assert torch.equal(mask.full_kv_num_blocks, theirs.full_kv_num_blocks)


@kinds
def test_flex_is_masked_attention(monkeypatch, window, softcap):
    """Forward, in eager mode: FlexAttention has no backward on a CPU."""
    monkeypatch.setattr(attention, "_backend", lambda *_: "flex")
    for seed, layout in ((11, "shared_prefix"), (12, "packed"), (14, "tree")):
        lengths, parents = some_segments(seed, layout)
        q, k, v = (x.float() for x in tensors(sum(lengths), 4, 2, seed=seed)[:3])
        cut = make_segments(lengths, parents, "cpu", pad_segments_to=30)
        out = through_interface(cut, sliding_window=window, softcap=softcap)(q, k, v)
        want = naive(q, k, v, visible(lengths, parents, window), softcap)
        torch.testing.assert_close(out, want, rtol=0, atol=3e-6)


def test_the_mask_is_made_once_for_all_layers():
    cut = make_segments([30, 5], [-1, 0], "cpu")
    device = torch.device("cpu")
    masks = [attention_flash.block_mask(cut, device, w) for w in (None, None, 4, None)]
    assert masks[0] is masks[1] is masks[3]
    assert masks[2] is not masks[0]


@pytest.mark.parametrize(
    ("dtype", "dim", "softcap", "package", "capability", "name", "reason"),
    [
        (torch.bfloat16, 128, None, True, (9, 0), "varlen", "flash-attn package"),
        (torch.bfloat16, 128, 50.0, True, (9, 0), "varlen", "flash-attn package"),
        (torch.float16, 64, None, False, (8, 0), "varlen", "varlen_attn"),
        (torch.bfloat16, 64, 50.0, False, (9, 0), "flex", "no soft-cap"),
        (torch.float32, 64, None, True, (9, 0), "flex", "no float32"),
        (torch.bfloat16, 512, None, True, (9, 0), "flex", "up to 256"),
        (torch.bfloat16, 20, None, True, (9, 0), "flex", "steps of 8"),
        (torch.bfloat16, 64, None, True, (7, 5), "flex", "capability 8.0"),
        (torch.float32, 8, None, True, (9, 0), "sdpa", "16 or more"),
        (torch.float64, 64, None, True, (9, 0), "sdpa", "no float64"),
    ],
)
def test_choose_backend(monkeypatch, dtype, dim, softcap, package, capability, name, reason):
    monkeypatch.setattr(attention_flash, "flash_package", lambda: print if package else None)
    monkeypatch.setattr(attention_flash, "triton_missing", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    found = attention.choose_backend(torch.device("cuda"), dtype, dim, softcap=softcap)
    assert found[0] == name
    assert reason in found[1]
    assert attention.choose_backend(torch.device("cpu"), dtype, dim)[0] == "sdpa"
