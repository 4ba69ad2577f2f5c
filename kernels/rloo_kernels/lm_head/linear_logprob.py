"""Hidden states x lm_head -> log-probability of one token per row and the row's entropy, never
[N, V].

    z = softcap(logit_scale (h W^T + bias)) / tau          softcap(x) = c tanh(x / c)
    log p(y) = z_y - log sum_v exp(z_v)                    H = - sum_v p_v log p_v

Letters: N rows, D hidden size, V vocabulary. The rows are worked through in pieces (`piece.py`);
what lives at one time is one piece of logits. Matrix products run in the inputs' dtype (autocast
does not reach into the op), statistics and the sum of the weight gradient in fp32.

FLOPs, chosen by what requires a gradient:

    nothing                2NDV
    hidden only            4NDV in forward (dX is linear in the upstream gradient, so it is made
                           there and scaled in backward), nothing in backward
    weight, one piece      2NDV + 4NDV: the piece's M = d log p / d raw is kept for backward
    weight, more pieces    2NDV + 6NDV: backward makes the logits again
    through the entropy    backward makes the logits again where it would not have to otherwise

`fused_linear_rloo_loss` knows the coefficients in forward and never needs the fourth product.
"""

# pyright: strict, reportUnknownMemberType=false

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor

from ..dispatch import without_autocast
from ..forward_mode import refuse_tangents
from ..logprob.checks import check_token_ids, check_token_range
from ..logprob.types import accumulation_dtype
from .checks import check_head
from .gradients import GradientAccumulator, needed_gradients
from .piece import (
    forward_piece,
    forward_rows,
    logit_gradient_is_scaled,
    logit_gradient_width,
    piece_rows_of,
    pieces,
)
from .types import LMHead, LogitGradient
from .vocab_shards import Labels
from .vocab_split import open_split, split_arguments, split_labels

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Saved = Literal["nothing", "unit dX", "logit gradient"]


def _saved_for_backward(need: list[bool], num_rows: int, size: int) -> Saved:
    """What forward keeps so that backward need not make the logits again.

    "unit dX": dX for an upstream gradient of 1; "logit gradient": M of the one piece.
    """
    if not any(need) or num_rows == 0:
        return "nothing"
    if need == [True, False, False]:
        return "unit dX"
    return "logit gradient" if num_rows <= size else "nothing"


@torch.library.custom_op("rloo_kernels::linear_logprob", mutates_args=())
def _linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    keep: Tensor | None,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    group: str | None,
    shard: list[int],
    want_entropy: bool,
    need: list[bool],
    size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(log-probs, entropies, saved for backward, row scale of what was saved).

    `need`: whether hidden, weight and bias get a gradient; `size`: rows of a piece; group, shard:
    `SplitArguments`.
    """
    head, split = LMHead(weight, bias, temperature, softcap, logit_scale), open_split(group, shard)
    num_rows = hidden.shape[0]
    index, (hidden, token_ids) = _take(keep, hidden, token_ids)
    check_token_range(token_ids, weight.shape[0] if split is None else split.vocab_size)
    labels = token_ids if split is None else split_labels(hidden, head, token_ids, split)
    saves = _saved_for_backward(need, num_rows, size)
    if saves == "nothing":
        logps, entropy = forward_rows(hidden, head, labels, size, want_entropy)
        saved, row_scale = hidden.new_empty(0), logps.new_empty(0)
    else:
        logps, entropy, saved, row_scale = _forward_and_save(
            hidden, head, labels, size, want_entropy, saves
        )
        if split is not None and saves == "unit dX":
            split.sum_hidden(saved)
    if want_entropy:
        entropy = _put_back(entropy, index, num_rows)
    return _put_back(logps, index, num_rows), entropy, saved, row_scale


def _forward_and_save(
    hidden: Tensor, head: LMHead, token_ids: Labels, size: int, want_entropy: bool, saves: Saved
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `_linear_logprob`, of rows none of which is masked."""
    logps = hidden.new_zeros(hidden.shape[0], dtype=accumulation_dtype(hidden.dtype))
    entropy = torch.zeros_like(logps) if want_entropy else logps.new_empty(0)
    row_scale = logps.new_empty(0)
    saved = hidden.new_empty(0, logit_gradient_width(hidden, head.weight))  # if no row is kept
    unit = GradientAccumulator(hidden, head, (saves == "unit dX", False, False), 1)
    for rows in pieces(hidden.shape[0], size):
        part = hidden[rows]
        found, gradient = forward_piece(
            part, head, token_ids[rows], want_entropy=want_entropy, want_gradient=True
        )
        assert gradient is not None
        logps[rows] = found.logps
        if want_entropy:
            entropy[rows] = found.entropy
        if saves == "unit dX":
            unit.add(rows, part, gradient, None)
        else:  # the one piece
            saved = gradient.padded()
            row_scale = row_scale if gradient.row_scale is None else gradient.row_scale
    if saves == "unit dX":
        assert unit.hidden is not None
        saved = unit.hidden
    return logps, entropy, saved, row_scale


