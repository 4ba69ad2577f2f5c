"""Attention over a tree of segments in FlashAttention varlen calls, one per depth, and no copies.

    own        every segment against itself, causally: T queries, T keys
    shared, d  every run of neighbours that continue one segment of depth d, directly or not,
               against that segment, all of it: no mask. Prompts alone: one such call

The softmax of a query over the keys of two calls is made of the softmaxes (o1, lse1) and (o2, lse2)
over each, and so on with the next call:

    lse = log(e^lse1 + e^lse2)      out = e^(lse1 - lse) o1 + e^(lse2 - lse) o2

Backward, with S the scores, P = e^(S - lse) the probabilities over all keys:

    D_i = sum_j P_ij dP_ij = dO_i . O_i      dP = dO V^T      dS = P (dP - D)
    dQ = scale dS K      dK = scale dS^T Q      dV = P^T dO

P_ij and dS_ij of a key j need lse_i and D_i of *all* keys and nothing else of the other ones. A
FlashAttention backward makes P from the lse and D from the output that it is given: given the
merged ones, its dK and dV of a call are exact, and gradients are the sums over all calls.

cu_seqlens can only cut consecutive rows, so `shared` has two empty sequences before each run: the
queries before it, without keys, and the keys between the segments seen, without queries.
FlashAttention gives queries without keys an output of 0 with lse = inf, and gradients of 0 on both
sides. Depth first, the segments of one depth lie in the order of the runs that see them.

Letters: T tokens, H query heads, Hkv key heads, d head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...records import Segments


class _Call(NamedTuple):
    """One varlen call: where its sequences begin, and a bound on their lengths."""

    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int


def flash_forward(
    q: Tensor, k: Tensor, v: Tensor, call: _Call, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """(out (T, H, d), lse (H, T) in fp32) of torch's FlashAttention."""
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, *call, 0.0, causal, False, scale=scale
    )
    return out, lse


def flash_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    call: _Call,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv), in the inputs' dtype."""
    state = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of dropout, which there is none
    return torch.ops.aten._flash_attention_backward(
        grad, q, k, v, out, lse, *call, 0.0, causal, state, q.new_empty(0), scale=scale
    )


def tree_attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float) -> Tensor:
    """q (T, H, d), k and v (T, Hkv, d) -> (T, H, d); some segment continues another one."""
    assert segments.shared
    sizes = ((segments.max_q, segments.max_q), *((s.max_q, s.max_k) for s in segments.shared))
    cut = [x for s in segments.shared for x in (s.cu_q, s.cu_k)]
    out = TreeAttention.apply(q, k, v, scale, sizes, segments.cu_q, segments.cu_q, *cut)
    assert isinstance(out, Tensor)
    return out


class TreeAttention(torch.autograd.Function):
    """The calls, `own` first, and their merge. `cut`: cu_q and cu_k of each."""

    @staticmethod
    def forward(ctx, q, k, v, scale, sizes, *cut):
        ctx.options = scale, sizes
        own, *others = _calls(sizes, cut)
        out, lse = flash_forward(q, k, v, own, True, scale)
        for call in others:
            shared_out, shared_lse = flash_forward(q, k, v, call, False, scale)
            shared_lse = torch.where(shared_lse == torch.inf, -torch.inf, shared_lse)  # no keys
            share = torch.sigmoid(shared_lse - lse).T.unsqueeze(-1)  # e^(lse2 - lse), fp32
            # in place: products and sums are made in fp32, and no fp32 copy of an output is held
            out.mul_(1 - share).addcmul_(shared_out, share)
            lse = torch.logaddexp(lse, shared_lse)
        ctx.save_for_backward(q, k, v, out, lse, *cut)
        return out

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, out, lse, *cut = ctx.saved_tensors
        scale, sizes = ctx.options
        grad = grad.contiguous()
        own, *others = _calls(sizes, cut)
        sums = flash_backward(grad, q, k, v, out, lse, own, True, scale)
        for call in others:
            found = flash_backward(grad, q, k, v, out, lse, call, False, scale)
            sums = tuple(a.add_(b) for a, b in zip(sums, found, strict=True))
        return (*sums, *(None,) * (2 + len(cut)))


def _calls(sizes: Sequence[tuple[int, int]], cut: Sequence[Tensor]) -> list[_Call]:
    pairs = zip(cut[::2], cut[1::2], sizes, strict=True)
    return [_Call(cu_q, cu_k, *longest) for cu_q, cu_k, longest in pairs]
