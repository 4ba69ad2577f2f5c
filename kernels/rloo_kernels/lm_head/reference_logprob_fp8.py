"""Log-probs of a frozen reference whose lm_head is multiplied in fp8: half the time of bf16's.

    z_v = softcap(logit_scale raw_v) / tau, raw in fp8 (`fp8.py`), but z_y from h and W themselves
    log p(y) = z_y - log(exp(z_y) + sum over v != y of exp(z_v))

The token's own logit, 2ND of the 2NDV FLOPs, is not rounded: where p(y) -> 1 the error of log p(y)
goes to 0 with 1 - p(y), and elsewhere the errors of the other logits average out in their sum.

There is no gradient, and no policy's log-probs should be made this way: what the loss is
differentiated by would be those of another model than the one that is trained.
`python -m benchmarks.fp8` prints the errors beside bf16's.
"""

# pyright: strict, reportUnknownMemberType=false

from __future__ import annotations

import logging

import torch
from torch import Tensor

from ..dispatch import log_once, use_triton, without_autocast
from ..logprob.checks import check_token_ids, check_token_range
from ..logprob.rows_torch import block_statistics, row_blocks
from .checks import check_head
from .fp8 import product, to_fp8, why_no_fp8
from .gradients import needed_gradients
from .piece import PIECE_BYTES_HALF, pieces
from .types import LMHead
from .vocab_split import label_logits


@torch.library.custom_op("rloo_kernels::reference_logprob_fp8", mutates_args=())
def _reference_logprob_fp8(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    want_entropy: bool,
    size: int,
) -> tuple[Tensor, Tensor]:
    """(log-probs (N,), entropies (N,) or empty); `size`: rows of a piece."""
    if hidden.device.type == "cpu":
        log_once("reference_logprob_fp8 emulates fp8 on a CPU, slower than fp32.", logging.INFO)
    check_token_range(token_ids, weight.shape[0])
    head = LMHead(weight, bias, temperature, softcap, logit_scale)
    labels = label_logits(hidden, head, token_ids)
    logps = hidden.new_empty(len(hidden), dtype=torch.float32)
    entropy = torch.empty_like(logps) if want_entropy else logps.new_empty(0)
    rows_of_head = to_fp8(weight)
    for rows in pieces(len(hidden), size):
        raw = product(to_fp8(hidden[rows]), rows_of_head, bias)
        found = _statistics(raw, head, token_ids[rows], labels[rows], want_entropy)
        logps[rows] = found[0]
        if want_entropy:
            entropy[rows] = found[1]
    return logps, entropy


@_reference_logprob_fp8.register_fake
def _reference_logprob_fp8_fake(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    want_entropy: bool,
    size: int,
) -> tuple[Tensor, Tensor]:
    logps = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
    return logps, torch.empty_like(logps) if want_entropy else logps.new_empty(0)


def _statistics(
    raw: Tensor, head: LMHead, token_ids: Tensor, labels: Tensor, want_entropy: bool
) -> tuple[Tensor, Tensor]:
    """(log-probs, entropies or empty) of raw logits (n, V), but for the tokens' own, `labels`."""
    if use_triton(raw):
        from ..logprob.rows_triton import forward_triton

        found = forward_triton(
            raw,
            token_ids,
            None,
            head.temperature,
            want_entropy,
            softcap=head.softcap,
            logit_scale=head.logit_scale,
            label_logits=labels,
        )
        return found.logps, found.entropy
    logps = labels.new_empty(len(labels), dtype=torch.float32)
    entropy = torch.empty_like(logps) if want_entropy else logps.new_empty(0)
    for rows in row_blocks(*raw.shape):
        z, _ = head.transform(raw[rows].float())
        z.scatter_(-1, token_ids[rows, None], labels[rows, None].float())
        found, _ = block_statistics(z, token_ids[rows], head.temperature, want_entropy)
        logps[rows] = found.logps
        if want_entropy:
            entropy[rows] = found.entropy
    return logps, entropy


def reference_logprob_fp8(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    return_entropy: bool = False,
    chunk_bytes: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`linear_logprob` of a frozen reference, its matrix product in fp8: near, and faster.

    Arguments and results are those of `linear_logprob`. A GPU needs compute capability 9.0; on a
    CPU the product is emulated, which is slower than none. Raises ValueError as `linear_logprob`
    does, on other devices, and where a gradient would be asked for: it has none.
    """
    check_head(hidden, weight, bias, temperature, softcap)
    if hidden.ndim != 2:
        raise ValueError(f"hidden must be (N, D), got {tuple(hidden.shape)}.")
    check_token_ids(token_ids, hidden.shape[:1])
    if any(needed_gradients(hidden, weight, bias)):
        raise ValueError(
            "reference_logprob_fp8 has no gradient, it is for a frozen reference: call it under "
            "torch.no_grad(), or linear_logprob for a policy."
        )
    if (reason := why_no_fp8(hidden.device)) is not None:
        raise ValueError(f"fp8 products cannot run here: {reason}. Use linear_logprob.")
    size = max(1, (chunk_bytes or PIECE_BYTES_HALF) // (2 * weight.shape[0]))
    with without_autocast(hidden):
        logps, entropy = _reference_logprob_fp8(
            hidden,
            weight,
            bias,
            token_ids.long(),
            float(temperature),
            softcap,
            float(logit_scale),
            return_entropy,
            size,
        )
    return (logps, entropy) if return_entropy else logps
