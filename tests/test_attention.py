"""Attention over segments against masked attention in float64, op, kernels' wiring and models."""

from __future__ import annotations

import random
import sys
import types

import pytest
import torch
from kernel_helpers import (  # noqa: F401
    Watch,
    assert_error_at_most_twice,
    bounds,
    nan_in_new_memory,
)
from torch.nn.attention.flex_attention import create_block_mask
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoConfig, AutoModelForCausalLM

from rloo_fast import attention, attention_flash, attention_formula, attention_ops
from rloo_fast.attention import (
    NAME,
    keep_for_backward,
    make_segments,
    restore,
    segment_attention,
    segment_attention_forward,
    unsupported_reason,
)

SCALE = 0.3
NO_MODULE = torch.nn.Identity()


def some_segments(seed, layout="shared_prefix", lengths=(0, 1, 3, 5, 9, 18, 26, 40)):
    """Random groups: prompts of different lengths, completions that are empty, short and long."""
    rng, found, prefixes = random.Random(seed), [], []
    for _ in range(3):
        prompt, start = rng.choice(lengths[1:]), sum(found)
        completions = rng.choices(lengths, k=rng.choice([1, 4, 6]))
        if layout == "packed":
            found += [prompt + c for c in completions]
            prefixes += [(0, 0)] * len(completions)
        else:
            found += [prompt, *completions]
            prefixes += [(0, 0), *[(start, start + prompt)] * len(completions)]
    return found, prefixes


def visible(lengths, prefixes, window=None):  # (T, T) bool
    total = sum(lengths)
    mask, start = torch.zeros(total, total, dtype=torch.bool), 0
    for length, (first, last) in zip(lengths, prefixes, strict=True):
        keys = torch.cat([torch.arange(first, last), torch.arange(start, start + length)])
        behind = torch.arange(last - first, len(keys))[:, None] - torch.arange(len(keys))
        mask[start : start + length, keys] = (behind >= 0) & (behind < (window or total))
        start += length
    return mask


def naive(q, k, v, mask, softcap=None):  # -> (1, T, H, d), in the dtype given
    group = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(group, 1).mT * SCALE
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    p = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return (p @ v.repeat_interleave(group, 1)).transpose(1, 2)


def tensors(total, heads, kv_heads, dim=16, seed=0):
    """q, k, v and the output's gradient in float64, token-major in memory as models make them."""
    g = torch.Generator().manual_seed(seed)
    made = [torch.randn(1, total, h, dim, generator=g, dtype=torch.double)
            for h in (heads, kv_heads, kv_heads, heads)]  # fmt: skip
    return [*(x.transpose(1, 2) for x in made[:3]), made[3]]


def results(function, q, k, v, grad, dtype=torch.double):
    leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
    out = function(*leaves)
    grads = torch.autograd.grad(out, leaves, grad.to(dtype))
    return dict(zip(("out", "dq", "dk", "dv"), (out.detach(), *grads), strict=True))


def assert_close(got, want, tolerance):
    for name, x in want.items():
        scale = max(1.0, x.abs().max().item())
        torch.testing.assert_close(
            got[name].double(), x, rtol=0, atol=tolerance * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


def through_op(segments, window=None, softcap=None):
    return lambda q, k, v: attention_ops.segment_attention_op(
        q, k, v, segments.bounds, segments.prefix, SCALE, window, softcap
    )[0]


def through_interface(segments, **options):
    return lambda q, k, v: segment_attention_forward(
        NO_MODULE, q, k, v, None, scaling=SCALE, segments=segments, **options
    )[0]


KINDS = [(None, None), (7, None), (50, None), (None, 4.0), (9, 4.0)]
kinds = pytest.mark.parametrize(("window", "softcap"), KINDS, ids=lambda x: str(x))
heads = pytest.mark.parametrize("kv_heads", [4, 2, 1])


@pytest.mark.usefixtures("nan_in_new_memory")
@kinds
@heads
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.double, 1e-12), (torch.float, 3e-6)])
def test_op_is_masked_attention(window, softcap, kv_heads, dtype, tolerance):
    for seed, layout in ((0, "shared_prefix"), (1, "shared_prefix"), (2, "packed")):
        lengths, prefixes = some_segments(seed, layout)
        inputs = tensors(sum(lengths), 4, kv_heads, seed=seed)
        mask = visible(lengths, prefixes, window)
        want = results(lambda q, k, v, m=mask: naive(q, k, v, m, softcap), *inputs)
        op = through_op(make_segments(lengths, prefixes, "cpu"), window, softcap)
        assert_close(results(op, *inputs, dtype=dtype), want, tolerance)


