"""Attention over segments by the fused GPU kernels: FlashAttention varlen, and FlexAttention.

`varlen`: a call for each depth without copies of keys (`flash_shared.py`), or, with a sliding
window, a soft-cap or on ROCm, one call for all segments. There queries are the row's tokens; the
keys of every segment, its path then its own, are gathered one segment after the other, and the
causal mask is aligned to the bottom right, where a query's own key is (a window counts from it, so
each segment needs its own copy). Extra memory: the gathered keys and values, M = sum over segments
of path + own tokens, and in backward their gradients in fp32.

`flex`: a table of which 128 x 128 blocks of [T, T] hold a visible pair, made from the segments
alone, and a mask function of per-token numbers for the blocks that are visible in part.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.attention.varlen as torch_varlen
from rloo_kernels.dispatch import triton_missing
from rloo_kernels.transfer import to_device
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils.weak import WeakTensorKeyDictionary

from ...batching.segments import joined, seen_ranges
from ...records import Segments
from .flash_shared import tree_attention

BLOCK = 128

# torch 2.11 takes fewer key heads as they are; later versions want to be told
_GQA_OPTION = "enable_gqa" in inspect.signature(torch_varlen.varlen_attn).parameters


def choose_backend(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    *,
    softcap: float | None = None,
) -> tuple[str, str]:
    """("varlen" | "flex" | "sdpa", why not the one before it)."""
    if device.type != "cuda":
        return "sdpa", f"the fused kernels are for CUDA, this is {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        reason = f"FlashAttention has no {str(dtype).removeprefix('torch.')}"
    elif head_dim > 256 or head_dim % 8:
        reason = f"FlashAttention takes head dimensions up to 256 in steps of 8, not {head_dim}"
    elif torch.cuda.get_device_capability(device) < (8, 0):
        reason = "FlashAttention needs compute capability 8.0"
    elif flash_package() is not None:
        return "varlen", "the flash-attn package"
    elif softcap is not None:
        reason = "torch's varlen_attn has no soft-cap, and flash-attn is not installed"
    elif torch.version.hip is not None:
        reason = "torch's varlen_attn is not known to align causal masks on ROCm"
    else:
        return "varlen", "torch's varlen_attn"
    if dtype == torch.float64:
        return "sdpa", "the fused kernels have no float64"
    if triton_missing() is not None or head_dim < 16:
        lacks = triton_missing() or "FlexAttention needs a head dimension of 16 or more"
        return "sdpa", f"{reason}; {lacks}"
    return "flex", reason


@functools.cache
def flash_package() -> Callable[..., Any] | None:
    """flash_attn_varlen_func of the flash-attn package, where it is installed for this torch."""
    try:
        from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    return flash_attn_varlen_func


@torch.compiler.assume_constant_result
def has_flash_package() -> bool:
    return flash_package() is not None


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """q (1, H, T, d), k and v (1, Hkv, T, d) -> (1, T, H, d)."""
    q, k, v = (x.transpose(1, 2).squeeze(0) for x in (q, k, v))  # (T, H, d)
    plain = window is None and softcap is None and torch.version.hip is None
    if plain and segments.shared:
        return tree_attention(q, k, v, segments, scale).unsqueeze(0)
    if segments.key_index is not None:
        k, v = GatherKeys.apply(k, v, segments.key_index, segments.cu_k)  # pyright: ignore
    args = (q, k, v, segments.cu_q, segments.cu_k, segments.max_q, segments.max_k)
    left = -1 if window is None else window - 1
    if has_flash_package():
        from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

        options: Any = {"window_size": (left, 0 if window else -1), "softcap": softcap or 0.0}
        out = flash_attn_varlen_func(*args, softmax_scale=scale, causal=True, **options)
    else:
        assert softcap is None, "torch's varlen_attn has no soft-cap"
        options: Any = {"enable_gqa": q.shape[1] != k.shape[1]} if _GQA_OPTION else {}
        out = torch_varlen.varlen_attn(*args, scale=scale, window_size=(left, 0), **options)
    assert isinstance(out, Tensor)
    return out.unsqueeze(0)


class GatherKeys(torch.autograd.Function):
    """Rows `index` of k and v; backward sums what every copy of a row got, in fp32.

    What `index` holds beyond cu_k[-1] is padding: no kernel reads those rows, and none writes
    their gradients, which may be anything.
    """

    @staticmethod
    def forward(ctx, k, v, index, cu_k):  # (T, Hkv, d) twice, (M,), (S + 1,)
        ctx.save_for_backward(index, cu_k)
        ctx.num_tokens = k.shape[0]
        return k.index_select(0, index), v.index_select(0, index)

    @staticmethod
    def backward(ctx, *grads):  # pyright: ignore[reportIncompatibleMethodOverride]
        index, cu_k = ctx.saved_tensors
        places = torch.arange(index.shape[0], device=index.device)
        index = torch.where(places < cu_k[-1], index, ctx.num_tokens)  # one row more, dropped
        found = []
        for grad in grads:
            dtype = torch.promote_types(grad.dtype, torch.float32)
            total = grad.new_zeros(ctx.num_tokens + 1, *grad.shape[1:], dtype=dtype)
            found.append(total.index_add_(0, index, grad.to(dtype))[:-1].to(grad.dtype))
        return (*found, None, None)


def flex_segments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """q (1, H, T, d), k and v (1, Hkv, T, d) -> (1, T, H, d)."""
    mask = block_mask(segments, q.device, window)  # pyright: ignore[reportCallIssue]
    run = _compiled_flex() if q.is_cuda else flex_attention
    out = run(
        q,
        k,
        v,
        score_mod=None if softcap is None else _softcap(softcap, q.device),
        block_mask=mask,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    assert isinstance(out, Tensor)
    return out.transpose(1, 2).contiguous()


@functools.cache
def _compiled_flex() -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=True)


@functools.cache
def _softcap(softcap: float, device: torch.device) -> Callable[..., Tensor]:
    # a float would become a dynamic size
    cap = torch.full((), softcap, dtype=torch.float32, device=device)
    return lambda score, b, h, i, j: cap * torch.tanh(score / cap)


_masks: Any = WeakTensorKeyDictionary()  # segments' bounds -> {(window, device): mask}


@torch.compiler.disable
def block_mask(segments: Segments, device: torch.device, window: int | None) -> BlockMask:
    """The mask of these segments, made once for all layers."""
    masks = _masks.setdefault(segments.bounds, {})
    if (window, device) not in masks:
        masks[window, device] = _make_mask(segments, device, window)
    return masks[window, device]


def _make_mask(segments: Segments, device: torch.device, window: int | None) -> BlockMask:
    needed, full = block_table(segments, window)
    bounds, parents = segments.bounds.tolist(), segments.parents.tolist()
    starts, ends = [0] * len(parents), bounds[1:]  # first position, end of all that continues it
    for s, parent in enumerate(parents):
        if parent >= 0:
            starts[s] = starts[parent] + bounds[parent + 1] - bounds[parent]
    for s in reversed(range(len(parents))):
        if parents[s] >= 0:
            ends[parents[s]] = max(ends[parents[s]], ends[s])
    num_tokens, lengths = bounds[-1], segments.bounds.long().diff()
    end, first = (torch.tensor(x).repeat_interleave(lengths) for x in (ends, starts))
    position = first + torch.arange(num_tokens) - segments.bounds[:-1].repeat_interleave(lengths)
    # in numbers per token: a window of one int would become a dynamic size
    farthest = position - (num_tokens if window is None else window - 1)
    end, position, farthest = (to_device(x, device) for x in (end, position, farthest))

    def continues(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (i < end[j])

    def near(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (i < end[j]) & (position[j] >= farthest[i])

    (num, index), (num_full, index_full) = (
        (x.sum(-1, dtype=torch.int32), x.int().argsort(dim=-1, descending=True, stable=True).int())
        for x in (to_device(t[None, None], device) for t in (needed & ~full, full))
    )
    visible = continues if window is None else near
    return BlockMask.from_kv_blocks(
        num, index, num_full, index_full, BLOCK, visible, (num_tokens, num_tokens)
    )


def block_table(segments: Segments, window: int | None) -> tuple[Tensor, Tensor]:
    """(blocks that hold a visible pair, blocks all of whose pairs are visible), (n, n) bool."""
    bounds = segments.bounds.tolist()
    num = -(-bounds[-1] // BLOCK)
    needed = torch.zeros(num, num, dtype=torch.bool)
    covered = torch.zeros(num, num, dtype=torch.int32)  # queries of the row that see all the keys
    low = torch.arange(num) * BLOCK
    high = low + BLOCK - 1
    for s, path in enumerate(seen_ranges(bounds, segments.parents.tolist())):
        start, stop = bounds[s], bounds[s + 1]
        if start == stop:
            continue
        rows = slice(start // BLOCK, (stop - 1) // BLOCK + 1)
        q_low, q_high = low[rows].clamp(min=start), high[rows].clamp(max=stop - 1)
        shift = 0  # the distance of query i to key j is i - j + shift
        # keys begin .. end - 1, from the last range back: each that lies apart is nearer by the gap
        after = stop
        for begin, end in reversed(joined([*path, (start, stop)])):
            shift -= after - end
            after = begin
            cols = slice(begin // BLOCK, (end - 1) // BLOCK + 1)
            k_low, k_high = low[cols].clamp(min=begin), high[cols].clamp(max=end - 1)
            farthest = q_high[:, None] - k_low + shift
            nearest = q_low[:, None] - k_high + shift
            some = farthest >= 0
            every = (nearest >= 0) & (low[cols] >= begin) & (high[cols] < end)
            if window is not None:
                some &= nearest < window
                every &= farthest < window
            needed[rows, cols] |= some
            covered[rows, cols] += every * (q_high - q_low + 1)[:, None]
    return needed, covered == BLOCK
