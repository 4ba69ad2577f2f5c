"""Rows of hidden states are worked through in pieces: how many rows fit, and the lm_head on them.

What lives at one time is one piece of logits. `piece_torch.py` has the mathematics and the letters;
`piece_triton.py` runs on a GPU.
"""

# pyright: strict

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from ..dispatch import use_triton
from ..logprob.types import RowStatistics, accumulation_dtype
from .piece_torch import LogitsBuffer, forward_piece_torch
from .types import LMHead, LogitGradient
from .vocab_shards import Labels, SplitLabels
from .vocab_split import SplitArguments, split_piece
from .waves import HeadShape, Pieces

# What a piece of logits may take. Pieces of fp32 are summed into the weight gradient at no cost;
# pieces of bf16 and fp16 cost an fp32 copy of it, so they are fewer and larger.
PIECE_BYTES = {torch.float32: 384 << 20, torch.float64: 384 << 20}
PIECE_BYTES_HALF = 768 << 20
# What it may take on a GPU while four times as much is free: all rows in one piece, or several.
# Steps, so that the pieces, and with them the last bits of a result, seldom depend on the moment.
ONE_PIECE_BYTES = 8 << 30
PLANNED_BYTES = (4 << 30, 2 << 30)


def piece_rows(hidden: Tensor, vocab_size: int, chunk_bytes: int | None) -> int:
    """The most rows of a piece: its logits take at most `chunk_bytes` (at least one row)."""
    if chunk_bytes is None:
        chunk_bytes = PIECE_BYTES.get(hidden.dtype, PIECE_BYTES_HALF)
    return max(1, min(hidden.shape[0], chunk_bytes // _bytes_per_row(hidden, vocab_size)))


def _bytes_per_row(hidden: Tensor, vocab_size: int) -> int:
    size = hidden.element_size()
    if use_triton(hidden):
        from .piece_triton import bytes_per_logit

        size = bytes_per_logit(hidden)
    return max(vocab_size * size, 1)


def piece_rows_of(
    hidden: Tensor, vocab_size: int, chunk_bytes: int | None, split: SplitArguments
) -> int:
    """`piece_rows`, and the same on all ranks of a split: by what all of them know alike."""
    if split.group is None:
        return piece_rows(hidden, vocab_size, chunk_bytes)
    if chunk_bytes is None:
        chunk_bytes = PIECE_BYTES.get(hidden.dtype, PIECE_BYTES_HALF)
    return piece_rows(hidden, split.rows_per_rank, chunk_bytes)


def planned_rows(
    hidden: Tensor,
    weight: Tensor,
    chunk_bytes: int | None,
    sums_weight: bool,
    split: SplitArguments | None = None,
) -> int:
    """`piece_rows` for the loss: on a GPU without `chunk_bytes` as many as free memory allows.

    Where the vocabulary is split, as `piece_rows_of`: free memory differs between ranks.

    With `sums_weight` several pieces need an fp32 sum of dW, which one piece may take instead.
    """
    if split is not None and split.group is not None:
        return piece_rows_of(hidden, len(weight), chunk_bytes, split)
    if chunk_bytes is None and hidden.is_cuda and (free := free_bytes(hidden.device)):
        spared = 4 * weight.numel() if sums_weight and hidden.dtype != torch.float16 else 0
        chunk_bytes = planned_bytes(
            hidden.shape[0] * _bytes_per_row(hidden, len(weight)), free, spared
        )
    return piece_rows(hidden, weight.shape[0], chunk_bytes)


def planned_bytes(all_bytes: int, free: int, spared: int) -> int | None:
    """Bytes of a piece where all logits take `all_bytes`; None, the fixed ones, if memory is short.

    One piece takes none of the `spared` bytes that several need beside their logits.
    """
    for most in (ONE_PIECE_BYTES, *PLANNED_BYTES):
        if 4 * most <= free:
            if all_bytes <= most + spared:
                return all_bytes
            if most in PLANNED_BYTES:
                return most
    return None


def free_bytes(device: torch.device) -> int | None:
    """Bytes that torch can still hand out on a GPU, asked without waiting for it.

    None where they are not to be asked: under torch.compile, in a CUDA graph, without a GPU, and
    with deterministic algorithms, whose bits may not depend on the moment.
    """
    if torch.compiler.is_compiling() or not torch.cuda.is_available():
        return None
    if torch.are_deterministic_algorithms_enabled() or torch.cuda.is_current_stream_capturing():
        return None
    stats = torch.cuda.memory_stats(device)
    held = stats.get("reserved_bytes.all.current", 0) - stats.get("allocated_bytes.all.current", 0)
    return torch.cuda.mem_get_info(device)[0] + held


def pieces_of(
    hidden: Tensor, shape: tuple[int, ...], need: tuple[bool, bool, bool], most: int
) -> Pieces:
    """How rows are cut into pieces of at most `most`: on a GPU by waves of its processors.

    `shape` (V, D) of the weight; of an average rank's where the vocabulary is split.
    """
    processors = num_processors(hidden)
    if processors is None:
        return Pieces(most)
    vocab_size, depth = shape
    return Pieces(most, HeadShape(depth, vocab_size, processors, need[0], need[1]))


def num_processors(x: Tensor) -> int | None:
    """Of the GPU that `x` lies on; None elsewhere."""
    if not x.is_cuda or not torch.cuda.is_available():
        return None
    properties = cast(Any, torch.cuda).get_device_properties(x.device)
    return int(properties.multi_processor_count)


def pieces(num_rows: int, most: int) -> list[slice]:
    """Slices of nearly equal length, at most `most` rows each."""
    return Pieces(most).cut(0, num_rows)


def forward_piece(
    hidden: Tensor,
    head: LMHead,
    token_ids: Labels,
    *,
    want_entropy: bool = False,
    want_gradient: bool = False,
    upstream: tuple[Tensor, Tensor] | None = None,
    buffer: LogitsBuffer | None = None,
) -> tuple[RowStatistics, LogitGradient | None]:
    """Statistics of the rows hidden (n, D) at token_ids (n,), and M with `want_gradient`: 2nDV.

    With `upstream` = (dL/d(log-prob), dL/d(entropy)), each (n,), M is dL / d raw. `buffer`: where M
    may lie until the next piece.
    """
    if isinstance(token_ids, SplitLabels):
        return split_piece(hidden, head, token_ids, want_entropy, want_gradient, upstream)
    if not use_triton(hidden):
        return forward_piece_torch(
            hidden, head, token_ids, want_entropy, want_gradient, upstream, buffer
        )
    from .piece_triton import forward_piece_triton

    return forward_piece_triton(hidden, head, token_ids, want_entropy, want_gradient, upstream)


def forward_rows(
    hidden: Tensor, head: LMHead, token_ids: Labels, size: int, want_entropy: bool
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
