"""Rows of hidden states are worked through in pieces: how many rows fit, and the lm_head on them.

What lives at one time is one piece of logits. `piece_torch.py` has the mathematics and the letters;
`piece_triton.py` runs on a GPU.
"""

# pyright: strict

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..dispatch import use_triton
from ..logprob.types import RowStatistics, accumulation_dtype
from .piece_torch import forward_piece_torch
from .types import LMHead, LogitGradient

# What a piece of logits may take. Pieces of fp32 are summed into the weight gradient at no cost;
# pieces of bf16 and fp16 cost an fp32 copy of it, so they are fewer and larger.
PIECE_BYTES = {torch.float32: 384 << 20, torch.float64: 384 << 20}
PIECE_BYTES_HALF = 768 << 20


def piece_rows(hidden: Tensor, vocab_size: int, chunk_bytes: int | None) -> int:
    """The most rows of a piece: its logits take at most `chunk_bytes` (at least one row)."""
    if chunk_bytes is None:
        chunk_bytes = PIECE_BYTES.get(hidden.dtype, PIECE_BYTES_HALF)
    bytes_per_row = vocab_size * hidden.element_size()
    if use_triton(hidden):
        from .piece_triton import bytes_per_logit

        bytes_per_row = vocab_size * bytes_per_logit(hidden)
    return max(1, min(hidden.shape[0], chunk_bytes // max(bytes_per_row, 1)))


def pieces(num_rows: int, most: int) -> Iterator[slice]:
    """Slices of nearly equal length, at most `most` rows each."""
    size = -(-num_rows // max(-(-num_rows // most), 1))
    for start in range(0, num_rows, max(size, 1)):
        yield slice(start, min(start + size, num_rows))


def forward_piece(
    hidden: Tensor,
    head: LMHead,
    token_ids: Tensor,
    *,
    want_entropy: bool = False,
    want_gradient: bool = False,
    upstream: tuple[Tensor, Tensor] | None = None,
) -> tuple[RowStatistics, LogitGradient | None]:
    """Statistics of the rows hidden (n, D) at token_ids (n,), and M with `want_gradient`: 2nDV.

    With `upstream` = (dL/d(log-prob), dL/d(entropy)), each (n,), M is dL / d raw.
    """
    forward = forward_piece_torch
    if use_triton(hidden):
        from .piece_triton import forward_piece_triton

        forward = forward_piece_triton
    return forward(hidden, head, token_ids, want_entropy, want_gradient, upstream)


def forward_rows(
    hidden: Tensor, head: LMHead, token_ids: Tensor, size: int, want_entropy: bool
) -> tuple[Tensor, Tensor]:
    """(log-probs (N,), entropies (N,) or empty) without a gradient, `size` rows at a time: 2NDV."""
    logps = hidden.new_zeros(hidden.shape[0], dtype=accumulation_dtype(hidden.dtype))
    entropy = torch.zeros_like(logps) if want_entropy else logps.new_empty(0)
    for rows in pieces(hidden.shape[0], size):
        found, _ = forward_piece(hidden[rows], head, token_ids[rows], want_entropy=want_entropy)
        logps[rows] = found.logps
        if want_entropy:
            entropy[rows] = found.entropy
    return logps, entropy


def logit_gradient_is_scaled(hidden: Tensor, weight: Tensor) -> bool:
    """Whether a piece's `LogitGradient` has a row scale: the library's product has none."""
    if not use_triton(hidden):
        return True
    from .piece_triton import uses_matrix_kernel

    return uses_matrix_kernel(hidden, weight, want_gradient=True)


def logit_gradient_width(hidden: Tensor, weight: Tensor) -> int:
    """Distance between the rows of a piece's `LogitGradient`, in elements."""
    if not use_triton(hidden) or not logit_gradient_is_scaled(hidden, weight):
        return weight.shape[0]
    from .matrix_triton import stored_width

    return stored_width(weight.shape[0])