@kinds
def test_half_precision_loses_at_most_twice_what_torch_does(window, softcap):
    for seed, dtype in ((3, torch.bfloat16), (4, torch.float16)):
        lengths, prefixes = some_segments(seed)
        # what the reference is given is what the op is given: rounded inputs
        inputs = [x.to(dtype).double() for x in tensors(sum(lengths), 4, 2, seed=seed)]
        mask = visible(lengths, prefixes, window)

        def torch_s(q, k, v, mask=mask):
            if softcap is not None:
                return naive(q, k, v, mask, softcap)
            return scaled_dot_product_attention(
                q, k, v, attn_mask=mask, scale=SCALE, enable_gqa=True
            ).transpose(1, 2)

        want = results(lambda q, k, v, m=mask: naive(q, k, v, m, softcap), *inputs)
        op = through_op(make_segments(lengths, prefixes, "cpu"), window, softcap)
        assert_error_at_most_twice(
            results(op, *inputs, dtype=dtype), results(torch_s, *inputs, dtype=dtype), want, 1e-4
        )


def test_scores_are_made_in_chunks(monkeypatch):
    """The result does not depend on SCORE_BYTES, and no larger score is made."""
    lengths, prefixes = [60, 45, 0, 70, 33], [(0, 0), *[(0, 60)] * 3, (0, 0)]
    inputs = tensors(sum(lengths), 4, 2)
    segments = make_segments(lengths, prefixes, "cpu")
    for window, softcap in ((None, 4.0), (20, None)):
        mask = visible(lengths, prefixes, window)
        want = results(lambda q, k, v, m=mask, c=softcap: naive(q, k, v, m, c), *inputs)
        for size in (1, 4 * 4 * 130 * 7, 16 << 20):
            monkeypatch.setattr(attention_formula, "SCORE_BYTES", size)
            got = results(through_op(segments, window, softcap), *inputs)
            assert_close(got, want, 1e-12)


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (100, None), (None, 4.0)])
def test_nothing_of_size_tokens_squared_is_made(monkeypatch, window, softcap):
    lengths, prefixes = [400, *[150] * 4, 300, *[5] * 20], [(0, 0), *[(0, 400)] * 4, (0, 0)]
    prefixes += [(1000, 1300)] * 20
    total, num_heads, dim = sum(lengths), 2, 8  # 1400 tokens: [T, T] is 2 M, out 22 k
    monkeypatch.setattr(attention_formula, "SCORE_BYTES", 40_000 * 4)
    q, k, v, grad = (x.float() for x in tensors(total, num_heads, num_heads, dim))
    cut = make_segments(lengths, prefixes, "cpu")
    score = attention_formula.Score(SCALE, window, softcap)
    with Watch() as watch:
        out, lse = attention_ops.forward_segments(q, k, v, cut.bounds, cut.prefix, score)
        attention_ops.backward_segments(grad, q, k, v, out, lse, cut.bounds, cut.prefix, score)
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

    lengths, prefixes = [50, 20, 0, 30, 40], [(0, 0), *[(0, 50)] * 4]
    q, k, v, _ = tensors(140, 2, 2)
    cut = make_segments(lengths, prefixes, "cpu")
    score = attention_formula.Score(SCALE, None, None)
    with Calls():
        attention_ops.forward_segments(q, k, v, cut.bounds, cut.prefix, score)
    assert sorted(seen) == sorted([(90, 50, True), *[(n, n, True) for n in (50, 20, 30, 40)]])


