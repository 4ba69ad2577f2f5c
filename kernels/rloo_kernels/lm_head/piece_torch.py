"""The lm_head on a piece of rows: raw logits -> statistics and the gradient of the log-prob by
them. The specification.

    raw = h W^T + bias        z = softcap(logit_scale raw) / tau        softcap(x) = c tanh(x / c)
    M_v = d log p(y) / d raw_v = ([v = y] - p_v) (1 - tanh^2) logit_scale / tau

M is made while the row is at hand and written over the raw logits: with c the coefficient of each
row in the loss, the gradient is then dX = c (M W), dW = M^T (c X), db = M^T c, and no elementwise
pass over [n, V] is left to do once c is known.

torch's softmax adds up a row in one go, so what it gives sums to 1 but for some 1e-6. The sum over
v != y is added up again, pairwise, for the digits of 1 - p_y; both together are T, the sum of all:

    q = softmax(z)        T = sum_v q_v        p_v = q_v / T        1 - p_y = sum_{v != y} q_v / T

so 1 / T, with M's other factors, is the row scale of M, and q is not written once more. A token
whose q underflows gets its log-prob from its logits, made again.

Letters: n rows of a piece, D hidden size, V vocabulary. The product runs in the inputs' dtype,
statistics in fp32. FLOPs: 2nDV. Held: one [n, V] tensor, and fp32 copies of a block of its rows,
none where it is fp32 itself and no entropy is asked for. Passes over [n, V] beside the product: one
softmax and one sum, each of them one parallel region per block of rows.
"""

# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..logprob.rows_torch import LOWEST, block_statistics
from ..logprob.types import RowStatistics, accumulation_dtype
from .types import LMHead, LogitGradient

BLOCK_BYTES = 8 << 20  # of the fp32 copy of a block of rows; a row per thread may take more


class LogitsBuffer:
    """Memory on a CPU for the logits of one piece after another: fresh pages, 100 ms for 400 MiB,
    would cost each of them a tenth of the product."""

    def __init__(self) -> None:
        self._held: Tensor | None = None

    def product(self, hidden: Tensor, head: LMHead) -> Tensor:
        """hidden W^T + bias (n, V), where the piece before had its own."""
        count = len(hidden) * len(head.weight)
        if self._held is None or self._held.numel() < count:
            self._held = None  # given back before more is asked for
            self._held = hidden.new_empty(count)
        out = self._held[:count].view(len(hidden), -1)
        if head.bias is None:
            return torch.mm(hidden, head.weight.t(), out=out)
        return torch.addmm(head.bias, hidden, head.weight.t(), out=out)


def forward_piece_torch(
    hidden: Tensor,
    head: LMHead,
    token_ids: Tensor,
    want_entropy: bool,
    want_gradient: bool,
    upstream: tuple[Tensor, Tensor] | None,
    buffer: LogitsBuffer | None = None,
) -> tuple[RowStatistics, LogitGradient | None]:
    """Statistics of the rows hidden (n, D) at token_ids (n,), and M with `want_gradient`.

    With `upstream` = (dL/d(log-prob), dL/d(entropy)), each (n,), M is dL / d raw. `buffer`: where M
    lies until the next piece takes it. The statistics are log-prob, 1 - p and entropy: `top` and
    `log_total` are empty.
    """
    if buffer is None or hidden.device.type != "cpu":
        raw = torch.nn.functional.linear(hidden, head.weight, head.bias)
    else:
        raw = buffer.product(hidden, head)
    dtype, want_entropy = accumulation_dtype(raw.dtype), want_entropy or upstream is not None
    # allocated first: small tensors kept from each block would cut up the memory of the next ones
    logps, rest, scale = (raw.new_empty(len(raw), dtype=dtype) for _ in range(3))
    entropy = raw.new_empty(len(raw) if want_entropy else 0, dtype=dtype)
    blocks = _blocks(raw, head, want_entropy)
    copy = None if raw.dtype == dtype else torch.empty_like(raw[blocks[0]], dtype=dtype)
    on_cpu, least = raw.device.type == "cpu", math.log(torch.finfo(dtype).tiny)
    for rows in blocks:
        ids = token_ids[rows, None]
        block = raw[rows] if copy is None else copy[: len(ids)].copy_(raw[rows])
        z, slope = head.transform(block)
        q, own, others = _softmax(z if head.temperature == 1.0 else z.div_(head.temperature), ids)
        total = own + others
        p_y = own / total
        log_p_y = torch.where(own > others, -(others / own).log1p(), p_y.log())
        if not on_cpu:  # to look which underflow, as below, would wait for the device
            again = z.gather(-1, ids).squeeze(-1) - z.logsumexp(-1)
            log_p_y = torch.where(log_p_y < least, again, log_p_y)
        logps[rows] = log_p_y
        rest[rows], scale[rows] = others / total, -head.slope / total
        if want_entropy:
            log_p = q.log().clamp_(min=LOWEST).sub_(total.log()[:, None])
            own_part = p_y * log_p_y.clamp_(min=LOWEST)  # 0 where p is
            entropy[rows] = h = -torch.linalg.vecdot(q, log_p) / total - own_part
            if upstream is not None:
                grad, grad_entropy = (g[rows] for g in upstream)
                q.mul_(log_p.add_(h[:, None]).mul_(grad_entropy[:, None]).add_(grad[:, None]))
                others = grad * others - grad_entropy * (own_part + p_y * h) * total
        if want_gradient:
            q.scatter_(-1, ids, -others[:, None])
            if slope is not None:
                q.mul_(slope)
            if copy is not None or q is not block:
                raw[rows] = q  # in the raw logits' place: nobody needs them again
    if on_cpu and len(underflown := (logps < least).nonzero().squeeze(1)):
        for rows in underflown.tensor_split(8):  # their logits beside those of the piece
            logps[rows] = _logps_again(hidden[rows], head, token_ids[rows], dtype)
    statistics = RowStatistics(logps, raw.new_empty(0), raw.new_empty(0), rest, entropy)
    return statistics, LogitGradient(raw, scale) if want_gradient else None


def _softmax(z: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(q = softmax(z) (n, V) with the token's entry set to 0, that entry (n,), the others' sum).

    Written over z on a CPU, where torch has read a row before it writes any of it.
    """
    q = torch.softmax(z, -1, out=z) if z.device.type == "cpu" else z.softmax(-1)
    own = q.gather(-1, ids).squeeze(-1)
    q.scatter_(-1, ids, 0.0)
    return q, own, q.sum(-1)


def _blocks(raw: Tensor, head: LMHead, want_entropy: bool) -> list[slice]:
    """Rows of raw (n, V) to work on at a time: all of them where that takes no copy of them."""
    plain = raw.dtype == accumulation_dtype(raw.dtype) and head.logit_scale == 1.0
    if plain and head.softcap is None and not want_entropy and raw.device.type == "cpu":
        return [slice(0, len(raw))]
    threads = torch.get_num_threads()  # each takes whole rows, equally many
    size = threads * max(1, BLOCK_BYTES // (4 * max(raw.shape[1], 1) * threads))
    return [slice(start, start + size) for start in range(0, max(len(raw), 1), size)]


def _logps_again(hidden: Tensor, head: LMHead, token_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Log-probs of a few rows from z - max z, where exp of it underflows."""
    raw = torch.nn.functional.linear(hidden, head.weight, head.bias)
    z, _ = head.transform(raw.to(dtype))
    statistics, _ = block_statistics(z, token_ids, head.temperature, False)
    return statistics.logps
