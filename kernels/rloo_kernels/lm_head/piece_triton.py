"""The lm_head on a piece of rows, on a GPU: `forward_piece_torch` with [n, V] written at most once.

Two ways to the logits, by dtype:

"matrix" (bf16; fp16 without a gradient): the kernel of `matrix_triton.py`.

"library" (everything else): a matrix product of the library with fp32 logits, n V 4 bytes, then the
row kernels of `logprob/rows_triton.py`, which read them twice and store M, n V b for b bytes per
number of the hidden states.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..dispatch import on_device_of
from ..logprob.rows_triton import backward_triton_, forward_triton
from ..logprob.types import RowStatistics
from .matrix_triton import matrix_piece
from .types import LMHead, LogitGradient

_library_only = False


@contextmanager
def library_products() -> Iterator[None]:
    """Within it every piece goes the "library" way: for measuring the two against each other."""
    global _library_only
    before, _library_only = _library_only, True
    try:
        yield
    finally:
        _library_only = before


def uses_matrix_kernel(hidden: Tensor, weight: Tensor, want_gradient: bool) -> bool:
    """Whether a piece of these rows goes the "matrix" way, not the "library" one."""
    dtypes = (torch.bfloat16,) if want_gradient else (torch.bfloat16, torch.float16)
    return hidden.dtype in dtypes and weight.stride(1) == 1 and not _library_only


def bytes_per_logit(hidden: Tensor) -> int:
    """What a piece holds per logit while its gradient is made."""
    if hidden.dtype == torch.bfloat16 and not _library_only:
        return 2
    return 4 + hidden.element_size()


def forward_piece_triton(
    hidden: Tensor,
    head: LMHead,
    token_ids: Tensor,
    want_entropy: bool,
    want_gradient: bool,
    upstream: tuple[Tensor, Tensor] | None,
) -> tuple[RowStatistics, LogitGradient | None]:
    """`forward_piece_torch`, by kernels."""
    if upstream is None and uses_matrix_kernel(hidden, head.weight, want_gradient):
        with on_device_of(hidden):
            return matrix_piece(hidden, head, token_ids, want_entropy, want_gradient)
    return library_piece(hidden, head, token_ids, want_entropy, want_gradient, upstream)


def raw_logits(hidden: Tensor, head: LMHead) -> Tensor:
    """h W^T + bias (n, V) in fp32, by a product of the library."""
    if hidden.is_cuda and hidden.dtype != torch.float32:
        raw = torch.mm(hidden, head.weight.T, out_dtype=torch.float32)
    else:
        raw = hidden.float() @ head.weight.float().T
    if head.bias is not None:
        raw += head.bias
    return raw


def library_piece(
    hidden: Tensor,
    head: LMHead,
    token_ids: Tensor,
    want_entropy: bool,
    want_gradient: bool,
    upstream: tuple[Tensor, Tensor] | None,
) -> tuple[RowStatistics, LogitGradient | None]:
    """The "library" way; with `upstream` M is dL / d raw."""
    raw = raw_logits(hidden, head)
    transform = {"softcap": head.softcap, "logit_scale": head.logit_scale}
    want_entropy = want_entropy or upstream is not None
    statistics = forward_triton(raw, token_ids, None, head.temperature, want_entropy, **transform)
    if not want_gradient:
        return statistics, None
    grad, grad_entropy = upstream or (torch.ones_like(statistics.logps), None)
    matrix = torch.empty_like(raw, dtype=hidden.dtype)
    backward_triton_(
        matrix, raw, token_ids, None, statistics, grad, grad_entropy, head.temperature, **transform
    )
    return statistics, LogitGradient(matrix, None)
