"""What FlashAttention's varlen kernels are documented to compute, in plain torch and any dtype."""

from __future__ import annotations

import torch


def forward(q, k, v, call, causal, scale):
    """(out (T, H, d), lse (H, T)); rows of no sequence stay NaN."""
    out = torch.full_like(q, torch.nan)
    lse = q.new_full((q.shape[1], q.shape[0]), torch.nan)
    for i, j in _sequences(q, k, call):
        if i.start == i.stop:
            continue
        if j.start == j.stop:  # flash_fwd_kernel.h: "write 0 to gO", and infinity to the lse
            out[i], lse[:, i] = 0.0, torch.inf
            continue
        scores = _scores(q, k, i, j, causal, scale)
        lse[:, i] = scores.logsumexp(-1)
        p = scores.softmax(-1)
        out[i] = (p @ _of_heads(v[j], q.shape[1])).transpose(0, 1)
    return out, lse


def backward(grad, q, k, v, out, lse, call, causal, scale):
    """(dq, dk, dv) with P from the lse and the row sums from the output that are given."""
    assert grad.is_contiguous()
    dq, dk, dv = (torch.full_like(x, torch.nan) for x in (q, k, v))
    num_heads, group = q.shape[1], q.shape[1] // k.shape[1]
    for i, j in _sequences(q, k, call):
        dq[i], dk[j], dv[j] = 0.0, 0.0, 0.0
        if i.start == i.stop or j.start == j.stop:
            continue
        p = (_scores(q, k, i, j, causal, scale) - lse[:, i, None]).exp()  # (H, n, m)
        do, o = grad[i].transpose(0, 1), out[i].transpose(0, 1)
        ds = p * (do @ _of_heads(v[j], num_heads).mT - (do * o).sum(-1, keepdim=True)) * scale
        dq[i] = (ds @ _of_heads(k[j], num_heads)).transpose(0, 1)
        for whole, part in ((dk, ds.mT @ q[i].transpose(0, 1)), (dv, p.mT @ do)):
            whole[j] = part.unflatten(0, (-1, group)).sum(1).transpose(0, 1)
    return dq, dk, dv


def _sequences(q, k, call):
    assert call.cu_q.dtype == call.cu_k.dtype == torch.int32
    cu_q, cu_k = call.cu_q.tolist(), call.cu_k.tolist()
    assert len(cu_q) == len(cu_k)
    assert (cu_q[0], cu_q[-1], cu_k[0], cu_k[-1]) == (0, len(q), 0, len(k))  # no row without one
    for a, b, c, d in zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:], strict=True):
        assert 0 <= b - a <= call.max_q
        assert 0 <= d - c <= call.max_k
        yield slice(a, b), slice(c, d)


def _of_heads(x, num_heads):  # (m, Hkv, d) -> (H, m, d)
    return x.transpose(0, 1).repeat_interleave(num_heads // x.shape[1], 0)


def _scores(q, k, i, j, causal, scale):  # (H, n, m), a causal mask aligned to the bottom right
    scores = q[i].transpose(0, 1) @ _of_heads(k[j], q.shape[1]).mT * scale
    n, m = scores.shape[1:]
    hidden = torch.arange(m) > torch.arange(n)[:, None] + m - n
    return scores.masked_fill(hidden, -torch.inf) if causal else scores
