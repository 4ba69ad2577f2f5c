"""The RLOO loss over hidden states: chunks of whole groups -> log-probs, coefficients, gradients.

`fused_linear_rloo_loss.py` has the mathematics, the FLOPs, and the op around it.
"""

# pyright: strict, reportUnknownMemberType=false

from __future__ import annotations

import logging
from typing import NamedTuple

import torch
from torch import Tensor

from ..dispatch import log_once
from ..logprob.types import accumulation_dtype
from ..loss.checks import check_bounds
from ..loss.rloo_objective import coefficients_and_table
from ..loss.types import TABLE_FIELDS, LossInputs, LossOptions, flat_inputs
from ..transfer import to_device
from .chunks import Chunk, plan_chunks
from .gradients import GradientAccumulator
from .piece import forward_piece, forward_rows
from .piece_torch import LogitsBuffer
from .types import LMHead, LogitGradient
from .vocab_shards import Labels, SplitLabels
from .waves import LEAST_INACTIVE_ROWS, Pieces


class LossAndGradients(NamedTuple):
    """What one call of `ChunkedLoss` makes: R rows, N tokens; gradients None where not needed."""

    table: Tensor  # (len(TABLE_FIELDS), R)
    coefficients: Tensor  # (N,) dloss / dlogp
    logps: Tensor  # (N,)
    entropy: Tensor | None  # (N,)
    grad_hidden: Tensor | None  # (N, D) dloss / d hidden, and likewise
    grad_weight: Tensor | None  # (V, D)
    grad_bias: Tensor | None  # (V,)


