"""Rows of tokens packed one after the other: row r owns tokens cu_seqlens[r]:cu_seqlens[r + 1].

Letters: R rows (completions), T the length of padded rows, N tokens of all rows together. Nothing
here waits for the device.
"""

# pyright: strict

from __future__ import annotations

import torch
from torch import Tensor


def pack_rows(token_ids: Tensor, cu_seqlens: Tensor | None) -> tuple[int, Tensor]:
    """(R, cu_seqlens) of packed (N,) token ids, or of padded ones (R, T): cu_seqlens None."""
    if cu_seqlens is not None:
        if token_ids.ndim != 1:
            raise ValueError(
                f"with cu_seqlens, per-token tensors must be (N,), got {tuple(token_ids.shape)}."
            )
        if cu_seqlens.ndim != 1 or len(cu_seqlens) < 1 or cu_seqlens.is_floating_point():
            raise ValueError(
                "cu_seqlens must be integers of shape (R + 1,), "
                f"got {cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}."
            )
        return len(cu_seqlens) - 1, cu_seqlens
    if token_ids.ndim != 2:
        raise ValueError(
            f"without cu_seqlens, per-token tensors must be (R, T), got {tuple(token_ids.shape)}."
        )
    num_rows, width = token_ids.shape
    bounds = torch.arange(num_rows + 1, device=token_ids.device) * width
    return num_rows, bounds


def segment_ids(cu_seqlens: Tensor, num_tokens: int) -> Tensor:  # (R + 1,) -> (N,)
    """Row number of every packed token."""
    lengths = cu_seqlens.diff()
    rows = torch.arange(len(lengths), device=lengths.device)
    return torch.repeat_interleave(rows, lengths, output_size=num_tokens)


def segment_sum(values: Tensor, cu_seqlens: Tensor) -> Tensor:  # (N,), (R + 1,) -> (R,)
    """sum_t values_it of every row; 0 for a row without tokens."""
    out = values.new_zeros(len(cu_seqlens) - 1)
    return out.index_add(0, segment_ids(cu_seqlens, len(values)), values)


def segment_exclusive_cumsum(
    values: Tensor, cu_seqlens: Tensor
) -> Tensor:  # (N,), (R + 1,) -> (N,)
    """sum_{s < t} values_is: what a row has accumulated before token t.

    Summed over all rows at once, but in fp64: the rows packed before leave no trace in fp32. After
    a value that is not finite, the rest of its own row is nan.
    """
    owner, first = segment_ids(cu_seqlens, len(values)), cu_seqlens[:-1].long()

    def before(x: Tensor) -> Tensor:
        total = torch.cat([x.new_zeros(1), x.cumsum(0)])
        return total[:-1] - total[first][owner]

    finite = values.isfinite()
    total = before(torch.where(finite, values, 0.0).double()).to(values.dtype)
    return torch.where(before((~finite).long()) > 0, float("nan"), total)
