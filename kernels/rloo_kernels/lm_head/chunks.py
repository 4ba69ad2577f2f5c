"""How the completions of one call are cut into chunks whose coefficients can be made alone."""

# pyright: strict

from __future__ import annotations

from bisect import bisect_left, bisect_right
from typing import NamedTuple

from .waves import Pieces

MOST_CUTS = 64  # places where chunks may end: their pairs are looked at, on the host


class Chunk(NamedTuple):
    """Consecutive rows r0:r1 with tokens t0:t1; `fits`: their logits fit into one piece."""

    r0: int
    r1: int
    t0: int
    t1: int
    fits: bool

    @property
    def rows(self) -> slice:
        return slice(self.r0, self.r1)

    @property
    def tokens(self) -> slice:
        return slice(self.t0, self.t1)


def plan_chunks(bounds: list[int], rows_per_unit: int, pieces: Pieces) -> list[Chunk]:
    """Whole units of `rows_per_unit` rows, in order, at most `pieces.most` tokens to a chunk.

    `bounds` are cu_seqlens. All that fits into one chunk is one; else they are cut where the chunks
    take the least time in all, or without a shape are few and nearly equal. A unit of more tokens
    is a chunk of its own that does not fit.
    """
    ends = bounds[::rows_per_unit]  # of the units; the first one's start before them
    cut = _equal if pieces.shape is None or ends[-1] - ends[0] <= pieces.most else _fastest
    chunks: list[Chunk] = []
    i = 0
    for j in cut(ends, pieces):
        fits = ends[j] - ends[i] <= pieces.most
        chunks.append(Chunk(i * rows_per_unit, j * rows_per_unit, ends[i], ends[j], fits))
        i = j
    return chunks


def _equal(ends: list[int], pieces: Pieces) -> list[int]:
    """Numbers of the units at which chunks end: the fewest chunks, their largest the smallest."""
    fewest = len(_full(ends, pieces.most))
    # the smaller their bound, the more chunks
    least = bisect_left(range(pieces.most), True, key=lambda n: len(_full(ends, n)) <= fewest)
    return _full(ends, least)


def _full(ends: list[int], most: int) -> list[int]:
    """Likewise, each chunk with as many units as fit into `most`, at least one."""
    cuts = [0]
    while cuts[-1] < len(ends) - 1:
        fitting = bisect_right(ends, ends[cuts[-1]] + most) - 1
        cuts.append(max(fitting, cuts[-1] + 1))
    return cuts[1:]


def _fastest(ends: list[int], pieces: Pieces) -> list[int]:
    """Likewise, those that take the least time: the best way on from each unit, last unit first."""
    kept = _with_few_cuts(ends, min(pieces.most, (ends[-1] - ends[0]) // MOST_CUTS))
    num_cuts = len(kept)
    least, best = [0.0] * num_cuts, [0] * num_cuts
    for i in range(num_cuts - 2, -1, -1):
        start = ends[kept[i]]
        least[i], best[i] = pieces.steps(ends[kept[i + 1]] - start) + least[i + 1], i + 1
        for j in range(i + 2, num_cuts):
            n = ends[kept[j]] - start
            if n > pieces.most:
                break
            time = pieces.steps(n) + least[j]
            if time <= least[i]:
                least[i], best[i] = time, j
    cuts, i = list[int](), 0
    while i < num_cuts - 1:
        i = best[i]
        cuts.append(kept[i])
    return cuts


def _with_few_cuts(ends: list[int], most: int) -> list[int]:
    """0, the last unit's end, and those between at which parts of at most `most` tokens end."""
    kept = [0]
    for j in range(1, len(ends)):
        if j + 1 == len(ends) or ends[j + 1] - ends[kept[-1]] > most:
            kept.append(j)
    return kept