class ChunkedLoss:
    """One call of the op, over the N tokens that are not masked.

    `need`: whether hidden, weight and bias get a gradient; `pieces`: how rows are cut;
    `weight_dtype`: that of dW, which is not the weight's only if dW is summed. Inputs and
    cu_seqlens may lie on the CPU: looking at them there does not wait for a GPU, and nothing here
    looks at anything else of one but cu_seqlens that lie on it.
    """

    def __init__(
        self,
        hidden: Tensor,
        head: LMHead,
        token_ids: Labels,
        cu_seqlens: Tensor,
        inputs: LossInputs,
        options: LossOptions,
        want_entropy: bool,
        need: tuple[bool, bool, bool],
        pieces: Pieces,
        weight_dtype: torch.dtype,
    ) -> None:
        self.hidden, self.head, self.token_ids = hidden, head, token_ids
        self.cu_seqlens = to_device(cu_seqlens, hidden.device)
        self.bounds: list[int] = cu_seqlens.tolist()
        check_bounds(self.bounds, len(token_ids))
        self.given, self.options, self.pieces = inputs, options, pieces
        self.inputs = flat_inputs(inputs, hidden, hidden.device)
        self.need, self.frozen_head = need, need == (True, False, False)
        self.weight_dtype = weight_dtype
        dtype = accumulation_dtype(hidden.dtype)
        self.logps = hidden.new_zeros(len(token_ids), dtype=dtype)
        self.entropy = torch.zeros_like(self.logps) if want_entropy else None
        self.coefficients = torch.zeros_like(self.logps)
        self.table = self.logps.new_zeros(len(TABLE_FIELDS), len(self.bounds) - 1)
        self.buffer = LogitsBuffer()

    def run(self) -> LossAndGradients:
        """Gradients are those at dL/dloss = 1."""
        everything = Chunk(0, len(self.bounds) - 1, 0, len(self.token_ids), False)
        if not any(self.need):
            self._forward(slice(None))
            self._set_coefficients(everything)
            return self._result(None, None, None)
        self._log_mode()
        if self._coefficients_known():
            sums = self._known_beforehand()
            self._set_coefficients(everything)
        else:
            sums = self._chunk_by_chunk()
        self.buffer = LogitsBuffer()  # its memory is free for what the sums become
        return self._result(*sums.finish(self.weight_dtype))

    def _log_mode(self) -> None:
        head = "frozen lm_head, no dW" if self.frozen_head else "three products"
        if self._coefficients_known():
            when = "coefficients are known before the log-probs, any chunking"
        else:
            per = "group" if self.inputs.rewards is not None else "completion"
            when = f"coefficients of a {per} come out of its own chunk"
        log_once(f"fused_linear_rloo_loss: {head}; {when}.", logging.INFO)

    # Which rows run when

    def _coefficients_known(self) -> bool:
        """Whether dloss / dlogp depends on no log-prob."""
        on_policy = self.inputs.old_logps is None and not self.options.kl_in_loss
        return on_policy and (self.inputs.rewards is None or self.options.beta == 0)

    def _known_beforehand(self) -> GradientAccumulator:
        """Three products where c != 0, in any pieces; one product, the log-probs, where c = 0.

        c depends on no log-prob, so it is made where the inputs were given. On the CPU it shows
        which rows have c = 0 (groups without signal, unscorable rows) before anything is launched.
        On a GPU looking would wait, so all rows run as if c != 0, and c = 0 makes their part 0.
        """
        inputs = self.given._replace(ref_logps=None)
        place = next(x.device for x in inputs if x is not None)
        logps, bounds = self.logps.new_zeros(len(self.logps), device=place), self.cu_seqlens
        if place != bounds.device:
            bounds = torch.tensor(self.bounds)
        c, _ = coefficients_and_table(logps, bounds, inputs, None, self.options)
        parts = _by_coefficient(c, LEAST_INACTIVE_ROWS if self.hidden.is_cuda else 1)
        cut = self.pieces.cut(0, len(c if parts is None else parts[0]))
        sums = self._accumulator(len(cut))
        c = to_device(c, self.hidden.device)
        active = None
        if parts is not None:
            active, still = (to_device(x, self.hidden.device) for x in parts)
            self._forward(still)
            sums.set_zero(still)
        for part in cut:
            rows = part if active is None else active[part]
            self._forward_and_add(sums, rows, c[rows])
        return sums

    def _chunk_by_chunk(self) -> GradientAccumulator:
        """Chunks of whole groups, of whole completions without rewards, of all with normalize."""
        unit = self.options.num_generations if self.inputs.rewards is not None else 1
        if self.options.normalize:
            unit = len(self.bounds) - 1
        chunks = plan_chunks(self.bounds, max(unit, 1), self.pieces)
        num_pieces = [1 if x.fits else len(self.pieces.cut(x.t0, x.t1)) for x in chunks]
        sums = self._accumulator(sum(num_pieces))
        for chunk in chunks:
            if chunk.t0 == chunk.t1:
                self._set_coefficients(chunk)
            elif chunk.fits:
                self._one_pass(sums, chunk)
            elif self.frozen_head:
                self._unit_gradient_then_scale(sums, chunk)
            else:
                self._two_passes(sums, chunk)
        return sums

    def _one_pass(self, sums: GradientAccumulator, chunk: Chunk) -> None:
        """Three products: M is kept until the coefficients are known."""
        gradient = self._forward_with_gradient(chunk.tokens)
        self._set_coefficients(chunk)
        hidden, c = self.hidden[chunk.tokens], self.coefficients[chunk.tokens]
        parts = _by_coefficient(c)  # clipped sequences have c = 0, unscorable ones too
        if parts is None:
            sums.add(chunk.tokens, hidden, gradient, c)
        else:
            active, still = parts
            sums.add(active + chunk.t0, hidden[active], gradient.select(active), c[active])
            sums.set_zero(still + chunk.t0)

    def _unit_gradient_then_scale(self, sums: GradientAccumulator, chunk: Chunk) -> None:
        """Two products: dX is linear in c, so it is made for c = 1 and scaled once c is known."""
        for rows in self.pieces.cut(chunk.t0, chunk.t1):
            self._forward_and_add(sums, rows, None)
        self._set_coefficients(chunk)
        assert sums.hidden is not None
        sums.hidden[chunk.tokens] *= self.coefficients[chunk.tokens, None]

    def _two_passes(self, sums: GradientAccumulator, chunk: Chunk) -> None:
        """Four products: log-probs first, then the logits once more for the gradients."""
        log_once(
            "A group's logits (all groups' with normalize=True) do not fit into one piece: their "
            "log-probs are made first and the logits twice, four products in place of three. A "
            "larger chunk_bytes avoids it."
        )
        self._forward(chunk.tokens)
        self._set_coefficients(chunk)
        parts = _by_coefficient(self.coefficients[chunk.tokens])
        if isinstance(self.token_ids, SplitLabels):  # each piece is a collective: as many on all
            parts = None
        if parts is None:
            every = self.pieces.cut(chunk.t0, chunk.t1)
        else:
            active, still = (x + chunk.t0 for x in parts)
            sums.set_zero(still)
            every = [active[part] for part in self.pieces.cut(0, len(active))]
        for rows in every:
            self._forward_and_add(sums, rows, self.coefficients[rows])

    # What a set of rows goes through

    def _accumulator(self, num_pieces: int) -> GradientAccumulator:
        if self.weight_dtype != self.hidden.dtype:  # dW is handed over as a sum
            num_pieces = max(num_pieces, 2)
        return GradientAccumulator(self.hidden, self.head, self.need, num_pieces)

    def _forward(self, rows: slice | Tensor) -> None:
        """Log-probs and entropies: one product."""
        want = self.entropy is not None
        hidden, ids = self.hidden[rows], self.token_ids[rows]
        self.logps[rows], entropy = forward_rows(hidden, self.head, ids, self.pieces.most, want)
        if self.entropy is not None:
            self.entropy[rows] = entropy

    def _forward_with_gradient(self, rows: slice | Tensor) -> LogitGradient:
        """Log-probs and entropies, and M of the rows, which fit into one piece: one product."""
        found, gradient = forward_piece(
            self.hidden[rows],
            self.head,
            self.token_ids[rows],
            want_entropy=self.entropy is not None,
            want_gradient=True,
            buffer=self.buffer,
        )
        assert gradient is not None
        self.logps[rows] = found.logps
        if self.entropy is not None:
            self.entropy[rows] = found.entropy
        return gradient

    def _forward_and_add(
        self, sums: GradientAccumulator, rows: slice | Tensor, coefficients: Tensor | None
    ) -> None:
        """Log-probs, and the gradients for coefficients that are known; None for 1 each."""
        gradient = self._forward_with_gradient(rows)
        sums.add(rows, self.hidden[rows], gradient, coefficients)

    def _set_coefficients(self, chunk: Chunk) -> None:
        """Coefficients and table of the chunk's rows, from its log-probs."""
        tokens, rows = chunk.tokens, chunk.rows
        per_row = [None if x is None else x[rows] for x in self.inputs[:2]]
        per_token = [None if x is None else x[tokens] for x in self.inputs[2:]]
        self.coefficients[tokens], self.table[:, rows] = coefficients_and_table(
            self.logps[tokens],
            self.cu_seqlens[chunk.r0 : chunk.r1 + 1] - chunk.t0,
            LossInputs(*per_row, *per_token),
            None if self.entropy is None else self.entropy[tokens],
            self.options,
        )

    def _result(
        self, grad_hidden: Tensor | None, grad_weight: Tensor | None, grad_bias: Tensor | None
    ) -> LossAndGradients:
        return LossAndGradients(
            self.table,
            self.coefficients,
            self.logps,
            self.entropy,
            grad_hidden,
            grad_weight,
            grad_bias,
        )


def _by_coefficient(c: Tensor, least: int = 1) -> tuple[Tensor, Tensor] | None:
    """(rows with c != 0, rows with c = 0), ascending; None where all rows are to run alike.

    That is where fewer than `least` have c = 0, and on a GPU: looking would wait. There the
    products of rows with c = 0, mostly clipped ones, cost less than an idle device.
    """
    if c.is_cuda:
        return None
    still = (c == 0).nonzero().squeeze(1)
    if len(still) < least:
        return None
    return c.nonzero().squeeze(1), still
