"""One pass of the RLOO loss over hidden states: groups -> chunks -> log-probs, coefficients,
gradients.

`linear_rloo.py` has the mathematics, the FLOPs, and the op around it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .dispatch import log_once
from .head import Gradients, Head, Weights, forward_piece
from .linear_logprob import forward_rows
from .logprob import accumulation_dtype
from .segments import ROWS, LossOptions, Signal, check_bounds, segments


class Chunk(NamedTuple):
    """Consecutive rows r0:r1 with tokens t0:t1; `fits`: their logits fit into one piece."""

    r0: int
    r1: int
    t0: int
    t1: int
    fits: bool


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


def pieces_of(index: Tensor, size: int) -> Iterator[Tensor]:
    """`index` in parts of nearly equal length, at most `size`."""
    num_pieces = -(-len(index) // size)
    yield from index.tensor_split(num_pieces) if num_pieces else ()


class Run:
    """One call of the op; what it finds ends up in `logps`, `entropy`, `coefficients`, `table`."""

    def __init__(
        self,
        hidden: Tensor,
        head: Head,
        token_ids: Tensor,
        cu_seqlens: Tensor,
        signal: Signal,
        options: LossOptions,
        want_entropy: bool,
        need: tuple[bool, bool, bool],
        size: int,
    ):
        self.hidden, self.head, self.token_ids = hidden, head, token_ids
        self.cu_seqlens = cu_seqlens.to(hidden.device)
        self.bounds: list[int] = cu_seqlens.tolist()
        check_bounds(self.bounds, len(token_ids))
        self.signal, self.options, self.size = signal, options, size
        self.need, self.frozen = need, need == (True, False, False)
        dtype = accumulation_dtype(hidden.dtype)
        self.logps = hidden.new_zeros(len(token_ids), dtype=dtype)
        self.entropy = torch.zeros_like(self.logps) if want_entropy else None
        self.coefficients = torch.zeros_like(self.logps)
        self.table = self.logps.new_zeros(len(ROWS), len(self.bounds) - 1)

    def __call__(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """dL/d(hidden, weight, bias) at dL/dloss = 1."""
        everything = Chunk(0, len(self.bounds) - 1, 0, len(self.token_ids), False)
        if not any(self.need):
            self._forward(slice(None))
            self._credit(everything)
            return None, None, None
        self._log_mode()
        if self._coefficients_known():
            sums = self._known_beforehand()
            self._credit(everything)
        else:
            sums = self._chunk_by_chunk()
        return sums.finish()

    def _log_mode(self) -> None:
        head = "frozen lm_head, no dW" if self.frozen else "three products"
        if self._coefficients_known():
            when = "coefficients are known before the log-probs, any chunking"
        else:
            per = "group" if self.signal.rewards is not None else "completion"
            when = f"coefficients of a {per} come out of its own chunk"
        log_once(f"fused_linear_rloo_loss: {head}; {when}.", logging.INFO)

    def _coefficients_known(self) -> bool:
        """Whether dloss / dlogp depends on no log-prob."""
        on_policy = self.signal.old_logps is None and not self.options.kl_in_loss
        return on_policy and (self.signal.rewards is None or self.options.beta == 0)

    def _known_beforehand(self) -> Gradients:
        signal = self.signal._replace(ref_logps=None)
        c, _ = segments(self.logps, self.cu_seqlens, signal, None, self.options)
        active = c.nonzero().squeeze(1)
        sums = self._gradients(-(-len(active) // self.size))
        if len(active) < len(c):
            self._forward((c == 0).nonzero().squeeze(1))
        for rows in pieces_of(active, self.size):
            self._add(sums, rows, c[rows])
        return sums

    def _chunk_by_chunk(self) -> Gradients:
        unit = self.options.num_generations if self.signal.rewards is not None else 1
        if self.options.normalize:
            unit = len(self.bounds) - 1
        chunks = plan_chunks(self.bounds, max(unit, 1), self.size)
        sums = self._gradients(sum(1 if c.fits else -(-(c.t1 - c.t0) // self.size) for c in chunks))
        for chunk in chunks:
            if chunk.t0 == chunk.t1:
                self._credit(chunk)
            elif chunk.fits:
                self._one_pass(sums, chunk)
            else:
                self._two_passes(sums, chunk)
        return sums

    def _one_pass(self, sums: Gradients, chunk: Chunk) -> None:
        """Three products: the weights are kept until the coefficients are known."""
        rows = slice(chunk.t0, chunk.t1)
        weights = self._forward_with_weights(rows)
        self._credit(chunk)
        hidden, c = self.hidden[rows], self.coefficients[rows]
        # clipped sequences have c = 0, unscorable ones too; a GPU is not asked for those alone
        if self.signal.old_logps is not None or not c.is_cuda:
            active = c.nonzero().squeeze(1)
            if len(active) < len(c):
                scale = weights.row_scale
                weights = Weights(weights.matrix[active], None if scale is None else scale[active])
                hidden, c = hidden[active], c[active]
                sums.add(active + chunk.t0, hidden, weights, c)
                return
        sums.add(rows, hidden, weights, c)

    def _two_passes(self, sums: Gradients, chunk: Chunk) -> None:
        """Log-probs first, then gradients: what one piece cannot hold is made twice."""
        every = torch.arange(chunk.t0, chunk.t1, device=self.hidden.device)
        if self.frozen:  # dX is linear in c: made for c = 1, scaled when c is known
            for rows in pieces_of(every, self.size):
                self._add(sums, rows, None)
            self._credit(chunk)
            here = slice(chunk.t0, chunk.t1)
            assert sums.hidden is not None
            sums.hidden[here] *= self.coefficients[here, None]
            return
        log_once(
            "A group's logits (all groups' with normalize=True) do not fit into one piece: their "
            "log-probs are made first and the logits twice, four products in place of three. A "
            "larger chunk_bytes avoids it."
        )
        self._forward(slice(chunk.t0, chunk.t1))
        self._credit(chunk)
        active = self.coefficients[chunk.t0 : chunk.t1].nonzero().squeeze(1) + chunk.t0
        for rows in pieces_of(active, self.size):
            self._add(sums, rows, self.coefficients[rows])

    # The parts

    def _gradients(self, num_pieces: int) -> Gradients:
        return Gradients(self.hidden, self.head, self.need, num_pieces)

    def _forward(self, rows: slice | Tensor) -> None:
        want = self.entropy is not None
        hidden, ids = self.hidden[rows], self.token_ids[rows]
        self.logps[rows], entropy = forward_rows(hidden, self.head, ids, self.size, want)
        if self.entropy is not None:
            self.entropy[rows] = entropy

    def _forward_with_weights(self, rows: slice | Tensor) -> Weights:
        found, weights = forward_piece(
            self.hidden[rows],
            self.head,
            self.token_ids[rows],
            want_entropy=self.entropy is not None,
            want_weights=True,
        )
        assert weights is not None
        self.logps[rows] = found.logps
        if self.entropy is not None:
            self.entropy[rows] = found.entropy
        return weights

    def _add(self, sums: Gradients, rows: Tensor, coefficients: Tensor | None) -> None:
        weights = self._forward_with_weights(rows)
        sums.add(rows, self.hidden[rows], weights, coefficients)

    def _credit(self, chunk: Chunk) -> None:
        """Coefficients and table of the chunk's rows, from its log-probs."""
        tokens, rows = slice(chunk.t0, chunk.t1), slice(chunk.r0, chunk.r1)
        per_row = [None if x is None else x[rows] for x in self.signal[:2]]
        per_token = [None if x is None else x[tokens] for x in self.signal[2:]]
        self.coefficients[tokens], self.table[:, rows] = segments(
            self.logps[tokens],
            self.cu_seqlens[chunk.r0 : chunk.r1 + 1] - chunk.t0,
            Signal(*per_row, *per_token),
            None if self.entropy is None else self.entropy[tokens],
            self.options,
        )