@_linear_logprob.register_fake
def _linear_logprob_fake(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    keep: Tensor | None,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    group: str | None,
    shard: list[int],
    want_entropy: bool,
    need: list[bool],
    size: int,
) -> tuple[Tensor, ...]:
    num_rows = hidden.shape[0]
    logps = hidden.new_empty(num_rows, dtype=accumulation_dtype(hidden.dtype))
    entropy = torch.empty_like(logps) if want_entropy else logps.new_empty(0)
    saves = _saved_for_backward(need, num_rows, size)
    saved = hidden.new_empty(0)
    if saves != "nothing":
        kept = num_rows
        if keep is not None and hidden.device.type != "meta":  # there: an upper bound
            kept = cast(int, torch.library.get_ctx().new_dynamic_size())
        unit = saves == "unit dX"
        width = hidden.shape[1] if unit else logit_gradient_width(hidden, weight)
        saved = hidden.new_empty(kept, width)
    scaled = saves == "logit gradient" and logit_gradient_is_scaled(hidden, weight)
    row_scale = logps.new_empty(saved.shape[0] if scaled else 0)
    return logps, entropy, saved, row_scale


@torch.library.custom_op("rloo_kernels::linear_logprob_backward", mutates_args=())
def _linear_logprob_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    keep: Tensor | None,
    saved: Tensor,
    row_scale: Tensor,
    grad: Tensor | None,
    grad_entropy: Tensor | None,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    group: str | None,
    shard: list[int],
    need: list[bool],
    size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """dL/d(hidden, weight, bias), empty where not asked for."""
    head, split = LMHead(weight, bias, temperature, softcap, logit_scale), open_split(group, shard)
    num_rows = hidden.shape[0]
    saves = _saved_for_backward(need, num_rows, size)
    index, (hidden, token_ids) = _take(keep, hidden, token_ids)
    if index is not None:
        grad, grad_entropy = (None if g is None else g[index] for g in (grad, grad_entropy))
    if grad_entropy is None and saves == "unit dX":
        assert grad is not None
        found = ((saved * grad[:, None]).to(hidden.dtype), None, None)
    else:
        flags = (need[0], need[1], need[2])
        sums = GradientAccumulator(hidden, head, flags, -(-hidden.shape[0] // size))
        if grad_entropy is None and saves == "logit gradient":
            matrix = saved[:, : weight.shape[0]]
            gradient = LogitGradient(matrix, row_scale if row_scale.numel() else None)
            sums.add(slice(None), hidden, gradient, grad)
        else:
            labels = token_ids if split is None else split_labels(hidden, head, token_ids, split)
            _recompute(sums, hidden, head, labels, grad, grad_entropy, size)
        found = sums.finish()
        if split is not None and found[0] is not None:
            split.sum_hidden(found[0])
    grads = [hidden.new_empty(0) if g is None else g for g in found]
    if need[0]:
        grads[0] = _put_back(grads[0], index, num_rows)
    return grads[0], grads[1], grads[2]


def _recompute(
    sums: GradientAccumulator,
    hidden: Tensor,
    head: LMHead,
    token_ids: Labels,
    grad: Tensor | None,
    grad_entropy: Tensor | None,
    size: int,
) -> None:
    """The logits once more, piece by piece, and their part of the gradients."""
    for rows in pieces(hidden.shape[0], size):
        upstream = None
        if grad_entropy is not None:
            g = torch.zeros_like(grad_entropy) if grad is None else grad
            upstream = (g[rows], grad_entropy[rows])
        part = hidden[rows]
        _, gradient = forward_piece(
            part, head, token_ids[rows], want_gradient=True, upstream=upstream
        )
        assert gradient is not None
        coefficients = grad[rows] if upstream is None and grad is not None else None
        sums.add(rows, part, gradient, coefficients)


@_linear_logprob_backward.register_fake
def _linear_logprob_backward_fake(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, *args: Any
) -> tuple[Tensor, ...]:
    *_, need, _ = args
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    return tuple(
        hidden.new_empty(shape if wanted else 0) for shape, wanted in zip(shapes, need, strict=True)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, temperature, softcap, logit_scale, group, shard, _, need, size = inputs
    ctx.options = (temperature, softcap, logit_scale, group, shard, need, size)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(*tensors, *output[2:])
    ctx.has_entropy = output[1].shape[0] == output[0].shape[0]


def _differentiate(
    ctx: Any, grad: Tensor | None, grad_entropy: Tensor | None, _saved: None, _row_scale: None
) -> tuple[Tensor | None, ...]:
    if not ctx.has_entropy:
        grad_entropy = None
    need = ctx.options[5]
    found: tuple[Tensor | None, ...] = (None, None, None)
    given = grad if grad is not None else grad_entropy
    if given is not None:
        with without_autocast(given):
            grads = _linear_logprob_backward(*ctx.saved_tensors, grad, grad_entropy, *ctx.options)
        found = tuple(g if wanted else None for g, wanted in zip(grads, need, strict=True))
    return (*found, *(None,) * 10)


_linear_logprob.register_autograd(_differentiate, setup_context=_setup_context)


def _take(keep: Tensor | None, *tensors: Tensor) -> tuple[Tensor | None, tuple[Tensor, ...]]:
    """(numbers of the rows kept, those rows of each tensor)."""
    if keep is None:
        return None, tensors
    index = keep.nonzero().squeeze(1)
    return index, tuple(x[index] for x in tensors)


def _put_back(values: Tensor, index: Tensor | None, num_rows: int) -> Tensor:
    """Rows put back where they were taken from, 0 elsewhere."""
    if index is None:
        return values
    return values.new_zeros((num_rows, *values.shape[1:])).index_copy_(0, index, values)


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    group: ProcessGroup | str | None = None,
    vocab_offset: int = 0,
    vocab_size: int | None = None,
    sum_hidden_grad: bool = True,
    mask: Tensor | None = None,
    return_entropy: bool = False,
    chunk_bytes: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """log softmax(softcap(logit_scale (h W^T + bias)) / temperature) at one token per row, never
    [N, V].

    Shapes: hidden (N, D), weight (V, D), bias (V,), token_ids and mask (N,); returns log-probs
    (N,) in fp32, with `return_entropy` also the entropies (N,) in nats; both are differentiable.
    N = 0 is fine. Rows where `mask` is False are not run: they give 0 and get no gradient (on a
    GPU, finding them waits for the device). `chunk_bytes` bounds the logits alive at one time;
    the result does not depend on it, beyond rounding. FLOPs: see kernels/README.md.

    With `group`, a torch.distributed group or its name, the vocabulary is split over its ranks:
    weight and bias are the rows from `vocab_offset` on of `vocab_size` (None: as many on every
    rank), and everything else, whether hidden requires a gradient too, is the same on all of them.
    So are the results; the gradients of weight and bias are those of this rank's rows. Without
    `sum_hidden_grad`, that of hidden is this rank's part of a sum that the caller makes (a
    reduce-scatter where the rows are split next). `chunk_bytes` is then of a rank with the average
    number of rows. Collectives: see kernels/README.md.

    Raises ValueError for shapes and dtypes that do not fit, a temperature or softcap that is not
    positive, and token ids outside [0, V); on a GPU, where checking the ids would wait for the
    device, such a row's log-prob is nan.
    """
    check_head(hidden, weight, bias, temperature, softcap)
    refuse_tangents("linear_logprob", hidden, weight, bias)
    shape = hidden.shape[:1]
    if hidden.ndim != 2:
        raise ValueError(f"hidden must be (N, D), got {tuple(hidden.shape)}.")
    check_token_ids(token_ids, shape)
    if mask is not None and mask.shape != shape:
        raise ValueError(f"mask must be {tuple(shape)}, got {tuple(mask.shape)}.")
    split = split_arguments(weight, group, vocab_offset, vocab_size, sum_hidden_grad)
    with without_autocast(hidden):
        logps, entropy, *_ = _linear_logprob(
            hidden,
            weight,
            bias,
            token_ids.long(),
            None if mask is None else mask.bool(),
            float(temperature),
            softcap,
            float(logit_scale),
            split.group,
            split.shard,
            return_entropy,
            list(needed_gradients(hidden, weight, bias)),
            piece_rows_of(hidden, weight.shape[0], chunk_bytes, split),
        )
    return (logps, entropy) if return_entropy else logps