def test_opcheck():
    lengths, prefixes = [20, 3, 4, 30], [(0, 0), *[(0, 20)] * 3]
    cut = make_segments(lengths, prefixes, "cpu")
    for kv_heads, options in ((2, (SCALE, None, None)), (1, (SCALE, 30, 4.0))):
        q, k, v = (x.float().requires_grad_() for x in tensors(57, 2, kv_heads, 8)[:3])
        torch.library.opcheck(
            attention_ops.segment_attention_op, (q, k, v, cut.bounds, cut.prefix, *options)
        )


def test_one_graph_serves_other_segments():
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def scaled(q, k, v, segments):
        return 2 * through_interface(segments)(q * 0.5, k, v)

    compiled = torch.compile(scaled, fullgraph=True, backend=counter)
    inputs = tensors(70, 4, 2)
    for lengths, prefixes in (
        ([30, 10, 30, 0], [(0, 0), (0, 30), (0, 30), (0, 0)]),
        ([5, 40, 20, 5], [(0, 0), (0, 5), (0, 0), (45, 65)]),
    ):
        cut = make_segments(lengths, prefixes, "cpu", pad_segments_to=6, pad_keys_to=150)
        want = results(lambda *qkv, c=cut: scaled(*qkv, c), *inputs)
        assert_close(results(lambda *qkv, c=cut: compiled(*qkv, c), *inputs), want, 1e-12)
    assert counter.frame_count == 1


def test_autocast_and_smaller_values():
    """Queries and keys leave the rotary embedding in fp32; latent attention's values are narrow."""
    lengths, prefixes = [12, 5, 6], [(0, 0), (0, 12), (0, 12)]
    q, k, v, _ = tensors(23, 4, 2)
    v = v[..., :6]
    run = through_interface(make_segments(lengths, prefixes, "cpu"))
    want = naive(q, k, v, visible(lengths, prefixes))
    torch.testing.assert_close(run(q, k, v), want)
    for inputs in ((q.float(), k.float(), v.bfloat16()), (q.float(), k.float(), v.float())):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = run(*inputs)
        assert out.dtype == torch.bfloat16
        assert out.is_contiguous()
        assert (out - want).abs().max() < 0.02


# ---- the GPU kernels' wiring, on CPU tensors --------------------------------------------------


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
    if softcap is not None and not varlen[0]:
        pytest.skip("torch's varlen_attn has no soft-cap; choose_backend does not send it there")
    for seed in (5, 6):
        lengths, prefixes = some_segments(seed)
        inputs = tensors(sum(lengths), 4, 2, seed=seed)
        mask = visible(lengths, prefixes, window)
        want = results(lambda q, k, v, m=mask: naive(q, k, v, m, softcap), *inputs)
        for padded in ({}, {"pad_segments_to": 40, "pad_keys_to": 2000}):
            cut = make_segments(lengths, prefixes, "cpu", **padded)
            run = through_interface(cut, sliding_window=window, softcap=softcap)
            assert_close(results(run, *inputs), want, 1e-12)


