"""The RLOO loss over hidden states: chunks of whole groups -> log-probs, coefficients, gradients.

`fused_linear_rloo_loss.py` has the mathematics, the FLOPs, and the op around it.
"""

# pyright: strict, reportUnknownMemberType=false

from __future__ import annotations

import logging
from collections.abc import Iterator
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
from .types import LMHead, LogitGradient
from .vocab_shards import Labels, SplitLabels


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

    `need`: whether hidden, weight and bias get a gradient; `size`: rows of a piece. Inputs and
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
        size: int,
    ) -> None:
        self.hidden, self.head, self.token_ids = hidden, head, token_ids
        self.cu_seqlens = to_device(cu_seqlens, hidden.device)
        self.bounds: list[int] = cu_seqlens.tolist()
        check_bounds(self.bounds, len(token_ids))
        self.given, self.options, self.size = inputs, options, size
        self.inputs = flat_inputs(inputs, hidden, hidden.device)
        self.need, self.frozen_head = need, need == (True, False, False)
        dtype = accumulation_dtype(hidden.dtype)
        self.logps = hidden.new_zeros(len(token_ids), dtype=dtype)
        self.entropy = torch.zeros_like(self.logps) if want_entropy else None
        self.coefficients = torch.zeros_like(self.logps)
        self.table = self.logps.new_zeros(len(TABLE_FIELDS), len(self.bounds) - 1)

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
        return self._result(*sums.finish())

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
        active, still = _active(c)
        sums = self._accumulator(-(-len(active) // self.size))
        active, still, c = (to_device(x, self.hidden.device) for x in (active, still, c))
        if len(still):
            self._forward(still)
        for rows in _split(active, self.size):
            self._forward_and_add(sums, rows, c[rows])
        return sums

    def _chunk_by_chunk(self) -> GradientAccumulator:
        """Chunks of whole groups, of whole completions without rewards, of all with normalize."""
        unit = self.options.num_generations if self.inputs.rewards is not None else 1
        if self.options.normalize:
            unit = len(self.bounds) - 1
        chunks = plan_chunks(self.bounds, max(unit, 1), self.size)
        sums = self._accumulator(sum(chunk.num_pieces(self.size) for chunk in chunks))
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
        active, still = _active(c)  # clipped sequences have c = 0, unscorable ones too
        if len(still):
            gradient = gradient.select(active)
            sums.add(active + chunk.t0, hidden[active], gradient, c[active])
        else:
            sums.add(chunk.tokens, hidden, gradient, c)

    def _unit_gradient_then_scale(self, sums: GradientAccumulator, chunk: Chunk) -> None:
        """Two products: dX is linear in c, so it is made for c = 1 and scaled once c is known."""
        every = torch.arange(chunk.t0, chunk.t1, device=self.hidden.device)
        for rows in _split(every, self.size):
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
        active, _ = _active(self.coefficients[chunk.tokens])
        if isinstance(self.token_ids, SplitLabels):  # each piece is a collective: as many on all
            active = torch.arange(chunk.t1 - chunk.t0, device=self.hidden.device)
        for rows in _split(active + chunk.t0, self.size):
            self._forward_and_add(sums, rows, self.coefficients[rows])

    # What a set of rows goes through

    def _accumulator(self, num_pieces: int) -> GradientAccumulator:
        return GradientAccumulator(self.hidden, self.head, self.need, num_pieces)

    def _forward(self, rows: slice | Tensor) -> None:
        """Log-probs and entropies: one product."""
        want = self.entropy is not None
        hidden, ids = self.hidden[rows], self.token_ids[rows]
        self.logps[rows], entropy = forward_rows(hidden, self.head, ids, self.size, want)
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
        )
        assert gradient is not None
        self.logps[rows] = found.logps
        if self.entropy is not None:
            self.entropy[rows] = found.entropy
        return gradient

    def _forward_and_add(
        self, sums: GradientAccumulator, rows: Tensor, coefficients: Tensor | None
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


def _active(c: Tensor) -> tuple[Tensor, Tensor]:
    """(rows with c != 0, rows with c = 0), ascending; on a GPU (all, none): it would have to wait.

    There the products of rows with c = 0, mostly clipped ones, cost less than an idle device.
    """
    if c.is_cuda:
        every = torch.arange(len(c), device=c.device)
        return every, every[:0]
    return c.nonzero().squeeze(1), (c == 0).nonzero().squeeze(1)


def _split(index: Tensor, size: int) -> Iterator[Tensor]:
    """`index` in parts of nearly equal length, at most `size`."""
    num_pieces = -(-len(index) // size)
    yield from index.tensor_split(num_pieces) if num_pieces else ()
