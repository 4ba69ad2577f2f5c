"""How the completions of one call are cut into chunks whose coefficients can be made alone."""

# pyright: strict

from __future__ import annotations

from typing import NamedTuple


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

    def num_pieces(self, size: int) -> int:
        """Pieces of at most `size` tokens that it takes; one for a chunk that fits."""
        return 1 if self.fits else -(-(self.t1 - self.t0) // size)


def plan_chunks(bounds: list[int], rows_per_unit: int, size: int) -> list[Chunk]:
    """Whole units of `rows_per_unit` rows, packed in order into pieces of at most `size` tokens.

    `bounds` are cu_seqlens. A unit of more tokens is a chunk of its own that does not fit.
    """
    chunks: list[Chunk] = []
    for r0 in range(0, len(bounds) - 1, rows_per_unit):
        r1 = r0 + rows_per_unit
        t0, t1 = bounds[r0], bounds[r1]
        last = chunks[-1] if chunks else None
        if last is not None and last.fits and t1 - last.t0 <= size:
            chunks[-1] = Chunk(last.r0, r1, last.t0, t1, True)
        else:
            chunks.append(Chunk(r0, r1, t0, t1, t1 - t0 <= size))
    return chunks