def test_varlen_gathers_nothing_where_rows_hold_their_prompts(varlen):
    lengths, prefixes = some_segments(7, "packed")
    q, k, v, _ = tensors(sum(lengths), 4, 2)
    out = through_interface(make_segments(lengths, prefixes, "cpu"))(q, k, v)
    torch.testing.assert_close(out, naive(q, k, v, visible(lengths, prefixes)))
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
    for seed, layout in ((8, "shared_prefix"), (9, "packed"), (10, "shared_prefix")):
        lengths, prefixes = some_segments(seed, layout)
        cut, total = make_segments(lengths, prefixes, "cpu"), sum(lengths)
        needed, full = attention_flash.block_table(cut, window)
        mask = attention_flash.block_mask(cut, torch.device("cpu"), window)
        theirs = create_block_mask(mask.mask_mod, 1, 1, total, total, "cpu", BLOCK_SIZE=block)
        edge = -total % block
        pairs = torch.nn.functional.pad(visible(lengths, prefixes, window), (0, edge, 0, edge))
        blocks = pairs.unflatten(1, (-1, block)).unflatten(0, (-1, block)).transpose(1, 2)
        assert torch.equal(needed, blocks.flatten(2).any(-1))
        assert torch.equal(full, blocks.flatten(2).all(-1))
        assert torch.equal(mask.to_dense(), theirs.to_dense())
        assert torch.equal(mask.full_kv_num_blocks, theirs.full_kv_num_blocks)


@kinds
def test_flex_is_masked_attention(monkeypatch, window, softcap):
    """Forward, in eager mode: FlexAttention has no backward on a CPU."""
    monkeypatch.setattr(attention, "_backend", lambda *_: "flex")
    for seed, layout in ((11, "shared_prefix"), (12, "packed")):
        lengths, prefixes = some_segments(seed, layout)
        q, k, v = (x.float() for x in tensors(sum(lengths), 4, 2, seed=seed)[:3])
        cut = make_segments(lengths, prefixes, "cpu", pad_segments_to=30)
        out = through_interface(cut, sliding_window=window, softcap=softcap)(q, k, v)
        want = naive(q, k, v, visible(lengths, prefixes, window), softcap)
        torch.testing.assert_close(out, want, rtol=0, atol=3e-6)


def test_the_mask_is_made_once_for_all_layers():
    cut = make_segments([30, 5], [(0, 0), (0, 30)], "cpu")
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


# ---- models -----------------------------------------------------------------------------------

TINY = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
FAMILIES = {
    "llama": {},
    "gpt_neox": {},
    "mistral": {"sliding_window": 6},
    "gemma2": {"sliding_window": 6, "head_dim": 8, "query_pre_attn_scalar": 8},
}


def tiny(family, **options):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**TINY, **FAMILIES.get(family, {}), **options})
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager")


def a_batch(seed=0):
    """Two groups as rows of ids, and as one row with its positions and segments."""
    g = torch.Generator().manual_seed(seed)
    ids, pos, lengths, prefixes, rows = [], [], [], [], []
    for size, sizes in ((9, (4, 0, 7)), (4, (1, 12))):
        prompt, start = torch.randint(40, (size,), generator=g), sum(lengths)
        ids.append(prompt)
        pos.append(torch.arange(size))
        lengths.append(size)
        prefixes.append((0, 0))
        for n in sizes:
            completion = torch.randint(40, (n,), generator=g)
            first = sum(lengths)
            ids.append(completion)
            pos.append(torch.arange(size, size + n))
            lengths.append(n)
            prefixes.append((start, start + size))
            rows.append((torch.cat([prompt, completion]), size, torch.arange(first, first + n)))
    return torch.cat(ids)[None], torch.cat(pos)[None], make_segments(lengths, prefixes, "cpu"), rows


