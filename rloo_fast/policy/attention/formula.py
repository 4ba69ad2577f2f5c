"""Attention over a segment by the formula, in chunks of queries: what no fused kernel serves.

    S = scale Q K^T    softcap: S = c tanh(S / c)    P = e^(S - lse), 0 where masked
    dS = P (dO V^T - rowsum(dO O)), through the soft-cap times 1 - tanh^2
    dQ = scale dS K    dK = scale dS^T Q    dV = P^T dO

Tensors are token-major: q, out, grad (1, T, H, d), k and v (1, T, Hkv, d), lse (1, T, H). Scores
are fp32 (fp64 for fp64), SCORE_BYTES or one query's at most, and three such tensors are alive at a
time. The keys of one segment are copied, those of its path among them, one segment at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

SCORE_BYTES = 16 << 20


class Path(NamedTuple):
    """A segment start:stop that sees some ranges of tokens, one after the other, before itself."""

    start: int
    stop: int
    seen: tuple[tuple[int, int], ...]

    @property
    def length(self) -> int:
        """Tokens seen before the segment's own."""
        return sum(last - first for first, last in self.seen)


class AttentionScore(NamedTuple):
    """How a query scores a key."""

    scale: float
    window: int | None
    softcap: float | None


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def formula_forward(
    q: Tensor, k: Tensor, v: Tensor, path: Path, score: AttentionScore, out: Tensor, lse: Tensor
) -> None:
    """Fill the segment's rows of `out` and `lse`."""
    for rows, keys in _ranges(path, q, score.window):
        chunk = _Chunk(q, k, path, rows, keys, score)
        lse_rows = chunk.scores.logsumexp(-1, keepdim=True)
        p = chunk.scores.sub_(lse_rows).exp_()
        out[0, chunk.rows] = chunk.token_major(p @ chunk.keys_of(v)).to(out.dtype)
        lse[0, chunk.rows] = chunk.token_major(lse_rows).squeeze(-1)


def formula_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    path: Path,
    score: AttentionScore,
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
    sums: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Add the segment's dq, dk and dv into `sums`."""
    for rows, keys in _ranges(path, q, score.window):
        chunk = _Chunk(q, k, path, rows, keys, score)
        dout = chunk.queries_of(grad)  # (Hkv, G n, d)
        delta = (dout * chunk.queries_of(out)).sum(-1, keepdim=True)
        bend = None  # tanh^2
        if score.softcap is not None:  # where masked, tanh is infinite, and stands for nothing
            bend = (chunk.scores / score.softcap).square_().clamp_(max=1.0)
        p = chunk.scores.sub_(chunk.queries_of(lse.unsqueeze(-1))).exp_()
        ds = (dout @ chunk.keys_of(v).mT).sub_(delta).mul_(p)
        if bend is not None:
            ds.addcmul_(ds, bend, value=-1)
        ds *= score.scale
        sums[0][0, chunk.rows] += chunk.token_major(ds @ chunk.keys)
        chunk.add_to_keys(sums[1], ds.mT @ chunk.queries)
        chunk.add_to_keys(sums[2], p.mT @ dout)


class _Chunk:
    """Queries `rows` of a segment against `keys` of (prefix, segment), as one matrix per KV head.

    The G query heads of a KV head are rows of its matrix: scores (Hkv, G n, m), masked with -inf.
    """

    def __init__(
        self, q: Tensor, k: Tensor, path: Path, rows: range, keys: range, score: AttentionScore
    ):
        self.key_slices = _cut([*path.seen, (path.start, path.stop)], keys)
        self.rows = slice(path.start + rows.start, path.start + rows.stop)
        self.num_kv, self.dtype = k.shape[2], statistics_dtype(q.dtype)
        self.queries, self.keys = self.queries_of(q), self.keys_of(k)
        self.scores = (self.queries @ self.keys.mT).mul_(score.scale)
        if score.softcap is not None:
            self.scores.div_(score.softcap).tanh_().mul_(score.softcap)
        at = torch.arange(rows.start, rows.stop, device=q.device).add_(path.length).unsqueeze(-1)
        to = torch.arange(keys.start, keys.stop, device=q.device)
        hidden = to > at  # (n, m)
        if score.window is not None:
            hidden |= to <= at - score.window
        self.scores.view(self.num_kv, -1, *hidden.shape).masked_fill_(hidden, float("-inf"))

    def queries_of(self, x: Tensor) -> Tensor:  # (1, T, H, c) -> (Hkv, G n, c)
        x = x[0, self.rows].transpose(0, 1).to(self.dtype)
        return x.reshape(self.num_kv, -1, x.shape[-1])

    def keys_of(self, x: Tensor) -> Tensor:  # (1, T, Hkv, c) -> (Hkv, m, c)
        return torch.cat([x[0, s] for s in self.key_slices]).transpose(0, 1).to(self.dtype)

    def token_major(self, x: Tensor) -> Tensor:  # (Hkv, G n, c) -> (n, H, c)
        return x.reshape(-1, self.rows.stop - self.rows.start, x.shape[-1]).transpose(0, 1)

    def add_to_keys(self, whole: Tensor, x: Tensor) -> None:  # (1, T, Hkv, c) += (Hkv, m, c)
        sizes = [s.stop - s.start for s in self.key_slices]
        for place, piece in zip(self.key_slices, x.split(sizes, dim=1), strict=True):
            whole[0, place] += piece.transpose(0, 1)


def _cut(ranges: list[tuple[int, int]], keys: range) -> list[slice]:
    """The tokens of `keys`, numbered through the ranges."""
    found: list[slice] = []
    begin = 0  # number of the range's first token
    for first, last in ranges:
        low, high = max(keys.start - begin, 0), min(keys.stop - begin, last - first)
        if low < high:
            found.append(slice(first + low, first + high))
        begin += last - first
    return found


def _ranges(path: Path, q: Tensor, window: int | None) -> Iterator[tuple[range, range]]:
    """Query rows, and the keys they may see, whose scores fill SCORE_BYTES at most."""
    length = path.length
    num_rows = path.stop - path.start
    num_keys = length + num_rows if window is None else min(length + num_rows, 2 * window)
    step = SCORE_BYTES // (q.shape[2] * num_keys * statistics_dtype(q.dtype).itemsize)
    step = max(1, step if window is None else min(step, window))  # a chunk sees step + window keys
    for start in range(0, num_rows, step):
        stop = min(start + step, num_rows)
        low = 0 if window is None else max(0, length + start - window + 1)
        yield range(start, stop), range(low, length + stop)