def shared_hidden(model, ids, pos, segments):
    with segment_attention(model):
        out = model.base_model(input_ids=ids, position_ids=pos, use_cache=False, segments=segments)
    keep_for_backward(out.last_hidden_state, model)
    return out.last_hidden_state


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_runs_as_on_separate_rows(family):
    model = tiny(family).train()
    ids, pos, segments, rows = a_batch()
    weight = torch.randn(TINY["hidden_size"], generator=torch.Generator().manual_seed(1))
    separate = [
        model.base_model(input_ids=row[None], use_cache=False).last_hidden_state[0, size:]
        for row, size, _ in rows
    ]
    want = torch.cat(separate)
    want_grads = gradients(model, (want.tanh() @ weight).sum())
    hidden = shared_hidden(model, ids, pos, segments)
    got = hidden[0, torch.cat([at for *_, at in rows])]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    got_grads = gradients(model, (got.tanh() @ weight).sum())
    assert got_grads.keys() == want_grads.keys()
    for name, g in got_grads.items():
        error = (g - want_grads[name]).norm() / (want_grads[name].norm() + 1e-6)
        assert error < 1e-5, (name, error)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_run_again_with_the_same_attention(reentrant):
    model = tiny("llama").train()
    ids, pos, segments, _ = a_batch()
    want = gradients(model, shared_hidden(model, ids, pos, segments).square().sum())
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    hidden = shared_hidden(model, ids, pos, segments)
    assert model.config._attn_implementation == "eager"
    got = gradients(model, hidden.square().sum())
    assert model.config._attn_implementation == "eager"
    for name, g in want.items():
        torch.testing.assert_close(got[name], g)


def test_a_backward_that_raises_leaves_the_next_forward_right():
    model = tiny("llama").train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    ids, pos, segments, _ = a_batch()

    def fail(grad):
        raise ArithmeticError("planted")

    for recover in (lambda: restore(model), lambda: shared_hidden(model, ids, pos, segments)):
        handle = model.base_model.embed_tokens.register_forward_hook(
            lambda module, args, out: out.register_hook(fail) and None
        )
        hidden = shared_hidden(model, ids, pos, segments)
        handle.remove()
        with pytest.raises(ArithmeticError, match="planted"):
            hidden.sum().backward()
        assert model.config._attn_implementation == NAME
        recover()
        assert model.config._attn_implementation == "eager"
    with segment_attention(model), pytest.raises(RuntimeError, match="needs segments"):
        model(input_ids=ids)
    assert model.config._attn_implementation == "eager"


def test_backward_inside_the_context_leaves_it_on():
    model = tiny("llama").train()
    ids, pos, segments, _ = a_batch()
    with segment_attention(model):
        shared_hidden(model, ids, pos, segments).sum().backward()
        assert model.config._attn_implementation == NAME
    assert model.config._attn_implementation == "eager"


def test_a_wrapper_of_a_switched_model_does_not_take_the_name_for_the_models_own():
    model = tiny("llama")
    wrapper = torch.nn.ModuleList([model])
    for order in ((model, wrapper), (wrapper, model)):
        contexts = {m: segment_attention(m) for m in (model, wrapper)}
        for m in (model, wrapper):
            contexts[m].__enter__()
        assert model.config._attn_implementation == NAME
        for m in order:
            contexts[m].__exit__(None, None, None)
        assert model.config._attn_implementation == "eager"


def test_sub_configs_are_switched_and_restored():
    """A multimodal model's layers look at the text config, beside one that no layer looks at."""
    config = AutoConfig.for_model(
        "gemma3",
        text_config={**TINY, "head_dim": 8, "model_type": "gemma3_text"},
        vision_config={"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
                       "num_attention_heads": 2, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config.text_config, attn_implementation="sdpa")
    wrapper = torch.nn.ModuleList([model])
    wrapper.config = config
    config.vision_config._attn_implementation = "eager"
    before = config._attn_implementation
    with segment_attention(wrapper):
        assert config._attn_implementation == config.text_config._attn_implementation == NAME
        assert config.vision_config._attn_implementation == "eager"
    assert config._attn_implementation == before
    assert config.text_config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("family", "options", "reason"),
    [
        ("llama", {}, None),
        ("gemma2", {}, None),
        ("gpt_neox", {}, None),
        ("bloom", {}, "does not take its attention from transformers' AttentionInterface"),
        ("gpt_oss", {"num_local_experts": 2, "head_dim": 8}, "sinks"),
        ("lfm2", {"layer_types": ["full_attention", "conv"]}, "its layers include conv"),
        ("mamba", {}, "carry a state"),
        ("minimax", {"layer_types": ["full_attention", "linear_attention"], "head_dim": 8,
                     "num_local_experts": 2}, "its layers include linear attention"),
        ("doge", {}, "depends on a mask"),
        ("gemma3_text", {"use_bidirectional_attention": True, "head_dim": 8}, "not causal"),
        ("llama4_text", {"num_local_experts": 2, "head_dim": 8, "intermediate_size_mlp": 16},
         "its layers include chunked attention"),
        ("lfm2", {"layer_types": ["full_attention"] * 2}, None),
    ],
)  # fmt: skip
def test_unsupported_reason(family, options, reason):
    model = tiny(family, **options)
    for layout in ("shared_prefix", "packed"):
        found = unsupported_reason(model, layout=layout)
        assert found == reason or reason in found
    assert unsupported_reason(model, layout="padded") is None


def test_unsupported_reason_of_an_encoder_decoder_and_of_an_unknown_layout():
    config = AutoConfig.for_model("t5", d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8)
    from transformers import T5ForConditionalGeneration

    model = T5ForConditionalGeneration(config)
    assert "encoder-decoder" in unsupported_reason(model, layout="packed")
    with pytest.raises(ValueError, match="layout must be one of"):
        unsupported_reason(model, layout="ragged")


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"segments": None}, RuntimeError, "needs segments"),
        ({"dropout": 0.1}, ValueError, "no dropout"),
        ({"attention_mask": torch.ones(1, 1, 5, 5)}, ValueError, "no mask"),
        ({"s_aux": torch.zeros(2)}, NotImplementedError, "s_aux"),
        ({"position_bias": torch.zeros(1)}, NotImplementedError, "position_bias"),
        ({"output_attentions": True}, NotImplementedError, "output_attentions"),
        ({"segments": make_segments([2, 2], [(0, 0)] * 2, "cpu")}, ValueError, "cover 4 tokens"),
        ({"is_causal": False}, NotImplementedError, "causal"),
        ({"key": torch.zeros(1, 2, 9, 8)}, ValueError, "use_cache=False"),
        ({"query": torch.zeros(2, 2, 5, 8)}, ValueError, "one row"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else None,
)
def test_what_it_does_not_compute_it_refuses(change, error, sentence):
    row = torch.zeros(1, 2, 5, 8)
    given = dict.fromkeys(("query", "key", "value"), row)
    given |= {"attention_mask": None, "output_attentions": False}
    given["segments"] = make_segments([5], [(0, 0)], "cpu")
    segment_attention_forward(NO_MODULE, **given)
    with pytest.raises(error, match=sentence):
        segment_attention_forward(NO_MODULE, **{**given, **change})


@pytest.mark.parametrize(
    ("lengths", "prefixes", "options", "sentence"),
    [
        ([3, 2], [(0, 0)], {}, "give one for each"),
        ([3, 2], [(0, 0), (0, 4)], {}, "the prefix end before"),
        ([3, -1], [(0, 0), (0, 3)], {}, "length must be >= 0"),
        ([3, 2], [(0, 0), (0, 3)], {"pad_segments_to": 1}, "do not fit"),
        ([3, 2], [(0, 0), (0, 3)], {"pad_keys_to": 7}, "do not fit"),
    ],
)
def test_make_segments_refuses(lengths, prefixes, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        make_segments(lengths, prefixes, "cpu", **options)


def test_make_segments_names_every_key():
    cut = make_segments([3, 2, 0, 1], [(0, 0), (0, 3), (0, 3), (1, 3)], "cpu",
                        pad_segments_to=5, pad_keys_to=14)  # fmt: skip
    assert cut.bounds.tolist() == cut.cu_q.tolist() == [0, 3, 5, 5, 6, 6]
    assert cut.cu_k.tolist() == bounds([3, 5, 0, 3, 0]).tolist()
    assert cut.key_index.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 1, 2, 5, 0, 0, 0]
    assert cut.prefix.tolist() == [[0, 0], [0, 3], [0, 3], [1, 3], [0, 0]]
